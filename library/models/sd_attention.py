"""The class names that network modules select layers of a U-Net by, and the backend that computes its attention."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.models.options import MemoryOptions

logger = logging.getLogger(__name__)


class CrossAttention(Attention):
    """diffusers' `Attention` under the name by which network modules and LyCORIS presets find attention layers."""


class TimeEmbedding(TimestepEmbedding):
    """diffusers' `TimestepEmbedding` under another name.

    LyCORIS picks its two layers by their paths and, for the sake of other models, by the name of this class, and then
    stops because it found them twice.
    """


_NAMES = {Attention: CrossAttention, TimestepEmbedding: TimeEmbedding}


def name_modules(unet: nn.Module) -> None:
    """Let layers of `unet` answer to the class names that network modules look for."""
    for module in unet.modules():
        name = _NAMES.get(type(module))
        if name is not None:
            module.__class__ = name


def choose_attention(memory: MemoryOptions, device: torch.device) -> str:
    """Return the backend to use, `xformers` or `sdpa`, with one warning when the wish cannot be granted.

    All backends compute the same function. PyTorch's own `sdpa` never builds the whole attention matrix either, so
    it also stands for `--mem_eff_attn`, which comes first if several are given.
    """
    if memory.mem_eff_attn or not memory.xformers:
        return "sdpa"
    reason = _no_xformers(device)
    if reason is None:
        return "xformers"
    logger.warning("--xformers: %s. PyTorch's scaled_dot_product_attention is used, with equal results", reason)
    return "sdpa"


def set_attention(unet: nn.Module, backend: str) -> None:
    """Switch `unet` to a backend that `choose_attention` returned; `sdpa` is what diffusers starts with."""
    if backend == "xformers":
        unet.enable_xformers_memory_efficient_attention()  # type: ignore[operator]


def _no_xformers(device: torch.device) -> str | None:
    """Return why xformers cannot be used on `device`, or None."""
    if find_spec("xformers") is None:
        return "the package xformers is not installed"
    if device.type != "cuda":
        return f"xformers needs a CUDA device, and this run is on {device.type}"
    try:
        import torch
        from xformers.ops import memory_efficient_attention

        probe = torch.zeros((1, 2, 40), device=device)
        memory_efficient_attention(probe, probe, probe)
    except (ImportError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        return f"xformers does not work here ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None
