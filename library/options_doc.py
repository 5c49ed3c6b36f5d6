"""Writes docs/options.md from the declarations: `python -m library.options_doc`, run beside the entry scripts."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.option_groups import Option, OptionSet
from library.option_help import group_headings, shown_default
from library.option_values import type_name
from library.retired import NO_EFFECT_IN, SPELLINGS

SCRIPTS = ("train_db",)
"""Entry scripts whose options are documented."""

TARGET = Path(__file__).resolve().parent.parent / "docs" / "options.md"

_INTRODUCTION = """# Options

This page is made from the declarations in the code: edit those and run `python -m library.options_doc`.

Every option can also stand in a TOML file that `--config_file` names (`learning_rate = 1e-6`, flags as
`enable_bucket = true`; tables are allowed and their names mean nothing). The command line wins over the file. A flag
that the file switches on can be switched off with `--flag=false`. Options may not be abbreviated.

*resume* says whether an option may differ when a run is resumed: `exact` options change what is computed, and must be
the same unless `--resume_override` names them (or their group, the heading); `free` ones may change.
"""


def document(sets: Mapping[str, type[OptionSet]]) -> str:
    """Return the page for scripts by name."""
    return _INTRODUCTION + "".join(_script(name, options_class) for name, options_class in sets.items())


def _script(name: str, options_class: type[OptionSet]) -> str:
    parts = [f"\n## {name}.py\n"]
    offered = [option for option in options_class.options().values() if option.offered]
    for title, about in group_headings(options_class).items():
        members = [option for option in offered if option.title == title]
        if members:
            parts.append(
                f"\n### {title}\n\n{about}\n\n| option | type | default | effect | resume |\n|---|---|---|---|---|\n"
            )
            parts.extend(_row(option, name) for option in members)
    return "".join(parts)


def _row(option: Option, script: str) -> str:
    kind = type_name(option.annotation)
    if option.choices:
        kind = ", ".join(f"`{choice}`" for choice in option.choices)
    default = shown_default(option.default)
    effect = " ".join([option.notes.get("help", ""), *_remarks(option, script)])
    cells = [
        f"`{option.flag}`",
        kind,
        f"`{default}`" if default else "",
        effect,
        "exact" if option.exact else "free",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _remarks(option: Option, script: str) -> list[str]:
    notes = option.notes
    remarks = []
    if "needs" in notes:
        remarks.append(f"Needs {_others(notes['needs'])}.")
    if "matters_when" in notes:
        remarks.append(f"Only with {_others(notes['matters_when'])}.")
    remarks += [f"Not with `--{other}`." for other in notes.get("excludes", {})]
    remarks += [f"`--{old}` is understood too." for old, new in SPELLINGS.items() if new == option.name]
    if option.secret:
        remarks.append("Never written to files or logs.")
    if "scope" in notes and notes["scope"]:
        levels = ", ".join(notes["scope"])
        remarks.append(f"Key `{notes.get('toml', option.field_name)}` of dataset files ({levels}).")
    no_effect = NO_EFFECT_IN.get(option.name, {}).get(script)
    if no_effect is not None:
        remarks.append(f"{'Refused' if no_effect.refuse else 'No effect'} here: {no_effect.reason}.")
    return remarks


def _others(conditions: Mapping[str, tuple[Any, ...]]) -> str:
    return " or ".join(
        f"`--{name}`" + (" " + " or ".join(f"`{value}`" for value in wanted) if wanted else "")
        for name, wanted in conditions.items()
    )


def option_sets() -> dict[str, type[OptionSet]]:
    """Import the entry scripts, which must be on the path, and return their options."""
    found = {}
    for name in SCRIPTS:
        classes = inspect.getmembers(importlib.import_module(name), inspect.isclass)
        found[name] = next(
            member for _, member in classes if issubclass(member, OptionSet) and member.__module__ == name
        )
    return found


def main() -> None:
    """Write the page."""
    from library.files import write_text

    write_text(TARGET, document(option_sets()))


if __name__ == "__main__":
    main()
