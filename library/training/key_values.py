"""Arguments given as `name=value`, such as `--optimizer_args weight_decay=0.01 betas=0.9,0.999`."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from library.errors import Problem

_LONGEST = 2000
"""Characters of one argument: far more than any optimizer takes, far less than can upset Python's parser."""

_PLAIN_WORDS = {"true": "True", "false": "False", "none": "None", "null": "None", "yes": "True", "no": "False"}


def parse_arguments(items: Sequence[str] | None, where: str) -> tuple[dict[str, Any], list[Problem]]:
    """Read `name=value` items whose values are Python literals: numbers, tuples, True, None, quoted strings.

    Args:
        items: What the user gave.
        where: The option, for messages.

    Returns:
        The arguments that could be read, and a problem for each of the others.
    """
    arguments: dict[str, Any] = {}
    problems: list[Problem] = []
    for item in items or ():
        name, equals, text = item.partition("=")
        name = name.strip()
        shown = item if len(item) <= 80 else item[:77] + "..."
        if not equals or not name.isidentifier():
            problems.append(Problem(where, f"{shown!r} is not of the form name=value", "No spaces around the `=`."))
        elif name in arguments:
            problems.append(Problem(where, f"{name} is given twice"))
        elif len(item) > _LONGEST:
            problems.append(Problem(where, f"the value of {name} is longer than {_LONGEST} characters"))
        else:
            try:
                arguments[name] = ast.literal_eval(text.strip())
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                problems.append(Problem(where, f"the value in {shown!r} is not a Python literal", _hint(name, text)))
    return arguments, problems


def _hint(name: str, text: str) -> str:
    meant = _PLAIN_WORDS.get(text.strip().lower())
    if meant:
        return f"Write {name}={meant}."
    return f"Numbers, tuples (0.9,0.999), True, False and None stand as they are; text needs quotes: \"{name}='text'\"."
