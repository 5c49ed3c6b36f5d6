"""Turns what a user wrote, text on the command line or a value in a TOML file, into the declared type of an option."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Collection
from typing import Any

_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


class BadValue(ValueError):
    """A value that an option cannot take; the text says what is wrong, for use after the option's name."""


def split_optional(annotation: Any) -> tuple[Any, bool]:
    """Return the annotation without `None`, and whether `None` was allowed: `int | None` gives `(int, True)`."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation, False
    members = [member for member in typing.get_args(annotation) if member is not type(None)]
    optional = len(members) < len(typing.get_args(annotation))
    if len(members) == 1:
        return members[0], optional
    return typing.Union[tuple(members)], optional  # noqa: UP007 - built from a list


def is_list(annotation: Any) -> bool:
    """Tell whether the option takes any number of values (`tuple[str, ...]`)."""
    return typing.get_origin(annotation) is tuple and typing.get_args(annotation)[-1] is Ellipsis


def type_name(annotation: Any) -> str:
    """Return how documentation names the type of an option."""
    if is_list(annotation):
        return f"list of {type_name(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is tuple:
        return "two numbers"
    if annotation == int | float:
        return "int or float"
    return {bool: "flag", int: "int", float: "float", str: "text"}.get(annotation, "value")


def convert(value: Any, annotation: Any, custom: Callable[[Any], Any] | None) -> Any:
    """Return `value` as `annotation` demands.

    Args:
        value: Text from the command line, or any TOML/JSON value.
        annotation: The declared type without `None`.
        custom: Converter of the option itself, used in place of the rules for the type.

    Raises:
        BadValue: If the value does not fit.
    """
    if custom is not None:
        return custom(value)
    if is_list(annotation):
        return _sequence(value, typing.get_args(annotation)[0])
    if annotation == int | float:
        return int_or_float(value)
    plain: dict[Any, Callable[[Any], Any]] = {bool: _flag, int: _integer, float: _real, str: _text}
    if annotation not in plain:
        raise TypeError(f"no converter for {annotation!r}")
    return plain[annotation](value)


def check_choice(value: Any, choices: Collection[Any] | None) -> None:
    """Raise `BadValue` when `value` is not one of `choices`; name the nearest one."""
    if choices is None or value is None or value in choices:
        return
    listed = ", ".join(str(choice) for choice in choices)
    near = nearest(str(value), [str(choice) for choice in choices])
    hint = f" (did you mean {near!r}?)" if near else ""
    raise BadValue(f"{value!r} is not one of {listed}{hint}")


def nearest(name: str, known: Collection[str], *, cutoff: float = 0.75) -> str | None:
    """Return the member of `known` most like `name`, or None when none is close."""
    import difflib

    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if isinstance(value, (str, int)) and word in _TRUE:
        return True
    if isinstance(value, (str, int)) and word in _FALSE:
        return False
    raise BadValue(f"expected true or false, got {value!r}")


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise BadValue(f"expected a whole number, got {value!r}")
    try:
        return int(_limited(value)) if isinstance(value, (int, str)) else _whole(value)
    except (ValueError, OverflowError):
        raise BadValue(f"expected a whole number, got {value!r}") from None


def _limited(value: Any) -> Any:
    # int() of a text with thousands of digits takes quadratic time.
    if isinstance(value, str) and len(value) > 100:
        raise ValueError("too long")
    return value


def _whole(value: float) -> int:
    if not value.is_integer():
        raise ValueError("not whole")
    return int(value)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise BadValue(f"expected a number, got {value!r}")
    try:
        number = float(_limited(value))
    except (ValueError, OverflowError):
        raise BadValue(f"expected a number, got {value!r}") from None
    if not math.isfinite(number):
        raise BadValue(f"expected a finite number, got {value!r}")
    return number


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise BadValue(f"expected text, got {value!r}")


def _sequence(value: Any, member: Any) -> tuple[Any, ...]:
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(convert(item, member, None) for item in items)


def int_or_float(value: Any) -> int | float:
    """Read a number of steps or a share of the run: `100` is steps, `0.1` and `5%` (0.05) are shares.

    Raises:
        BadValue: If it is neither; `100.0` is refused, since a share of 100 cannot be meant.
    """
    if isinstance(value, str) and value.strip().endswith("%"):
        return _real(value.strip()[:-1]) / 100
    number = _real(value)
    if isinstance(value, int):
        return value
    if number < 1:
        return number
    try:
        return int(value) if isinstance(value, str) else _whole(value)
    except ValueError:
        raise BadValue(f"expected whole steps, a share below 1 or a percentage, got {value!r}") from None


def number_pair(value: Any) -> tuple[float, float]:
    """Read `low,high` or a list of two numbers with low <= high."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        raise BadValue(f"expected two numbers such as 2.0,4.0, got {value!r}")
    low, high = (_real(part) for part in parts)
    if low > high:
        raise BadValue(f"the first number must not be larger than the second, got {value!r}")
    return low, high


def resolution_text(value: Any) -> str:
    """Return a resolution, `512`, `"512,768"` or `[512, 768]` (width, height), as text: `"512"` or `"512,768"`."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        parts = [parts]
    try:
        numbers = [_integer(part.strip() if isinstance(part, str) else part) for part in parts]
    except BadValue:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise BadValue(f"expected a size such as 512 or width,height such as 768,512, got {value!r}")
    return ",".join(str(number) for number in numbers)


def resolution_wh(text: str) -> tuple[int, int]:
    """Return (width, height) of a resolution as `resolution_text` accepts it."""
    numbers = [int(part) for part in resolution_text(text).split(",")]
    return numbers[0], numbers[-1]
