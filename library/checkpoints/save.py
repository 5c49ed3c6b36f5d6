"""Parts in memory -> a checkpoint file or a Diffusers folder, without network and without reading the source again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints import key_maps
from library.checkpoints.ckpt_writer import write_ckpt
from library.checkpoints.parts import ModelParts, SaveSettings, SourceInfo
from library.checkpoints.save_folder import save_folder, write_options
from library.checkpoints.tensor_files import LazyTensor, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from library.contracts import FamilySpec

KINDS = ("ckpt", "safetensors", "diffusers", "diffusers_safetensors")
Tensors = Mapping[str, "Tensor"]
FileTensors = dict[str, "Tensor | LazyTensor"]


def save_kind(requested: str | None, use_safetensors: bool, source_kind: str) -> str:
    """Return the kind of saved models: as asked, else as the source; Diffusers folders then hold safetensors.

    Args:
        requested: `--save_model_as` or None.
        use_safetensors: `--use_safetensors`, which also overrides ``ckpt`` and ``diffusers``.
        source_kind: ``safetensors``, ``ckpt`` or ``diffusers``, from `SourceInfo.kind` or `CheckpointInfo.kind`.
    """
    kind = requested or {"diffusers": "diffusers_safetensors"}.get(source_kind, source_kind)
    if use_safetensors:
        kind = {"ckpt": "safetensors", "diffusers": "diffusers_safetensors"}.get(kind, kind)
    return kind


def is_folder_kind(kind: str) -> bool:
    """Whether models of this kind are folders."""
    return kind.startswith("diffusers")


def save_checkpoint(
    target: str | Path,
    kind: str,
    parts: ModelParts,
    *,
    spec: FamilySpec,
    source: SourceInfo | None = None,
    settings: SaveSettings | None = None,
) -> Path:
    """Write a model; it appears under its name complete or not at all.

    Args:
        target: file with its extension, or folder.
        kind: one of `KINDS`.
        parts: state dicts by memory name and configurations.
        spec: family (``sd1``, ``sd2``) and prediction type.
        source: what the model was trained from; its unused tensors and small files are carried over.
        settings: precision, metadata, counters.

    Returns:
        The path written.

    Raises:
        NonFiniteWeights: the model holds NaN or infinity, or the precision makes some.
        CannotSave: the disk is full or the place cannot be written.
    """
    target = Path(target)
    settings = settings or SaveSettings()
    if kind not in KINDS:
        raise ValueError(f"unknown kind of checkpoint: {kind}")
    if is_folder_kind(kind):
        save_folder(target, kind, parts, spec, source, settings)
        return target
    tensors = file_tensors(parts, spec.name, source)
    if kind == "safetensors":
        write_safetensors(target, tensors, settings.metadata, **write_options(settings))
    else:
        before = source.counters if source is not None else {}
        counters = {
            "epoch": settings.epoch + before.get("epoch", 0),
            "global_step": settings.step + before.get("global_step", 0),
        }
        write_ckpt(target, tensors, counters, **write_options(settings))
    return target


# Single files ------------------------------------------------------------------------------------------------------


def file_tensors(parts: ModelParts, family: str, source: SourceInfo | None) -> FileTensors:
    """Return all tensors of a single-file checkpoint by file name; joined ones are made when they are written."""
    tensors: FileTensors = {}
    shape_rule = key_maps.as_matrix if family == "sd2" else key_maps.as_kernel
    for name, short in key_maps.unet_to_file(parts.unet).items():
        tensor = parts.unet[name]
        tensors[key_maps.UNET_PREFIX + short] = shape_rule(tensor) if key_maps.is_projection(name) else tensor
    text = _text_v2(parts.text) if family == "sd2" else _text_v1(parts.text)
    tensors.update(text)
    for name, short in key_maps.vae_to_file(parts.vae).items():
        tensor = parts.vae[name]
        kernel = key_maps.is_vae_attention_weight(name)
        tensors[key_maps.VAE_PREFIX + short] = key_maps.as_kernel(tensor) if kernel else tensor
    carried = source.carried if source is not None and source.kind != "diffusers" else {}
    if family == "sd2":
        tensors.update(_unused_v2(parts.text, text, carried))
    for name, tensor in carried.items():
        tensors.setdefault(name, tensor)
    return tensors


def _text_v1(text: Tensors) -> FileTensors:
    return {key_maps.TEXT_V1_PREFIX + name: t for name, t in text.items() if not key_maps.is_position_ids(name)}


def _text_v2(text: Tensors) -> FileTensors:
    import torch

    tensors: FileTensors = {}
    wanted = [name for name in text if not key_maps.is_position_ids(name)]
    for short, names in key_maps.openclip_to_file(wanted).items():
        rows = [text[name] for name in names]
        first = rows[0]
        if len(rows) == 1:
            tensors[key_maps.TEXT_V2_PREFIX + short] = first
            continue
        shape = (sum(row.shape[0] for row in rows), *first.shape[1:])
        tensors[key_maps.TEXT_V2_PREFIX + short] = LazyTensor(shape, first.dtype, partial(torch.cat, rows))
    return tensors


def _unused_v2(text: Tensors, saved: FileTensors, carried: Tensors) -> FileTensors:
    """Return what OpenCLIP's class owns and SD2 does not use, where the source has none: programs expect it in files.

    The last layer is a copy of the one before; the projection is all ones and the scale one, as other trainers do.
    """
    import torch

    prefix = f"{key_maps.TEXT_V2_PREFIX}transformer.resblocks."
    last = max(key_maps.openclip_layer(name.removeprefix(key_maps.TEXT_V2_PREFIX)) for name in saved)
    unused: FileTensors = {}
    if not any(name.startswith(f"{prefix}{last + 1}.") for name in carried):
        for name, tensor in saved.items():
            if name.startswith(f"{prefix}{last}."):
                unused[f"{prefix}{last + 1}.{name[len(prefix) + len(str(last)) + 1 :]}"] = tensor
    table = text["text_model.embeddings.token_embedding.weight"]
    for name, shape in (("text_projection", (table.shape[1], table.shape[1])), ("logit_scale", ())):
        full = key_maps.TEXT_V2_PREFIX + name
        if full not in carried:
            unused[full] = torch.ones(shape, dtype=table.dtype)
    return unused
