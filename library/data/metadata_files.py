"""Metadata files of fine-tuning data: one JSON object keyed by image, or JSON lines; checked entry by entry.

Training takes `read_metadata`. Tools that change such files take `read_table`, which keeps keys that are not known
here, and `write_table`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library import files
from library.data.bad_files import SHOWN, printable
from library.data.captions import clean_caption
from library.data.dataset_file import parse_json
from library.errors import Problem, UserError
from library.text_files import read_text

MAX_BYTES = 4 << 30
_TEXT_KEYS = ("caption", "tags")
_KEYS = frozenset((*_TEXT_KEYS, "image_size", "train_resolution"))
_LINE_KEY = "image_path"

Table = dict[str, dict[str, Any]]
"""Image key -> entry as it stands in the file."""


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """One image of a metadata file: its key as written, its texts and sizes (width, height)."""

    key: str
    caption: str | None = None
    tags: str | None = None
    image_size: tuple[int, int] | None = None
    train_resolution: tuple[int, int] | None = None

    def full_caption(self, separator: str, multiline: bool) -> str:
        """Join caption and tags: the separator stands between them, and with wildcards tags follow every line."""
        caption, tags = self.caption or "", self.tags or ""
        if multiline:
            tags = tags.replace("\n", separator)
        if not tags or not caption.strip():
            return tags or caption
        if not multiline:
            return caption + separator + tags
        return "\n".join(line + separator + tags for line in caption.split("\n") if line.strip())


def read_metadata(path: str) -> list[MetadataEntry]:
    """Return the entries of a `.json` or `.jsonl` metadata file in the order of the file.

    Raises:
        UserError: The file cannot be read or parsed, or holds entries of the wrong form (all are listed).
    """
    problems: list[Problem] = []
    entries = [entry for _key, _value, entry in _checked(path, problems) if entry is not None]
    _raise_some(problems, path)
    if not entries:
        raise UserError("no metadata: the file names no images", where=path)
    return entries


def prepared_resolution(path: str) -> str | None:
    """Return the largest bucket that a metadata file names, as `width,height`; None unless all entries name one.

    Raises:
        UserError: as `read_metadata`.
    """
    sizes = [entry.train_resolution for entry in read_metadata(path)]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    width, height = max(known, key=lambda size: (size[0] * size[1], size))
    return f"{width},{height}"


def read_table(path: str | Path) -> Table:
    """Return all entries of a metadata file by image key, in the order of the file, as they are written.

    Raises:
        UserError: The file cannot be read or parsed, or holds entries of the wrong form (all are listed).
    """
    problems: list[Problem] = []
    lines = is_json_lines(path)
    table = {}
    for key, value, entry in _checked(str(path), problems):
        if entry is not None:
            table[key] = {name: field for name, field in value.items() if name != _LINE_KEY} if lines else value
    _raise_some(problems, str(path))
    return table


def write_table(path: str | Path, table: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a metadata file, completely or not at all: indented JSON, or one entry per line in a `.jsonl` file.

    Everything that is not ASCII is escaped, so that the file reads the same in every encoding, and names of files that
    are no valid text survive.

    Raises:
        CannotSave: The file could not be written; a previous one is untouched.
    """
    if is_json_lines(path):
        lines = (json.dumps({_LINE_KEY: key, **entry}) for key, entry in table.items())
        files.write_text(path, "".join(f"{line}\n" for line in lines))
    else:
        files.write_text(path, json.dumps(table, indent=2) + "\n")


def is_json_lines(path: str | Path) -> bool:
    """Tell whether a metadata file of this name holds one JSON object per line."""
    return Path(path).suffix.lower() == ".jsonl"


def _checked(path: str, problems: list[Problem]) -> Iterator[tuple[str, Any, MetadataEntry | None]]:
    """Yield key, value as written and entry (None for a useless value); what is wrong is added to `problems`."""
    text = read_text(path, limit=MAX_BYTES)
    wrong: list[tuple[str, str]] = []
    for place, key, value in _json_lines(text, path) if is_json_lines(path) else _json_object(text, path):
        yield key, value, _entry(key, value, wrong)
        if wrong:
            problems += [Problem(f"{path}: {place or printable(key)}{field}", what) for field, what in wrong]
            wrong.clear()


def _raise_some(problems: Iterable[Problem], path: str) -> None:
    """Raise the first problems, and how many more there are."""
    found = list(problems)
    if found:
        more = len(found) - SHOWN
        rest = [Problem(path, f"{more} more entries are wrong")] if more > 0 else []
        raise UserError.of([*found[:SHOWN], *rest])


def _json_object(text: str, path: str) -> Iterator[tuple[str, str, Any]]:
    table = parse_json(text, path)
    if not isinstance(table, dict):
        kind = "a list" if isinstance(table, list) else type(table).__name__
        raise UserError(f"the top level is {kind}", 'Expected {"image name": {"caption": "..."}, ...}.', where=path)
    for key, value in table.items():
        yield "", key, value


def _json_lines(text: str, path: str) -> Iterator[tuple[str, str, Any]]:
    seen: set[str] = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        value = parse_json(line, where)
        key = value.get(_LINE_KEY) if isinstance(value, dict) else None
        if not isinstance(key, str):
            raise UserError("has no image_path", 'Expected {"image_path": "...", "caption": "..."}.', where=where)
        if key in seen:
            raise UserError(f"image_path {key!r} occurs twice", "Remove one.", where=where)
        seen.add(key)
        yield f"line {number}", key, value


def _entry(key: str, value: Any, wrong: list[tuple[str, str]]) -> MetadataEntry | None:
    """Return one entry; what is wrong with it is added as (field, words)."""
    if not isinstance(value, dict):
        wrong.append(("", f"must be an object, not {_short(value)}"))
        return None
    if not key or "\0" in key:
        wrong.append(("", f"{key!r} is no file name"))
        return None
    fields: dict[str, Any] = {}
    for name, field in value.items():
        if field is None or name not in _KEYS:
            continue
        if name in _TEXT_KEYS:
            if isinstance(field, str):
                fields[name] = clean_caption(field)[0]
            else:
                wrong.append((f".{name}", f"must be text, not {_short(field)}"))
        elif (size := as_size(field)) is not None:
            fields[name] = size
        else:
            wrong.append((f".{name}", f"must be [width, height], not {_short(field)}"))
    return MetadataEntry(key, **fields)


def as_size(value: Any) -> tuple[int, int] | None:
    """Return `[width, height]` of a JSON file as a pair, None when it is anything else."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    width, height = value
    if type(width) is not int or type(height) is not int or not (0 < width < 1 << 31 and 0 < height < 1 << 31):
        return None
    return width, height


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
