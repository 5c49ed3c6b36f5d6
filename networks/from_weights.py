"""Makes a network that has just the layers, ranks and alphas of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from library.errors import UserError
from networks.adapter_base import Adapter
from networks.adapter_files import match_modules, read_weights
from networks.adapter_network import AdapterNetwork
from networks.param_groups import PlusRatios
from networks.targets import CONV_CLASSES, TRANSFORMER_CLASSES, Target, base_of, text_targets, unet_targets


def network_from_weights(
    file: str | Path | None,
    weights_sd: Mapping[str, Tensor] | None,
    models: tuple[Any, Any],
    make: Callable[[Target, Mapping[str, Tensor]], Adapter | None],
    *,
    multiplier: float = 1.0,
    plus: PlusRatios | None = None,
    prefix: str = "lora",
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """Return a network for the layers of a file, not attached and with initial values, and the file's tensors.

    Args:
        file: of any layout.
        weights_sd: its tensors by their names in kohya files, if they were read before.
        models: text encoder (a module, a list of several, or None) and U-Net (or None).
        make: turns a layer and its tensors by suffix into an adapter; None: the tensors are of another kind.
        multiplier: strength.
        plus: LoRA+ ratios.
        prefix: that names in the file begin with.

    Raises:
        UserError: the file is damaged, for another base model, of another kind, or has no layer of the model.
    """
    text, unet = _targets(models, prefix)
    weights = read_weights(file, weights_sd, base_of(unet))
    matched = match_modules(weights, {target.name: target for target in (*text, *unet)}, "the model")
    adapters = [_made(targets, matched, make, weights.where) for targets in (text, unet)]
    return AdapterNetwork(*adapters, multiplier=multiplier, plus=plus), weights.tensors()


def _targets(models: tuple[Any, Any], prefix: str) -> tuple[list[Target], list[Target]]:
    text = text_targets(models[0], f"{prefix}_te")
    classes = (*TRANSFORMER_CLASSES, *CONV_CLASSES)
    return text, [] if models[1] is None else unet_targets(models[1], classes, f"{prefix}_unet")


def _made(
    targets: Sequence[Target],
    matched: Mapping[str, Mapping[str, Tensor]],
    make: Callable[[Target, Mapping[str, Tensor]], Adapter | None],
    where: str,
) -> list[Adapter]:
    made = []
    for target in targets:
        tensors = matched.get(target.name)
        if tensors is None:
            continue
        adapter = make(target, tensors)
        if adapter is None:
            what = f"{target.name} is of a kind that this network module does not make ({', '.join(tensors)})"
            raise UserError(what, "Choose the --network_module that made the file.", where=where)
        made.append(adapter)
    return made


def alpha_in(tensors: Mapping[str, Tensor]) -> float | None:
    """Return the alpha among the tensors of a layer; None: the file has none, which stands for the rank."""
    alpha = tensors.get("alpha")
    return None if alpha is None else float(alpha)
