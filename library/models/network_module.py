"""Network modules by name: importing them, and what goes wrong inside those that are not ours.

A module offers `create_network` and `create_network_from_weights`, and returns an object with a known set of methods.
These names are a public interface: modules written for other trainers (LyCORIS, or a user's own) plug in here.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from library.cli import TRACEBACK_VARIABLE
from library.errors import Problem, StopTraining, UserError
from library.models import lycoris_args

if TYPE_CHECKING:
    from types import ModuleType

    from torch import nn

logger = logging.getLogger(__name__)

MODULES = (
    "networks.lora",
    "networks.lora_fa",
    "networks.dylora",
    "networks.oft",
    "networks.loha",
    "networks.lokr",
    "lycoris.kohya",
)
"""What `--network_module` usually names, and whose files are known here; any module of the same protocol works."""

HYPERNETWORK = "networks.hypernetwork"
"""Its files have a layout of their own."""

OFFERED = (*MODULES, HYPERNETWORK)
"""What messages and help name."""

_OPTION = "--network_module"
_NEEDED = ("create_network", "create_network_from_weights")


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
    return Problem(where, f"no such Python module{f' ({why})' if why else ''}", f"There are {', '.join(OFFERED)}.")


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
    name: str,
    module: ModuleType,
    size: tuple[int | None, float | None],
    arguments: Mapping[str, str],
    base: str,
) -> Iterator[Problem]:
    """Yield what the module itself says against `--network_args`, where it can be asked.

    Args:
        name: of the module.
        module: imported.
        size: rank and alpha.
        arguments: the `--network_args`.
        base: family of the model that the network is for, such as `sd1`.
    """
    check: Callable[..., Iterator[Problem]] | None = getattr(module, "check_network_args", None)
    if check is not None:
        yield from check(*size, arguments, base=base)
    elif name == lycoris_args.NAME:
        yield from lycoris_args.lycoris_problems(module, arguments)


def check_layers(module: ModuleType, denoiser: nn.Module, arguments: Mapping[str, str]) -> None:
    """Let a module see whether its arguments leave layers of the denoiser, which may be one without weights.

    Raises:
        UserError: they leave none.
    """
    check: Callable[..., None] | None = getattr(module, "check_layers", None)
    if check is not None:
        check(denoiser, arguments)


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
