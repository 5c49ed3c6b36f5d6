"""Single-file checkpoints in the original layout: their parts under memory names, as views of the file's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from library.checkpoints import key_maps, model_configs
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]
Part = tuple[dict[str, "Tensor"], dict[str, Any]]


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def unet_part(tensors: Tensors, family: str, used: set[str]) -> Part:
    """Return the U-Net of a single-file checkpoint and its configuration; the names taken are added to `used`."""
    inner = dict(key_maps.iter_prefixed(tensors, key_maps.UNET_PREFIX))
    used.update(inner)
    table = key_maps.unet_to_memory(inner.values())
    unet = {table[short]: tensors[full] for full, short in inner.items()}
    return unet, model_configs.unet_config(shapes_of(unet), family)


def text_part(tensors: Tensors, family: str, used: set[str]) -> Part:
    """Return the text encoder of a single-file checkpoint and its configuration; names taken are added to `used`."""
    text = _text_v2(tensors, used) if family == "sd2" else _text_v1(tensors, used)
    return text, model_configs.text_config(shapes_of(text), family)


def _text_v1(tensors: Tensors, used: set[str]) -> dict[str, Tensor]:
    inner = dict(key_maps.iter_prefixed(tensors, key_maps.TEXT_V1_PREFIX))
    text = {}
    for full, short in inner.items():
        name = key_maps.text_name_to_memory(short)
        if name is not None:
            text[name] = tensors[full]
            used.add(full)
    return text


def _text_v2(tensors: Tensors, used: set[str]) -> dict[str, Tensor]:
    inner = dict(key_maps.iter_prefixed(tensors, key_maps.TEXT_V2_PREFIX))
    layers = key_maps.used_openclip_layers(inner.values())
    text: dict[str, Tensor] = {}
    for full, short in inner.items():
        names = key_maps.openclip_to_memory(short)
        if not names or key_maps.openclip_layer(short) >= layers:
            continue
        used.add(full)
        if len(names) == 1:
            text[names[0]] = tensors[full]
        else:
            text.update(zip(names, key_maps.split_rows(full, tensors[full]), strict=True))
    return text


def vae_part(tensors: Tensors, where: str, used: set[str] | None = None) -> Part:
    """Return the VAE of a checkpoint or of a VAE file of either layout, and its configuration.

    Raises:
        UserError: there is none in it.
    """
    inner = dict(key_maps.iter_prefixed(tensors, key_maps.VAE_PREFIX)) or {key: key for key in tensors}
    wanted = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    inner = {full: short for full, short in inner.items() if short.startswith(wanted)}
    if not inner:
        raise UserError("holds no VAE", "Give a VAE or a full checkpoint", where=where)
    if used is not None:
        used.update(inner)
    table = key_maps.vae_to_memory(inner.values())
    return square_attention({table[short]: tensors[full] for full, short in inner.items()})


def square_attention(vae: Mapping[str, Tensor]) -> Part:
    """Return a VAE with its attention weights as matrices, as diffusers holds them, and its configuration."""
    vae = {name: key_maps.as_matrix(t) if key_maps.is_vae_attention_weight(name) else t for name, t in vae.items()}
    return vae, model_configs.vae_config(shapes_of(vae))
