"""Clean the captions and tags in a metadata file, and say what was changed.

python finetune/clean_captions_and_tags.py meta_tags.json meta_clean.json
python finetune/clean_captions_and_tags.py --print_rules > my_rules.toml
python finetune/clean_captions_and_tags.py meta_tags.json meta_clean.json --rules my_rules.toml
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.metadata_parts import check_metadata_output  # noqa: E402
from library import cli  # noqa: E402
from library.errors import Problem  # noqa: E402
from library.log import safe_text  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import show  # noqa: E402

if TYPE_CHECKING:
    from finetune.clean_texts import Cleaner

_log = logging.getLogger(__name__)

FIELDS = ("caption", "tags")
_EXAMPLES = 5
_COUNTED = 20
_SHOWN = 100


@dataclass(frozen=True, kw_only=True)
class CleanOptions(OptionGroup, title="cleaning"):
    """One metadata file in, a cleaned one out."""

    in_json: str | None = opt(None, positional=True, path=True, help="Metadata file to read: .json or .jsonl.")
    out_json: str | None = opt(None, positional=True, path=True, help="Metadata file to write; may be the same.")
    third: str | None = opt(
        None,
        positional=True,
        path=True,
        help="Only for old command lines that began with a folder of images, which is ignored.",
    )
    rules: str | None = opt(
        None, path=True, help="TOML file with the rules, which takes the place of the built-in ones."
    )
    print_rules: bool = opt(False, help="Print the rules (of --rules, if given) and stop: what to write your own from.")
    debug: bool = opt(False, help="Print every text that was changed, before and after, and not only examples.")

    @property
    def source(self) -> str | None:
        """The file to read."""
        return self.in_json if self.third is None else self.out_json

    @property
    def target(self) -> str | None:
        """The file to write."""
        return self.out_json if self.third is None else self.third

    def check(self) -> Iterator[Problem]:
        """Two files, unless only the rules are printed."""
        if self.print_rules:
            return
        if self.source is None or self.target is None:
            missing = "in_json and out_json" if self.source is None else "out_json"
            yield Problem("", f"missing: {missing}", "Expected: in_json out_json. See --help.")
            return
        yield from check_metadata_output("out_json", self.target)

    def warn(self) -> Iterator[Problem]:
        """The old form of the command line, and words that are not used."""
        if self.print_rules and self.in_json is not None:
            yield Problem("--print_rules", "only prints the rules: no file is cleaned", "Leave it out to clean.")
        elif self.third is not None:
            yield Problem(str(self.in_json), "is ignored: two files are enough", "Give in_json and out_json.")


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that clean_captions_and_tags.py accepts."""

    clean: CleanOptions


@dataclass
class Changes:
    """What cleaning changed in one kind of text: examples or everything, and how many of how many."""

    everything: bool
    texts: int = 0
    changed: int = 0
    lines: list[str] = field(default_factory=list)

    def note(self, key: str, before: str, after: str) -> None:
        """Remember a change."""
        self.changed += 1
        if self.everything or self.changed <= _EXAMPLES:
            texts = (before, after) if self.everything else _short(before, after)
            self.lines.append(f"  {safe_text(key)}: {texts[0]!r} -> {texts[1]!r}")


def _short(before: str, after: str) -> tuple[str, str]:
    """Return both texts around the place where they begin to differ."""
    begin = max(len(commonprefix([before, after])) - _SHOWN // 2, 0)
    return _window(before, begin), _window(after, begin)


def _window(text: str, begin: int) -> str:
    end = begin + _SHOWN
    return ("..." if begin else "") + text[begin:end] + ("..." if end < len(text) else "")


def run(options: CleanOptions) -> None:
    """Clean the texts of a metadata file, or print the rules.

    Raises:
        UserError: the metadata or the rules are damaged.
        CannotSave: the file could not be written.
    """
    from finetune.clean_rules import DEFAULT_RULES, read_rules
    from library.text_files import read_text

    rules = read_rules(options.rules)
    if options.print_rules:
        show([read_text(options.rules or DEFAULT_RULES).rstrip("\n")])
        return
    from finetune.clean_texts import Cleaner
    from library.data.metadata_files import read_table, write_table

    table = read_table(str(options.source))
    cleaner = Cleaner(rules)
    changes = clean_table(table, cleaner, everything=options.debug)
    write_table(str(options.target), table)
    show(summary_lines(changes, cleaner))
    _log.info("wrote %s: %d entries", options.target, len(table))


def clean_table(table: dict[str, dict[str, object]], cleaner: Cleaner, *, everything: bool) -> dict[str, Changes]:
    """Clean the texts of all entries in their place; return what changed for each kind of text."""
    from tqdm import tqdm

    changes = {name: Changes(everything) for name in FIELDS}
    clean = {"caption": cleaner.clean_caption, "tags": cleaner.clean_tags}
    for key, entry in tqdm(table.items(), desc="cleaning", unit="image", leave=False):
        for name in FIELDS:
            before = entry.get(name)
            if not isinstance(before, str):
                continue
            after = clean[name](before)
            changes[name].texts += 1
            if after != before:
                entry[name] = after
                changes[name].note(key, before, after)
    return changes


def summary_lines(changes: Mapping[str, Changes], cleaner: Cleaner) -> Iterator[str]:
    """Yield what a user sees: how much was changed, by which rules, and examples."""
    for name, title in zip(FIELDS, ("captions", "tags"), strict=True):
        kind = changes[name]
        yield f"{title}: {kind.changed} of {kind.texts} changed"
        counts = [(what, count) for what, count in cleaner.counts[name].most_common() if count]
        for what, count in counts[:_COUNTED]:
            yield f"  {count:7}  {safe_text(what)}"
        if len(counts) > _COUNTED:
            yield f"           and {len(counts) - _COUNTED} more rules"
        yield from kind.lines
        if kind.changed > len(kind.lines):
            yield f"  ... and {kind.changed - len(kind.lines)} more (--debug shows all)"


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda options: run(options.clean), argv=argv)


if __name__ == "__main__":
    main()
