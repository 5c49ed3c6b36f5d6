"""Stable Cascade parts in memory -> official single files, or the folder of one component of a Diffusers model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints import cascade_configs
from library.checkpoints import key_maps_cascade as keys
from library.checkpoints.cascade_configs import CascadeConfig
from library.checkpoints.cascade_parts import (
    STAGE_A_SCALE,
    ControlNetConfig,
    StageAConfig,
    control_net_metadata,
)
from library.checkpoints.ckpt_writer import write_ckpt
from library.checkpoints.folders import as_json
from library.checkpoints.key_maps_cascade import Layout, Part, Table
from library.checkpoints.load_cascade import TEXT_HEADS_KEY
from library.checkpoints.model_configs import DIFFUSERS_VERSION
from library.checkpoints.parts import SaveSettings
from library.checkpoints.save_folder import write_options
from library.checkpoints.tensor_files import LazyTensor, stored_size, write_safetensors
from library.files import atomic_folder, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
FileTensors = dict[str, "Tensor | LazyTensor"]

_TRANSFORMERS: Mapping[Part, str] = {
    "text": "CLIPTextModelWithProjection",
    "vision": "CLIPVisionModelWithProjection",
}
COMPONENTS: Mapping[Part, str] = {
    "stage_c": "prior",
    "stage_b": "decoder",
    "stage_a": "vqgan",
    "text": "text_encoder",
    "vision": "image_encoder",
}
"""Parts that Diffusers models have, by the names of their folders."""


def file_tensors(part: Part, tensors: Tensors, layout: Layout = "official") -> FileTensors:
    """Return the tensors of a part by the names of a layout; packed ones are made when they are written.

    Args:
        part: which part.
        tensors: by the names in memory.
        layout: ``official``, ``split`` (as in memory) or ``diffusers``.
    """
    if layout == "split":
        return dict(tensors)
    return {name: _joined([tensors[source] for source in sources]) for name, sources in
            _table(part, tensors, layout).items()}  # fmt: skip


def _table(part: Part, tensors: Tensors, layout: Layout) -> Table:
    if part in ("stage_c", "stage_b"):
        return keys.stage_to_diffusers(tensors) if layout == "diffusers" else keys.stage_to_official(tensors)
    if part == "stage_a" and layout == "diffusers":
        return keys.stage_a_to_diffusers(tensors)
    return {name: (name,) for name in tensors}


def _joined(rows: list[Tensor]) -> Tensor | LazyTensor:
    import torch

    if len(rows) == 1:
        return rows[0]
    shape = (sum(row.shape[0] for row in rows), *rows[0].shape[1:])
    return LazyTensor(shape, rows[0].dtype, partial(torch.cat, rows))


def needed_metadata(config: Any) -> dict[str, str]:
    """Return what a single file must say beside its tensors so that the same structure is built from it."""
    if isinstance(config, CascadeConfig):
        return cascade_configs.config_metadata(config)
    if isinstance(config, ControlNetConfig):
        return control_net_metadata(config)
    if isinstance(config, Mapping) and config["num_attention_heads"] != max(1, config["hidden_size"] // 64):
        return {TEXT_HEADS_KEY: str(config["num_attention_heads"])}
    return {}


def save_part(
    path: str | Path, part: Part, tensors: Tensors, config: Any, settings: SaveSettings | None = None
) -> Path:
    """Write a part as a single official file; its suffix says whether it is a safetensors file or a pickle.

    Args:
        path: ends with ``.safetensors`` or ``.ckpt``.
        part: which part.
        tensors: by the names in memory; any device.
        config: its sizes.
        settings: precision, metadata, counters.

    Raises:
        NonFiniteWeights: there are NaN or infinity, or the precision makes some.
        CannotSave: the disk is full or the place cannot be written.
    """
    path, settings = Path(path), settings or SaveSettings()
    rows = file_tensors(part, tensors)
    if path.suffix == ".ckpt":
        write_ckpt(path, rows, {"epoch": settings.epoch, "global_step": settings.step}, **write_options(settings))
    else:
        metadata = {**needed_metadata(config), **(settings.metadata or {})}
        write_safetensors(path, rows, metadata or None, **write_options(settings))
    return path


def save_component(
    folder: str | Path, part: Part, tensors: Tensors, config: Any, settings: SaveSettings | None = None
) -> Path:
    """Write a stage, or a text or image encoder, as the folder of one component of a Diffusers model.

    Raises:
        NonFiniteWeights: there are NaN or infinity, or the precision makes some.
        CannotSave: the disk is full or the place cannot be written.
    """
    folder, settings = Path(folder), settings or SaveSettings()
    rows = file_tensors(part, tensors, "diffusers")
    size = sum(stored_size(tensor, settings.precision) for tensor in rows.values())
    name = "model" if part in _TRANSFORMERS else "diffusion_pytorch_model"
    with atomic_folder(folder, size=size) as temporary:
        write_bytes(temporary / "config.json", as_json(_component_config(part, config)))
        write_safetensors(temporary / f"{name}.safetensors", rows, {"format": "pt"}, **write_options(settings))
    return folder


def _component_config(part: Part, config: Any) -> dict[str, Any]:
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    if isinstance(config, CascadeConfig):
        return {"_class_name": "StableCascadeUNet", **version, **cascade_configs.diffusers_config(config)}
    if isinstance(config, StageAConfig):
        return {
            "_class_name": "PaellaVQModel",
            **version,
            "bottleneck_blocks": config.bottleneck,
            "embed_dim": config.features,
            "latent_channels": config.channels,
            "num_vq_embeddings": config.codebook,
            "up_down_scale_factor": config.patch,
            # The class itself has the scale of Würstchen v2 as its default.
            "scale_factor": STAGE_A_SCALE,
        }
    if part not in _TRANSFORMERS:
        raise ValueError(f"diffusers has no class for {part}")
    return {"architectures": [_TRANSFORMERS[part]], **config}
