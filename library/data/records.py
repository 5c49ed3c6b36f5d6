"""The images of a run in columns: compact in memory, shared with loader workers through one mapped temporary file."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library import files
from library.contracts import ImageRecord
from library.data.array_file import pack_arrays, unpack_arrays
from library.data.storage import holds_members, member_name

_ENCODING_ERRORS = "surrogatepass"


@dataclass(frozen=True, slots=True)
class TextColumn:
    """Texts of a column back to back: `blob` uint8 [total], `offsets` int64 [n + 1]."""

    blob: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[str]) -> TextColumn:
        """Pack `texts`; undecodable file names survive as they are."""
        joined = "".join(texts)
        data = joined.encode("utf-8", _ENCODING_ERRORS)
        if len(data) == len(joined):
            lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        else:
            sizes = (len(text.encode("utf-8", _ENCODING_ERRORS)) for text in texts)
            lengths = np.fromiter(sizes, np.int64, len(texts))
        return cls(np.frombuffer(data, np.uint8), _offsets(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        start, end = self.offsets[row], self.offsets[row + 1]
        return self.blob[start:end].tobytes().decode("utf-8", _ENCODING_ERRORS)

    def __iter__(self) -> Iterator[str]:
        data = self.blob.tobytes()
        offsets = self.offsets.tolist()
        for start, end in zip(offsets, offsets[1:], strict=False):
            yield data[start:end].decode("utf-8", _ENCODING_ERRORS)

    def take(self, rows: NDArray[np.int64]) -> TextColumn:
        """Return the texts of `rows` in that order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = _offsets(lengths)
        starts = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return TextColumn(self.blob[starts + np.arange(offsets[-1])], offsets)

    @staticmethod
    def join(columns: Sequence[TextColumn]) -> TextColumn:
        """Return the columns one after the other."""
        lengths = [np.diff(column.offsets) for column in columns]
        blobs = [column.blob for column in columns]
        return TextColumn(_concatenate(blobs, np.uint8), _offsets(_concatenate(lengths, np.int64)))


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _concatenate(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


@dataclass(frozen=True, slots=True)
class Columns:
    """The arrays of a table, one entry per image; `widths` and `heights` hold the size after EXIF orientation.

    `folders` index `RecordTable.folders` (the path of the directory and what stands for it in keys); `mask_folders`
    likewise, -1 without a mask, and then `mask_names` is the empty text.
    """

    names: TextColumn
    captions: TextColumn
    mask_names: TextColumn
    folders: NDArray[np.int32]
    mask_folders: NDArray[np.int32]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    repeats: NDArray[np.int32]
    datasets: NDArray[np.int16]
    subsets: NDArray[np.int32]
    is_reg: NDArray[np.bool_]
    orientations: NDArray[np.uint8]
    file_sizes: NDArray[np.int64]
    mtimes_ns: NDArray[np.int64]


class RecordTable:
    """All images of a run. Rows are numbered from 0; columns are numpy arrays, texts come one at a time.

    Pickling writes the table once into a temporary file and ships its path: workers map it, so a hundred thousand
    images cost them nothing, whether they were forked or spawned.
    """

    def __init__(self, columns: Columns, folders: Sequence[tuple[str, str]]) -> None:
        """Wrap columns.

        Args:
            columns: Equally long columns.
            folders: (path of a directory, its name in keys), what `columns.folders` counts.
        """
        self.columns = columns
        self.folders = tuple(folders)
        self._shared: str | None = None

    def __len__(self) -> int:
        return len(self.columns.widths)

    @property
    def widths(self) -> NDArray[np.int32]:
        """Widths after EXIF orientation."""
        return self.columns.widths

    @property
    def heights(self) -> NDArray[np.int32]:
        """Heights after EXIF orientation."""
        return self.columns.heights

    @property
    def repeats(self) -> NDArray[np.int32]:
        """How often each image occurs in an epoch, at least 1."""
        return self.columns.repeats

    @property
    def datasets(self) -> NDArray[np.int16]:
        """Number of each image's data set."""
        return self.columns.datasets

    @property
    def subsets(self) -> NDArray[np.int32]:
        """Number of each image's subset, counted over all data sets."""
        return self.columns.subsets

    @property
    def is_reg(self) -> NDArray[np.bool_]:
        """Whether each image is a regularization image."""
        return self.columns.is_reg

    @property
    def file_sizes(self) -> NDArray[np.int64]:
        """Size in bytes of each image file; 0 where only caches are left of it."""
        return self.columns.file_sizes

    @property
    def mtimes_ns(self) -> NDArray[np.int64]:
        """Time of the last change of each image file in nanoseconds."""
        return self.columns.mtimes_ns

    def path(self, row: int) -> str:
        """Return the path of the image file."""
        return os.path.join(self.folders[self.columns.folders[row]][0], self.columns.names[row])  # noqa: PTH118

    def key(self, row: int) -> str:
        """Return the name of the image that does not depend on where the data lie: `folder/file.png`."""
        folder, prefix = self.folders[self.columns.folders[row]]
        name = self.columns.names[row]
        if holds_members(folder):
            name = member_name(name)
        return f"{prefix}/{name}" if prefix else name

    def keys(self) -> Iterator[str]:
        """Yield the key of every row in order."""
        prefixes = [f"{key}/" if key else "" for _path, key in self.folders]
        packed = [holds_members(path) for path, _key in self.folders]
        for folder, name in zip(self.columns.folders.tolist(), self.columns.names, strict=True):
            yield prefixes[folder] + (member_name(name) if packed[folder] else name)

    def caption(self, row: int) -> str:
        """Return the caption as it was read, before any processing."""
        return self.columns.captions[row]

    def captions(self) -> Iterator[str]:
        """Yield the caption of every row in order."""
        return iter(self.columns.captions)

    def size_wh(self, row: int) -> tuple[int, int]:
        """Return (width, height) after EXIF orientation."""
        return int(self.columns.widths[row]), int(self.columns.heights[row])

    def mask_path(self, row: int) -> str | None:
        """Return the path of the conditioning or mask image, if there is one."""
        folder = self.columns.mask_folders[row]
        if folder < 0:
            return None
        return os.path.join(self.folders[folder][0], self.columns.mask_names[row])  # noqa: PTH118

    def record(self, row: int) -> ImageRecord:
        """Return one row as an `ImageRecord`."""
        columns = self.columns
        return ImageRecord(
            index=row,
            path=self.path(row),
            key=self.key(row),
            size_wh=self.size_wh(row),
            caption=self.caption(row),
            repeats=int(columns.repeats[row]),
            dataset=int(columns.datasets[row]),
            subset=int(columns.subsets[row]),
            is_reg=bool(columns.is_reg[row]),
            mask_path=self.mask_path(row),
            orientation=int(columns.orientations[row]),
            file_size=int(columns.file_sizes[row]),
            mtime_ns=int(columns.mtimes_ns[row]),
        )

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.record, range(len(self)))

    def take(self, rows: NDArray[np.int64]) -> RecordTable:
        """Return a table of `rows` in that order."""
        chosen: dict[str, Any] = {f.name: _take(getattr(self.columns, f.name), rows) for f in fields(Columns)}
        return RecordTable(Columns(**chosen), self.folders)

    def with_repeats(self, repeats: NDArray[np.int32]) -> RecordTable:
        """Return the same images with other repeats."""
        return RecordTable(replace(self.columns, repeats=repeats.astype(np.int32)), self.folders)

    @staticmethod
    def join(tables: Sequence[RecordTable]) -> RecordTable:
        """Return the tables one after the other."""
        folders: list[tuple[str, str]] = []
        shifted: list[Columns] = []
        for table in tables:
            shift = np.int32(len(folders))
            columns = table.columns
            masks = np.where(columns.mask_folders < 0, np.int32(-1), columns.mask_folders + shift)
            shifted.append(replace(columns, folders=columns.folders + shift, mask_folders=masks))
            folders.extend(table.folders)
        joined: dict[str, Any] = {}
        for column in fields(Columns):
            parts = [getattr(columns, column.name) for columns in shifted]
            is_text = column.name in _TEXT_COLUMNS
            joined[column.name] = TextColumn.join(parts) if is_text else _concatenate(parts, _DTYPES[column.name])
        return RecordTable(Columns(**joined), folders)

    def nbytes(self) -> tuple[int, int]:
        """Return the bytes of (numbers, texts) that the table holds in memory."""
        numbers = texts = 0
        for array_name, array in _arrays(self.columns):
            if array_name.endswith(".blob"):
                texts += array.nbytes
            else:
                numbers += array.nbytes
        return numbers, texts + sum(len(path) + len(key) for path, key in self.folders)

    def share(self) -> str:
        """Write the table into a temporary file, once, and return its path; it goes when the table goes."""
        if self._shared is None:
            folder = tempfile.mkdtemp(prefix="records-")
            path = Path(folder) / "records.bin"
            files.write_bytes(path, pack_arrays({"folders": self.folders}, _arrays(self.columns)))
            self._shared = str(path)
            weakref.finalize(self, _remove_shared, folder, os.getpid())
        return self._shared

    def __reduce__(self) -> tuple[Any, ...]:
        return open_shared, (self.share(),)


