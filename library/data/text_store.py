"""Which outputs of text encoders exist, which must be made, and where a worker finds them.

They stand for captions, not for images: in memory every different caption is kept once, in one mapped file per node,
and the empty caption, which stands for dropped ones, always is. On disk each image has its own file. `plan_texts` looks
at everything once; whoever owns the encoders works through the plan's batches; `CachedTexts` serves loader workers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.data.cache_files import (
    IN_MEMORY,
    MISSING,
    READ_ONLY_FOLDER,
    BrokenCache,
    CacheFolders,
    Verdict,
    look_at_all,
    setting_aside,
)
from library.data.cache_names import CacheRules, text_cache_path
from library.data.captions import CaptionPipeline
from library.data.mapped_file import MappedFile
from library.data.records import RecordTable
from library.data.serving import Catalogue
from library.data.text_caches import (
    Arrays,
    TextLayout,
    caption_hash,
    check_texts,
    read_texts,
    write_texts,
)
from library.errors import UserError

EMPTY = -1
"""Stands in lists of rows for the empty caption, which belongs to no row."""

SHARED_NAME = "another image uses the same file, kept in memory"


@dataclass(frozen=True, slots=True)
class CacheNames:
    """Picklable `row -> name of its cache file`."""

    table: RecordTable
    rules: CacheRules

    def __call__(self, row: int) -> str:
        """Return the name of the cache file of `row`."""
        return text_cache_path(self.table.path(row), self.rules)


class TextRows:
    """The captions of all rows of several parts of the data, numbered one part after the other.

    Attributes:
        starts: the number of the first row of each part, and of all rows, int64 [parts + 1].
        names: of the cache files of each part.
    """

    def __init__(self, parts: Sequence[Catalogue], rules: CacheRules) -> None:
        """Prepare; all captions must be fixed (`CaptionPipeline.varying_options`)."""
        self._parts = tuple(parts)
        self.names = [CacheNames(part.table, rules) for part in parts]
        self._pipelines = [
            {index: CaptionPipeline(served.subset) for index, served in part.subsets.items()} for part in parts
        ]
        self.starts = np.cumsum([0, *(len(part.table) for part in parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _locate(self, row: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.starts, row, "right")) - 1
        return part, row - int(self.starts[part])

    def text(self, row: int) -> str:
        """Return the caption that is served where it is not dropped."""
        if row == EMPTY:
            return ""
        part, inside = self._locate(row)
        table = self._parts[part].table
        return self._pipelines[part][int(table.subsets[inside])].undropped(table.caption(inside))

    def texts(self) -> Iterator[str]:
        """Yield the captions of all rows in order."""
        for part, pipelines in zip(self._parts, self._pipelines, strict=True):
            for subset, caption in zip(part.table.subsets.tolist(), part.table.captions(), strict=True):
                yield pipelines[subset].undropped(caption)

    def path(self, row: int) -> str:
        """Return the name of the row's cache file."""
        part, inside = self._locate(row)
        return self.names[part](inside)


@dataclass(frozen=True, slots=True)
class TextJob:
    """A caption to encode: the rows that share it (or `EMPTY`), and whether it is kept in memory or in their files."""

    rows: tuple[int, ...]
    in_memory: bool


