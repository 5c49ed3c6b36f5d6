"""Network modules by name: importing them, and calling them the way that every such module understands.

A module offers `create_network` and `create_network_from_weights`, and returns an object with a known set of methods.
These names are a public interface: modules written for other trainers (LyCORIS, or a user's own) plug in here. What a
module may leave out is looked up once.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.errors import Problem, UserError
from library.option_values import nearest

if TYPE_CHECKING:
    from types import ModuleType

logger = logging.getLogger(__name__)

_OPTION = "--network_module"
_NEEDED = ("create_network", "create_network_from_weights")
_METHODS = ("apply_to", "load_weights", "save_weights", "prepare_optimizer_params", "get_trainable_params")

_LYCORIS = """
    algo preset conv_dim conv_alpha dropout rank_dropout module_dropout rank_dropout_scale use_tucker use_cp use_conv_cp
    disable_conv_cp use_scalar block_size train_norm constraint constrain rescaled dora_wd wd_on_output full_matrix
    bypass_mode rs_lora unbalanced_factorization decompose_both factor loraplus_lr_ratio loraplus_unet_lr_ratio
    loraplus_text_encoder_lr_ratio"""
LYCORIS_ARGS = frozenset(_LYCORIS.split())
"""What `lycoris.kohya` reads; it passes over anything else without a word."""


def find_module(name: str) -> Problem | None:
    """Return why the module cannot be imported, as far as that can be told without running it."""
    where = f"{_OPTION} {name}"
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError) as error:
        return _not_found(name, where, str(error))
    return None if found is not None else _not_found(name, where, "")


def _not_found(name: str, where: str, why: str) -> Problem:
    package = name.partition(".")[0]
    if package == "lycoris":
        return Problem(where, "the package lycoris_lora is not installed", "Run: pip install lycoris_lora")
    hint = "Known modules are networks.lora, networks.lora_fa, networks.dylora, networks.oft, networks.loha, "
    return Problem(where, f"no such Python module{f' ({why})' if why else ''}", f"{hint}networks.lokr, lycoris.kohya.")


def import_network_module(name: str) -> ModuleType:
    """Import a network module, and say in the log where it came from.

    Raises:
        UserError: there is no such module, it fails when it is imported, or it is no network module.
    """
    where = f"{_OPTION} {name}"
    problem = find_module(name)
    if problem is not None:
        raise UserError(problem.what, problem.hint, where=problem.where)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - a module of the user's own may fail in any way
        raise UserError(f"fails when it is imported ({type(error).__name__}: {error})", where=where) from error
    missing = [function for function in _NEEDED if not callable(getattr(module, function, None))]
    if missing:
        raise UserError(f"is no network module: it has no {' and no '.join(missing)}", where=where)
    logger.info("network module %s from %s", name, getattr(module, "__file__", "the interpreter"))
    return module


def argument_problems(
    name: str, module: ModuleType, dim: int | None, alpha: float, arguments: Mapping[str, str]
) -> Iterator[Problem]:
    """Yield what the module itself says against `--network_args`, where it can be asked."""
    check: Callable[..., Iterator[Problem]] | None = getattr(module, "check_network_args", None)
    if check is not None:
        yield from check(dim, alpha, arguments)
    elif name == "lycoris.kohya":
        for key in arguments:
            if key not in LYCORIS_ARGS:
                near = nearest(key, LYCORIS_ARGS)
                hint = f"Did you mean {near}?" if near else f"It reads {', '.join(sorted(LYCORIS_ARGS))}."
                yield Problem("--network_args", f"lycoris.kohya reads no {key!r}", hint)


def float8_problems(name: str, arguments: Mapping[str, str]) -> Iterator[Problem]:
    """Yield why a module cannot work on weights kept in 8 bits."""
    if name == "lycoris.kohya" and arguments.get("bypass_mode", "").lower() not in ("true", "1"):
        what = "LyCORIS calculates in the type of the base weights, which 8 bits are too few for"
        yield Problem("--fp8_base", what, "Add bypass_mode=True to --network_args, or use a module of networks.")


def require_network(network: Any, name: str) -> Any:
    """Return what a module created, after a look at its methods.

    Raises:
        UserError: the module created nothing, or an object without the methods that training calls.
    """
    if network is None:
        raise UserError("created no network", "Its own messages above may say why.", where=f"{_OPTION} {name}")
    missing = [method for method in _METHODS if not callable(getattr(network, method, None))]
    if missing:
        raise UserError(f"its network has no method {missing[0]}", where=f"{_OPTION} {name}")
    return network


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
