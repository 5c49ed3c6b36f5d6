"""LoRA (Hu et al. 2021) for linear layers and convolutions: y = W x + multiplier * alpha / rank * up(down(x))."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from library.errors import Problem
from networks import network_args
from networks.adapter_base import Adapter, Dropouts
from networks.adapter_network import AdapterNetwork
from networks.block_weights import BLOCK_KEYS, BLOCK_LISTS, block_plan, block_problems, layout_of
from networks.chance import uniform
from networks.from_weights import alpha_in, network_from_weights
from networks.low_rank import Into, adapted_linear, layer_product, limit_product
from networks.network_args import Keys, read_arguments
from networks.targets import CONV_CLASSES, TRANSFORMER_CLASSES, Target, base_of, text_targets, unet_targets

logger = logging.getLogger(__name__)

KEYS: Keys = {
    **network_args.CONV_KEYS,
    **network_args.DROPOUT_KEYS,
    **network_args.FILTER_KEYS,
    **BLOCK_KEYS,
    **network_args.PLUS_KEYS,
    "dora_wd": network_args.flag,
    "wd_on_output": network_args.flag,
}
"""The `network_args` of this module."""

Make = Callable[..., Adapter]
"""Class of the adapters of a network."""


class Factor(nn.Module):
    """One of the two matrices of a LoRA; its only tensor is called `weight`, as in files.

    Args:
        weight: initial value.
        trained: whether it is a parameter; a buffer otherwise.
    """

    weight: Any

    def __init__(self, weight: Tensor, *, trained: bool = True) -> None:
        super().__init__()
        if trained:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.held: Any = self._parameters if trained else self._buffers


class LoraAdapter(Adapter):
    """LoRA of a linear layer or of a convolution, whose first factor then has its kernel, stride and padding."""

    plus_names: tuple[str, ...] = ("lora_up",)
    trains_down = True

    def __init__(self, target: Target, *, rank: int, alpha: float | None, dropouts: Dropouts | None = None) -> None:
        super().__init__(target, rank=rank, alpha=alpha, dropouts=dropouts)
        outs, *ins = target.layer.weight.shape
        self.lora_down = Factor(self.first_values((rank, *ins)), trained=self.trains_down)
        self.lora_up = Factor(torch.zeros((outs, rank, *(1 for _ in ins[1:])), device="cpu"))
        # The fused product is for layers that compute nothing but their class's product.
        self.fused = isinstance(self.layer, nn.Linear)
        self.into: Into = None
        self.held = self.lora_down.held, self.lora_up.held

    def first_values(self, shape: Sequence[int]) -> Tensor:
        """Return initial values of the first factor: those of a linear layer of torch."""
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return torch.empty(tuple(shape), device="cpu").uniform_(-bound, bound, generator=self.generator())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer with its adapter."""
        if self.fused and self.bare and not self.dropping:
            # Past the attribute lookup of modules, which takes longer than a small product.
            own, (down, up) = self.layer._parameters, self.held
            strength = self.multiplier * self.scale
            return adapted_linear(x, own["weight"], own["bias"], down["weight"], up["weight"], strength, self.into)
        if self.dropping or self.fused:
            return self.inner(x) + self.change(x)
        down, up = self.held
        low = layer_product(self.layer, x, down["weight"])
        change = F.conv2d(low, up["weight"].to(low.dtype))
        # The factor comes with the sum, which is a pass less over the whole output.
        return torch.add(self.inner(x), change, alpha=self.multiplier * self.scale)

    def accumulate_in_place(self) -> None:
        """Let backward passes add to the gradients that are there; of use only where both factors are trained."""
        down, up = self.lora_down.weight.grad, self.lora_up.weight.grad
        if down is not None and up is not None:
            self.into = down, up

    def change(self, x: Tensor) -> Tensor:
        """Return what the adapter adds to the layer's output for the input `x`."""
        return self.product(x, self.multiplier * self.scale * self.kept(x))

    def product(self, x: Tensor, factor: float | Tensor) -> Tensor:
        """Return `factor * up(down(x))`, with neurons and ranks left out in training mode."""
        low = self.drop(layer_product(self.layer, x, self.lora_down.weight)) * factor
        up = self.lora_up.weight.to(low.dtype)
        return F.linear(low, up) if up.dim() == 2 else F.conv2d(low, up)

    def drop(self, low: Tensor) -> Tensor:
        """Leave out neurons, and per sample whole ranks, of the low-rank state [B,...,r] or [B,r,H,W]."""
        if not self.dropping:
            return low
        if self.dropouts.neuron:
            low = F.dropout(low, self.dropouts.neuron)
        share = self.dropouts.rank
        if share:
            last = isinstance(self.layer, nn.Linear)
            shape = (low.shape[0], *(1,) * (low.dim() - 2), self.rank) if last else (*low.shape[:2], 1, 1)
            low = low * ((uniform(shape, low.device) > share).to(low.dtype) / (1 - share))
        return low

    def kept(self, x: Tensor) -> float | Tensor:
        """Return 0 if this call leaves the whole adapter out, else 1; no branch, which would wait for the device."""
        share = self.dropouts.module
        return (uniform((), x.device) >= share).to(x.dtype) if share and self.dropping else 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return up [out, r] and down [r, in * kernel] as matrices, float32."""
        return self.lora_up.weight.float().flatten(1), self.lora_down.weight.float().flatten(1)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return scale * up @ down in the shape of the layer's weight."""
        up, down = self.factors()
        return (up @ down).mul_(self.scale).view(self.layer.weight.shape)

    def is_idle(self) -> bool:
        """Whether the second factor is zero, as it is at first."""
        return not bool(self.lora_up.weight.any())

    def norm(self) -> Tensor:
        """Return the norm of `delta()`, 0-d."""
        up, down = self.factors()
        # |up down|^2 is the trace of (up^T up)(down down^T): r x r matrices in place of the product.
        squared = ((up.t() @ up) * (down @ down.t())).sum().clamp_(min=0)
        return squared.sqrt().mul_(abs(self.scale))

    def limit_norm(self, max_norm: float) -> Tensor:
        """Scale both factors so that |scale * up @ down| is at most `max_norm`; see `limit_product`."""
        return limit_product(self.norm(), max_norm, (self.lora_up.weight, self.lora_down.weight))


