"""y = layer(x) with (w1_a w1_b) o (w2_a w2_b) added to its weight, in two forms that give the same numbers.

The Hadamard product of two matrices of rank r is a matrix of rank r * r, so for small ranks it is a LoRA of that rank
(`as_low_rank`). For larger ones the changed weight is built whole; one autograd node builds it again in the backward
pass, because keeping it and its parts would hold several copies of all adapted weights at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from networks.low_rank import compute_dtype

Half = tuple[Tensor, ...]
"""One half of the product: (a, b), or (a, b, core) in Tucker form."""

Rows = tuple[float, Tensor | None]
"""A factor for the whole product, and one for each of its rows: [out]."""


def half_product(half: Half) -> Tensor:
    """Return one half of the product.

    Args:
        half: a [out, r] and b [r, n]; or a [r, out], b [r, in] and a core [r, r, *kernel].

    Returns:
        [out, n]; or [out, in, *kernel].
    """
    if len(half) == 2:
        return half[0] @ half[1]
    a, b, core = half
    return torch.einsum("ij...,jr,ip->pr...", core, b, a)


def half_gradients(half: Half, grad: Tensor) -> Half:
    """Return the gradients of the factors of one half, given that of `half_product`."""
    if len(half) == 2:
        return grad @ half[1].t(), half[0].t() @ grad
    a, b, core = (factor.flatten(2) if factor.dim() > 2 else factor for factor in half)
    # Kernel positions make one index: sums over nothing but them need no ellipsis.
    grad = grad.flatten(2)
    with_b = torch.einsum("prk,jr->pjk", grad, b)
    with_a = torch.einsum("prk,ip->irk", grad, a)
    return (
        torch.einsum("pjk,ijk->ip", with_b, core),
        torch.einsum("irk,ijk->jr", with_a, core),
        torch.einsum("pjk,ip->ijk", with_b, a).reshape(half[2].shape),
    )


def as_low_rank(first: Half, second: Half) -> tuple[Tensor, Tensor]:
    """Return down [r * r, n] and up [out, r * r] whose product is that of both halves, neither in Tucker form."""
    down = (first[1].unsqueeze(1) * second[1].unsqueeze(0)).flatten(0, 1)
    up = (first[0].unsqueeze(2) * second[0].unsqueeze(1)).flatten(1)
    return down, up


def scale_rows(weight: Tensor, rows: Tensor | None) -> Tensor:
    """Return a weight with each of its rows, [out, ...], multiplied by one of `rows`, [out]."""
    return weight if rows is None else weight * rows.reshape(-1, *(1 for _ in weight.shape[1:]))


class _HadamardLayer(torch.autograd.Function):
    """With g = scale * dL/dW': the gradient of each half is g times the other half."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, conv: Any, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, rows[1], *factors)
        ctx.conv, ctx.scale = conv, rows[0]
        changed, _ = _changed_weight(weight, rows, factors, x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, changed, bias) if conv is None else F.conv2d(x, changed, bias, *conv)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, keep, *factors = ctx.saved_tensors
        rows = (ctx.scale, keep)
        changed, products = _changed_weight(weight, rows, factors, x.dtype)
        wanted = (ctx.needs_input_grad[0], True)
        dx, full = (_linear_gradients if ctx.conv is None else _conv_gradients)(grad, x, changed, wanted, ctx.conv)
        full = _scale_rows(full.reshape(products[0].shape).to(products[0].dtype), rows)
        first, second = _halves(factors)
        return (
            dx, None, None, None, None,
            *half_gradients(first, full * products[1]), *half_gradients(second, full * products[0]),
        )  # fmt: skip


def _halves(factors: Any) -> tuple[Half, Half]:
    middle = len(factors) // 2
    return tuple(factors[:middle]), tuple(factors[middle:])


def _changed_weight(
    weight: Tensor, rows: Rows, factors: Any, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    first, second = _halves(factors)
    products = half_product(first), half_product(second)
    delta = _scale_rows(products[0] * products[1], rows).reshape(weight.shape)
    return delta.add_(weight.to(delta.dtype)).to(dtype), products


def _scale_rows(matrix: Tensor, rows: Rows) -> Tensor:
    scale, keep = rows
    matrix = matrix.mul_(scale)
    return matrix if keep is None else matrix.mul_(keep.reshape(-1, *(1 for _ in matrix.shape[1:])))


def _linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool], _: Any
) -> tuple[Tensor | None, Tensor]:
    flat = grad.reshape(-1, grad.shape[-1])
    return grad @ weight if wanted[0] else None, flat.t() @ x.reshape(-1, x.shape[-1])


def _conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool], conv: Any
) -> tuple[Tensor | None, Tensor]:
    stride, padding, dilation, groups = conv
    dx, full, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False]
    )
    return dx, full


def hadamard_layer(x: Tensor, layer: Any, rows: Rows, first: Half, second: Half) -> Tensor:
    """Return the output of a frozen linear layer or convolution whose weight the product of two halves is added to.

    Args:
        x: the layer's input.
        layer: `torch.nn.Linear` or `torch.nn.Conv2d`.
        rows: what the product is multiplied by.
        first: one half.
        second: the other.
    """
    conv = (layer.stride, layer.padding, layer.dilation, layer.groups) if layer.weight.dim() == 4 else None
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return _HadamardLayer.apply(x.to(dtype), layer.weight, layer.bias, rows, conv, *first, *second)
