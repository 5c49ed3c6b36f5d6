"""The class names that network modules select layers of a U-Net by, and the backend that computes its attention."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.models.options import MemoryOptions

logger = logging.getLogger(__name__)


class CrossAttention(Attention):
    """diffusers' `Attention` under the name by which network modules and LyCORIS presets find attention layers."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Call the processor. diffusers' own method looks up the names of its arguments first, each time anew."""
        if cross_attention_kwargs:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
        return self.processor(
            self, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask
        )


class SlimProcessor(AttnProcessor2_0):
    """PyTorch's attention without what the attention of these U-Nets has no use for: the same numbers, fewer calls.

    diffusers' processor divides by 1, adds no residual, asks for norms that are not there; it steps in for layers and
    calls that do need more.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return the attention of [B,n,C] to itself or to [B,m,D], as [B,n,C]."""
        if attention_mask is not None or args or kwargs or hidden_states.dim() != 3:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, heads = hidden_states.shape[0], attn.heads
        query, key, value = (
            state.view(batch, -1, heads, state.shape[-1] // heads).transpose(1, 2)
            for state in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](mixed.transpose(1, 2).reshape(batch, -1, heads * mixed.shape[-1]))


def is_plain(attention: Attention) -> bool:
    """Whether an attention layer does nothing but attend: no norms, no residual, no scaling, no dropout."""
    absent = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
    unscaled = attention.rescale_output_factor == 1 and not attention.residual_connection
    dropout: Any = attention.to_out[1]
    return unscaled and dropout.p == 0 and not any(getattr(attention, name, None) for name in absent)


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
    """Switch `unet` to a backend that `choose_attention` returned."""
    if backend == "xformers":
        unet.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
        return
    slim: Any = SlimProcessor()
    for module in unet.modules():
        if isinstance(module, CrossAttention) and is_plain(module):
            module.set_processor(slim)


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
