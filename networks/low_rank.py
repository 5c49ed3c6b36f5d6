"""y = W x + b + scale * up(down(x)) as one autograd node.

Two more linear layers beside a frozen one cost far more than their arithmetic: the sum of both outputs, the product
with the scale, and in the backward pass the sum of both gradients of x are passes over whole activations. Here matrix
products accumulate into the outputs that are there anyway, and the nodes of the graph, those of the conversions that
mixed precision needs included, become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that a matrix product with `x` is computed in: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def layer_product(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return the product of a layer's input with a weight that takes the place of the layer's, without its bias.

    Args:
        layer: linear layer or convolution, whose stride, padding and dilation count.
        x: its input.
        weight: [n, in] or [n, in, *kernel], of any type.
    """
    weight = weight.to(compute_dtype(x))
    if weight.dim() == 2:
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)


def channel_product(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return the product of a matrix [n, m] with the channels of `x`.

    Args:
        layer: linear layer, for which `x` is [..., m], or convolution: [B, m, h, w].
        x: some values on their way through the layer.
        weight: [n, m], of any type.
    """
    weight = weight.to(compute_dtype(x))
    return F.linear(x, weight) if layer.weight.dim() == 2 else F.conv2d(x, weight[..., None, None])


class _AdaptedLinear(torch.autograd.Function):
    """Backward, with g = scale * dy up: dx = dy W + g down, d_up = scale * dy^T (x down^T), d_down = g^T x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        dtype = compute_dtype(x)
        ctx.scale, ctx.dtypes = scale, None
        if not x.dtype == weight.dtype == down.dtype == up.dtype == dtype:
            ctx.dtypes = x.dtype, down.dtype, up.dtype
            x, weight, down, up = x.to(dtype), weight.to(dtype), down.to(dtype), up.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        rows = x.reshape(-1, x.shape[-1])
        low = F.linear(rows, down)
        y = F.linear(rows, weight, bias).addmm_(low, up.t(), alpha=scale)
        # A frozen `down` (LoRA-FA) spares keeping the input.
        ctx.save_for_backward(rows if ctx.needs_input_grad[3] else None, low, weight, down, up)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, low, weight, down, up = ctx.saved_tensors
        scale, dtypes = ctx.scale, ctx.dtypes
        dy = grad.reshape(-1, grad.shape[-1])
        # With beta=0 the first argument only lends its shape: a product and its factor in one call.
        low_grad = torch.addmm(low, dy, up, beta=0, alpha=scale)
        dx = torch.mm(dy, weight).addmm_(low_grad, down).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        d_down = torch.mm(low_grad.t(), rows) if rows is not None else None
        d_up = torch.addmm(up, dy.t(), low, beta=0, alpha=scale) if ctx.needs_input_grad[4] else None
        if dtypes is not None:
            found = zip((dx, d_down, d_up), dtypes, strict=True)
            dx, d_down, d_up = (None if tensor is None else tensor.to(dtype) for tensor, dtype in found)
        return dx, None, None, d_down, d_up, None


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return the output of a frozen linear layer with a low-rank adapter.

    Everything is computed in the type of autocast or else of `x`, whatever the types of the weights; gradients come in
    the types of what they belong to.

    Args:
        x: [..., in].
        weight: [out, in], frozen.
        bias: [out] or None, frozen.
        down: [r, in].
        up: [out, r].
        scale: factor of the adapter.
    """
    return _AdaptedLinear.apply(x, weight, bias, down, up, scale)


def limit_product(norm: Tensor, max_norm: float, factors: Sequence[Tensor]) -> Tensor:
    """Scale the factors of a product down, as one, until its norm is at most `max_norm`.

    As sd-scripts does: n = max(norm, max_norm / 2), ratio = min(n, max_norm) / n. Each side of the product takes the
    square root of the ratio.

    Args:
        norm: of the product, 0-d.
        max_norm: what is allowed.
        factors: of both sides, changed in place; a side may consist of several tensors beside each other.

    Returns:
        [2] on the device: the norm afterwards, and 1 if it was changed.
    """
    norm = norm.clamp(min=max_norm / 2)
    ratio = norm.clamp(max=max_norm) / norm
    for factor in factors:
        factor.mul_(ratio.sqrt().to(factor.dtype))
    return torch.stack([norm * ratio, (ratio != 1).to(norm.dtype)])
