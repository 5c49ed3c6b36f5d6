"""Checks what declarations say about combinations: `needs`, `excludes`, `matters_when`, and `retired`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.errors import Problem
from library.option_groups import COMMAND_LINE, Option, OptionSet, switched_on
from library.retired import NO_EFFECT_IN


@dataclass
class Relations:
    """What is wrong, what has no effect, and what is worth saying."""

    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def check_relations(options: OptionSet, *, only: str | None = None) -> Relations:
    """Check every option that was switched on and differs from its default.

    Args:
        options: The options of a script.
        only: Name of the one option to check; None for all.
    """
    found = Relations()
    values = options.values()
    declared = type(options).options()
    for name, option in declared.items():
        value = values[name]
        if only in (None, name) and switched_on(value) and value != option.default:
            _check_one(option, values, options, found)
    return found


def _check_one(option: Option, values: Mapping[str, Any], options: OptionSet, found: Relations) -> None:
    notes = option.notes
    if option.offered and not _satisfied(notes.get("needs", {}), values):
        found.errors.append(Problem(option.flag, f"needs {_described(notes['needs'], values)}"))
    if option.offered and not _satisfied(notes.get("matters_when", {}), values):
        text = f"has no effect without {_described(notes['matters_when'], values)}"
        found.warnings.append(Problem(option.flag, text))
    for other, reason in notes.get("excludes", {}).items():
        if switched_on(values.get(other)):
            found.errors.append(Problem(option.flag, f"cannot be combined with --{other}: {reason}"))
    for target, value in {**notes.get("implies", {}), **notes.get("means", {})}.items():
        if target not in options.given and option.name in options.given:
            shown = f"switches --{target} on" if value is True else f"means --{target} {value}"
            found.notices.append(f"{option.flag} {shown}")
    if option.secret and options.given.get(option.name) == COMMAND_LINE:
        found.notices.append(f"{option.flag}: others on this machine can read it in the list of processes")
    no_effect = NO_EFFECT_IN.get(option.name, {}).get(options.script)
    if no_effect is not None:
        problem = Problem(option.flag, f"has no effect in {options.script}.py: {no_effect.reason}")
        (found.errors if no_effect.refuse else found.warnings).append(problem)


def _satisfied(conditions: Mapping[str, tuple[Any, ...]], values: Mapping[str, Any]) -> bool:
    if not conditions:
        return True
    return any(
        values[name] in wanted if wanted else switched_on(values[name])
        for name, wanted in conditions.items()
        if name in values
    )


def _described(conditions: Mapping[str, tuple[Any, ...]], values: Mapping[str, Any]) -> str:
    parts = [
        f"--{name} {' or '.join(str(value) for value in wanted)}" if wanted else f"--{name}"
        for name, wanted in conditions.items()
        if name in values
    ]
    return " or ".join(parts)
