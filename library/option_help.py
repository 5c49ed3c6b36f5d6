"""The text of `--help`, made from the declarations."""

from __future__ import annotations

import inspect
import shutil
import sys
import textwrap
from typing import Any

from library.option_groups import Option, OptionSet
from library.option_places import places_of, usage
from library.option_values import is_list, type_name

_COLUMN = 34


def help_text(options_class: type[OptionSet]) -> str:
    """Return usage, description and all options of a script, by group, as wide as the terminal."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 130))
    lines = [f"usage: {usage(options_class.script, places_of(options_class))}", ""]
    about = (inspect.getdoc(sys.modules[options_class.__module__]) or "").partition("\n\n")[0]
    lines += [*textwrap.wrap(about, width), ""] if about else []
    if "config_file" in options_class.options():
        formats = options_class.options()["config_file"].notes["help"].partition(" file")[0]
        lines += [f"Options may also stand in a {formats} file (--config_file).", ""]
    offered = [option for option in options_class.options().values() if option.offered]
    for title, about_group in group_headings(options_class).items():
        members = [option for option in offered if option.title == title]
        if members:
            lines.append(f"{title}: {about_group}")
            lines += [line for option in members for line in _entry(option, width)]
            lines.append("")
    lines += ["  -h, --help".ljust(_COLUMN) + "Show this text.", ""]
    return "\n".join(lines)


def group_headings(options_class: type[OptionSet]) -> dict[str, str]:
    """Return title -> one sentence about the group, in order."""
    return {
        group.group_title: (inspect.getdoc(group) or "").split("\n")[0] for group in options_class.groups().values()
    }


def _entry(option: Option, width: int) -> list[str]:
    head = f"  {option.flag}{_placeholder(option)}"
    text = f"{option.notes.get('help', '')}{default_note(option)}"
    body = textwrap.wrap(text, width - _COLUMN) or [""]
    if len(head) < _COLUMN - 1:
        first, *rest = body
        return [head.ljust(_COLUMN) + first, *(" " * _COLUMN + line for line in rest)]
    return [head, *(" " * _COLUMN + line for line in body)]


def _placeholder(option: Option) -> str:
    if option.is_flag or option.positional:
        return ""
    if is_list(option.annotation):
        return " [VALUE ...]"
    if option.choices and len(option.choices) <= 6:
        return " {" + ",".join(str(choice) for choice in option.choices) + "}"
    return {"int": " N", "float": " X", "int or float": " N|X", "two numbers": " LOW,HIGH"}.get(
        type_name(option.annotation), " TEXT"
    )


def default_note(option: Option) -> str:
    """Return ` (default: ...)` and the choices that the placeholder does not show, or nothing."""
    notes = []
    if option.choices and len(option.choices) > 6:
        notes.append("one of " + ", ".join(str(choice) for choice in option.choices))
    if shown_default(option.default):
        notes.append(f"default: {shown_default(option.default)}")
    return f" ({'; '.join(notes)})" if notes else ""


def shown_default(value: Any) -> str:
    """Return a default as documentation shows it; nothing for None, False and empty."""
    return "" if value is None or value is False or value in ("", ()) else str(value)
