"""What lies where in tar files: each is walked through once, and the result kept in a small file beside it.

Samples are members of the same name up to the first dot of the base name: `set/0001.jpg`, `set/0001.txt` and
`set/0001.json` are sample `set/0001` with the fields `jpg`, `txt` and `json`. Texts are kept in the index, pictures
stay where they are. Nothing is unpacked, and members that could harm are named and never opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library import files
from library.data.array_file import NotAnArrayFile, pack_arrays, unpack_arrays
from library.data.bad_files import BadFile
from library.data.dataset_file import parse_json
from library.data.records import TextColumn
from library.data.remote_files import read_ahead, remote_facts
from library.data.scan_index import RACY_NS
from library.data.storage import Locator, forget_open, is_remote, reader_of
from library.data.tar_headers import NotATar
from library.data.tar_samples import PICTURE_SUFFIXES, Found, collect
from library.errors import Problem, UserError, raise_problems

_log = logging.getLogger(__name__)

FORMAT = 2
_AHEAD = 1 << 19
"""Bytes that are fetched at once where headers are far away."""
_HINT = "Make it anew, for example with tools/make_webdataset.py."


@dataclass(frozen=True, slots=True)
class TarSample:
    """One sample: its picture (None: it has none), size and EXIF orientation as stored, and its texts by field."""

    key: str
    picture: Locator | None
    header: tuple[int, int, int]
    texts: dict[str, str]
    others: dict[str, Locator]
    """Further pictures by field, such as `mask.png`."""

    @property
    def caption(self) -> str | None:
        """The text beside the picture."""
        return self.texts.get("txt", self.texts.get("caption"))

    def facts(self) -> dict[str, Any] | None:
        """Return the JSON object, None when there is none.

        Raises:
            UserError: it is damaged, or no object.
        """
        text = self.texts.get("json")
        if text is None:
            return None
        value = parse_json(text, f"{self.key}.json")
        if not isinstance(value, dict):
            raise UserError("is no JSON object", where=f"{self.key}.json")
        return value


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The samples of one tar file, in the order in which they begin.

    Attributes:
        shard: path or address.
        version: size, and time of change or tag, of the file that was indexed.
        keys: of the samples [n].
        starts: first member of each sample, and the end [n + 1]; members are sorted by sample.
        names: of the members [m].
        spans: offset and size of the members [m, 2].
        headers: width, height, EXIF orientation of pictures as stored [m, 3]; 0 for everything else, and bad pictures.
        texts: content of text members [m].
        notes: what was left out and why, and damage.
        kinds: of the notes, as in `skipped`.
        skipped: how many entries each note kind stands for; of notes only the first are kept.
    """

    shard: str
    version: tuple[int, str]
    keys: TextColumn
    starts: NDArray[np.int64]
    names: TextColumn
    spans: NDArray[np.int64]
    headers: NDArray[np.int32]
    texts: TextColumn
    notes: tuple[str, ...]
    kinds: tuple[str, ...]
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[TarSample]:
        return (self.sample(number) for number in range(len(self)))

    def sample(self, number: int) -> TarSample:
        """Return one sample, counted from 0."""
        key = self.keys[number]
        pictures: dict[str, int] = {}
        texts: dict[str, str] = {}
        for row in range(int(self.starts[number]), int(self.starts[number + 1])):
            field = self.names[row].rpartition("/")[2].partition(".")[2].lower()
            if field.rpartition(".")[2] in PICTURE_SUFFIXES:
                pictures[field] = row
            else:
                texts[field] = self.texts[row]
        main = next((pictures[suffix] for suffix in PICTURE_SUFFIXES if suffix in pictures), None)
        width, height, orientation = (0, 0, 0) if main is None else self.headers[main].tolist()
        others = {field: self._locator(row) for field, row in pictures.items() if row != main}
        picture = None if main is None else self._locator(main)
        return TarSample(key, picture, (width, height, orientation), texts, others)

    def _locator(self, row: int) -> Locator:
        offset, size = self.spans[row].tolist()
        return Locator(self.shard, self.names[row], offset, size)

    @property
    def mtime_ns(self) -> int:
        """A number that changes when the file does: when it was changed, or a digest of what its server says."""
        if not is_remote(self.shard):
            return int(self.version[1].partition("/")[0])
        return int.from_bytes(blake2b(self.version[1].encode(), digest_size=7).digest(), "big")

    def problems(self) -> list[BadFile]:
        """Return the notes as entries of a report, every line with the shard's name."""
        return [BadFile(self.shard, note) for note in self.notes]


