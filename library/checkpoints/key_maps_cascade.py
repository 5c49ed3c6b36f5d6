"""Names of Stable Cascade tensors: official files, Diffusers folders, ComfyUI checkpoints <-> names in memory.

In memory stages B and C have the official names, with the packed projection of queries, keys and values as three
tensors (ComfyUI's names). All other parts have the official names, the text encoder those of transformers. Light: only
names are handled here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

Part = Literal["stage_c", "stage_b", "stage_a", "effnet", "previewer", "controlnet", "text", "vision"]
Layout = Literal["official", "split", "diffusers"]
Table = dict[str, tuple[str, ...]]
"""Names on one side, each with the names on the other side that it is cut into or made of."""

UNET_PREFIX = "model.diffusion_model."
TEXT_PROJECTION = "text_projection.weight"
TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"

_QKV = ("to_q", "to_k", "to_v")
_PACKED = re.compile(r"(.*\.attention\.attn\.)in_proj_(weight|bias)$")
_SPLIT = re.compile(r"(.*\.attention\.attn\.)to_([qkv])\.(weight|bias)$")
_DIFFUSERS = re.compile(r"(.*\.attention\.)(to_[qkv]|to_out\.0)\.(weight|bias)$")
_MAPPER, _DIFFUSERS_MAPPER = "clip_mapper.", "clip_txt_pooled_mapper."
_CODEBOOK, _DIFFUSERS_CODEBOOK = "vquantizer.codebook.weight", "vquantizer.embedding.weight"
_EFFNET_EXTRAS = ("mean", "std")

# A tensor that only files of this part have, and the prefix that an all-in-one checkpoint puts before it.
_MARKS: Mapping[str, tuple[Part, str]] = {
    "clip_txt_mapper.weight": ("stage_c", UNET_PREFIX),
    "effnet_mapper.0.weight": ("stage_b", UNET_PREFIX),
    _CODEBOOK: ("stage_a", "vae."),
    _DIFFUSERS_CODEBOOK: ("stage_a", "vae."),
    "mapper.1.running_mean": ("effnet", "vae.encoder."),
    "blocks.23.running_mean": ("previewer", "vae.previewer."),
    "projections.0.2.weight": ("controlnet", ""),
}
_VISION_MARK, _VISION_PREFIX = "vision_model.embeddings.class_embedding", "clip_l_vision."
_TEXT_PREFIXES = ("", "text_encoder.clip_g.transformer.", "clip_g.transformer.", "text_encoder.")


def find_parts(names: Iterable[str]) -> dict[Part, str]:
    """Return the Stable Cascade parts that a file with these tensors holds, each with the prefix of its names.

    A text encoder counts where it has a projection. Others use it too, and the image encoder: by themselves they say
    nothing about the model.
    """
    names = set(names)
    found: dict[Part, str] = {}
    for mark, (part, prefix) in _MARKS.items():
        start = next((start for start in ("", prefix) if start + mark in names), None)
        if start is not None:
            found.setdefault(part, start)
    for start in _TEXT_PREFIXES:
        if start + TOKEN_EMBEDDING in names and projection_name(names, start) is not None:
            found["text"] = start
            break
    for start in ("", _VISION_PREFIX):
        if start + _VISION_MARK in names:
            found.setdefault("vision", start)
    return found


def is_cascade_mark(name: str) -> bool:
    """Whether a tensor of this name tells that a file is, or holds, a Stable Cascade model."""
    return any(name in (mark, prefix + mark) for mark, (_, prefix) in _MARKS.items())


def without_prefix(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Map the names that begin with `prefix` to what follows it."""
    return {name: name[len(prefix) :] for name in names if name.startswith(prefix)}


# Stages B and C ----------------------------------------------------------------------------------------------------


