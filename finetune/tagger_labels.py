"""What the outputs of a tagger mean: the list of tags beside the model, and how the user wants tags written."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.tagger_files import SUB_FOLDER, TaggerFiles
from library.data.dataset_file import parse_json
from library.errors import UserError
from library.text_files import read_text

_log = logging.getLogger(__name__)

RATING, QUALITY, CHARACTER, GENERAL = "rating", "quality", "character", "general"
_CATEGORY_NUMBERS = {"0": GENERAL, "1": "artist", "3": "copyright", "4": CHARACTER, "5": "meta", "9": RATING}
_SHORTEST_WITH_SPACES = 4
"""Shorter tags with underscores are faces such as ^_^ and keep them."""


@dataclass(frozen=True)
class Label:
    """One output: its category (lower case), and the tags that are written when it is found (mostly one)."""

    category: str
    tags: tuple[str, ...]


def read_labels(files: TaggerFiles) -> list[Label]:
    """Return the meaning of every output, in order.

    Raises:
        UserError: the list is damaged or of another form.
    """
    text, where = read_text(files.tags), str(files.tags)
    labels = _from_mapping(text, where) if files.format is SUB_FOLDER else list(_from_table(text, where))
    if not labels:
        raise UserError("holds no tags", where=where)
    return labels


def _from_table(text: str, where: str) -> Iterator[Label]:
    """Read `tag_id,name,category,...`."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if not {"name", "category"} <= set(rows.fieldnames or ()):
            raise UserError("the first line has no name and category", "It begins tag_id,name,category.", where=where)
        for row in rows:
            name, number = row["name"], row["category"]
            if not name or not number:
                raise UserError(f"line {rows.line_num} has no name or no category", where=where)
            yield Label(_CATEGORY_NUMBERS.get(number.strip(), number.strip()), (_one_line(name, where),))
    except csv.Error as error:
        raise UserError(f"line {rows.line_num}: {error}", where=where) from error


def _from_mapping(text: str, where: str) -> list[Label]:
    """Read `{"0": {"tag": ..., "category": ...}, ...}`, where the keys number the outputs."""
    table = parse_json(text, where)
    if not isinstance(table, dict):
        raise UserError("the top level is no object", 'Expected {"0": {"tag": ..., "category": ...}}.', where=where)
    labels = []
    for number in range(len(table)):
        entry: Any = table.get(str(number))
        if entry is None:
            raise UserError(f"has {len(table)} entries, but none for output {number}", where=where)
        tag, category = (entry.get("tag"), entry.get("category")) if isinstance(entry, dict) else (None, None)
        if not isinstance(tag, str) or not tag or not isinstance(category, str):
            raise UserError(f"entry {number} has no tag and category", where=where)
        labels.append(Label(category.lower(), (_one_line(tag, where),)))
    return labels


def _one_line(tag: str, where: str) -> str:
    """Return a tag without line ends and control characters, which would break the texts that it is written into."""
    if tag.isprintable():
        return tag
    cleaned = " ".join("".join(character if character.isprintable() else " " for character in tag).split())
    if not cleaned:
        raise UserError(f"a tag holds nothing but control characters: {tag!r}", where=where)
    return cleaned


def adapt_labels(
    labels: Sequence[Label], *, expand_characters: bool, remove_underscore: bool, replacements: dict[str, str]
) -> list[Label]:
    """Return the labels with their tags as the user wants them written.

    Args:
        labels: as the model's list has them.
        expand_characters: write `name_(series)` of a character as two tags, name and series.
        remove_underscore: write tags of more than three letters with spaces in place of underscores.
        replacements: what is written in place of a tag, whichever way that is spelled.
    """
    adapted = []
    unused = {spaced(source): source for source in replacements}
    by_spelling = {spaced(source): target for source, target in replacements.items()}
    for label in labels:
        tags = label.tags
        if expand_characters and label.category == CHARACTER:
            tags = tuple(part for tag in tags for part in _expanded(tag))
        if remove_underscore:
            tags = tuple(spaced(tag) if len(tag) >= _SHORTEST_WITH_SPACES else tag for tag in tags)
        if by_spelling:
            for tag in tags:
                unused.pop(spaced(tag), None)
            tags = tuple(by_spelling.get(spaced(tag), tag) for tag in tags)
        adapted.append(replace(label, tags=tags))
    for source in unused.values():
        _log.warning("--tag_replacement: the model has no tag %s", source)
    return adapted


def spaced(tag: str) -> str:
    """Return a tag with spaces for underscores, in which spellings are compared."""
    return tag.replace("_", " ")


def _expanded(tag: str) -> tuple[str, ...]:
    """Return name and series of `name_(series)`; `name_(costume)_(series)` keeps its costume in the name."""
    name, found, series = tag.rpartition("(")
    name, series = name.rstrip("_ "), series.removesuffix(")")
    return (name, series) if found and tag.endswith(")") and name and series else (tag,)


def parse_replacements(text: str) -> dict[str, str]:
    """Return source -> target of `a,b;c,d`, where a backslash takes a comma, semicolon or backslash literally.

    Raises:
        ValueError: a part is no pair; the text says which.
    """
    pairs = {}
    for part in _split(text, ";"):
        if not part.strip():
            continue
        words = [_unescaped(word.strip()) for word in _split(part, ",")]
        if len(words) != 2 or not all(words):
            raise ValueError(f"{part.strip()!r} is no pair of tags")
        pairs[words[0]] = words[1]
    return pairs


def _split(text: str, separator: str) -> list[str]:
    """Split where a separator has no backslash before it; backslashes stay."""
    parts, start, at = [], 0, 0
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == separator:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    return [*parts, text[start:]]


def _unescaped(word: str) -> str:
    """Remove the backslash before a comma, semicolon or backslash; tags may hold other ones."""
    kept, at = [], 0
    while at < len(word):
        if word[at] == "\\" and word[at + 1 : at + 2] in (",", ";", "\\"):
            at += 1
        kept.append(word[at : at + 1])
        at += 1
    return "".join(kept)
