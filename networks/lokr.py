"""LoKr for Stable Diffusion: the change of a weight is a Kronecker product of two small tensors.

delta W = (alpha / rank) kron(w1, w2), as LyCORIS does it: both sides of a weight are split, [a * b, c * d], w1 is [a, c], and
w2 is [b, d] or, where it is large, a product w2_a [b, r] w2_b [r, d]. For a 3x3 convolution w2 has the kernel, or with
`use_tucker` is a core [r, r, 3, 3] between w2_a [r, b] and w2_b [r, d]. Tensors are called as in LyCORIS' files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from networks.adapter_base import Dropouts
from networks.low_rank import compute_dtype
from networks.lycoris_like import WeightAdapter, channel_product, layer_product, limit
from networks.targets import Target

SQUARE = -1
"""The `factor` that splits a dimension into two numbers as close to each other as can be."""


def split(size: int, factor: int = SQUARE) -> tuple[int, int]:
    """Split a dimension into a smaller and a larger number whose product it is.

    The smaller is the factor, or else the greatest number below it that divides both ways; LyCORIS' rule.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = int(size**0.5) if factor < 0 else min(factor, int(size**0.5))
    small = max(number for number in range(1, most + 1) if size % number == 0)
    return small, size // small


@dataclass(frozen=True, slots=True)
class Form:
    """How a change is put together.

    Attributes:
        first: [a, c], the shape of w1.
        second: [b, d, *kernel], that of w2.
        first_rank: of w1; None: it is whole.
        second_rank: of w2; None: it is whole.
        tucker: whether w2 is a core between two factors.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    first_rank: int | None = None
    second_rank: int | None = None
    tucker: bool = False

    @classmethod
    def for_layer(cls, layer: Any, rank: int, factor: int, *, tucker: bool) -> Form:
        """Return the form that a new adapter has; w2 stays whole where a product would not be smaller."""
        outputs, inputs, *kernel = layer.weight.shape
        (a, b), (c, d) = split(outputs, factor), split(inputs, factor)
        whole = rank >= max(b, d) / 2
        core = tucker and not whole and any(size != 1 for size in kernel)
        return cls((a, c), (b, d, *kernel), None, None if whole else rank, core)

    @classmethod
    def of_file(cls, layer: Any, tensors: Mapping[str, Tensor]) -> Form:
        """Return the form that tensors of a file have."""
        tucker = "lokr_t2" in tensors
        if "lokr_w1" in tensors:
            first, first_rank = tuple(tensors["lokr_w1"].shape), None
        else:
            first = (tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1])
            first_rank = tensors["lokr_w1_b"].shape[0]
        second_rank = None if "lokr_w2" in tensors else tensors["lokr_w2_b"].shape[0]
        outputs, inputs, *kernel = layer.weight.shape
        return cls(first, (outputs // first[0], inputs // first[1], *kernel), first_rank, second_rank, tucker)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by their names in files."""
        found: dict[str, tuple[int, ...]] = {}
        if self.first_rank is None:
            found["lokr_w1"] = self.first
        else:
            found |= {"lokr_w1_a": (self.first[0], self.first_rank), "lokr_w1_b": (self.first_rank, self.first[1])}
        b, d, *kernel = self.second
        r = self.second_rank
        if r is None:
            found["lokr_w2"] = self.second
        elif self.tucker:
            found |= {"lokr_w2_a": (r, b), "lokr_w2_b": (r, d), "lokr_t2": (r, r, *kernel)}
        else:
            found |= {"lokr_w2_a": (b, r), "lokr_w2_b": (r, d * (kernel[0] * kernel[1] if kernel else 1))}
        return found


class LokrAdapter(WeightAdapter):
    """Adds a Kronecker product to the weight of a layer.

    It never builds that product: input and output are cut into groups, w2 is applied inside of them and w1 across them,
    which takes fewer operations, and less memory for the backward pass, than the weight would.
    """

    kind = "lokr"
    plus_names = ("lokr_w1",)

    def __init__(self, target: Target, form: Form, *, alpha: float | None, dropouts: Dropouts | None = None) -> None:
        rank = form.second_rank or form.first_rank
        # Without a rank there is nothing that alpha could be divided by: the strength is 1, and the file says so.
        super().__init__(target, rank=rank or 1, alpha=alpha if rank else None, dropouts=dropouts)
        self.form = form
        generator = self.generator()
        zero = "lokr_w2" if form.second_rank is None else "lokr_w2_b"
        for name, shape in form.shapes.items():
            values = torch.zeros(shape)
            if name != zero:
                nn.init.kaiming_uniform_(values, a=5**0.5, generator=generator)
            self.register_parameter(name, nn.Parameter(values))

    def settle(self) -> None:
        """Take the scale from the `alpha` buffer, which means nothing where both tensors are whole."""
        if self.form.first_rank or self.form.second_rank:
            super().settle()

    def adapted(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Compute the layer with its adapter; see `WeightAdapter.adapted`."""
        change = self._conv_change(x) if self.layer.weight.dim() == 4 else self._linear_change(x)
        if rows is not None:
            change = change * (rows[:, None, None] if change.dim() == 4 else rows)
        return torch.add(self.inner(x), change, alpha=self.scale * self.multiplier)

    def _first(self) -> Tensor:
        return self.lokr_w1 if self.form.first_rank is None else self.lokr_w1_a @ self.lokr_w1_b

    def _linear_change(self, x: Tensor) -> Tensor:
        whole = self.form.second_rank is None
        groups = x.unflatten(-1, (self.form.first[1], self.form.second[1]))
        inside = channel_product(self.layer, groups, self.lokr_w2 if whole else self.lokr_w2_b)
        # Across groups at the rank, where there is one: values are fewest there.
        across = channel_product(self.layer, inside.transpose(-1, -2), self._first()).transpose(-1, -2)
        return (across if whole else channel_product(self.layer, across, self.lokr_w2_a)).flatten(-2)

    def _conv_change(self, x: Tensor) -> Tensor:
        (a, c), (_, d, *kernel) = self.form.first, self.form.second
        groups = x.reshape(-1, d, *x.shape[2:])
        outer = None
        if self.form.second_rank is None:
            inside = layer_product(self.layer, groups, self.lokr_w2)
        elif self.form.tucker:
            inside = layer_product(self.layer, channel_product(self.layer, groups, self.lokr_w2_b), self.lokr_t2)
            outer = self.lokr_w2_a.t()
        else:
            inside = layer_product(self.layer, groups, self.lokr_w2_b.view(-1, d, *kernel))
            outer = self.lokr_w2_a
        size = inside.shape[1:]
        first = self._first().to(compute_dtype(x))
        across = torch.matmul(first, inside.reshape(-1, c, size.numel())).reshape(-1, *size)
        change = across if outer is None else channel_product(self.layer, across, outer)
        return change.reshape(-1, a * change.shape[1], *size[1:])
