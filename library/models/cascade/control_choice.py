"""Choosing a filter by name, reading its parameters, and filters of the user's own.

Light: neither torch nor what filters need is imported before a filter is made.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import random
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from library.errors import Problem, UserError, raise_problems
from library.models.cascade.control_filters import (
    FILTERS,
    Array,
    ControlFilter,
    Encode,
    Picture,
    PlainFilter,
    levels,
)
from library.models.cascade.control_names import FILTER, OFFICIAL_NAMES, PARAMS, is_own
from library.option_values import BadValue, convert, nearest, number_pair, split_optional

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_SPELLINGS = {"thresold": "threshold"}
_NOTHING = ("null", "none", "None")


def filter_problems(name: str, params: Sequence[str]) -> Iterator[Problem]:
    """Yield why no filter of this name can be made with these parameters, without importing anything of the user's."""
    given, problems = _split(params)
    yield from problems
    if is_own(name):
        module, _, found = _dotted(name).rpartition(".")
        if not module or not all(part.isidentifier() for part in (*module.split("."), found)):
            yield Problem(FILTER, f"{name!r} is not a name such as my_filters:Sketch")
        return
    if OFFICIAL_NAMES.get(name, name) not in FILTERS:
        near = nearest(name.lower(), list(FILTERS), cutoff=0.6)
        hint = f"Did you mean {near}?" if near else f"There are {', '.join(FILTERS)}, or module:Class of your own."
        yield Problem(FILTER, f"there is no filter {name!r}", hint)
        return
    if not problems:
        yield from _made(_class_of(name), given)[1]


def make_filter(name: str, params: Sequence[str] = ()) -> ControlFilter:
    """Return the filter of a name.

    Args:
        name: a row of `FILTERS`, its name in official files, or `module:Class` of the user's own.
        params: `name=value`; values as in JSON, or plain text.

    Raises:
        UserError: there is no such filter, or a parameter is wrong.
    """
    raise_problems(list(filter_problems(name, params)))
    given, _ = _split(params)
    if is_own(name):
        return _own_filter(_dotted(name), given)
    made: ControlFilter = _made(_class_of(name), given)[0]
    return made


# Parameters --------------------------------------------------------------------------------------------------------


def _split(params: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    given: dict[str, Any] = {}
    problems = []
    for item in params:
        name, separator, text = item.partition("=")
        name = _SPELLINGS.get(name, name)
        if not separator or not name.isidentifier():
            problems.append(Problem(PARAMS, f"{item!r} is not name=value", "Write, for example, resize=224."))
        elif name in given:
            problems.append(Problem(PARAMS, f"{name!r} is given twice", "Keep one of them."))
        else:
            given[name] = _value(text)
    return given, problems


def _value(text: str) -> Any:
    if text in _NOTHING:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _class_of(name: str) -> type[Any]:
    return FILTERS[OFFICIAL_NAMES.get(name, name)]()


def _made(kind: type[Any], given: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """Return the filter, or None and what is wrong with its parameters."""
    hints = typing.get_type_hints(kind)
    fields = [item.name for item in dataclasses.fields(kind)]
    values, problems = {}, []
    for name, value in given.items():
        if name not in fields:
            near = nearest(name, fields, cutoff=0.6)
            hint = f"Did you mean {near}?" if near else f"There are {', '.join(fields)}."
            problems.append(Problem(f"{PARAMS} {name}", "the filter has no such parameter", hint))
            continue
        try:
            values[name] = _typed(value, hints[name])
        except BadValue as error:
            problems.append(Problem(f"{PARAMS} {name}", str(error)))
    if problems:
        return None, problems
    made = kind(**values)
    wrong = made.problem()
    if not wrong:
        return made, []
    name, _, what = wrong.partition(": ")
    return None, [Problem(f"{PARAMS} {name}", what)]


def _typed(value: Any, annotation: Any) -> Any:
    plain, optional = split_optional(annotation)
    if value is None:
        if optional:
            return None
        raise BadValue("cannot be null")
    return number_pair(value) if typing.get_origin(plain) is tuple else convert(value, plain, None)


# Filters of the user's own -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnFilter(PlainFilter):
    """A filter of the user's own: called with pictures [N,3,H,W] in [0,1], in the main process, on the device.

    Whatever it draws from the global generators of torch, numpy and Python follows from the place in the run.
    """

    target: str
    params: str
    num_channels: int = 0

    def prepare(self, picture: Picture, rng: random.Random, mask: NDArray[np.bool_] | None = None) -> Array:
        """Return the picture in [0,1]."""
        return levels(picture)

    def finish(self, prepared: Tensor, encode: Encode, seed: int) -> Tensor:
        """Call the user's object.

        Raises:
            UserError: it fails, or returns something else than a condition.
        """
        import torch

        where = f"{FILTER} {self.target}"
        try:
            with _seeded(seed, prepared.device), torch.no_grad():
                found = _own_object(self.target, self.params)(prepared)
        except Exception as error:  # noqa: BLE001 - code of the user's own may fail in any way
            what = f"fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            raise UserError(what, where=where) from error
        # It may return what it looks like, too.
        condition = found[0] if isinstance(found, tuple) and found else found
        wanted = f"[{len(prepared)},{self.num_channels},h,w]"
        if not isinstance(condition, torch.Tensor) or condition.dim() != 4:
            raise UserError(f"returns {type(condition).__name__}, not a tensor {wanted}", where=where)
        if condition.shape[:2] != (len(prepared), self.num_channels):
            raise UserError(f"returns a tensor {list(condition.shape)}, not {wanted}", where=where)
        return condition.detach().to(prepared.device, torch.float32)


def _dotted(name: str) -> str:
    return name.replace(":", ".")


def _own_filter(target: str, given: Mapping[str, Any]) -> OwnFilter:
    params = json.dumps(dict(given), sort_keys=True)
    channels = getattr(_own_object(target, params), "num_channels", None)
    if callable(channels):
        channels = channels()
    if not isinstance(channels, int) or channels < 1:
        raise UserError("has no num_channels, the channels of what it returns", where=f"{FILTER} {target}")
    return OwnFilter(target, params, channels)


@lru_cache(maxsize=8)
def _own_object(target: str, params: str) -> Any:
    module_name, _, name = target.rpartition(".")
    where = f"{FILTER} {target}"
    try:
        module = importlib.import_module(module_name)
        made = getattr(module, name)(**json.loads(params))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - code of the user's own may fail in any way
        what = f"cannot be made ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise UserError(what, "Is its folder in PYTHONPATH?", where=where) from error
    if not callable(made):
        raise UserError("cannot be called with pictures: it has no __call__", where=where)
    logger.info("ControlNet filter %s from %s", target, getattr(module, "__file__", "the interpreter"))
    return made


@contextmanager
def _seeded(seed: int, device: Any) -> Iterator[None]:
    """Seed the global generators inside the block; afterwards they are as before."""
    import torch

    from library.draws import seed_generators

    python, numbers = random.getstate(), np.random.get_state()
    cards = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cards):
            seed_generators(seed >> 1)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
