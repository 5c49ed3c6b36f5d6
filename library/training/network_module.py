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
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from library.cli import TRACEBACK_VARIABLE
from library.errors import Problem, StopTraining, UserError
from library.training import lycoris_args

if TYPE_CHECKING:
    from types import ModuleType

    from library.data.dataset_spec import DatasetSpec

logger = logging.getLogger(__name__)

_OPTION = "--network_module"
PRESERVE = "diff_output_preservation"
"""Custom attribute of a subset: what the model drew without the network is the target for its images."""

_NEEDED = ("create_network", "create_network_from_weights")
_METHODS = ("apply_to", "load_weights", "save_weights", "prepare_optimizer_params", "get_trainable_params")


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
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a module of the user's own may fail in any way
        raise UserError(f"fails when it is imported ({_short(error)})", where=where) from error
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
    elif name == lycoris_args.NAME:
        yield from lycoris_args.lycoris_problems(module, arguments)


@contextmanager
def calling(name: str, function: str) -> Iterator[None]:
    """Context of a call into a network module: what goes wrong in the code of one that is not ours becomes one line.

    An error in a module of ours, or elsewhere, is a bug of the toolkit, and is reported as such.

    Args:
        name: of the module.
        function: that is called.

    Raises:
        UserError: naming the module, the function and the error.
    """
    try:
        yield
    except (UserError, StopTraining):
        raise
    except Exception as error:  # noqa: BLE001 - a module of the user's own may fail in any way
        if is_ours(name) or type(error).__name__ == "OutOfMemoryError" or not _passed_through(name, error):
            raise
        hint = f"{TRACEBACK_VARIABLE}=1 in the environment shows where."
        raise UserError(f"its {function} failed ({_short(error)})", hint, where=f"{_OPTION} {name}") from error


def _passed_through(name: str, error: BaseException) -> bool:
    """Whether an error came out of the code of a module or of its package, or lies in how it was called."""
    package = name.partition(".")[0]
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = {str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames}
    return package in packages or isinstance(error, TypeError)


def is_ours(name: str) -> bool:
    """Whether a network module is one of this toolkit's."""
    return name.partition(".")[0] == "networks"


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


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
