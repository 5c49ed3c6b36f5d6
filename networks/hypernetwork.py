"""Hypernetworks as NovelAI made them: MLPs that change what keys and values of attention are computed from.

For every width d of context that attention layers have (768 for the text of SD 1.x, 320, 640 and 1280 inside the
U-Net) there are two MLPs, shared by all layers of that width: x -> x + m (W1 (W0 x + b0) + b1) with W0 [2d,d] and
W1 [d,2d], one before `to_k` and one before `to_v`. There is no activation, so each is a linear map of its input.

The A1111 web UI reads what `--save_model_as pt` writes; see `library.checkpoints.hypernetwork_file`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.hypernetwork_file import ROLES, HypernetworkFile, read_hypernetwork, write_hypernetwork
from library.errors import Problem, UserError
from library.option_values import BadValue
from networks.chance import initial_generator
from networks.network_args import Keys, problems_of, read_arguments

logger = logging.getLogger(__name__)

UNET_ONLY = True
SPREAD = 0.01
"""Standard deviation of the first weights; biases begin at 0."""

_ATTENTION = ("Attention", "CrossAttention")


def _widths(value: Any) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in str(value).split(","))
    except ValueError:
        raise BadValue(f"expected widths such as 320,640,768,1280, got {value!r}") from None
    if any(width < 1 for width in found) or len(set(found)) != len(found):
        raise BadValue(f"expected different widths above 0, got {value!r}")
    return found


KEYS: Keys = {"sizes": _widths}


class ContextMLP(nn.Module):
    """Two linear layers, named as in files; d -> 2d -> d."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, width))

    def forward(self, context: Tensor) -> Tensor:
        """Return what is added to the context [..., d]."""
        return self.linear(context)


class HypernetworkNetwork(nn.Module):
    """The MLPs of all widths, hooked before keys and values; the protocol of network modules.

    Args:
        widths: of contexts that get MLPs.
        multiplier: strength.
    """

    may_skip_parameters = False
    uses_global_randomness = False
    saves_whole_files = True
    """Its files have a layout of their own, and its own hashes would mean nothing."""

    def __init__(self, widths: Sequence[int], *, multiplier: float = 1.0) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.widths = nn.ModuleDict(
            {str(width): nn.ModuleDict({role: ContextMLP(width) for role in ROLES}) for width in widths}
        )
        self._hooks: list[Any] = []
        self._layers: list[tuple[nn.Module, ContextMLP]] = []
        for name, parameter in self.named_parameters():
            _initialise(name, parameter)

    def apply_to(
        self,
        text_encoder: Any,
        unet: Any,
        apply_text_encoder: bool = True,  # noqa: FBT001, FBT002 - the protocol's signature
        apply_unet: bool = True,  # noqa: FBT001, FBT002
    ) -> None:
        """Hook the MLPs before keys and values of the U-Net's attention.

        Raises:
            UserError: no attention layer has a width of this network.
        """
        used = set()
        for attention in (module for module in unet.modules() if type(module).__name__ in _ATTENTION):
            for role in ROLES:
                layer = getattr(attention, f"to_{role}")
                width = str(layer.in_features)
                if width in self.widths:
                    used.add(width)
                    self._layers.append((layer, self.widths[width][role]))  # type: ignore[index]
        unused = sorted(set(self.widths) - used, key=int)
        if not used:
            have = ", ".join(map(str, sorted({layer.in_features for layer in _key_layers(unet)})))
            raise UserError(
                f"this hypernetwork is for contexts of width {', '.join(unused)}, but the model has {have}",
                "It was made for another kind of model.",
                where=_MODULE,
            )
        if unused:
            # Never reached, so they would be parameters without gradients.
            logger.warning("no attention layer has a context of width %s: these MLPs are left out", ", ".join(unused))
            for width in unused:
                del self.widths[width]
        self.set_enabled(True)
        logger.info("hypernetwork before keys and values of %d layers", len(self._layers))

    def set_enabled(self, is_enabled: bool) -> None:  # noqa: FBT001 - the protocol's signature
        """Hook the MLPs in, or take them out."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = [layer.register_forward_pre_hook(self._hook(mlp)) for layer, mlp in self._layers if is_enabled]

    def _hook(self, mlp: ContextMLP) -> Any:
        def change(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self.multiplier == 0:
                return None
            context = inputs[0]
            fits = torch.is_autocast_enabled(context.device.type)
            added = mlp(context if fits else context.to(next(mlp.parameters()).dtype))
            return (context + self.multiplier * added.to(context.dtype), *inputs[1:])

        return change

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength."""
        self.multiplier = multiplier

    def is_mergeable(self) -> bool:
        """It cannot be merged: self-attention shares its input with the queries."""
        return False

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the model's own checkpointing covers the hooks inside its blocks."""

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return one parameter group, trained at the rate of the U-Net."""
        rate = default_lr if unet_lr is None else unet_lr
        return [{"params": list(self.parameters()), "lr": rate}], ["unet"]

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Let gradients reach what is trained."""
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Switch to training mode."""
        self.train()

    def get_trainable_params(self) -> list[nn.Parameter]:
        """Return all parameters."""
        return list(self.parameters())

    def save_weights(
        self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write the hypernetwork; `.pt` is what the A1111 web UI reads."""
        widths = {
            int(width): {role: mlps[role].state_dict() for role in ROLES}  # type: ignore[index]
            for width, mlps in self.widths.items()
        }
        write_hypernetwork(file, HypernetworkFile(widths, dict(metadata or {})), precision=dtype)

    def load_weights(self, file: str | Path) -> str:
        """Start from the values of a file.

        Raises:
            UserError: the file is damaged or has other widths.
        """
        return self._take(read_hypernetwork(file), str(file))

    def _take(self, found: HypernetworkFile, where: str) -> str:
        missing = sorted({int(width) for width in self.widths} - set(found.widths))
        if missing:
            raise UserError(f"holds nothing for contexts of width {', '.join(map(str, missing))}", where=where)
        for width, mlps in self.widths.items():
            for role in ROLES:
                mlps[role].load_state_dict(dict(found.widths[int(width)][role]))  # type: ignore[index]
        return f"hypernetwork for contexts of width {', '.join(self.widths)}"


