"""Optimizers and schedules are named by import paths; here a name is checked without importing what it names.

Importing torch or bitsandbytes takes seconds, and a misspelt name or argument should be reported at once. So the class
is looked up in the source text of its module. What cannot be decided that way (compiled modules, names made at run
time) counts as correct here and is found out when the class is imported.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library import option_values
from library.errors import UserError

logger = logging.getLogger(__name__)

_MOST_HOPS = 8
"""Imports and base classes that are followed from the module that the user named."""

_DISTRIBUTIONS = {"lion_pytorch": "lion-pytorch", "prodigyplus": "prodigy-plus-schedule-free"}
"""Names on the package index where they differ from those in Python."""


class NotFound(LookupError):
    """The package, module or class that an import path names does not exist; the text says which, for a message."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Signature:
    """Arguments of a class after the first one (parameters, or an optimizer)."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    takes_any: bool

    def complaints(self, given: Iterable[str]) -> list[str]:
        """Say what is wrong with the names of the arguments `given`."""
        found = []
        given = list(given)
        for name in given:
            if name not in self.names and not self.takes_any:
                near = nearest(name, self.names)
                known = f"did you mean {near}?" if near else f"it takes {', '.join(self.names) or 'none'}"
                found.append(f"there is no argument {name}: {known}")
        found.extend(f"the argument {name} is needed" for name in self.required if name not in given)
        return found


def read_signature(import_path: str) -> Signature | None:
    """Return the arguments of the class `import_path` names, or None where only an import can tell.

    Raises:
        NotFound: if the package is not installed, or has no such module or class.
    """
    *modules, name = import_path.split(".")
    found = _find_class(modules, name, _MOST_HOPS)
    return None if found is None else _signature(*found)


def import_class(import_path: str, where: str) -> Any:
    """Import the class that `import_path` names.

    Raises:
        UserError: naming `where` (the option), if it cannot be imported.
    """
    module_name, _, name = import_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{import_path} cannot be imported ({error})", install_hint(import_path), where=where
        ) from error
    if not isinstance(found, type):
        raise UserError(f"{import_path} is not a class", where=where)
    if not import_path.startswith(("torch.", "transformers.")):
        logger.info(
            "%s is taken from %s", import_path, getattr(sys.modules[module_name], "__file__", "a built-in module")
        )
    return found


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the one of `known` that is most like `name`, however it is capitalised, or None."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = option_values.nearest(name.lower(), by_lower, cutoff=0.6)
    return by_lower[near] if near else None


def install_hint(import_path: str) -> str:
    """Say how the package of an import path is installed."""
    package = import_path.partition(".")[0]
    return f"Run: pip install {_DISTRIBUTIONS.get(package, package)}"


@dataclass(frozen=True, slots=True)
class _Module:
    """Source of one module: its dotted name in parts, whether it is a package, and its syntax tree."""

    parts: tuple[str, ...]
    is_package: bool
    tree: ast.Module

    def package_of(self, level: int) -> tuple[str, ...]:
        """Return the package that an import with `level` dots starts from."""
        return self.parts[: len(self.parts) - level + self.is_package]


def _find_class(modules: Iterable[str], name: str, hops: int) -> tuple[_Module, ast.ClassDef] | None:
    module = _read_module(tuple(modules))
    if module is None or hops == 0:
        return None
    undecided = False
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                undecided |= alias.name == "*"
                if (alias.asname or alias.name) == name:
                    start = module.package_of(node.level) if node.level else ()
                    return _find_class((*start, *(node.module or "").split(".")), alias.name, hops - 1)
        else:
            undecided |= isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
            undecided |= isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
    if undecided:
        return None
    public = [node.asname or node.name for node in ast.walk(module.tree) if isinstance(node, ast.alias)]
    public += [node.name for node in module.tree.body if isinstance(node, ast.ClassDef)]
    near = nearest(name, public)
    raise NotFound(f"{'.'.join(module.parts)} has no class {name}", f"Did you mean {near}?" if near else "")


def _read_module(parts: tuple[str, ...]) -> _Module | None:
    """Read the source of a module, importing none of its parents; None if there is no source to read."""
    parts = tuple(part for part in parts if part)
    path, is_package = _module_file(parts)
    if path is None:
        return None
    try:
        return _Module(parts, is_package, ast.parse(path.read_bytes()))
    except (OSError, SyntaxError, ValueError):
        return None


def _module_file(parts: tuple[str, ...]) -> tuple[Path | None, bool]:
    try:
        spec = importlib.util.find_spec(parts[0])
    except ValueError:  # a module without a specification, such as the running script
        return None, False
    if spec is None:
        raise NotFound(f"the package {parts[0]} is not installed", install_hint(parts[0]))
    if len(parts) == 1 or not spec.submodule_search_locations:
        source = Path(spec.origin) if spec.origin else None
        readable = source is not None and source.suffix == ".py"
        return (source if readable else None), bool(spec.submodule_search_locations)
    for root in spec.submodule_search_locations:
        folder = Path(root).joinpath(*parts[1:])
        if (folder / "__init__.py").is_file():
            return folder / "__init__.py", True
        if folder.with_suffix(".py").is_file():
            return folder.with_suffix(".py"), False
        if folder.is_dir() or any(folder.parent.glob(f"{folder.name}.*")):
            return None, False  # a namespace package or a compiled module
    raise NotFound(f"the package {parts[0]} has no module {'.'.join(parts)}")


def _signature(module: _Module, found: ast.ClassDef, hops: int = _MOST_HOPS) -> Signature | None:
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return _arguments(node.args)
    if hops == 0 or len(found.bases) != 1 or not isinstance(found.bases[0], ast.Name):
        return None
    try:
        base = _find_class(module.parts, found.bases[0].id, hops - 1)
    except NotFound:
        return None
    return None if base is None else _signature(*base, hops - 1)


def _arguments(arguments: ast.arguments) -> Signature:
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    without_default = positional[: len(positional) - len(arguments.defaults)]
    keywords = [argument.arg for argument in arguments.kwonlyargs]
    needed = [
        argument.arg
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    ]
    # The first two are the object itself and what it works on.
    return Signature(tuple(positional[2:] + keywords), tuple(without_default[2:] + needed), arguments.kwarg is not None)
