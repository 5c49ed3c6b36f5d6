"""Rules for cleaning captions and tags: a TOML file, by default the one that comes with these scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config_file import parse_toml
from library.errors import Problem, raise_problems
from library.text_files import read_text

DEFAULT_RULES = Path(__file__).resolve().parent.parent / "library" / "assets" / "clean_rules" / "default.toml"

_SECTIONS = ("tags", "captions")
_TAG_LISTS = ("keep_underscores", "cut_at", "general", "several_people")


@dataclass(frozen=True)
class Ambiguous:
    """Tags of which two or more are removed together when several people are in a picture."""

    name: str
    pattern: re.Pattern[str]
    protected: re.Pattern[str] | None = None

    def matches(self, tag: str) -> bool:
        """Tell whether a tag is one of these."""
        return self.pattern.fullmatch(tag) is not None and not (self.protected and self.protected.fullmatch(tag))


@dataclass(frozen=True)
class TagRules:
    """How tags are cleaned; without a value nothing is done."""

    keep_underscores: tuple[str, ...] | None = None
    cut_at: tuple[str, ...] = ()
    several_people: tuple[str, ...] = ()
    general: tuple[re.Pattern[str], ...] = ()
    ambiguous: tuple[Ambiguous, ...] = ()


@dataclass(frozen=True)
class Rules:
    """How tags and captions are cleaned. `replace` holds text and what stands in its place, in order."""

    tags: TagRules
    replace: tuple[tuple[str, str], ...] = ()


def read_rules(path: str | Path | None) -> Rules:
    """Return the rules of a file, None for the default ones.

    Raises:
        UserError: the file cannot be read, or something in it is no rule (everything is listed).
    """
    file = Path(path) if path is not None else DEFAULT_RULES
    table = parse_toml(read_text(file), file)
    reader = _Reader(str(file))
    rules = reader.rules(table)
    raise_problems(reader.problems)
    return rules


class _Reader:
    """Turns the tables of a file into rules and collects what is wrong with them."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.problems: list[Problem] = []

    def rules(self, table: dict[str, Any]) -> Rules:
        self._only(table, _SECTIONS, "")
        tags, captions = (self._table(table.get(name, {}), f"[{name}]") for name in _SECTIONS)
        self._only(tags, (*_TAG_LISTS, "ambiguous"), "[tags] ")
        self._only(captions, ("replace",), "[captions] ")
        lists = {name: tuple(self._texts(tags, name)) for name in _TAG_LISTS}
        entries = tags.get("ambiguous", [])
        if not isinstance(entries, list):
            self._wrong("tags.ambiguous", "must be written [[tags.ambiguous]]")
            entries = []
        found = TagRules(
            keep_underscores=lists["keep_underscores"] if "keep_underscores" in tags else None,
            cut_at=lists["cut_at"],
            several_people=lists["several_people"],
            general=tuple(self._patterns(lists["general"], "tags.general")),
            ambiguous=tuple(self._ambiguous(entries)),
        )
        return Rules(found, tuple(self._pairs(captions.get("replace", []))))

    def _wrong(self, where: str, what: str, hint: str = "See --print_rules for the form.") -> None:
        self.problems.append(Problem(f"{self._path}: {where}", what, hint))

    def _only(self, table: dict[str, Any], known: tuple[str, ...], where: str) -> None:
        for name in sorted(set(table) - set(known)):
            self._wrong(f"{where}{name}", "is no rule", f"Rules here: {', '.join(known)}.")

    def _table(self, value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self._wrong(where, "must be a table")
        return {}

    def _texts(self, table: dict[str, Any], name: str) -> Iterator[str]:
        value = table.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            self._wrong(f"tags.{name}", "must be a list of texts")
            return
        yield from value

    def _patterns(self, texts: tuple[str, ...], where: str) -> Iterator[re.Pattern[str]]:
        for text in texts:
            try:
                yield re.compile(text)
            except (re.error, RecursionError, OverflowError) as error:
                self._wrong(where, f"{text!r} is no regular expression ({error})")

    def _ambiguous(self, entries: list[Any]) -> Iterator[Ambiguous]:
        for number, entry in enumerate(entries, 1):
            where = f"[[tags.ambiguous]] number {number}"
            table = self._table(entry, where)
            self._only(table, ("name", "pattern", "except"), f"{where}: ")
            texts = {name: table[name] for name in ("name", "pattern", "except") if name in table}
            if "pattern" not in texts or not all(isinstance(text, str) for text in texts.values()):
                self._wrong(where, "needs a pattern, and texts as values")
                continue
            patterns = list(self._patterns((texts["pattern"], texts.get("except", "")), where))
            if len(patterns) == 2:
                name = texts.get("name", texts["pattern"])
                yield Ambiguous(name, patterns[0], patterns[1] if texts.get("except") else None)

    def _pairs(self, value: Any) -> Iterator[tuple[str, str]]:
        where = "captions.replace"
        if not isinstance(value, list):
            self._wrong(where, "must be a list of pairs")
            return
        for number, pair in enumerate(value, 1):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                self._wrong(f"{where}, number {number}", "must be a pair of texts")
            elif not pair[0]:
                self._wrong(f"{where}, number {number}", "replaces the empty text")
            elif pair[0] in pair[1]:
                hint = "Replacing is repeated until nothing changes, which would be never."
                self._wrong(f"{where}, number {number}", f"puts {pair[0]!r} in its own place", hint)
            else:
                yield pair[0], pair[1]