@dataclass(frozen=True, slots=True)
class TextPlan:
    """What caching has to do. Picklable, so that one rank can look and tell the others.

    Attributes:
        on_disk: whether each row is served from its file, bool [N].
        numbers: the captions that are kept in memory, by the first half of their hash, sorted, uint64 [U].
        memory_rows: for each of them a row that has it, or `EMPTY`, int64 [U].
        file_jobs: rows whose files must be written; those of equal captions together.
        why: why each of those files must be written, and why each text but the empty one is in memory.
        files: number of different files that are used.
        unknown: number of files in use that do not tell where they come from.
        slot_bytes: that a caption takes in memory.
    """

    on_disk: NDArray[np.bool_]
    numbers: NDArray[np.uint64]
    memory_rows: NDArray[np.int64]
    file_jobs: tuple[tuple[int, ...], ...]
    why: tuple[str, ...]
    files: int
    unknown: int
    slot_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Size of the mapped file."""
        return len(self.numbers) * self.slot_bytes

    @property
    def reused(self) -> int:
        """Number of files that are used as they are."""
        return self.files - sum(map(len, self.file_jobs))

    @property
    def reasons(self) -> dict[str, int]:
        """How many entries must be made, by reason, most frequent first."""
        return dict(Counter(self.why).most_common())

    def describe(self) -> str:
        """Return one line: ``120 reused, 12 to encode (9 caption changed, 3 not cached yet)``."""
        detail = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        line = f"{self.reused} reused, {len(self.why)} to encode" + (f" ({detail})" if detail else "")
        return line + (f"; {self.unknown} tell no origin and are taken as they are" if self.unknown else "")

    def batches(
        self, batch_size: int, *, rank: int = 0, world_size: int = 1, in_memory: bool = False
    ) -> Iterator[list[TextJob]]:
        """Yield captions to encode together.

        Caption i belongs to rank i modulo `world_size`. Entries in memory exist once per node: for them
        (`in_memory=True`) give the rank and number of processes within the node.
        """
        jobs = tuple((row,) for row in self.memory_rows.tolist()) if in_memory else self.file_jobs
        mine = [TextJob(rows, in_memory) for rows in jobs[rank::world_size]]
        for start in range(0, len(mine), batch_size):
            yield mine[start : start + batch_size]


def plan_texts(
    rows: TextRows, layout: TextLayout, origin: Mapping[str, Any], rules: CacheRules, *, to_disk: bool
) -> TextPlan:
    """Look at the cache file of every image and decide what must be encoded.

    Args:
        rows: captions and file names.
        layout: of the arrays of a caption.
        origin: what the arrays depend on besides the caption.
        rules: names and validity rules.
        to_disk: read and write cache files; otherwise everything is encoded and kept in memory.
    """
    hashes = [caption_hash(text) for text in rows.texts()]
    found = _look(rows, hashes, layout, origin, rules) if to_disk else _Found([IN_MEMORY] * len(rows))
    jobs: dict[str, list[int]] = {}
    for row in found.stale:
        jobs.setdefault(hashes[row], []).append(row)
    # The first row that has a caption stands for it.
    kept = {hashes[row]: row for row in reversed(range(len(rows))) if found.in_memory[row] is not None}
    kept.pop(caption_hash(""), None)
    why = [*found.stale.values(), *(str(found.in_memory[row]) for row in kept.values())]
    numbers = np.array([_number(key) for key in (caption_hash(""), *kept)], np.uint64)
    order = np.argsort(numbers)
    return TextPlan(
        on_disk=np.array([reason is None for reason in found.in_memory], np.bool_),
        numbers=numbers[order],
        memory_rows=np.array([EMPTY, *kept.values()], np.int64)[order],
        file_jobs=tuple(tuple(members) for members in jobs.values()),
        why=tuple(why),
        files=found.files,
        unknown=found.unknown,
        slot_bytes=layout.slot_bytes,
    )


def _number(key: str) -> int:
    """Return half of a caption's hash: two of a million captions agree in it with a chance of 3 in 100 million."""
    return int(key[:16], 16)


@dataclass(slots=True)
class _Found:
    """What a look at the disk found: why each row is in memory (None: on disk), and why files must be written."""

    in_memory: list[str | None]
    stale: dict[int, str] = field(default_factory=dict)
    files: int = 0
    unknown: int = 0


def _look(
    rows: TextRows, hashes: Sequence[str], layout: TextLayout, origin: Mapping[str, Any], rules: CacheRules
) -> _Found:
    """Check the file of every row; of rows that share a name the first one decides what the file holds."""
    owners: dict[str, int] = {}
    owner_of = [owners.setdefault(rows.path(row), row) for row in range(len(rows))]
    folders = CacheFolders()

    def look(entry: tuple[str, int]) -> Verdict:
        path, row = entry
        if os.path.basename(path) not in folders.names_beside(path):  # noqa: PTH119
            return Verdict(MISSING)
        return Verdict() if rules.skip_check else check_texts(path, layout, {**origin, "caption": hashes[row]})

    found = _Found([])
    unwritable = set()
    for (path, row), verdict in zip(owners.items(), look_at_all(list(owners.items()), look), strict=True):
        if verdict.reason is not None and not folders.can_write(path):
            unwritable.add(row)
            continue
        found.files += 1
        found.unknown += not verdict.known
        if verdict.reason is not None:
            found.stale[row] = verdict.reason
    for row, owner in enumerate(owner_of):
        reason = READ_ONLY_FOLDER if owner in unwritable else None
        found.in_memory.append(SHARED_NAME if hashes[row] != hashes[owner] else reason)
    return found


