"""The ControlNet of stage C that a run trains: what is known before a model is loaded, and how it begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.checkpoints.cascade_parts import (
    ControlNetConfig,
    check_control_blocks,
    control_filter_metadata,
    default_control_blocks,
    features_config,
)
from library.checkpoints.load_cascade import load_control_net, load_stage
from library.checkpoints.parts import SaveSettings
from library.checkpoints.save_cascade import needed_metadata, save_part
from library.checkpoints.single_file import shapes_of
from library.checkpoints.tensor_files import open_tensors
from library.errors import Problem, UserError, named_by, raise_problems
from library.inference.cascade import CascadeRenderer
from library.inference.cascade_control import ControlPictures, ControlSource
from library.inference.rendering import HeldPart
from library.models.cascade.control_choice import make_filter
from library.models.cascade.control_net import CascadeControlNet, build_control_net, new_control_net
from library.training.control_samples import GuidedRenderer

if TYPE_CHECKING:
    from torch import Tensor

    from library.contracts import Batch, Condition, Noised
    from library.data.dataset import TrainingData
    from library.models.cascade.control_filters import ControlFilter
    from library.models.cascade.stage_c import StageC
    from library.training.options_control_net import ControlNetTrainingOptions
    from library.training.run import Run
    from library.training.sampling import Renderer

logger = logging.getLogger(__name__)

_BACKBONE = "backbone."
_KEPT_SUFFIX = "_sc_control"
"""Ends the names of files with what filters find in pictures."""
_START = "--controlnet_checkpoint_path"


@dataclass(frozen=True)
class ControlPlan:
    """What is known of the ControlNet before a model is loaded.

    Attributes:
        maker: the filter that makes what it looks at.
        keeps: what the filter finds in pictures is kept in files.
        config: its sizes.
        start: tensors that it begins with; None: fresh ones.
        backbone: tensors of the EfficientNet that a fresh one begins with.
        described: what its files tell of the filter.
    """

    maker: ControlFilter
    keeps: bool
    config: ControlNetConfig
    start: Mapping[str, Tensor] | None
    backbone: Mapping[str, Tensor] | None
    described: Mapping[str, str]

    @classmethod
    def of(cls, opts: ControlNetTrainingOptions) -> ControlPlan:
        """Make the filter, and look at shapes in the files that options name.

        Raises:
            UserError: blocks that the stage does not have, or files that do not fit each other.
        """
        chosen = opts.control_net
        name = chosen.controlnet_filter or ""
        maker = make_filter(name, chosen.controlnet_filter_params)
        with named_by("--controlnet_filter_params"):
            maker.open_files()
        stage = load_stage(opts.model.stage_path or "", "c", version=opts.model.model_version).config
        count, width = stage.residual_blocks, stage.c_hidden[0]
        if set(stage.c_hidden) != {width}:
            raise UserError("levels of different widths cannot be steered", where=str(opts.model.stage_path))
        if chosen.controlnet_blocks:
            check_control_blocks(chosen.controlnet_blocks, count)
        described = control_filter_metadata(name, chosen.controlnet_filter_params)
        keeps = chosen.cache_conditions_to_disk and bool(maker.kept)
        if chosen.cache_conditions_to_disk and not keeps:
            logger.warning("--cache_conditions_to_disk has no effect: %s finds nothing that could be kept", name)
        if chosen.controlnet_checkpoint_path:
            with named_by(_START):
                loaded = load_control_net(chosen.controlnet_checkpoint_path, count, chosen.controlnet_blocks or None)
            raise_problems(list(_misfits(loaded.config, maker, width, opts)))
            return cls(maker, keeps, loaded.config, loaded.tensors, None, described)
        blocks = chosen.controlnet_blocks or default_control_blocks(count)
        channels = maker.num_channels
        mode = chosen.controlnet_bottleneck_mode or "effnet"
        config = ControlNetConfig(mode, channels, width, blocks)  # type: ignore[arg-type]
        if mode == "effnet":
            path = chosen.controlnet_backbone_path or opts.model.effnet_checkpoint_path or ""
            backbone = read_backbone(path)
            features = replace(features_config(shapes_of(backbone), path), c_in=channels)
            config = replace(config, effnet=features, features=features.width)
            return cls(maker, keeps, config, None, backbone, described)
        config = replace(config, features=channels) if mode == "simple" else config
        return cls(maker, keeps, config, None, None, described)

    def serve(self, data: TrainingData) -> None:
        """Let loader processes prepare what the ControlNet looks at.

        Raises:
            UserError: what is found in pictures shall be kept, and the pictures vary.
        """
        for part in (data, data.validation):
            if part is not None and self.keeps:
                part.keep_conditions(self.maker, _KEPT_SUFFIX)  # type: ignore[arg-type]
            elif part is not None:
                part.use_conditions(self.maker)

    def build(self, run: Run, family: StageC) -> StageCControl:
        """Make the ControlNet on the device, in the type of what trains.

        Raises:
            UserError: tensors do not fit.
        """
        if self.start is not None:
            network = build_control_net(self.config, self.start, device=run.device, dtype=run.trained_dtype)
        else:
            network = new_control_net(self.config, run.seed, self.backbone, device=run.device)
        return StageCControl(self, network.to(run.trained_dtype), family, run.autocast)


class StageCControl:
    """A ControlNet for stage C; see `library.training.methods.control_net.Control`."""

    def __init__(
        self,
        plan: ControlPlan,
        network: CascadeControlNet,
        family: StageC,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.plan = plan
        self._autocast = autocast
        self.network = network
        self._family = family

    def guide(self, batch: Batch, seed: int) -> Tensor:
        """Return what the filter makes of the batch, [B,C,H,W] float32."""
        if batch.control is None:
            raise ValueError("the data set serves nothing that a ControlNet could look at")
        return self.plan.maker.finish(batch.control, self._encode, seed)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self._family.encode_latents(pixels, pixels.new_empty(0))

    def residuals(self, guide: Tensor, noised: Noised, condition: Condition) -> Mapping[int, Tensor]:
        """Return residuals by the number of the residual block; they depend on nothing but what is looked at."""
        return self.network(guide)

    def samples(self, renderer: Renderer) -> Renderer:
        """Return what draws pictures with the guides that prompts name by `--cn`."""
        if not isinstance(renderer, CascadeRenderer):
            raise TypeError("stage C draws its sample pictures by a CascadeRenderer")
        source = ControlSource(HeldPart(self.network), self.plan.maker)
        pictures = ControlPictures([source], effnet=self._family.effnet, autocast=self._autocast)
        return GuidedRenderer(renderer.extended(pictures))

    def metadata(self) -> Mapping[str, str]:
        """Return blocks, mode and filter."""
        return {**needed_metadata(self.plan.config), **self.plan.described}

    def save(
        self, path: Path, precision: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int
    ) -> Path:
        """Write an official file."""
        settings = SaveSettings(precision, metadata, epoch, step)
        return save_part(path, "controlnet", self.network.state_dict(), self.plan.config, settings)


def read_backbone(path: str) -> dict[str, Tensor]:
    """Return the convolutional part of an EfficientNet by the names `backbone.…`.

    Args:
        path: an EfficientNet encoder of Stable Cascade, alone or in a whole checkpoint, a ControlNet, or the classifier
            of torchvision.

    Raises:
        UserError: it is something else.
    """
    tensors = open_tensors(Path(path))
    for prefix in (_BACKBONE, "features.", "vae.encoder.backbone."):
        found = {_BACKBONE + name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if f"{_BACKBONE}0.0.weight" in found:
            return found
    hint = "Give effnet_encoder.safetensors, or the weights of torchvision's efficientnet_v2_s."
    raise UserError("holds no EfficientNet", hint, where=f"--controlnet_backbone_path {path}")


def _misfits(
    config: ControlNetConfig, maker: ControlFilter, width: int, opts: ControlNetTrainingOptions
) -> list[Problem]:
    """Return what of a ControlNet does not fit the filter, the stage or the options."""
    where = f"--controlnet_checkpoint_path {opts.control_net.controlnet_checkpoint_path}"
    problems = []
    if config.c_in != maker.num_channels:
        what = f"looks at {config.c_in} channels, and the filter makes {maker.num_channels}"
        problems.append(Problem(where, what, "Give the filter that it was trained with."))
    if config.c_out != width:
        what = f"is for a stage C of {config.c_out} features, not {width}"
        problems.append(Problem(where, what, "Give one for this size of the model."))
    mode = opts.control_net.controlnet_bottleneck_mode
    if mode not in (None, config.mode):
        what = f"has the backbone {config.mode}, not {mode}"
        problems.append(Problem(where, what, "Leave out --controlnet_bottleneck_mode."))
    return problems