_MODULE = "--network_module networks.hypernetwork"


def _initialise(name: str, parameter: nn.Parameter) -> None:
    """Give a parameter its first values: a function of torch's seed and its name."""
    with torch.no_grad():
        if parameter.dim() == 1:
            parameter.zero_()
            return
        parameter.copy_(torch.empty(parameter.shape).normal_(std=SPREAD, generator=initial_generator(name)))


def _key_layers(unet: Any) -> Iterator[Any]:
    return (module.to_k for module in unet.modules() if type(module).__name__ in _ATTENTION)


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> HypernetworkNetwork:
    """Make a hypernetwork for all widths that the U-Net has, or for those of the argument `sizes`."""
    sizes = read_arguments(kwargs, KEYS)["sizes"]
    return HypernetworkNetwork(
        sizes or sorted({layer.in_features for layer in _key_layers(unet)}), multiplier=multiplier
    )


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    weights_sd: Mapping[int, Any] | None = None,
    for_inference: bool = False,  # noqa: FBT001, FBT002 - the protocol's signature
    **kwargs: Any,
) -> tuple[HypernetworkNetwork, Mapping[int, Any]]:
    """Make the hypernetwork of a file, with its values, and return it with them."""
    read_arguments(kwargs, {})
    found = HypernetworkFile(weights_sd) if weights_sd is not None else read_hypernetwork(file or "")
    network = HypernetworkNetwork(sorted(found.widths), multiplier=multiplier)
    network._take(found, str(file or "the network's weights"))
    return network, found.widths


def check_network_args(
    network_dim: int | None, network_alpha: float | None, kwargs: Mapping[str, Any], *, base: str | None = None
) -> Iterator[Problem]:
    """Yield what is wrong with the arguments of a network, before any model is loaded."""
    yield from problems_of({name: value for name, value in kwargs.items() if name != "dropout"}, KEYS)
    if "dropout" in kwargs:
        yield Problem("--network_dropout", "a hypernetwork has nothing that could be left out")
    if network_dim is not None:
        yield Problem("--network_dim", "a hypernetwork has no rank: its size follows from the model", "Leave it out.")
