"""Names in checkpoint files <-> names in memory, for the parts of SD1 and SD2, and the few tensors that change shape.

In memory the U-Net and the VAE have diffusers' names and the text encoder has `text_model.` names. The original layout
numbers the blocks of the U-Net through, so the rules need the number of blocks per level, read off the names.
Light: tensors are touched only by the `*_to_file` and `*_to_memory` functions, which need nothing but their methods.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_V1_PREFIX = "cond_stage_model.transformer."
TEXT_V2_PREFIX = "cond_stage_model.model."
EMA_PREFIX = "model_ema."
TEXT_MODEL = "text_model."
SD2_LAYERS = 23

_UNET_ENDS = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "label_emb.0.0.": "add_embedding.linear_1.",
    "label_emb.0.2.": "add_embedding.linear_2.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
    "middle_block.0.": "mid_block.resnets.0.",
    "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
}
_RESNET = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
}
_VAE_MIDDLE = {
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.": "mid_block.attentions.0.",
}
_VAE_ATTENTION = {"norm.": "group_norm.", "q.": "to_q.", "k.": "to_k.", "v.": "to_v.", "proj_out.": "to_out.0."}
_VAE_OLD_ATTENTION = {"query.": "to_q.", "key.": "to_k.", "value.": "to_v.", "proj_attn.": "to_out.0."}
_OPENCLIP_LAYER = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}
_OPENCLIP_ENDS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


def _swap_start(name: str, table: Mapping[str, str]) -> str:
    for start, replacement in table.items():
        if name.startswith(start):
            return replacement + name[len(start) :]
    return name


_UNET_ENDS_BACK, _RESNET_BACK = _inverse(_UNET_ENDS), _inverse(_RESNET)
_VAE_MIDDLE_BACK, _VAE_ATTENTION_BACK = _inverse(_VAE_MIDDLE), _inverse(_VAE_ATTENTION)
_OPENCLIP_LAYER_BACK, _OPENCLIP_ENDS_BACK = _inverse(_OPENCLIP_LAYER), _inverse(_OPENCLIP_ENDS)


def _numbers(names: Iterable[str], pattern: str) -> Iterator[int]:
    expression = re.compile(pattern)
    return (int(match[1]) for name in names if (match := expression.match(name)))


# U-Net -------------------------------------------------------------------------------------------------------------


def unet_to_memory(names: Iterable[str]) -> dict[str, str]:
    """Map U-Net names of the original layout (without prefix) to diffusers' names."""
    names = list(names)
    # The first level ends with its downsampler: block 1 + resnets of a level.
    level = min(_numbers(names, r"input_blocks\.(\d+)\.0\.op\."), default=3)
    return {name: _unet_name_to_memory(name, level) for name in names}


def _unet_name_to_memory(name: str, level: int) -> str:
    match = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", name)
    if match is None:
        return _unet_inner(_swap_start(name, _UNET_ENDS), _RESNET)
    side, number, part, rest = match[1], int(match[2]), int(match[3]), match[4]
    if side == "input":
        if number == 0:
            return f"conv_in.{rest}"
        block, index = divmod(number - 1, level)
        if rest.startswith("op."):
            return f"down_blocks.{block}.downsamplers.0.conv.{rest[3:]}"
        path = f"down_blocks.{block}"
    else:
        block, index = divmod(number, level)
        if part > 0 and rest.startswith("conv."):
            return f"up_blocks.{block}.upsamplers.0.{rest}"
        path = f"up_blocks.{block}"
    if part == 0:
        return f"{path}.resnets.{index}.{_swap_start(rest, _RESNET)}"
    return f"{path}.attentions.{index}.{rest}"


def _unet_inner(name: str, table: Mapping[str, str]) -> str:
    match = re.match(r"(.*\bresnets\.\d+\.)(.*)", name)
    return match[1] + _swap_start(match[2], table) if match else name


def unet_to_file(names: Iterable[str]) -> dict[str, str]:
    """Map diffusers' U-Net names to the original layout (without prefix)."""
    names = list(names)
    level = max(_numbers(names, r"down_blocks\.0\.resnets\.(\d+)\."), default=1) + 2
    attended = set(_numbers(names, r"up_blocks\.(\d+)\.attentions\."))
    return {name: _unet_name_to_file(name, level, attended) for name in names}


