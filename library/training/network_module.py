"""Networks in training: calling them the way that every network module understands (see `models.network_module`).

What a module may leave out is looked up once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from library.errors import UserError

if TYPE_CHECKING:
    from library.data.dataset_spec import DatasetSpec

_OPTION = "--network_module"
PRESERVE = "diff_output_preservation"
"""Custom attribute of a subset: what the model drew without the network is the target for its images."""

_METHODS = ("apply_to", "load_weights", "save_weights", "prepare_optimizer_params", "get_trainable_params")


def require_network(network: Any, name: str) -> Any:
    """Return what a module created, after a look at its methods.

    Raises:
        UserError: the module created nothing, or an object that cannot be trained.
    """
    if network is None:
        raise UserError("created no network", "Its own messages above may say why.", where=f"{_OPTION} {name}")
    if not isinstance(network, nn.Module):
        raise UserError(f"its network, a {type(network).__name__}, is no torch.nn.Module", where=f"{_OPTION} {name}")
    missing = [method for method in _METHODS if not callable(getattr(network, method, None))]
    if missing:
        raise UserError(f"its network has no method {missing[0]}", where=f"{_OPTION} {name}")
    return network


def require_strength(network: Any, name: str, specs: Iterable[DatasetSpec]) -> None:
    """Refuse data sets that ask for another strength than 1 of a network that has only one.

    Raises:
        UserError: naming what the data ask for.
    """
    if hasattr(network, "set_multiplier"):
        return
    for spec in specs:
        preserved = any(subset.custom_attributes.get(PRESERVE) for subset in spec.subsets)
        if preserved or spec.network_multiplier != 1:
            asked = PRESERVE if preserved else f"network_multiplier {spec.network_multiplier:g}"
            what = f"its network has no set_multiplier, which {asked} of the data needs"
            raise UserError(what, "Use another network module, or leave that out.", where=f"{_OPTION} {name}")


def optimizer_groups(
    network: Any, text_rates: Sequence[float], unet_rate: float | None, rate: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Ask a network for its parameter groups, and return them with the names that their learning rates get.

    Args:
        network: has `prepare_optimizer_params`, of two or three arguments, or
            `prepare_optimizer_params_with_multiple_te_lrs`.
        text_rates: `--text_encoder_lr`, perhaps empty.
        unet_rate: `--unet_lr`.
        rate: `--learning_rate`.
    """
    several = getattr(network, "prepare_optimizer_params_with_multiple_te_lrs", None)
    if several is not None:
        made = several(list(text_rates) or None, unet_rate, rate)
    else:
        prepare = network.prepare_optimizer_params
        rates = [text_rates[0] if text_rates else None, unet_rate, rate]
        # Old modules take two arguments. Calling and seeing whether it fails would hide the errors of the module.
        made = prepare(*(rates if _takes(prepare, 3) else rates[:2]))
    groups, names = made if isinstance(made, tuple) else (made, None)
    listed = [{**group, "params": list(group["params"])} for group in groups]
    names = list(names or [])
    if len(names) != len(listed):
        names = [f"group{number}" for number in range(len(listed))]
    kept = [(group, name) for group, name in zip(listed, names, strict=True) if group["params"]]
    return [group for group, _ in kept], [name for _, name in kept]


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True
