"""Metadata files of fine-tuning data: one JSON object keyed by image, or JSON lines; checked entry by entry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data.bad_files import SHOWN, printable
from library.data.captions import clean_caption
from library.data.dataset_file import parse_json
from library.errors import Problem, UserError
from library.text_files import read_text

MAX_BYTES = 4 << 30
_TEXT_KEYS = ("caption", "tags")
_KEYS = frozenset((*_TEXT_KEYS, "image_size", "train_resolution"))


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
        if not caption or not tags:
            return caption or tags
        if not multiline:
            return caption + separator + tags
        return "\n".join(line + separator + tags for line in caption.split("\n") if line.strip())


def read_metadata(path: str) -> list[MetadataEntry]:
    """Return the entries of a `.json` or `.jsonl` metadata file in the order of the file.

    Raises:
        UserError: The file cannot be read or parsed, or holds entries of the wrong form (all are listed).
    """
    text = read_text(path, limit=MAX_BYTES)
    problems: list[Problem] = []
    triples = _json_lines(text, path) if Path(path).suffix.lower() == ".jsonl" else _json_object(text, path)
    entries = []
    for place, key, value in triples:
        wrong: list[tuple[str, str]] = []
        entry = _entry(key, value, wrong)
        if entry is not None:
            entries.append(entry)
        problems += [Problem(f"{path}: {place or printable(key)}{field}", what) for field, what in wrong]
    if problems:
        more = len(problems) - SHOWN
        rest = [Problem(path, f"{more} more entries are wrong")] if more > 0 else []
        raise UserError.of([*problems[:SHOWN], *rest])
    if not entries:
        raise UserError("no metadata: the file names no images", where=path)
    return entries


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
        key = value.get("image_path") if isinstance(value, dict) else None
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
