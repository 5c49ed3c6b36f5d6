"""Reads dataset configuration files: TOML or JSON in UTF-8, bounded; messages show the place and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from library.config_file import parse_toml
from library.errors import UserError
from library.text_files import read_text


def read_table(path: str) -> dict[str, Any]:
    """Return the top-level table of a `.toml` or `.json` file.

    Raises:
        UserError: The file is missing, too large, not UTF-8, of another kind, or does not parse.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".toml", ".json"):
        raise UserError(f"not supported config file format {suffix!r}", "Use a .toml or .json file.", where=path)
    text = read_text(path)
    table = parse_toml(text, Path(path)) if suffix == ".toml" else parse_json(text, path)
    if not isinstance(table, dict):
        raise UserError("the top level is not a table", "Start with [general] or [[datasets]].", where=path)
    return table


def parse_json(text: str, where: str) -> Any:
    """Parse JSON without the liberties of Python's parser: no NaN, no duplicate keys.

    Raises:
        UserError: It does not parse; the message has line and column.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except json.JSONDecodeError as error:
        raise UserError(f"JSON error, line {error.lineno}, column {error.colno}: {error.msg}", where=where) from error
    except RecursionError as error:
        raise UserError("nested too deeply", where=where) from error
    except ValueError as error:
        raise UserError(str(error), where=where) from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _value in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return table


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
