"""LoHa for Stable Diffusion: the change of a weight is an elementwise product of two low-rank matrices.

delta W = (alpha / rank) (w1_a w1_b) o (w2_a w2_b), as FedPara (Hyeon-Woo et al. 2021) and LyCORIS do it; a 3x3
convolution is a matrix [out, in * 9], or with `use_tucker` each half is a core [r, r, 3, 3] between two factors.
Tensors are called as in LyCORIS' files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import Problem
from networks.adapter_base import Dropouts
from networks.adapter_network import AdapterNetwork
from networks.from_weights import alpha_in
from networks.hadamard import as_low_rank, hadamard_layer, half_product, scale_rows
from networks.low_rank import adapted_linear, channel_product, layer_product, limit_product
from networks.lycoris_like import PRODUCT_KEYS, WeightAdapter, build_network, network_like, product_problems
from networks.network_args import read_arguments
from networks.targets import Target

KEYS = PRODUCT_KEYS
"""The `network_args` of this module."""

_LOW_RANK_COST = 2
"""A step takes so many matrix products with both low-rank factors, or one for the gradient of a whole weight."""


class LohaAdapter(WeightAdapter):
    """Adds the elementwise product of two low-rank matrices to the weight of a layer."""

    kind = "loha"
    hada_w1_a: Any
    hada_w1_b: Any
    hada_t1: Any
    hada_w2_a: Any
    hada_w2_b: Any
    hada_t2: Any
    plus_names = ("hada_w2_a",)

    def __init__(
        self, target: Target, *, rank: int, alpha: float | None, dropouts: Dropouts | None = None, tucker: bool = False
    ) -> None:
        super().__init__(target, rank=rank, alpha=alpha, dropouts=dropouts)
        outputs, inputs, *kernel = target.layer.weight.shape
        self.tucker = tucker and any(size != 1 for size in kernel)
        generator = self.generator()
        flat = inputs if self.tucker else inputs * (kernel[0] * kernel[1] if kernel else 1)
        outer = (rank, outputs) if self.tucker else (outputs, rank)
        # The half that is zero decides that a new adapter changes nothing.
        spreads = (0.0, 0.1) if self.tucker else (0.1, 0.0)
        for half, spread in zip(("1", "2"), spreads, strict=True):
            self._create(f"hada_w{half}_a", outer, spread, generator)
            self._create(f"hada_w{half}_b", (rank, flat), 1.0, generator)
            if self.tucker:
                self._create(f"hada_t{half}", (rank, rank, *kernel), 0.1, generator)
        columns = flat * (9 if self.tucker else 1)
        self.as_low_rank = not self.tucker and _LOW_RANK_COST * rank**2 * (outputs + columns) <= outputs * columns

    def _create(self, name: str, shape: tuple[int, ...], spread: float, generator: torch.Generator) -> None:
        values = torch.zeros(shape)
        if spread:
            values.normal_(0.0, spread, generator=generator)
        self.register_parameter(name, nn.Parameter(values))

    def _halves(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if self.tucker:
            return (
                (self.hada_w1_a, self.hada_w1_b, self.hada_t1),
                (self.hada_w2_a, self.hada_w2_b, self.hada_t2),
            )
        return (self.hada_w1_a, self.hada_w1_b), (self.hada_w2_a, self.hada_w2_b)

    def adapted(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Compute the layer with its adapter; see `WeightAdapter.adapted`."""
        strength = self.scale * self.multiplier
        first, second = self._halves()
        if not self.as_low_rank:
            if self.bare:
                return hadamard_layer(x, self.layer, (strength, rows), first, second)
            product = scale_rows(half_product(first) * half_product(second), rows).reshape(self.layer.weight.shape)
            return torch.add(self.inner(x), layer_product(self.layer, x, product), alpha=strength)
        down, up = as_low_rank(first, second)
        up = scale_rows(up, rows)
        if self.bare and not self.is_conv:
            return adapted_linear(x, self.layer.weight, self.layer.bias, down, up, strength)
        low = layer_product(self.layer, x, down.view(-1, *self.layer.weight.shape[1:]))
        return torch.add(self.inner(x), channel_product(self.layer, low, up), alpha=strength)

    def limit_norm(self, max_norm: float) -> Tensor:
        """Limit the norm of the change by making both outer factors smaller; see `Adapter.limit_norm`."""
        first, second = self._halves()
        return limit_product(
            self.scale * (half_product(first) * half_product(second)).norm(), max_norm, (first[0], second[0])
        )

    def is_idle(self) -> bool:
        """Whether the adapter changes nothing with its present values."""
        first, second = self._halves()
        return not (bool(first[0].any()) and bool(second[0].any()))


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
    """Make a LoHa network for a model; see the documentation of network training for the `network_args`.

    Raises:
        UserError: an argument is not known or has no sense.
    """
    values = read_arguments(kwargs, KEYS)
    make = partial(LohaAdapter, tucker=bool(values["use_tucker"]))
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
    """Make a network with the layers, ranks and alphas of a file, and return it with the file's tensors.

    Raises:
        UserError: the file does not fit the model, or an argument is not known.
    """

    def make(target: Target, tensors: Mapping[str, Tensor], **common: Any) -> LohaAdapter | None:
        if "hada_w1_b" not in tensors:
            return None
        rank, tucker = tensors["hada_w1_b"].shape[0], "hada_t1" in tensors
        return LohaAdapter(target, rank=rank, alpha=alpha_in(tensors), tucker=tucker, **common)

    values, source = read_arguments(kwargs, KEYS), (file, weights_sd)
    return network_like(make, values, source, (text_encoder, unet), multiplier, for_inference=for_inference)


def check_network_args(
    network_dim: int | None, network_alpha: float | None, kwargs: Mapping[str, Any], *, base: str | None = None
) -> Iterator[Problem]:
    """Yield what is wrong with the arguments of a network, before any model is loaded."""
    return product_problems(kwargs, KEYS)
