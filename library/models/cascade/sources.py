"""Where the parts of a Stable Cascade model come from: files opened, modules built when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.checkpoints import load_cascade
from library.checkpoints.cascade_configs import CONFIGS, CascadeConfig
from library.models.assemble import build_module
from library.models.cascade.options import BIG_G, CascadeModelOptions
from library.models.cascade.text import (
    ProjectedTextEncoder,
    build_projected_text_encoder,
    make_projected_text_encoder,
)
from library.models.cascade.unet import CascadeUNet, build_stage, new_stage
from library.models.family import WeightPlan
from library.models.memory import give_back_memory

if TYPE_CHECKING:
    from library.checkpoints.load_cascade import LoadedPart

NO_TEXT = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "projection_dim": 8,
}
"""Stands for a text encoder that is never run."""


class LazyPart:
    """A frozen part whose tensors stay in their file until it is needed."""

    def __init__(
        self,
        loaded: LoadedPart[Any] | None,
        make: Callable[[Any], nn.Module],
        what: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        keep_cache: bool = False,
    ) -> None:
        self.source, self.device, self.dtype = loaded, device, dtype
        self._make, self._what, self._keep_cache = make, what, keep_cache
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The module, built now if it was not there."""
        if self._model is None:
            source = self.source
            if source is None:
                raise ValueError(f"no {self._what} was given")
            self._model = build_module(
                lambda: self._make(source.config),
                source.tensors,
                what=self._what,
                device=self.device,
                dtype=self.dtype,
            )
        return self._model

    @property
    def loaded(self) -> bool:
        """Whether the module is in memory."""
        return self._model is not None

    def release(self) -> None:
        """Free the module; it is built again from its file when it is needed."""
        was_loaded, self._model = self.loaded, None
        if was_loaded:
            give_back_memory(self.device, keep=self._keep_cache)


@dataclass(frozen=True)
class CascadeSources:
    """What a family is made of, as it was read: the stage (None: fresh weights), text encoder, EfficientNet.

    The latter two are None where nothing uses them.
    """

    stage: LoadedPart[CascadeConfig] | None
    config: CascadeConfig
    text: LoadedPart[dict[str, Any]] | None
    effnet: LoadedPart[Any] | None

    @property
    def kind(self) -> str:
        """How the stage came: `safetensors`, `ckpt` or `diffusers`."""
        if self.stage is None or self.stage.path.suffix == ".safetensors":
            return "safetensors"
        return "diffusers" if self.stage.path.is_dir() else "ckpt"


def open_sources(model: CascadeModelOptions, unused: Collection[str] = ()) -> CascadeSources:
    """Open the files that options name, but for parts that are not used; tensors stay in them.

    Raises:
        UserError: a file is missing, damaged, or not what its option is for.
    """
    stage = None
    if "unet" in unused:
        config = next(config for (stage_of, _), config in CONFIGS.items() if stage_of == model.stage)
    elif model.stage_path:
        stage = load_cascade.load_stage(model.stage_path, model.stage, version=model.model_version)
        config = stage.config
    else:
        config = CONFIGS[model.stage, model.model_version or ""]  # type: ignore[index]
    text = None if "text_encoder" in unused else open_text(model)
    effnet = load_cascade.load_effnet(model.effnet_checkpoint_path) if model.effnet_checkpoint_path else None
    return CascadeSources(stage, config, text, effnet)


def bare_stage(model: CascadeModelOptions) -> CascadeUNet:
    """Return the stage of options without weights, by the names and shapes in its file.

    Raises:
        UserError: the file is missing, damaged, or another part.
    """
    config = load_cascade.load_stage(model.stage_path or "", model.stage).config
    with torch.device("meta"):
        return CascadeUNet(config)


def open_text(model: CascadeModelOptions) -> LoadedPart[dict[str, Any]]:
    """Open the text encoder: a file or folder, or its repository on Hugging Face.

    Raises:
        UserError: it is not there and cannot be had, or is another part.
    """
    from library.checkpoints.hub import resolve_model
    from library.checkpoints.save_cascade import save_part

    option, name = "--text_model_checkpoint_path", model.text_model_checkpoint_path
    if name is None or not model.save_text_model or Path(name).exists():
        return load_cascade.load_text(resolve_model(name or BIG_G, option))
    loaded = load_cascade.load_text(resolve_model(BIG_G, option))
    save_part(name, "text", loaded.tensors, loaded.config)
    return loaded


def build_part_text(sources: CascadeSources, weights: WeightPlan) -> ProjectedTextEncoder:
    """Build the text encoder, or what stands for it where it is not used."""
    if sources.text is None:
        with torch.device("meta"):
            return make_projected_text_encoder(NO_TEXT).requires_grad_(False).eval()
    encoder = build_projected_text_encoder(
        sources.text.config,
        sources.text.tensors,
        device=weights.device_of("text_encoder"),
        dtype=weights.dtype_of("text_encoder"),
    )
    # Rows of the table are seldom trained, and by so little that bfloat16 would lose it. Weights that are shared out
    # between GPUs must be of one type.
    if "text_encoder" in weights.trained and weights.trained_device is None:
        embeddings = encoder.text_model.embeddings.float()
        with torch.no_grad():
            for name, parameter in embeddings.named_parameters():
                parameter.copy_(sources.text.tensors[f"text_model.embeddings.{name}"])
    return encoder


def build_part_stage(sources: CascadeSources, weights: WeightPlan, seed: int) -> CascadeUNet:
    """Build the stage around its tensors or, without a file, with fresh weights that follow from `seed`."""
    device, dtype = weights.device_of("unet"), weights.dtype_of("unet")
    if sources.stage is not None:
        return build_stage(sources.config, sources.stage.tensors, device=device, dtype=dtype)
    if device.type == "meta":
        with device:
            return CascadeUNet(sources.config).requires_grad_(False).eval()
    return new_stage(sources.config, seed, device=device, dtype=dtype).requires_grad_(False).eval()
