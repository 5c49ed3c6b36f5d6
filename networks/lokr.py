"""LoKr for Stable Diffusion: the change of a weight is a Kronecker product of two small tensors.

delta W = (alpha / rank) kron(w1, w2), as LyCORIS does it: both sides of a weight are split, [a * b, c * d], w1 is
[a, c], and w2 is [b, d] or, where it is large, a product w2_a [b, r] w2_b [r, d]. For a 3x3 convolution w2 has the
kernel, or with `use_tucker` is a core [r, r, 3, 3] between w2_a [r, b] and w2_b [r, d]. Tensors are called as in
LyCORIS' files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import Problem
from library.option_values import BadValue
from networks.adapter_base import Dropouts
from networks.adapter_network import AdapterNetwork
from networks.from_weights import alpha_in
from networks.hadamard import half_product
from networks.low_rank import channel_product, compute_dtype, layer_product, limit_product
from networks.lycoris_like import PRODUCT_KEYS, WeightAdapter, build_network, network_like, product_problems
from networks.network_args import Keys, read_arguments, whole
from networks.targets import Target

SQUARE = -1
"""The `factor` that splits a dimension into two numbers as close to each other as can be."""


def _factor(value: Any) -> int:
    number: int = whole(SQUARE)(value)
    if number == 0:
        raise BadValue("must be -1 (as square as can be) or at least 1, got 0")
    return number


KEYS: Keys = {**PRODUCT_KEYS, "factor": _factor}
"""The `network_args` of this module."""


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
    def rank(self) -> int | None:
        """What alpha is divided by; None: both tensors are whole."""
        return self.second_rank or self.first_rank

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
    lokr_w1: Any
    lokr_w1_a: Any
    lokr_w1_b: Any
    lokr_w2: Any
    lokr_w2_a: Any
    lokr_w2_b: Any
    lokr_t2: Any
    plus_names = ("lokr_w1",)

    def __init__(
        self, target: Target, form: Form, *, rank: int, alpha: float | None, dropouts: Dropouts | None = None
    ) -> None:
        # Without a rank there is nothing that alpha could be divided by: the strength is 1, and the file says so.
        super().__init__(target, rank=rank, alpha=alpha if form.rank else None, dropouts=dropouts)
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
        if self.form.rank:
            super().settle()

    def adapted(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Compute the layer with its adapter; see `WeightAdapter.adapted`."""
        change = self._conv_change(x) if self.layer.weight.dim() == 4 else self._linear_change(x)
        if rows is not None:
            rows = rows.to(change.dtype)
            change = change * (rows if self.layer.weight.dim() == 2 else rows[:, None, None])
        return torch.add(self.inner(x), change, alpha=self.scale * self.multiplier)

    def _first(self) -> Tensor:
        """Return w1, [a, c]."""
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

    def limit_norm(self, max_norm: float) -> Tensor:
        """Limit the norm of the change by making both tensors smaller; see `Adapter.limit_norm`."""
        form = self.form
        outer = self.lokr_w2 if form.second_rank is None else self.lokr_w2_a
        second = outer
        if form.second_rank is not None:
            second = half_product((outer, self.lokr_w2_b, self.lokr_t2) if form.tucker else (outer, self.lokr_w2_b))
        # The norm of a Kronecker product is the product of the norms.
        norm = self.scale * self._first().norm() * second.norm()
        return limit_product(norm, max_norm, (self.lokr_w1 if form.first_rank is None else self.lokr_w1_a, outer))

    def is_idle(self) -> bool:
        """Whether the adapter changes nothing with its present values."""
        return not bool((self.lokr_w2 if self.form.second_rank is None else self.lokr_w2_b).any())


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> AdapterNetwork:
    """Make a LoKr network for a model; see the documentation of network training for the `network_args`.

    Raises:
        UserError: an argument is not known or has no sense.
    """
    values = read_arguments(kwargs, KEYS)
    factor, tucker = values["factor"] or SQUARE, bool(values["use_tucker"])

    def make(target: Target, *, rank: int, **common: Any) -> LokrAdapter:
        return LokrAdapter(target, Form.for_layer(target.layer, rank, factor, tucker=tucker), rank=rank, **common)

    size = network_dim, network_alpha
    return build_network(make, values, size, (text_encoder, unet), multiplier, neuron_dropout)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,  # noqa: FBT001, FBT002 - the protocol's signature
    **kwargs: Any,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """Make a network with the layers, forms, ranks and alphas of a file, and return it with the file's tensors.

    Raises:
        UserError: the file does not fit the model, or an argument is not known.
    """

    def make(target: Target, tensors: Mapping[str, Tensor], **common: Any) -> LokrAdapter | None:
        if "lokr_w1" not in tensors and "lokr_w1_a" not in tensors:
            return None
        form = Form.of_file(target.layer, tensors)
        return LokrAdapter(target, form, rank=form.rank or 1, alpha=alpha_in(tensors), **common)

    values, source = read_arguments(kwargs, KEYS), (file, weights_sd)
    return network_like(make, values, source, (text_encoder, unet), multiplier, for_inference=for_inference)


def check_network_args(
    network_dim: int | None, network_alpha: float | None, kwargs: Mapping[str, Any], *, base: str | None = None
) -> Iterator[Problem]:
    """Yield what is wrong with the arguments of a network, before any model is loaded."""
    return product_problems(kwargs, KEYS)