_TEXT_COLUMNS = frozenset({"names", "captions", "mask_names"})
_DTYPES: Mapping[str, Any] = {
    "folders": np.int32,
    "mask_folders": np.int32,
    "widths": np.int32,
    "heights": np.int32,
    "repeats": np.int32,
    "datasets": np.int16,
    "subsets": np.int32,
    "is_reg": np.bool_,
    "orientations": np.uint8,
    "file_sizes": np.int64,
    "mtimes_ns": np.int64,
}


def empty_table() -> RecordTable:
    """Return a table without images."""
    return RecordTable.join([])


def _take(column: TextColumn | NDArray[Any], rows: NDArray[np.int64]) -> TextColumn | NDArray[Any]:
    return column.take(rows) if isinstance(column, TextColumn) else column[rows]


def _arrays(columns: Columns) -> Iterator[tuple[str, NDArray[Any]]]:
    for column in fields(Columns):
        value = getattr(columns, column.name)
        if isinstance(value, TextColumn):
            yield f"{column.name}.blob", value.blob
            yield f"{column.name}.offsets", value.offsets
        else:
            yield column.name, value


def open_shared(path: str) -> RecordTable:
    """Map a table that `share` wrote."""
    with Path(path).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header, arrays = unpack_arrays(mapped, verify=False)
    columns: dict[str, Any] = {}
    for column in fields(Columns):
        if column.name in _TEXT_COLUMNS:
            columns[column.name] = TextColumn(arrays[f"{column.name}.blob"], arrays[f"{column.name}.offsets"])
        else:
            columns[column.name] = arrays[column.name]
    table = RecordTable(Columns(**columns), [(folder, key) for folder, key in header["folders"]])
    table._shared = path
    return table


def _remove_shared(folder: str, owner: int) -> None:
    """Remove the temporary file, in the process that wrote it alone."""
    if os.getpid() == owner:
        files.remove_tree(Path(folder))