def layout_of(names: Iterable[str]) -> Layout:
    """Tell the layout of stage B or C from its names (without prefix)."""
    for name in names:
        if _PACKED.match(name):
            return "official"
        if _SPLIT.match(name):
            return "split"
        if _DIFFUSERS.match(name):
            return "diffusers"
    return "official"


def stage_to_memory(names: Iterable[str]) -> Table:
    """Map the names of stage B or C in any layout (without prefix) to those in memory: three for a packed one."""
    names = list(names)
    is_b = "effnet_mapper.0.weight" in names
    return {name: _stage_name(name, is_b=is_b) for name in names}


def _stage_name(name: str, *, is_b: bool) -> tuple[str, ...]:
    packed = _PACKED.match(name)
    if packed is not None:
        return tuple(f"{packed[1]}{part}.{packed[2]}" for part in _QKV)
    other = _DIFFUSERS.match(name)
    if other is not None:
        layer = "out_proj" if other[2] == "to_out.0" else other[2]
        return (f"{other[1]}attn.{layer}.{other[3]}",)
    if is_b and name.startswith(_DIFFUSERS_MAPPER):
        return (_MAPPER + name[len(_DIFFUSERS_MAPPER) :],)
    return (name,)


def stage_to_official(names: Iterable[str]) -> Table:
    """Map each official name of stage B or C to the memory names that it is made of, one or three."""
    table: Table = {}
    for name in names:
        split = _SPLIT.match(name)
        if split is None:
            table[name] = (name,)
        else:
            start, kind = split[1], split[3]
            table[f"{start}in_proj_{kind}"] = tuple(f"{start}{part}.{kind}" for part in _QKV)
    return table


def stage_to_diffusers(names: Iterable[str]) -> Table:
    """Map each name of diffusers' `StableCascadeUNet` to the memory name of the same tensor."""
    table: Table = {}
    for name in names:
        other = re.sub(r"\.attention\.attn\.out_proj\.", ".attention.to_out.0.", name)
        other = re.sub(r"\.attention\.attn\.(to_[qkv])\.", r".attention.\1.", other)
        if other.startswith(_MAPPER):
            other = _DIFFUSERS_MAPPER + other[len(_MAPPER) :]
        table[other] = (name,)
    return table


# Other parts -------------------------------------------------------------------------------------------------------


def stage_a_to_memory(names: Iterable[str]) -> Table:
    """Map the names of stage A, official or diffusers', to those in memory."""
    return {name: (_CODEBOOK if name == _DIFFUSERS_CODEBOOK else name,) for name in names}


def stage_a_to_diffusers(names: Iterable[str]) -> Table:
    """Map each name of diffusers' `PaellaVQModel` to the memory name of the same tensor."""
    return {_DIFFUSERS_CODEBOOK if name == _CODEBOOK else name: (name,) for name in names}


def effnet_to_memory(names: Iterable[str]) -> Table:
    """Map the names of the EfficientNet encoder to those in memory, without the constants that ComfyUI adds."""
    return {name: (name,) for name in names if name not in _EFFNET_EXTRAS}


def vision_to_memory(names: Iterable[str]) -> Table:
    """Map the names of the image encoder to those in memory, without the text encoder and constants beside it."""
    used = ("vision_model.", "visual_projection.")
    return {name: (name,) for name in names if name.startswith(used) and not name.endswith("position_ids")}


def projection_name(names: Iterable[str], prefix: str) -> str | None:
    """Return the name of the text projection that belongs to the encoder under `prefix`, or None."""
    outer = prefix.removesuffix("transformer.")
    candidates = (prefix + TEXT_PROJECTION, outer + TEXT_PROJECTION, f"{outer}text_projection")
    names = names if isinstance(names, (set, frozenset, Mapping)) else set(names)
    return next((name for name in candidates if name in names), None)


def is_transposed_projection(name: str) -> bool:
    """Whether a text projection is a matrix [in,out] to be multiplied from the right, as OpenCLIP and ComfyUI have."""
    return name.endswith("text_projection")