def index_shards(
    shards: Sequence[str],
    *,
    cache_dir: str | None = None,
    workers: int = 4,
    progress: Callable[[int, int], object] | None = None,
) -> list[ShardIndex]:
    """Return the index of every tar file, reading those that are new or have changed.

    Each index is kept as soon as it is made, so a run that was stopped goes on where it was.

    Args:
        shards: paths and addresses.
        cache_dir: for indexes that cannot lie beside their file, remote ones among them; None: those are not kept.
        workers: files that are read at the same time.
        progress: is told how many of how many are done.

    Raises:
        UserError: holds every file that is missing, unreadable or no tar file.
    """
    found: list[ShardIndex] = []
    problems: list[Problem] = []
    with ThreadPoolExecutor(max(workers, 1), "index") as pool:
        for future in [pool.submit(index_shard, shard, cache_dir=cache_dir) for shard in shards]:
            try:
                found.append(future.result())
            except UserError as error:
                problems.extend(error.problems)
            if progress is not None:
                progress(len(found) + len(problems), len(shards))
    raise_problems(problems)
    return found


def index_shard(shard: str, *, cache_dir: str | None = None) -> ShardIndex:
    """Return the index of one tar file; see `index_shards`.

    Raises:
        UserError: it is missing, unreadable or no tar file.
    """
    version, changed_ns = _version_of(shard)
    for path in index_paths(shard, cache_dir):
        known = _loaded(path, shard)
        if known is not None and known.version == version:
            return known
    forget_open(shard)
    try:
        read_at = reader_of(shard)
        if is_remote(shard):
            read_at = read_ahead(read_at, version[0], _AHEAD)
        index = _made(shard, version, collect(shard, read_at, version[0]))
    except NotATar as error:
        raise UserError(str(error), _HINT, where=shard) from error
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=shard) from error
    again, _ = _version_of(shard)
    if again == version and (is_remote(shard) or _quiet(changed_ns)):
        _save(index, index_paths(shard, cache_dir))
    for line in index.notes:
        _log.debug("%s: %s", shard, line)
    return index


