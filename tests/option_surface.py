"""What holds of the options of every script: users' command lines work, each is explained and has an effect."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from library.option_values import type_name
from library.retired import NO_EFFECT_IN
from tests.conftest import ROOT

CONDITIONS = ("needs", "matters_when", "excludes", "implies", "means")


def golden(script: str) -> dict[str, dict[str, Any]]:
    """The options that users' command lines for a script were written for."""
    return json.loads((ROOT / "tests" / "golden" / f"{script}_options.json").read_text(encoding="utf-8"))


@cache
def offered(script: str) -> dict[str, Any]:
    """The options that a script has on its command line, by name."""
    found = import_module(script).Options.options()
    return {name: option for name, option in found.items() if option.offered}


def differences(script: str) -> list[str]:
    """Say where types, defaults and choices of a script's options are not those of its golden file."""
    return [name for name, wanted in golden(script).items() if facts(offered(script)[name]) != _in_order(wanted)]


def facts(option: Any) -> dict[str, Any]:
    """Type, default and choices of an option as golden files have them."""
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    return _in_order({"type": type_name(option.annotation), "default": default, "choices": option.choices or ()})


def _in_order(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": found["type"], "default": found["default"], "choices": sorted(map(str, found.get("choices", ())))}


def unexplained(script: str) -> list[str]:
    """Name options whose help is no sentence, and conditions about options that the script has not."""
    options, found = offered(script), []
    for name, option in options.items():
        text = option.notes["help"]
        begins = text[0].isupper() or text.split()[0].strip(":,.`-").islower()
        found += [] if begins and text.endswith(".") else [name]
        found += [
            f"{name}: {note} names {other}"
            for note in CONDITIONS
            for other in option.notes.get(note, {})
            if other not in options
        ]
    return found


def idle(script: str, files: Iterable[Path], honoured: Iterable[str] = ()) -> list[str]:
    """Name options that nothing in these files reads, and of which nobody says so."""
    words: set[str] = set().union(*map(words_of, files))
    # checkpoints/metadata.py reads f"metadata_{name}" for each name of its table.
    words |= {f"metadata_{word}" for word in words}
    return [
        name
        for name, option in offered(script).items()
        if option.field_name not in words | set(honoured) and script not in NO_EFFECT_IN.get(name, {})
    ]


@cache
def words_of(file: Path) -> set[str]:
    """Every attribute name and text constant of the code; of declarations and checks only what properties read."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    if file.name.startswith(("options", "option_set", "checks", "retired")):
        properties = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.decorator_list]
        nodes = [inner for node in properties for inner in ast.walk(node)]
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return attributes | {text for text in texts if text.isidentifier()}
