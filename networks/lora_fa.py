"""LoRA-FA (Zhang et al. 2023): the first factor stays as it was drawn, only `lora_up` is trained.

Half of the gradients and of the optimizer's state are saved, and the inputs of the layers need not be kept for the
backward pass. Files are those of LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import Problem
from networks.adapter_base import Adapter
from networks.adapter_network import AdapterNetwork
from networks.block_weights import BLOCK_KEYS
from networks.lora import LoraAdapter, build_network, check_args, network_like
from networks.lora import check_layers as check_layers
from networks.network_args import CONV_KEYS, DROPOUT_KEYS, FILTER_KEYS, Keys, read_arguments
from networks.targets import Target

KEYS: Keys = {**CONV_KEYS, **DROPOUT_KEYS, **FILTER_KEYS, **BLOCK_KEYS}
"""The `network_args` of this module: no LoRA+, since there is no second rate."""


class LoraFaAdapter(LoraAdapter):
    """LoRA whose first factor is a constant."""

    plus_names = ()
    trains_down = False

    def first_values(self, shape: Sequence[int]) -> Tensor:
        """Return normal values with a standard deviation of sqrt(2 / (in + rank))."""
        spread = math.sqrt(2 / (shape[1] + shape[0]))
        return torch.empty(tuple(shape), device="cpu").normal_(std=spread, generator=self.generator())


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
    """Make a LoRA-FA network; arguments and errors as in `networks.lora`."""
    values = read_arguments(kwargs, KEYS)
    size = network_dim, network_alpha
    return build_network(LoraFaAdapter, values, size, (text_encoder, unet), multiplier, neuron_dropout)


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
    """Make a network with the layers, ranks and alphas of a LoRA file; as in `networks.lora`."""
    values = read_arguments(kwargs, KEYS)

    def make(target: Target, tensors: Mapping[str, Tensor], **common: Any) -> Adapter | None:
        return None if "dora_scale" in tensors else LoraFaAdapter(target, **common)

    return network_like(make, values, (file, weights_sd), (text_encoder, unet), multiplier, for_inference=for_inference)


def check_network_args(
    network_dim: int | None, network_alpha: float | None, kwargs: Mapping[str, Any], *, base: str | None = None
) -> Iterator[Problem]:
    """Yield what is wrong with the arguments of a network, before any model is loaded."""
    return check_args(KEYS, kwargs, base)
