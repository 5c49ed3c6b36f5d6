"""Where tags go: a text file beside every picture, or one metadata file for all of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from library import files
from library.data.caption_files import BadCaption, decode_caption
from library.data.metadata_files import is_json_lines, read_table, write_table
from library.errors import UserError

_WRITE_EVERY = 60.0
"""Seconds between two writings of a metadata file that grows."""


class TagOutput(Protocol):
    """Takes the tags of one picture after the other."""

    def has(self, picture: Path) -> bool:
        """Tell whether there are tags of a picture already."""

    def add(self, picture: Path, tags: Sequence[str], size_wh: tuple[int, int]) -> str:
        """Keep the tags of a picture with its size; return the text that is written."""

    def close(self) -> None:
        """Write what is not written yet."""


class TagJoiner:
    """Makes one text of tags, with those that are there already if they shall stay; counts how often tags occur."""

    def __init__(self, separator: str, *, append: bool) -> None:
        self._separator, self.append = separator, append
        self.frequencies: Counter[str] = Counter()

    def join(self, tags: Sequence[str], existing: str) -> str:
        """Return the text of tags; with `append` those of `existing` come first, and none occurs twice."""
        self.frequencies.update(tags)
        if self.append:
            old = [tag for part in existing.split(self._mark) if (tag := part.strip())]
            tags = [*old, *(tag for tag in tags if tag not in old)]
        return self._separator.join(tags)

    @property
    def _mark(self) -> str:
        return self._separator.strip() or self._separator


class TextOutput:
    """A text file beside each picture."""

    def __init__(self, text_file: Callable[[Path], Path], joiner: TagJoiner) -> None:
        self._text_file, self._joiner = text_file, joiner

    def has(self, picture: Path) -> bool:
        """Tell whether a picture has its text file."""
        return self._text_file(picture).is_file()

    def add(self, picture: Path, tags: Sequence[str], size_wh: tuple[int, int]) -> str:
        """Write the text file of a picture.

        Raises:
            UserError: there is a file to add to that cannot be read.
        """
        target = self._text_file(picture)
        text = self._joiner.join(tags, self._existing(target) if self._joiner.append else "")
        files.write_text(target, f"{text}\n")
        return text

    def _existing(self, target: Path) -> str:
        try:
            return decode_caption(target.read_bytes(), "utf-8")
        except FileNotFoundError:
            return ""
        except BadCaption as error:
            raise UserError(f"{target.name}: {error.reason}", "Convert it to UTF-8.", where=str(target)) from error

    def close(self) -> None:
        """Nothing is left to write."""


class MetadataOutput:
    """One file for all pictures: `{path: {"tags": ..., "image_size": [w, h]}}`, or JSON lines with the same values."""

    def __init__(self, path: str, joiner: TagJoiner, *, keep: bool) -> None:
        """Begin a file.

        Args:
            path: of the file; with the suffix `.jsonl` tags are called caption in it.
            joiner: makes the text.
            keep: keep the entries of a file that is there.

        Raises:
            UserError: the file to be kept is damaged.
        """
        self._path, self._joiner = path, joiner
        self._field = "caption" if is_json_lines(path) else "tags"
        self._table: dict[str, dict[str, Any]] = read_table(path) if keep and Path(path).exists() else {}
        self._changed = False
        self._written = time.monotonic()

    def has(self, picture: Path) -> bool:
        """Tell whether the file has tags of a picture."""
        return self._field in self._table.get(str(picture), {})

    def add(self, picture: Path, tags: Sequence[str], size_wh: tuple[int, int]) -> str:
        """Keep the tags of a picture; the file is written now and then, so that little is lost with the process."""
        entry = self._table.setdefault(str(picture), {})
        entry[self._field] = text = self._joiner.join(tags, str(entry.get(self._field) or ""))
        entry["image_size"] = list(size_wh)
        self._changed = True
        if time.monotonic() - self._written > _WRITE_EVERY:
            self.close()
        return text

    def close(self) -> None:
        """Write the file, if there is anything new."""
        if self._changed:
            write_table(self._path, self._table)
            self._changed = False
        self._written = time.monotonic()