# The network module -------------------------------------------------------------------------------------------------


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
    """Make a LoRA network for a model; see the documentation of network training for the `network_args`.

    Raises:
        UserError: an argument is not known or has no sense.
    """
    values = read_arguments(kwargs, KEYS)
    make = adapter_class(values)
    return build_network(make, values, (network_dim, network_alpha), (text_encoder, unet), multiplier, neuron_dropout)


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

    def make(target: Target, tensors: Mapping[str, Tensor], **common: Any) -> Adapter:
        if "dora_scale" not in tensors:
            return LoraAdapter(target, **common)
        from networks.dora import DoraAdapter, is_on_output

        return DoraAdapter(target, **common, on_output=is_on_output(tensors["dora_scale"], target))

    return network_like(make, values, (file, weights_sd), (text_encoder, unet), multiplier, for_inference=for_inference)


def check_network_args(
    network_dim: int | None, network_alpha: float | None, kwargs: Mapping[str, Any], *, base: str | None = None
) -> Iterator[Problem]:
    """Yield what is wrong with the arguments of a network, before any model is loaded."""
    return check_args(KEYS, kwargs, base)


def check_layers(unet: Any, kwargs: Mapping[str, Any]) -> None:
    """See that the arguments leave layers of a model to adapt; it needs no weights.

    Raises:
        UserError: they leave none.
    """
    values = read_arguments({name: value for name, value in kwargs.items() if name in KEYS}, KEYS)
    network_args.filtered(unet_targets(unet, (*TRANSFORMER_CLASSES, *CONV_CLASSES)), values)


# What modules with the same options share ---------------------------------------------------------------------------


