"""DyLoRA for Stable Diffusion: a LoRA whose first ranks are of use without the others (Valipour et al. 2022).

In training a layer draws b from {0, unit, 2 unit, ...} in every forward pass, computes with its first b + unit ranks,
and trains only the last `unit` of them; alpha / rank is multiplied by sqrt(rank / (b + unit)). Otherwise it is a LoRA,
and so are the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import Problem, UserError, raise_problems
from networks.adapter_network import AdapterNetwork
from networks.chance import number_below
from networks.lora import LoraAdapter, build_network, network_like
from networks.lora import check_layers as check_layers
from networks.low_rank import adapted_linear, channel_product, layer_product, limit_product
from networks.network_args import (
    CONV_KEYS,
    DEFAULT_RANK,
    DROPOUT_KEYS,
    FILTER_KEYS,
    PLUS_KEYS,
    WHERE,
    Keys,
    problems_of,
    read_arguments,
    whole,
)
from networks.targets import Target

KEYS: Keys = {
    "unit": whole(1),
    **CONV_KEYS,
    **{name: reader for name, reader in DROPOUT_KEYS.items() if name != "rank_dropout"},
    **FILTER_KEYS,
    **PLUS_KEYS,
}
"""The `network_args` of this module: ranks are left out by another rule than rank_dropout's."""


class RankBlocks(nn.Module):
    """A factor of a LoRA whose ranks are parameters of their own, `unit` at a time.

    An optimizer moves every parameter that has a gradient, by momentum and decay even where that is zero. Ranks that
    were not drawn must not move, so they must have no gradient, which only whole parameters can do without. States hold
    the parameters as they are; files one tensor called `weight`, which can be loaded, too.
    """

    def __init__(self, values: Tensor, unit: int, axis: int) -> None:
        super().__init__()
        self.unit, self.axis = unit, axis
        for number, block in enumerate(values.split(unit, axis)):
            self.register_parameter(str(number), nn.Parameter(block.clone()))

    @property
    def weight(self) -> Tensor:
        """All ranks; a new tensor without gradient."""
        return torch.cat([block.detach() for block in self.parameters()], self.axis)

    def up_to(self, drawn: int | None) -> Tensor:
        """Return the ranks up to block `drawn`, of which that block alone gets a gradient; None: all, and all do."""
        blocks: list[Tensor] = list(self.parameters())
        if drawn is not None:
            blocks = [*(block.detach() for block in blocks[:drawn]), blocks[drawn]]
        return torch.cat(blocks, self.axis)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        joined = state_dict.get(f"{prefix}weight")
        if joined is not None:
            blocks = joined.split(self.unit, self.axis)
            if len(blocks) != len(self._parameters):
                message = f"{prefix}weight has {joined.shape[self.axis]} ranks, not {self.unit * len(self._parameters)}"
                rest[-1].append(message)
            state_dict = {f"{prefix}{number}": block for number, block in enumerate(blocks)}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DyloraAdapter(LoraAdapter):
    """LoRA that is trained a few ranks at a time."""

    lora_down: Any
    lora_up: Any
    held: Any
    may_skip_parameters = True
    uses_global_randomness = True

    def __init__(self, target: Target, *, unit: int, **common: Any) -> None:
        super().__init__(target, **common)
        if self.rank % unit:
            raise UserError(f"unit {unit} does not divide the {self.rank} ranks of {self.name}", where=WHERE)
        self.lora_down = RankBlocks(self.lora_down.weight.detach(), unit, 0)
        self.lora_up = RankBlocks(self.lora_up.weight.detach(), unit, 1)
        self.held = ()
        # With fewer ranks the sum is smaller; by how much, on average, is made up for.
        self.gains = [math.sqrt(self.rank / used) for used in range(unit, self.rank + 1, unit)]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer with its adapter."""
        layer, strength, drawn = self.layer, self.multiplier * self.scale, None
        if self.training:
            drawn = number_below(len(self.gains))
            strength *= self.gains[drawn]
        down, up = self.lora_down.up_to(drawn), self.lora_up.up_to(drawn)
        if self.fused and self.bare and not self.dropping:
            return adapted_linear(x, layer.weight, layer.bias, down, up, strength)
        low = self.drop(layer_product(layer, x, down)) * (strength * self.kept(x))
        return self.inner(x) + channel_product(layer, low, up.flatten(1))

    def limit_norm(self, max_norm: float) -> Tensor:
        """Scale both factors so that the norm of the change by all ranks is at most `max_norm`."""
        return limit_product(self.norm(), max_norm, (*self.lora_down.parameters(), *self.lora_up.parameters()))

    def file_tensors(self) -> dict[str, Tensor]:
        """Return what a file holds, by suffix: the tensors of a LoRA."""
        return {"alpha": self.alpha, "lora_down.weight": self.lora_down.weight, "lora_up.weight": self.lora_up.weight}


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
    """Make a DyLoRA network for a model; see the documentation of network training for the `network_args`.

    Raises:
        UserError: an argument is not known or has no sense.
    """
    raise_problems(check_network_args(network_dim, network_alpha, kwargs))
    values = read_arguments(kwargs, KEYS)
    make = partial(DyloraAdapter, unit=values["unit"] or 1)
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
    values = read_arguments(kwargs, KEYS)

    def make(target: Target, tensors: Mapping[str, Tensor], **common: Any) -> DyloraAdapter | None:
        return None if "dora_scale" in tensors else DyloraAdapter(target, unit=values["unit"] or 1, **common)

    return network_like(make, values, (file, weights_sd), (text_encoder, unet), multiplier, for_inference=for_inference)


def check_network_args(
    network_dim: int | None, network_alpha: float | None, kwargs: Mapping[str, Any], *, base: str | None = None
) -> Iterator[Problem]:
    """Yield what is wrong with the arguments of a network, before any model is loaded."""
    found = list(problems_of(kwargs, KEYS))
    yield from found
    if found:
        return
    values = read_arguments(kwargs, KEYS)
    rank, unit = DEFAULT_RANK if network_dim is None else network_dim, values["unit"] or 1
    if rank % unit:
        yield Problem(WHERE, f"unit must divide --network_dim, and {unit} does not divide {rank}")
    if values["conv_dim"] and values["conv_dim"] != rank:
        yield Problem(
            WHERE, f"conv_dim must be the same as --network_dim for DyLoRA ({values['conv_dim']}, not {rank})"
        )
