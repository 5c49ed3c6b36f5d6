"""What all cache files share: how they are opened, looked through and written, and why one cannot be used.

They are `.npz` files with a record of origin, `meta_json`. Files of other programs have none and are accepted on names
and shapes alone. Nothing is ever unpickled, and a broken file is an answer, never a crash.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from library import files
from library.data.npz import BrokenNpz, NpzFile, pack_npz
from library.files import atomic_file
from library.new_file import NewFile

_log = logging.getLogger(__name__)

MISSING = "not cached yet"
UNREADABLE = "unreadable"
OTHER_FAMILY = "made for another model family"
IN_MEMORY = "kept in memory"
READ_ONLY_FOLDER = "folder is not writable, kept in memory"

META = "meta_json"
FORMAT = 1
_MAX_META = 1 << 18
_CHUNK = 256

Item = TypeVar("Item")
Found = TypeVar("Found")


class BrokenCache(Exception):
    """A cache entry that cannot be used; `str()` is the reason, perhaps with a detail after a colon."""

    @property
    def reason(self) -> str:
        """The reason without its detail."""
        return str(self).partition(": ")[0]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a look at a file found: why it cannot serve (None: it can), and whether its origin is known."""

    reason: str | None = None
    known: bool = True


@contextmanager
def opened(path: str) -> Iterator[NpzFile]:
    """Open a cache file for reading.

    Raises:
        BrokenCache: also from the block, for whatever is wrong with the file.
    """
    try:
        with NpzFile(path) as file:
            yield file
    except FileNotFoundError as error:
        raise BrokenCache(MISSING) from error
    except (BrokenNpz, OSError) as error:
        _log.debug("%s: %s", path, error)
        raise BrokenCache(f"{UNREADABLE}: {error}") from error


def read_meta(file: NpzFile, part: str) -> dict[str, Any]:
    """Return `part` of the record of origin; empty when another program wrote the file.

    Raises:
        BrokenNpz: the record cannot be understood.
    """
    if META not in file:
        return {}
    try:
        found = json.loads(str(file.read(META, _MAX_META)[()]))
    except (ValueError, RecursionError, IndexError) as error:
        raise BrokenNpz("meta_json cannot be parsed") from error
    if not isinstance(found, dict) or not isinstance(found.get(part), dict):
        raise BrokenNpz("meta_json has another form")
    return found[part]


def meta_array(part: str, value: Mapping[str, Any]) -> NDArray[Any]:
    """Return the record of origin as it is stored."""
    return np.array(json.dumps({"format": FORMAT, part: value}))


def fits(file: NpzFile, name: str, shape: tuple[int, ...], kinds: str = "f") -> bool:
    """Tell from its header whether there is an array of this name, shape and kind of numbers."""
    if name not in file:
        return False
    header = file.header(name)
    return header.shape == shape and np.dtype(header.dtype).kind in kinds


def read_array(file: NpzFile, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
    """Return an array that `fits`, its CRC verified, as `dtype`.

    Raises:
        BrokenNpz: it is damaged.
        BrokenCache: it holds values that are not finite.
    """
    array = file.read(name, 8 * int(np.prod(shape))).astype(dtype)
    if not np.isfinite(array).all():
        raise BrokenCache(f"{UNREADABLE}: {name} is not finite")
    return array


@contextmanager
def setting_aside(path: str) -> Iterator[None]:
    """Rename a cache file that the block finds unreadable to `<name>.corrupt`, so that the next start makes it anew."""
    try:
        yield
    except BrokenCache as error:
        if error.reason == UNREADABLE:
            with suppress(OSError):
                os.replace(path, f"{path}.corrupt")  # noqa: PTH105
        raise


def write_cache(path: str, arrays: Mapping[str, NDArray[Any]], kept: Iterable[tuple[str, bytes]] = ()) -> None:
    """Write a cache file: whole or not at all.

    Args:
        path: of the file.
        arrays: by name, the record of origin among them.
        kept: further members as raw bytes.

    Raises:
        CannotSave: the file could not be written.
    """
    data = pack_npz(arrays, kept)
    with atomic_file(path, size=len(data), sync=False, kind="cache") as temporary, NewFile(temporary, "cache") as file:
        file.write(data)


class CacheFolders:
    """The folders of cache files, each looked at once: which files it holds, and whether it can be written to."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}
        self._writable: dict[str, bool] = {}

    def names_beside(self, path: str) -> frozenset[str]:
        """Return the names of the cache files in the folder of `path`; safe to call from threads."""
        folder = os.path.dirname(path) or "."  # noqa: PTH120
        if folder not in self._names:
            try:
                found = frozenset(entry.name for entry in os.scandir(folder) if entry.name.endswith(".npz"))
            except OSError:
                found = frozenset()
            self._names[folder] = found
        return self._names[folder]

    def can_write(self, path: str) -> bool:
        """Tell whether `path` could be written; what killed writers left beside it is removed."""
        folder = os.path.dirname(path) or "."  # noqa: PTH120
        if folder not in self._writable:
            self._writable[folder] = not files.check_writable_folder(folder)
            files.clean_litter(folder)
        return self._writable[folder]


def look_at_all(items: Sequence[Item], look: Callable[[Item], Found]) -> list[Found]:
    """Return `look(item)` of all items in order, worked out by a few threads."""
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="caches") as pool:
        return [found for part in pool.map(lambda chunk: [look(item) for item in chunk], chunks) for found in part]
