"""ControlNets of stage C while pictures are made: what they look at, and how strongly and how long they act."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from library.checkpoints.cascade_parts import stored_control_filter
from library.checkpoints.load_cascade import load_control_net
from library.errors import UserError, named_by
from library.inference.cascade_extensions import EFFNET_STEP, CascadeBatch, CascadeExtension, Control
from library.inference.image_to_image import levels_of
from library.inference.rendering import Part, on_device
from library.models.cascade.control_choice import make_filter
from library.models.cascade.control_filters import InpaintFilter, SuperResolutionLatents
from library.models.cascade.control_net import CascadeControlNet, add_controls
from library.models.cascade.sources import LazyPart
from library.randomness import derive, python_random

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    from library.inference.cascade_loading import CascadeParts
    from library.inference.extensions import PictureInputs
    from library.inference.options_cascade import CascadeControlOptions
    from library.inference.prompts import PromptRequest
    from library.models.cascade.control_filters import ControlFilter

_HALF = 0.5
_OPTION = "--controlnet_checkpoint_path"


@dataclass(frozen=True, slots=True)
class ControlSource:
    """One ControlNet of a run.

    Attributes:
        part: the network.
        filter: makes what it looks at.
        strength: what its residuals are multiplied by.
        share: of the steps, from the first, in which it acts.
    """

    part: Part
    filter: ControlFilter
    strength: float = 1.0
    share: float = 1.0


class ControlPictures(CascadeExtension):
    """Lets ControlNets look at `PictureInputs.guides`, one for each.

    Pictures are brought to the size at which stage C was trained to make one of the wanted size. Both the predictions
    with and without prompt are steered, as in the official program.

    Args:
        sources: the ControlNets.
        effnet: encodes pictures for filters that work on latents.
        mask: white where filters paint the picture over; None leaves it to them.
        autocast: makes the context in which ControlNets run.
    """

    def __init__(
        self,
        sources: Sequence[ControlSource],
        *,
        effnet: Part | None = None,
        mask: Image | None = None,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._sources = tuple(sources)
        self._effnet = effnet
        self._mask = mask
        self._autocast = autocast

    def batch_key(self, request: PromptRequest, inputs: PictureInputs) -> bool:
        """Return whether there is something to look at."""
        return bool(inputs.guides)

    def control(self, batch: CascadeBatch) -> Control | None:
        """Return what gives the residuals of the ControlNets that still act."""
        if not batch.inputs[0].guides:
            return None
        found = [
            self._residuals(source, number, batch) for number, source in enumerate(self._sources) if source.strength
        ]
        acting = [source for source in self._sources if source.strength]

        def control(done: float) -> Mapping[int, Tensor] | None:
            now = [
                (residuals, source.strength)
                for residuals, source in zip(found, acting, strict=True)
                if done < source.share
            ]
            return add_controls([item for item, _ in now], [strength for _, strength in now]) if now else None

        return control

    def _residuals(self, source: ControlSource, number: int, batch: CascadeBatch) -> Mapping[int, Tensor]:
        condition = self._condition(source, number, batch)
        model = source.part.model
        with self._autocast(), on_device([model], batch.device):
            return model(condition)

    def _condition(self, source: ControlSource, number: int, batch: CascadeBatch) -> Tensor:
        """Return what a ControlNet looks at [B,c,H,W]."""
        height, width = (side * EFFNET_STEP for side in batch.size_hw)
        mask = None if self._mask is None else levels_of(self._mask.convert("L"), (width, height)).numpy() >= _HALF
        found = []
        # One by one: what chance does to a picture must not depend on those beside it.
        for request, given in zip(batch.requests, batch.inputs, strict=True):
            rng = python_random(request.seed or 0, "control", number)
            prepared = source.filter.prepare(_levels(given.guides[number], (width, height)), rng, mask)
            seed = derive(request.seed or 0, "control filter", number)
            found.append(source.filter.finish(torch.from_numpy(prepared)[None].to(batch.device), self._encode, seed))
        return torch.cat(found)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Return latents of pictures in [-1,1]."""
        if self._effnet is None:
            raise UserError("is required for this filter", where="--effnet_checkpoint_path")
        effnet = self._effnet.model
        with on_device([effnet], pixels.device):
            return effnet((pixels + 1) / 2).float()


def _levels(picture: Image, size_wh: tuple[int, int]) -> NDArray[np.uint8]:
    """Return RGB levels [H,W,3] of a picture at a size."""
    levels: Any = levels_of(picture.convert("RGB"), size_wh) * 255
    return levels.round().numpy().astype(np.uint8)


def open_controls(options: CascadeControlOptions, parts: CascadeParts) -> tuple[list[ControlSource], LazyPart | None]:
    """Return the ControlNets of the options, and the EfficientNet where a filter works on latents.

    Args:
        options: which, and how they act.
        parts: of the model.

    Raises:
        UserError: a file is damaged or no ControlNet for this stage C, or a filter does not fit it.
    """
    sources = [_open(options, number, parts) for number in range(len(options.controlnet_checkpoint_path))]
    filters = [source.filter for source in sources]
    if options.controlnet_mask and not any(isinstance(one, InpaintFilter) for one in filters):
        raise UserError("no filter paints anything over", "It is for inpaint.", where="--controlnet_mask")
    needs_latents = any(isinstance(one, SuperResolutionLatents) for one in filters)
    return sources, parts.effnet("the filter sr_effnet") if needs_latents else None


def _open(options: CascadeControlOptions, number: int, parts: CascadeParts) -> ControlSource:
    stage = parts.stage.config
    path = options.controlnet_checkpoint_path[number]
    loaded = load_control_net(path, stage.residual_blocks, options.controlnet_blocks or None)
    config, where = loaded.config, f"{_OPTION} {path}"
    if config.c_out != stage.c_hidden[0]:
        what = f"is for a stage C with {config.c_out} features, and this one has {stage.c_hidden[0]}"
        raise UserError(what, "Give the stage C that it was trained with.", where=where)
    name, params = stored_control_filter(loaded.metadata)
    if number < len(options.controlnet_filter):
        name, params = options.controlnet_filter[number], ()
    if number < len(options.controlnet_filter_params):
        params = tuple(item.strip() for item in options.controlnet_filter_params[number].split(";") if item.strip())
    if name is None:
        raise UserError("does not say which filter it was trained with", "Give --controlnet_filter.", where=where)
    made = make_filter(name, params)
    with named_by("--controlnet_filter_params"):
        made.open_files()
    if made.num_channels != config.c_in:
        what = f"looks at {config.c_in} channels, and the filter {name} gives {made.num_channels}"
        raise UserError(what, "Give the one that it was trained with, with --controlnet_filter.", where=where)
    multipliers, ratios = options.controlnet_multipliers, options.controlnet_ratios
    return ControlSource(
        LazyPart(loaded, CascadeControlNet, "ControlNet", device=parts.place.home, dtype=parts.place.dtype),
        made,
        multipliers[number] if number < len(multipliers) else 1.0,
        ratios[number] if number < len(ratios) else 1.0,
    )
