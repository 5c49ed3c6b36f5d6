"""Reads `--network_args`: every module has a table of the keys that it knows, and of how their values are read."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from library.errors import Problem, UserError, raise_problems
from library.option_values import BadValue, convert, nearest
from networks.adapter_base import Dropouts
from networks.param_groups import PlusRatios
from networks.targets import Target

WHERE = "--network_args"
DEFAULT_RANK, DEFAULT_ALPHA = 4, 1.0

Reader = Callable[[Any], Any]
"""Turns what the user wrote into a value; raises `BadValue` with a text that continues the key's name."""

Keys = Mapping[str, Reader]
"""The keys that a module knows, and their readers."""


def words(value: Any) -> tuple[str, ...]:
    """Read words between commas."""
    items = value if isinstance(value, (list, tuple)) else str(value).split(",")
    found = tuple(str(item).strip() for item in items)
    if not all(found):
        raise BadValue(f"holds an empty word, got {value!r}")
    return found


def patterns(value: Any) -> tuple[re.Pattern[str], ...]:
    """Read a regular expression, or a list of several as Python writes it."""
    items = [value]
    if isinstance(value, str) and value.startswith("["):
        try:
            items = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            items = [value]
    try:
        return tuple(re.compile(str(item)) for item in items)
    except re.error as error:
        raise BadValue(f"is no regular expression ({error}), got {value!r}") from None


def flag(value: Any) -> bool:
    """Read true or false; unlike in Python, the words False and 0 are false."""
    return bool(convert(value, bool, None))


def text(value: Any) -> str:
    """Read any text."""
    return str(value)


def whole(at_least: int = 0, at_most: int | None = None) -> Reader:
    """Return a reader of whole numbers in a range."""
    return lambda value: _in_range(convert(value, int, None), at_least, at_most)


def number(at_least: float | None = None, at_most: float | None = None) -> Reader:
    """Return a reader of numbers in a range."""
    return lambda value: _in_range(convert(value, float, None), at_least, at_most)


def share(value: Any) -> float:
    """Read how much is left out: at least 0, less than 1."""
    found = float(_in_range(convert(value, float, None), 0, None))
    if found >= 1:
        raise BadValue(f"must be less than 1, got {found:g}")
    return found


def choice(*words: str) -> Reader:
    """Return a reader of one of several words."""

    def read(value: Any) -> str:
        if value not in words:
            raise BadValue(f"expected one of {', '.join(words)}, got {value!r}")
        return str(value)

    return read


def _in_range(value: Any, at_least: float | None, at_most: float | None) -> Any:
    if at_least is not None and value < at_least:
        raise BadValue(f"must be at least {at_least:g}, got {value:g}")
    if at_most is not None and value > at_most:
        raise BadValue(f"must be at most {at_most:g}, got {value:g}")
    return value


PLUS_KEYS: Keys = {
    "loraplus_lr_ratio": number(0),
    "loraplus_unet_lr_ratio": number(0),
    "loraplus_text_encoder_lr_ratio": number(0),
}
CONV_KEYS: Keys = {"conv_dim": whole(0), "conv_alpha": number(0)}
FILTER_KEYS: Keys = {"module_filters": words, "include_patterns": patterns, "exclude_patterns": patterns}
"""Which layers of the U-Net, or of stage C, are adapted: by parts of their paths, or by expressions for whole paths."""

DROPOUT_KEYS: Keys = {"dropout": share, "rank_dropout": share, "module_dropout": share}
"""`dropout` is there for every module: the trainer passes `--network_dropout` by that name, too."""


def problems_of(kwargs: Mapping[str, Any], keys: Keys) -> Iterator[Problem]:
    """Yield what is wrong with arguments: keys that are not known, values that cannot be read."""
    for name, value in kwargs.items():
        reader = keys.get(name)
        if reader is None:
            near = nearest(name, tuple(keys), cutoff=0.6)
            hint = f"Did you mean {near}?" if near else f"It knows {', '.join(keys)}."
            yield Problem(WHERE, f"the network module knows no argument {name!r}", hint)
            continue
        try:
            _read(reader, value)
        except BadValue as error:
            yield Problem(WHERE, f"{name}: {error}")


def read_arguments(kwargs: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
    """Return the values of all `keys`; None for those that are not given (or given as `None`).

    Raises:
        UserError: naming everything that is wrong.
    """
    raise_problems(problems_of(kwargs, keys))
    return {name: _read(reader, kwargs.get(name)) for name, reader in keys.items()}


def _read(reader: Reader, value: Any) -> Any:
    if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "")):
        return None
    return reader(value.strip() if isinstance(value, str) else value)


def filtered(targets: Sequence[Target], values: Mapping[str, Any]) -> list[Target]:
    """Return the layers that `FILTER_KEYS` leave.

    A layer is adapted if its path contains one of `module_filters`, and matches none of `exclude_patterns` unless it
    matches one of `include_patterns`.

    Raises:
        UserError: none is left.
    """

    def matches(name: str, path: str) -> bool:
        return any(pattern.fullmatch(path) for pattern in values.get(name) or ())

    parts = values.get("module_filters") or ("",)
    kept = [
        target
        for target in targets
        if any(part in target.path for part in parts)
        and (not matches("exclude_patterns", target.path) or matches("include_patterns", target.path))
    ]
    if targets and not kept:
        given = ", ".join(name for name in FILTER_KEYS if values.get(name) is not None)
        hint = f"Paths look like {targets[0].path} and {targets[len(targets) // 2].path}."
        raise UserError(f"{given}: leave none of the {len(targets)} layers of the model", hint, where=WHERE)
    return kept


def dropouts_of(values: Mapping[str, Any], neuron_dropout: float | None = None) -> Dropouts:
    """Return the dropouts among arguments; `dropout` wins over what the trainer passes as `neuron_dropout`."""
    neuron = values.get("dropout")
    return Dropouts(
        neuron=(neuron_dropout if neuron is None else neuron) or 0.0,
        rank=values.get("rank_dropout") or 0.0,
        module=values.get("module_dropout") or 0.0,
    )


def plus_of(values: Mapping[str, Any]) -> PlusRatios:
    """Return the LoRA+ ratios among arguments."""
    return PlusRatios(
        every=values.get("loraplus_lr_ratio"),
        unet=values.get("loraplus_unet_lr_ratio"),
        text=values.get("loraplus_text_encoder_lr_ratio"),
    )


def rank_and_alpha(network_dim: int | None, network_alpha: float | None) -> tuple[int, float]:
    """Return the rank and the alpha of a network: without `network_dim` 4 and 1; an alpha of 0 or None is the rank.

    Raises:
        UserError: the rank is not positive.
    """
    if network_dim is None:
        network_dim, network_alpha = DEFAULT_RANK, DEFAULT_ALPHA if network_alpha is None else network_alpha
    if network_dim < 1:
        raise UserError(f"must be at least 1, got {network_dim}", where="--network_dim")
    return network_dim, float(network_alpha or network_dim)