def index_paths(shard: str, cache_dir: str | None) -> list[Path]:
    """Return where the index of a tar file may lie: beside it, or in the cache folder."""
    remote = is_remote(shard)
    paths = [] if remote else [Path(shard).with_name(f".{Path(shard).name}.index")]
    if cache_dir is not None:
        place = shard if remote else str(Path(shard).absolute())
        name = blake2b(place.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
        paths.append(Path(cache_dir) / f"tar_index-{name}.bin")
    return paths


def _version_of(shard: str) -> tuple[tuple[int, str], int]:
    """Return what changes with a file, and when a local one was changed last."""
    if is_remote(shard):
        return remote_facts(shard), 0
    try:
        path = Path(shard)
        info = path.stat()
        if not path.is_file():
            raise UserError("is not a regular file", where=shard)
    except OSError as error:
        raise UserError(error.strerror or str(error), where=shard) from error
    return (info.st_size, f"{info.st_mtime_ns}/{info.st_ctime_ns}"), max(info.st_mtime_ns, info.st_ctime_ns)


def _quiet(changed_ns: int) -> bool:
    """Tell whether a file was left alone long enough for a later change to show in its times."""
    import time

    return time.time_ns() - changed_ns > RACY_NS


def _made(shard: str, version: tuple[int, str], found: Found) -> ShardIndex:
    members = [member for sample in found.samples.values() for member in sample.values()]
    counts = np.fromiter(map(len, found.samples.values()), np.int64, len(found.samples))
    return ShardIndex(
        shard=shard,
        version=version,
        keys=TextColumn.of([_storable(key) for key in found.samples]),
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        names=TextColumn.of([_storable(member.name) for member in members]),
        spans=np.array([(member.offset, member.size) for member in members], np.int64).reshape(-1, 2),
        headers=np.array([member.header for member in members], np.int32).reshape(-1, 3),
        texts=TextColumn.of([member.text for member in members]),
        notes=tuple(found.notes),
        kinds=tuple(found.kinds),
        skipped=dict(found.skipped),
    )


def _storable(text: str) -> str:
    return text.replace("\0", "")


_COLUMNS = ("starts", "spans", "headers")
_TEXTS = ("keys", "names", "texts")


def _save(index: ShardIndex, paths: Sequence[Path]) -> None:
    """Write the index to the first place that can be written; being unable to is no error."""
    header = {
        "format": FORMAT,
        "version": index.version,
        "notes": index.notes,
        "kinds": index.kinds,
        "skipped": index.skipped,
    }
    arrays = [(name, getattr(index, name)) for name in _COLUMNS]
    for name in _TEXTS:
        column = getattr(index, name)
        arrays += [(name, column.blob), (f"{name}_offsets", column.offsets)]
    pieces = pack_arrays(header, arrays)
    for path in paths:
        try:
            files.write_bytes(path, pieces)
        except (files.CannotSave, OSError) as error:
            _log.debug("index not written: %s", error)
        else:
            return


def _loaded(path: Path, shard: str) -> ShardIndex | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    try:
        header, arrays = unpack_arrays(data, verify=True)
        if header.get("format") != FORMAT:
            return None
        column = partial(_column, arrays)
        size, tag = header["version"]
        index = ShardIndex(
            shard,
            (size, tag),
            keys=column("keys"),
            starts=arrays["starts"],
            names=column("names"),
            spans=arrays["spans"],
            headers=arrays["headers"],
            texts=column("texts"),
            notes=tuple(header["notes"]),
            kinds=tuple(header["kinds"]),
            skipped=dict(header["skipped"]),
        )
    except (NotAnArrayFile, KeyError, TypeError, ValueError) as error:
        _log.warning("%s is damaged (%s): the tar file is indexed anew", path, error)
        return None
    return index if _is_sound(index) else None


def _is_sound(index: ShardIndex) -> bool:
    """Tell whether the columns fit each other: nobody knows who wrote the file."""
    if not all(_reads(column) for column in (index.keys, index.names, index.texts)):
        return False
    members = len(index.names)
    shapes = ((index.starts, (len(index.keys) + 1,)), (index.spans, (members, 2)), (index.headers, (members, 3)))
    if not all(array.shape == shape and array.dtype.kind == "i" for array, shape in shapes):
        return False
    inside = bool((index.spans >= 0).all() and (index.spans.sum(axis=1) <= index.version[0]).all())
    whole = len(index.texts) == members and len(index.kinds) == len(index.notes)
    return whole and _ascends(index.starts, members) and inside


def _reads(column: TextColumn) -> bool:
    """Tell whether every text of a column can be read."""
    try:
        return _ascends(column.offsets, len(column.blob)) and all(text is not None for text in column)
    except UnicodeDecodeError:
        return False


def _ascends(offsets: NDArray[Any], end: int) -> bool:
    """Tell whether offsets lead from 0 to `end` without a step back."""
    whole = offsets.ndim == 1 and offsets.dtype.kind == "i" and len(offsets) > 0
    return whole and offsets[0] == 0 and offsets[-1] == end and bool((np.diff(offsets) >= 0).all())


def _column(arrays: dict[str, NDArray[Any]], name: str) -> TextColumn:
    return TextColumn(arrays[name], arrays[f"{name}_offsets"])