def check_args(keys: Keys, kwargs: Mapping[str, Any], base: str | None) -> Iterator[Problem]:
    """Yield what is wrong with arguments that `keys` describe, block lists included."""
    found = list(network_args.problems_of(kwargs, keys))
    yield from found
    readable = {name: value for name, value in kwargs.items() if name in keys}
    if not found:
        yield from block_problems(read_arguments(readable, keys), layout_of(base))


def adapter_class(values: Mapping[str, Any]) -> Make:
    """Return what makes adapters: LoRA, or with `dora_wd` DoRA."""
    if not values["dora_wd"]:
        return LoraAdapter
    from functools import partial

    from networks.dora import DoraAdapter

    return partial(DoraAdapter, on_output=values["wd_on_output"] is not False)


def build_network(
    make: Make,
    values: Mapping[str, Any],
    size: tuple[int | None, float | None],
    models: tuple[Any, Any],
    multiplier: float,
    neuron_dropout: float | None,
) -> AdapterNetwork:
    """Make adapters for the layers that the arguments choose.

    Args:
        make: adapter class.
        values: arguments, read.
        size: network_dim and network_alpha.
        models: text encoder (a module, a list of several, or None) and U-Net (or None).
        multiplier: strength.
        neuron_dropout: as the trainer passes it.
    """
    rank, alpha = network_args.rank_and_alpha(*size)
    dropouts = network_args.dropouts_of(values, neuron_dropout)
    text = [make(target, rank=rank, alpha=alpha, dropouts=dropouts) for target in text_targets(models[0])]
    layers = [] if models[1] is None else unet_targets(models[1])
    layout = layout_of(base_of(layers))
    plan = block_plan(values, rank, alpha, layout)
    if models[1] is not None and plan.conv_dims is not None:
        layers = unet_targets(models[1], (*TRANSFORMER_CLASSES, *CONV_CLASSES))
    unet = []
    for target in network_args.filtered(layers, values):
        own_rank, own_alpha = plan.size_of(target)
        if own_rank:
            unet.append(make(target, rank=own_rank, alpha=own_alpha, dropouts=dropouts))
            plan.set_rate(unet[-1])
    return AdapterNetwork(text, unet, multiplier=multiplier, plus=network_args.plus_of(values))


def network_like(
    make: Callable[..., Adapter | None],
    values: Mapping[str, Any],
    source: tuple[str | Path | None, Mapping[str, Tensor] | None],
    models: tuple[Any, Any],
    multiplier: float,
    *,
    for_inference: bool = False,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """Make adapters for the layers in a file, at its ranks and alphas, with the dropouts and rates of the arguments.

    Args:
        make: called with a layer, its tensors, and `rank`, `alpha` and `dropouts`.
        values: arguments, read.
        source: the file, and its tensors if they were read before.
        models: text encoder (a module, a list of several, or None) and U-Net (or None).
        multiplier: strength.
        for_inference: nothing is left out by chance.
    """
    decided = ("conv_dim", "conv_alpha", *BLOCK_LISTS, *network_args.FILTER_KEYS, "dora_wd")
    useless = [name for name in decided if values.get(name) is not None]
    if useless and not for_inference:
        logger.warning("%s: the file decides about %s; these have no effect", network_args.WHERE, ", ".join(useless))
    dropouts = Dropouts() if for_inference else network_args.dropouts_of(values)

    def made(target: Target, tensors: Mapping[str, Tensor]) -> Adapter | None:
        if "lora_down.weight" not in tensors or "lora_mid.weight" in tensors:
            return None
        rank = tensors["lora_down.weight"].shape[0]
        return make(target, tensors, rank=rank, alpha=alpha_in(tensors), dropouts=dropouts)

    network, tensors = network_from_weights(
        *source, models, made, multiplier=multiplier, plus=network_args.plus_of(values)
    )
    plan = block_plan({**values, **dict.fromkeys(BLOCK_LISTS)}, 1, 1.0, layout_of(base_of(network.unet_adapters)))
    for adapter in network.unet_adapters:
        plan.set_rate(adapter)
    return network, tensors
