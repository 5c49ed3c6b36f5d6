"""Reading one folder: sizes, orientations and captions of its images, from the index where it still holds."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from library.data import caption_files, scan_index
from library.data.bad_files import BadFile
from library.data.folder_listing import FolderFiles, FolderListing, caption_names, list_folder, same_stems
from library.data.image_headers import (
    HEAD_BYTES,
    BadHeader,
    Header,
    ask_pillow,
    at_offset,
    parse_header,
    too_many_pixels,
)
from library.data.records import TextColumn
from library.data.scan_index import CLEANED, EMPTY_FILE, NO_CAPTION, NOT_LOOKED_FOR, READ, FolderFacts

_log = logging.getLogger(__name__)

KEEP_FROM = 500
KEEP_AFTER_SECONDS = 1.0
_SAMPLE = 48
_SLOW_SECONDS = 0.001
_THREADS = 16
_CHUNK = 64
_UNUSED: Header = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class FolderSettings:
    """How a folder is read.

    Attributes:
        extension: Suffix of caption files, None when captions come from elsewhere.
        multiline: Keep all lines of a caption.
        encoding: Encoding of caption files.
        max_pixels: Larger images are bad files.
        cache_dir: Where the index goes when the folder cannot be written.
    """

    extension: str | None = None
    multiline: bool = False
    encoding: str = "utf-8"
    max_pixels: int = 179_000_000
    cache_dir: str | None = None

    @property
    def caption_key(self) -> str:
        """Return what captions in an index must have been read with."""
        return f"{self.extension} {self.multiline} {self.encoding}"


@dataclass(frozen=True, slots=True)
class Known:
    """What somebody else wrote down about an image: taken when the index has nothing, and never kept in it.

    Attributes:
        header: Stored width and height, and EXIF orientation.
        caption: As it would be read.
        stat: (size, mtime_ns) that the image must have for `header` to hold.
        caption_stat: The same for the caption file.
        written_ns: Without those, files changed after this time are read.
    """

    header: Header | None = None
    caption: str | None = None
    stat: tuple[int, int] | None = None
    caption_stat: tuple[int, int] | None = None
    written_ns: int | None = None

    def holds(self, size: int, mtime_ns: int, stat: tuple[int, int] | None) -> bool:
        """Tell whether a file of this size and time is the one that was written about."""
        if stat is not None:
            return stat == (size, mtime_ns)
        return self.written_ns is None or mtime_ns <= self.written_ns


@dataclass(slots=True)
class FolderScan:
    """Outcome of reading a folder: facts of its good images, and the bad files."""

    folder: str
    settings: FolderSettings
    listing: FolderListing
    facts: FolderFacts
    bad: list[BadFile]
    started_ns: int
    started: float
    changed: bool
    untrusted: set[str] = field(default_factory=set)
    kept: FolderFacts | None = None

    @property
    def total(self) -> int:
        """Return the number of images looked at."""
        return len(self.facts) + len(self.bad)

    def save(self) -> None:
        """Write the index when anything changed and reading again would take time worth saving."""
        facts = self.facts
        worth = len(facts) >= KEEP_FROM or time.monotonic() - self.started > KEEP_AFTER_SECONDS
        if not self.changed or not worth or not len(facts):
            return
        if self.untrusted:
            good = [row for row, name in enumerate(facts.names) if name not in self.untrusted]
            facts = facts.take(np.array(good, np.int64))
        if self.kept is not None:
            facts = FolderFacts.join(facts, self.kept)
        if len(facts):
            key, cache_dir = self.settings.caption_key, self.settings.cache_dir
            scan_index.save_index(self.folder, facts, key, self.started_ns, cache_dir)
        self.changed = False


def scan_folder(
    folder: str,
    settings: FolderSettings,
    *,
    wanted: Sequence[str] | None = None,
    known: Mapping[str, Known] | None = None,
    listing: FolderListing | None = None,
) -> FolderScan:
    """Read a folder.

    Args:
        folder: Its path.
        settings: How to read it.
        wanted: Names of the images that matter; None for all.
        known: Facts from elsewhere by name.
        listing: What is in the folder, if that is known.

    Raises:
        OSError: The folder cannot be listed.
    """
    started_ns, started = time.time_ns(), time.monotonic()
    listing = listing or list_folder(folder)
    names = listing.images
    bad = list(listing.bad)
    if wanted is None:
        twins = same_stems(names)
        bad += [_twin(listing, name, first) for name, first in twins.items()]
        names = [name for name in names if name not in twins] if twins else names
    else:
        chosen = set(wanted)
        names = [name for name in names if name in chosen]
        bad = [one for one in bad if os.path.basename(one.path) in chosen]  # noqa: PTH119
    with FolderFiles(folder) as reader:
        work = _Work(listing, names, settings, reader, known or {})
        work.compare(scan_index.load_index(folder, settings.caption_key, settings.cache_dir))
        work.read()
    result = FolderScan(folder, settings, listing, work.facts(), bad + work.bad, started_ns, started, work.changed)
    result.untrusted = work.untrusted
    result.kept = work.unlisted_facts(wanted is not None)
    result.bad.sort(key=lambda one: one.path)
    return result


def _twin(listing: FolderListing, name: str, first: str) -> BadFile:
    reason = f"has the same name as {first} up to the suffix: both would share caption and cache files"
    return BadFile(listing.path(name), reason, "Rename or remove one of them.")


class _Work:
    """State of one scan: columns of what is known, and which rows have to be read."""

    def __init__(
        self,
        listing: FolderListing,
        names: list[str],
        settings: FolderSettings,
        reader: FolderFiles,
        known: Mapping[str, Known],
    ) -> None:
        count = len(names)
        self.listing, self.names, self.settings, self.reader, self.known = listing, names, settings, reader, known
        self.bad: list[BadFile] = []
        self.untrusted: set[str] = set()
        self.changed = False
        self.stats = reader.stats(names)
        self.wants_captions = settings.extension is not None
        self.captions_in = [""] * count
        if settings.extension is not None:
            self.captions_in = caption_names(listing, names, settings.extension)
        self.caption_stats = reader.stats(self.captions_in)
        self.states = np.full(count, NO_CAPTION if self.wants_captions else NOT_LOOKED_FOR, np.uint8)
        self.headers = np.zeros((count, 3), np.int32)
        self.checked = np.zeros(count, np.bool_)
        self.usable = np.ones(count, np.bool_)
        self.captions: TextColumn | None = None
        self.new_captions: dict[int, str] = {}
        self.need_header: list[int] = list(range(count))
        self.need_caption: list[int] = self._rows_with_caption()
        self.old: FolderFacts | None = None

    def _rows_with_caption(self) -> list[int]:
        return np.flatnonzero(self.caption_stats[:, 0] >= 0).tolist()

    def compare(self, old: FolderFacts | None) -> None:
        """Take over what the index knows about files that did not change."""
        self.old = old
        self.changed = old is None
        if old is None:
            return
        rows = self._old_rows(old)
        found = rows >= 0
        self.changed = len(old) != len(self.names) or not found.all()
        same = found & (self.stats == old.stats[rows]).all(axis=1) & (self.stats[:, 0] >= 0)
        self.headers[same] = old.headers[rows[same]]
        self.checked[same] = old.checked[rows[same]]
        self.need_header = np.flatnonzero(~same).tolist()
        if self.wants_captions:
            self._compare_captions(old, rows, found)
        self.changed |= bool(self.need_header) or bool(self.need_caption)

    def _old_rows(self, old: FolderFacts) -> NDArray[np.int64]:
        if old.names == self.names:
            return np.arange(len(self.names))
        where = {name: row for row, name in enumerate(old.names)}
        return np.fromiter((where.get(name, -1) for name in self.names), np.int64, len(self.names))

    def _compare_captions(self, old: FolderFacts, rows: NDArray[np.int64], found: NDArray[np.bool_]) -> None:
        same = found & (self.caption_stats == old.caption_stats[rows]).all(axis=1)
        same &= old.caption_states[rows] != NOT_LOOKED_FOR
        if old.caption_names != self.captions_in:
            names = old.caption_names
            pairs = zip(self.captions_in, rows.tolist(), strict=True)
            same &= np.fromiter((name == names[row] for name, row in pairs), np.bool_, len(rows))
        # A row without caption now is right as it stands, whatever the index says.
        missing = self.caption_stats[:, 0] < 0
        self.changed |= bool((missing & ~same).any())
        self.states[same] = old.caption_states[rows[same]]
        self.need_caption = np.flatnonzero(~same & ~missing).tolist()
        if same.all():
            whole = len(old) == len(rows) and (rows == np.arange(len(rows))).all()
            self.captions = old.captions if whole else old.captions.take(rows)
        else:
            texts = old.captions
            kept = np.flatnonzero(same & ~missing)
            self.new_captions = dict(zip(kept.tolist(), texts.take(rows[kept]), strict=True))

    def read(self) -> None:
        """Read what the index does not know, in threads when files come slowly."""
        needs = set(self.need_caption)
        headers = set(self.need_header)
        rows = sorted(headers | needs) if needs != headers else self.need_header
        found: list[Header] = [_UNUSED] * len(self.names)

        def read_rows(part: Sequence[int]) -> None:
            for row in part:
                if row in headers:
                    self._read_header(row, found)
                if row in needs:
                    self._read_caption(row)

        begin = time.perf_counter()
        read_rows(rows[:_SAMPLE])
        rest = rows[_SAMPLE:]
        if rest and (time.perf_counter() - begin) / _SAMPLE > _SLOW_SECONDS:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(read_rows, [rest[at : at + _CHUNK] for at in range(0, len(rest), _CHUNK)]))
        else:
            read_rows(rest)
        if len(headers) == len(self.names):
            self.headers = np.fromiter(chain.from_iterable(found), np.int32, 3 * len(found)).reshape(-1, 3)
        else:
            for row in self.need_header:
                self.headers[row] = found[row]

    def _refuse(self, row: int, name: str, reason: str, hint: str = "") -> None:
        if self.usable[row]:
            self.usable[row] = False
            self.bad.append(BadFile(self.listing.path(name), reason, hint))

    def _read_header(self, row: int, found: list[Header]) -> None:
        name = self.names[row]
        if self.known:
            known = self.known.get(name, _NOTHING)
            size, mtime_ns, _ctime = self.stats[row].tolist()
            if known.header is not None and size > 0 and known.holds(size, mtime_ns, known.stat):
                found[row] = known.header
                self.untrusted.add(name)
                return
        try:
            descriptor = self.reader.open(name)
            try:
                head = os.read(descriptor, HEAD_BYTES)
                if not head:
                    raise BadHeader("empty file", "Remove it or fetch it again.")
                header = parse_header(head, at_offset(descriptor))
            finally:
                os.close(descriptor)
            if header is None:
                header = ask_pillow(self.listing.path(name), self.settings.max_pixels)
            if header[0] * header[1] > self.settings.max_pixels:
                raise too_many_pixels(header[0] * header[1], self.settings.max_pixels)
            found[row] = header
        except BadHeader as error:
            self._refuse(row, name, error.reason, error.hint)
        except OSError as error:
            self._refuse(row, name, error.strerror or str(error))

    def _read_caption(self, row: int) -> None:
        name = self.captions_in[row]
        size, mtime_ns, _ctime = self.caption_stats[row].tolist()
        if self.known:
            known = self.known.get(self.names[row], _NOTHING)
            if known.caption is not None and known.holds(size, mtime_ns, known.caption_stat):
                self.states[row], self.new_captions[row] = READ, known.caption
                self.untrusted.add(self.names[row])
                return
        if size == 0:
            self.states[row] = EMPTY_FILE
            return
        if size > caption_files.MAX_BYTES:
            self._refuse(row, name, f"caption of {size >> 20} MiB, the limit is {caption_files.MAX_BYTES >> 20} MiB")
            return
        try:
            data = self._content(name, size)
            text = caption_files.decode_caption(data, self.settings.encoding)
        except caption_files.BadCaption as error:
            self._refuse(row, name, error.reason, error.hint)
        except OSError as error:
            self._refuse(row, name, error.strerror or str(error))
        else:
            self.new_captions[row], cleaned = caption_files.caption_of(text, self.settings.multiline)
            self.states[row] = CLEANED if cleaned else READ

    def _content(self, name: str, size: int) -> bytes:
        descriptor = self.reader.open(name)
        try:
            data = os.read(descriptor, size + 1)
            while len(data) < size:
                more = os.read(descriptor, size + 1 - len(data))
                if not more:
                    break
                data += more
            return data
        finally:
            os.close(descriptor)

    def facts(self) -> FolderFacts:
        """Return the columns of the usable rows."""
        captions = self.captions
        if captions is None:
            get = self.new_captions.get
            captions = TextColumn.of([get(row, "") for row in range(len(self.names))])
        whole = FolderFacts(
            self.names,
            self.stats,
            self.headers,
            self.captions_in,
            self.caption_stats,
            captions,
            self.states,
            self.checked,
        )
        return whole if self.usable.all() else whole.take(np.flatnonzero(self.usable))

    def unlisted_facts(self, partial: bool) -> FolderFacts | None:
        """Return what the index knows about images of the folder that were not wanted this time."""
        if not partial or self.old is None:
            return None
        seen, present = set(self.names), set(self.listing.images)
        rows = [row for row, name in enumerate(self.old.names) if name in present and name not in seen]
        return self.old.take(np.array(rows, np.int64)) if rows else None


_NOTHING = Known()