class TextMemory:
    """Arrays of captions in one mapped file: written by the ranks of a node, read by their loader workers."""

    def __init__(self, file: MappedFile, numbers: NDArray[np.uint64], layout: TextLayout) -> None:
        self._file, self._numbers, self._layout = file, numbers, layout

    @classmethod
    def create(cls, plan: TextPlan, layout: TextLayout, folder: str | None = None) -> TextMemory:
        """Reserve a temporary file for what `plan` keeps in memory; it is removed when the object goes.

        Raises:
            UserError: there is not enough space.
        """
        file = MappedFile.create(plan.memory_bytes, what="texts", option="--cache_text_encoder_outputs", folder=folder)
        return cls(file, plan.numbers, layout)

    @property
    def path(self) -> str:
        """Of the file."""
        return self._file.path

    def _slot(self, caption: str) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
        number = np.uint64(_number(caption))
        index = int(np.searchsorted(self._numbers, number))
        if index == len(self._numbers) or self._numbers[index] != number:
            raise BrokenCache(MISSING)
        size = self._layout.slot_bytes
        return self._layout.views(self._file.bytes(index * size, size))

    def read(self, caption: str) -> dict[str, NDArray[Any]]:
        """Return the arrays of a caption by its hash: views of the file, not copies.

        Raises:
            BrokenCache: they are not there.
        """
        arrays, filled = self._slot(caption)
        if not filled[0]:
            raise BrokenCache(MISSING)
        return arrays

    def write(self, caption: str, arrays: Arrays) -> None:
        """Store the arrays of a caption by its hash."""
        places, filled = self._slot(caption)
        for name, place in places.items():
            place[...] = arrays[name]
        filled[:] = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return TextMemory, (self._file, self._numbers, self._layout)


@dataclass(frozen=True, slots=True)
class CachedTexts:
    """Serves the cached outputs of one part of the data; picklable, and small whatever it serves.

    Attributes:
        names: of the cache files.
        on_disk: whether each row is served from its file, bool [N].
        memory: everything else, and the empty caption.
        layout: of the arrays.
        trusting: files are not compared with the caption (`--skip_cache_check`).
    """

    names: CacheNames
    on_disk: NDArray[np.bool_]
    memory: TextMemory
    layout: TextLayout
    trusting: bool = False

    def read(self, row: int, caption: str) -> dict[str, NDArray[Any]]:
        """Return the arrays that stand for the caption of a row, or for the empty one.

        Raises:
            BrokenCache: there is nothing usable; a damaged file has been set aside.
        """
        key = caption_hash(caption)
        if not caption or not self.on_disk[row]:
            return self.memory.read(key)
        path = self.names(row)
        with setting_aside(path):
            return read_texts(path, self.layout, None if self.trusting else key)


class TextStore:
    """Takes what the encoders make of a plan's captions, and hands out what serves them."""

    def __init__(
        self, rows: TextRows, plan: TextPlan, memory: TextMemory, layout: TextLayout, origin: Mapping[str, Any]
    ) -> None:
        self.rows, self.plan, self.memory, self.layout = rows, plan, memory, layout
        self._origin = dict(origin)

    def sources(self, *, trusting: bool) -> list[CachedTexts]:
        """Return what serves each part of the data."""
        on_disk = np.split(self.plan.on_disk, self.rows.starts[1:-1])
        return [
            CachedTexts(names, mine, self.memory, self.layout, trusting)
            for names, mine in zip(self.rows.names, on_disk, strict=True)
        ]

    def store(self, job: TextJob, arrays: Arrays) -> None:
        """Store the arrays of a caption; safe to call from threads.

        Raises:
            UserError: values are not finite; the message shows the caption.
            CannotSave: a cache file could not be written.
        """
        text = self.rows.text(job.rows[0])
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise UserError(
                f"the text encoder made NaN or infinite values of the caption {text[:60]!r}",
                "Use --mixed_precision bf16 or no, or another model.",
            )
        key = caption_hash(text)
        if job.in_memory:
            self.memory.write(key, arrays)
            return
        for row in job.rows:
            write_texts(self.rows.path(row), arrays, {**self._origin, "caption": key})