def _unet_name_to_file(name: str, level: int, attended: set[int]) -> str:
    if name.startswith("conv_in."):
        return f"input_blocks.0.0.{name[8:]}"
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if match is None:
        return _swap_start(_unet_inner(name, _RESNET_BACK), _UNET_ENDS_BACK)
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{level * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{level * (block + 1) - 1}.{2 if block in attended else 1}.{rest}"
    number = f"input_blocks.{level * block + index + 1}" if side == "down" else f"output_blocks.{level * block + index}"
    return f"{number}.0.{_swap_start(rest, _RESNET_BACK)}" if kind == "resnets" else f"{number}.1.{rest}"


def is_projection(name: str) -> bool:
    """Whether a U-Net tensor is the weight of a proj_in or proj_out: a convolution in SD1, a matrix in SD2."""
    return bool(re.search(r"attentions\.\d+\.proj_(in|out)\.weight$", name))


# VAE ---------------------------------------------------------------------------------------------------------------


def vae_to_memory(names: Iterable[str]) -> dict[str, str]:
    """Map VAE names of the original layout (without prefix), or diffusers' older names, to diffusers' names."""
    names = list(names)
    levels = max(_numbers(names, r"decoder\.up\.(\d+)\."), default=3) + 1
    return {name: _vae_name_to_memory(name, levels) for name in names}


def _vae_name_to_memory(name: str, levels: int) -> str:
    match = re.match(r"(encoder|decoder)\.(.*)", name)
    if match is None:
        return name
    side, rest = match[1], match[2]
    if "mid_block.attentions." in rest:
        return _vae_attention(name, _VAE_OLD_ATTENTION)
    block = re.match(r"(down|up)\.(\d+)\.(block\.\d+|downsample|upsample)\.(.*)", rest)
    if block is not None:
        direction, number, kind, tail = block[1], int(block[2]), block[3], block[4]
        number = number if direction == "down" else levels - 1 - number
        if kind.startswith("block."):
            tail = _swap_start(tail, {"nin_shortcut.": "conv_shortcut."})
            return f"{side}.{direction}_blocks.{number}.resnets.{kind[6:]}.{tail}"
        return f"{side}.{direction}_blocks.{number}.{kind}rs.0.{tail}"
    rest = _swap_start(_swap_start(rest, {"norm_out.": "conv_norm_out."}), _VAE_MIDDLE)
    return _vae_attention(f"{side}.{rest}", _VAE_ATTENTION)


def _vae_attention(name: str, table: Mapping[str, str]) -> str:
    match = re.match(r"(.*mid_block\.attentions\.0\.)(.*)", name)
    return match[1] + _swap_start(match[2], table) if match else name


def vae_to_file(names: Iterable[str]) -> dict[str, str]:
    """Map diffusers' VAE names to the original layout (without prefix)."""
    names = list(names)
    levels = max(_numbers(names, r"decoder\.up_blocks\.(\d+)\."), default=3) + 1
    return {name: _vae_name_to_file(name, levels) for name in names}


def _vae_name_to_file(name: str, levels: int) -> str:
    match = re.match(r"(encoder|decoder)\.(.*)", name)
    if match is None:
        return name
    side, rest = match[1], match[2]
    block = re.match(r"(down|up)_blocks\.(\d+)\.(resnets\.\d+|downsamplers\.0|upsamplers\.0)\.(.*)", rest)
    if block is not None:
        direction, number, kind, tail = block[1], int(block[2]), block[3], block[4]
        number = number if direction == "down" else levels - 1 - number
        if kind.startswith("resnets."):
            tail = _swap_start(tail, {"conv_shortcut.": "nin_shortcut."})
            return f"{side}.{direction}.{number}.block.{kind[8:]}.{tail}"
        return f"{side}.{direction}.{number}.{kind.removesuffix('rs.0')}.{tail}"
    rest = _vae_attention(rest, _VAE_ATTENTION_BACK)
    rest = _swap_start(_swap_start(rest, {"conv_norm_out.": "norm_out."}), _VAE_MIDDLE_BACK)
    return f"{side}.{rest}"


def is_vae_attention_weight(name: str) -> bool:
    """Whether a VAE tensor (diffusers' name) is a matrix in memory and a 1x1 convolution in the original layout."""
    return bool(re.search(r"mid_block\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight$", name))


# Text encoders -----------------------------------------------------------------------------------------------------


def is_position_ids(name: str) -> bool:
    """Whether a tensor is the constant 0..76 that older files hold; nothing needs it."""
    return name.endswith("position_ids")


def text_name_to_memory(name: str) -> str | None:
    """Return a CLIP name with the `text_model.` prefix that some files and transformers >= 5.6 leave out.

    None for tensors that a text encoder does not use: position ids, projections, scales.
    """
    inner = name.removeprefix(TEXT_MODEL)
    used = inner.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")) and not is_position_ids(inner)
    return TEXT_MODEL + inner if used else None


def is_average(name: str) -> bool:
    """Whether a tensor is part of averaged (EMA) weights, which are neither trained nor saved."""
    return name.startswith(EMA_PREFIX) or f".{EMA_PREFIX}" in name


def openclip_layer(name: str) -> int:
    """Return the number of the transformer layer that an OpenCLIP name (without prefix) belongs to, -1 for none."""
    return next(_numbers([name], r"transformer\.resblocks\.(\d+)\."), -1)


def used_openclip_layers(names: Iterable[str]) -> int:
    """Return how many layers of an OpenCLIP text encoder SD2 uses: all but the last.

    A file that holds exactly the 23 layers of SD2 has lost the unused one already.
    """
    layers = max(map(openclip_layer, names), default=-1) + 1
    return layers if layers == SD2_LAYERS else layers - 1


def openclip_to_memory(name: str) -> tuple[str, ...]:
    """Return the memory name of an OpenCLIP tensor: three for joined q, k, v rows, none for one that is not used."""
    if name in _OPENCLIP_ENDS:
        return (TEXT_MODEL + _OPENCLIP_ENDS[name],)
    match = re.match(r"transformer\.resblocks\.(\d+)\.(.*)", name)
    if match is None:
        return ()
    layer = f"{TEXT_MODEL}encoder.layers.{match[1]}."
    if match[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = match[2].removeprefix("attn.in_proj_")
        return tuple(f"{layer}self_attn.{part}.{kind}" for part in _QKV)
    renamed = _swap_start(match[2], _OPENCLIP_LAYER)
    return (layer + renamed,) if renamed != match[2] else ()


def openclip_to_file(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map each OpenCLIP name to the memory names it is made of, one or three (q, k, v rows joined)."""
    table: dict[str, tuple[str, ...]] = {}
    for name in names:
        inner = name.removeprefix(TEXT_MODEL)
        match = re.match(r"encoder\.layers\.(\d+)\.(.*)", inner)
        if match is None:
            table[_OPENCLIP_ENDS_BACK.get(inner, inner)] = (name,)
            continue
        layer = f"transformer.resblocks.{match[1]}."
        joined = re.match(r"self_attn\.[qkv]_proj\.(weight|bias)", match[2])
        if joined is None:
            table[layer + _swap_start(match[2], _OPENCLIP_LAYER_BACK)] = (name,)
        else:
            start = f"{TEXT_MODEL}encoder.layers.{match[1]}.self_attn."
            table[f"{layer}attn.in_proj_{joined[1]}"] = tuple(f"{start}{part}.{joined[1]}" for part in _QKV)
    return table


# Shapes ------------------------------------------------------------------------------------------------------------


def split_rows(name: str, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split joined q, k, v rows [3d, ...] into three views.

    Raises:
        UserError: the number of rows is not a multiple of three.
    """
    if tensor.dim() == 0 or tensor.shape[0] % 3:
        raise UserError(f"tensor {name!r} of shape {tuple(tensor.shape)} cannot be split into q, k and v")
    query, key, value = tensor.chunk(3, dim=0)
    return query, key, value


def as_matrix(tensor: Any) -> Any:
    """View a 1x1 convolution weight [o,i,1,1] (or an old [o,i,1]) as [o,i]; anything else stays."""
    extra = tensor.dim() - 2
    return tensor.reshape(tensor.shape[:2]) if extra > 0 and all(n == 1 for n in tensor.shape[2:]) else tensor


def as_kernel(tensor: Any) -> Any:
    """View a matrix [o,i] as a 1x1 convolution weight [o,i,1,1]; anything else stays."""
    return tensor[:, :, None, None] if tensor.dim() == 2 else tensor


def iter_prefixed(names: Iterable[str], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (name, name without `prefix`) for the names that begin with it."""
    return ((name, name[len(prefix) :]) for name in names if name.startswith(prefix))
