"""Writes the pages of options in docs/ from the declarations.

Run as `python -m library.options_doc` beside the entry scripts.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.option_groups import Option, OptionSet
from library.option_help import group_headings, shown_default
from library.option_places import places_of, usage
from library.option_values import type_name
from library.retired import NO_EFFECT_IN, SPELLINGS

SCRIPTS = ("train_db", "fine_tune", "train_network", "train_textual_inversion")
"""Entry scripts whose options are documented."""

CASCADE_SCRIPTS = (
    "stable_cascade_train_stage_c",
    "stable_cascade_train_c_network",
    "stable_cascade_train_c_control_net",
    "stable_cascade_train_stage_b",
)
"""Entry scripts that train Stable Cascade, which have a page of their own."""

PICTURE_SCRIPTS = ("gen_img", "stable_cascade_gen_img")
"""Entry scripts that make pictures, which have a page of their own."""

TOOL_FOLDERS = ("finetune", "networks", "tools")
"""Folders of tools: files in them that declare `class Options` are documented."""

ROOT = Path(__file__).resolve().parent.parent

_MADE = "This page is made from the declarations in the code: edit those and run `python -m library.options_doc`."

_TRAINING = f"""# Options

{_MADE}

Every option can also stand in a TOML file that `--config_file` names (`learning_rate = 1e-6`, flags as
`enable_bucket = true`; tables are allowed and their names mean nothing). The command line wins over the file. A flag
that the file switches on can be switched off with `--flag=false`. Options may not be abbreviated.

*resume* says whether an option may differ when a run is resumed: `exact` options change what is computed, and must be
the same unless `--resume_override` names them (or their group, the heading); `free` ones may change.

The scripts for Stable Cascade have [a page of their own](stable_cascade_options.md).
"""

_CASCADE = f"""# Options for training Stable Cascade

{_MADE}

[The guide](stable_cascade.md) says what to do with them. Files of options, switching off flags and the column *resume*
work as [on the page of the other scripts](options.md); `--config_file` also takes the YAML files of the official code.
"""

_PICTURES = f"""# Options for making pictures

{_MADE}

Options may not be abbreviated. Many of them can also stand in a prompt, where they win: see [the guide](gen_img.md).
"""

_TOOLS = f"""# Options of the tools

{_MADE}

Tools run from any folder (`python path/to/tools/NAME.py`) and, from the folder of this project, as modules
(`python -m tools.NAME`). Words without dashes in front are given by their place. Options may not be abbreviated. A tool
writes its result completely or not at all, and ends with status 2 and one line per problem when it cannot do its work.
"""


@dataclass(frozen=True)
class Page:
    """A page of options: its file in docs/, what it begins with, and the modules whose options it tells."""

    name: str
    introduction: str
    modules: Callable[[], Sequence[str]]
    resume: bool = False

    @property
    def target(self) -> Path:
        """Where the page lies."""
        return ROOT / "docs" / self.name

    def option_sets(self) -> dict[str, type[OptionSet]]:
        """Import the modules, which must be on the path, and return their options by name."""
        return {name: _declared_in(name) for name in self.modules()}

    def text(self) -> str:
        """Return the whole page."""
        section = _script if self.resume else _tool
        return self.introduction + "".join(section(name, declared) for name, declared in self.option_sets().items())


def _tool(module: str, options_class: type[OptionSet]) -> str:
    about = (inspect.getdoc(importlib.import_module(module)) or "").partition("\n\n")[0]
    words = usage(module.replace(".", "/"), places_of(options_class))
    return f"\n## {module.replace('.', '/')}.py\n\n{about}\n\n    python {words}\n" + "".join(
        _table(title, lines, members, options_class.script, resume=False)
        for title, lines, members in _groups(options_class)
    )


def _script(name: str, options_class: type[OptionSet]) -> str:
    return f"\n## {name}.py\n" + "".join(
        _table(title, about, members, name, resume=True) for title, about, members in _groups(options_class)
    )


def _groups(options_class: type[OptionSet]) -> Iterator[tuple[str, str, list[Option]]]:
    """Yield title, sentence and options of every group that offers any."""
    offered = [option for option in options_class.options().values() if option.offered]
    for title, about in group_headings(options_class).items():
        members = [option for option in offered if option.title == title]
        if members:
            yield title, about, members


def _table(title: str, about: str, members: Sequence[Option], script: str, *, resume: bool) -> str:
    columns = ["option", "type", "default", "effect", *(["resume"] if resume else [])]
    head = f"\n### {title}\n\n{about}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    return head + "".join(_row(option, script, resume=resume) for option in members)


def _row(option: Option, script: str, *, resume: bool) -> str:
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
        *(["exact" if option.exact else "free"] if resume else []),
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


def tool_modules() -> list[str]:
    """Return the modules below `TOOL_FOLDERS` that declare options, found without importing them."""
    return [
        f"{folder}.{path.stem}"
        for folder in TOOL_FOLDERS
        for path in sorted((ROOT / folder).glob("*.py"))
        if any(
            isinstance(node, ast.ClassDef) and node.name == "Options"
            for node in ast.parse(path.read_text(encoding="utf-8")).body
        )
    ]


PAGES = (
    Page("options.md", _TRAINING, lambda: SCRIPTS, resume=True),
    Page("stable_cascade_options.md", _CASCADE, lambda: CASCADE_SCRIPTS, resume=True),
    Page("gen_img_options.md", _PICTURES, lambda: PICTURE_SCRIPTS),
    Page("tool_options.md", _TOOLS, tool_modules),
)
"""Every page that `main` writes."""


def _declared_in(module: str) -> type[OptionSet]:
    classes = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    return next(member for _, member in classes if issubclass(member, OptionSet) and member.__module__ == module)


def main() -> None:
    """Write all pages."""
    from library.files import write_text

    for page in PAGES:
        write_text(page.target, page.text())


if __name__ == "__main__":
    main()
