"""Options that are given by their place among the bare words of a command line: handing words out, and usage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from library.errors import Problem
from library.option_groups import Option, OptionSet
from library.option_values import is_list

_SHOWN = 5


def places_of(options_class: type[OptionSet]) -> list[Option]:
    """Return the options of a script that are given by their place, in order."""
    return [option for option in options_class.options().values() if option.positional]


def place_text(option: Option) -> str:
    """Return how usage shows an option that is given by its place: `NAME`, `[NAME]` or `NAME [NAME ...]`."""
    if is_list(option.annotation):
        return f"{option.name} [{option.name} ...]"
    return f"[{option.name}]" if option.optional else option.name


def usage(script: str, places: Sequence[Option]) -> str:
    """Return the first line of help: the script, the words it needs, and that there are options."""
    return " ".join([f"{script}.py", *map(place_text, places), "[options]"])


def expected(places: Iterable[Option]) -> str:
    """Return a hint that names the words a script takes."""
    return f"Expected: {' '.join(map(place_text, places))}."


def hand_out(places: Sequence[Option], words: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Give each place its word, and a list all that are left; return the values by name and what is too much."""
    values: dict[str, Any] = {}
    left = list(words)
    for option in places:
        if left and is_list(option.annotation):
            values[option.name], left = left, []
        elif left:
            values[option.name] = left.pop(0)
    if not left:
        return values, []
    shown = ", ".join(repr(word) for word in left[:_SHOWN]) + (", ..." if len(left) > _SHOWN else "")
    what = f"unexpected argument{'s' if len(left) > 1 else ''} {shown}"
    return values, [Problem("", what, f"{expected(places)} Put quotes around values that contain spaces.")]


def without_value(places: Iterable[Option], values: Mapping[str, Any]) -> list[Option]:
    """Return the places that need a word and have none."""
    return [option for option in places if option.name not in values and not option.optional]
