"""Where the bytes of a picture are: a file, or a member of a tar file, local or remote. Nothing is ever unpacked.

A member is written as a path, `photos/a.tar!/set/0001.jpg@1536+20480`: tar file, name, first byte and length. So it
goes wherever the path of a picture goes, through tables, caches and loader processes, and one read fetches it.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from library.data.image_headers import ReadAt, at_offset

MAX_MEMBER_BYTES = 512 << 20
MAX_TEXT_BYTES = 16 << 20
MARK = "!/"
"""Between the tar file and the name of the member."""

_MEMBER = re.compile(r"(?P<shard>.+?)!/(?P<member>.+)@(?P<offset>\d{1,18})\+(?P<size>\d{1,18})", re.DOTALL)
_REMOTE = ("s3://", "http://", "https://")
_MOST_OPEN = 128


def is_remote(path: str) -> bool:
    """Tell whether a path is an address that is read through the network."""
    return path.startswith(_REMOTE)


@dataclass(frozen=True, slots=True)
class Locator:
    """A member of a tar file: `size` bytes from `offset` on."""

    shard: str
    member: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}{MARK}{self.member}@{self.offset}+{self.size}"

    def read(self, limit: int = MAX_MEMBER_BYTES) -> bytes:
        """Return the bytes of the member.

        Raises:
            OSError: it is larger than `limit`, the tar file ends before it does, or cannot be read.
        """
        held = _held.get(str(self))
        if held is not None:
            return held
        if self.size > limit:
            raise OSError(f"has {self.size >> 20} MiB, the limit is {limit >> 20} MiB")
        data = read_part(self.shard, self.offset, self.size)
        if len(data) != self.size:
            raise OSError("the tar file is shorter than it was when it was indexed")
        return data

    def open(self, limit: int = MAX_MEMBER_BYTES) -> BinaryIO:
        """Return the bytes of the member as an open file.

        Raises:
            OSError: as `read`.
        """
        return io.BytesIO(self.read(limit))


def holds_members(folder: str) -> bool:
    """Tell whether a folder of a table is a tar file: its paths are those of members."""
    return folder.endswith(MARK)


def member_name(name: str) -> str:
    """Return the name of a member without the place where it lies."""
    return name.rpartition("@")[0] or name


def exists(path: str | Path) -> bool:
    """Tell whether there is a file of this path, or the tar file that a member is in; addresses are not looked at."""
    locator = locator_of(path)
    return Path(path).exists() if locator is None else is_remote(locator.shard) or Path(locator.shard).exists()


def locator_of(path: str | Path) -> Locator | None:
    """Return the locator that a path stands for, None for a path of a file."""
    text = str(path)
    if MARK not in text or "@" not in text:
        return None
    match = _MEMBER.fullmatch(text)
    if match is None:
        return None
    return Locator(match["shard"], match["member"], int(match["offset"]), int(match["size"]))


def read_part(path: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from `offset` on, fewer at its end.

    Raises:
        OSError: it cannot be read.
    """
    return reader_of(path)(offset, size)


def reader_of(path: str) -> ReadAt:
    """Return what reads parts of a file; local files stay open between calls.

    Raises:
        OSError: it cannot be opened.
    """
    if is_remote(path):
        from library.data.remote_files import remote_reader

        return remote_reader(path)
    return _open_files.get(path).read


class _OpenFile:
    """A descriptor that is closed when nobody holds the object any more, so never under a thread that reads."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        self._read_at = at_offset(self._descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        data = self._read_at(offset, size)
        while len(data) < size:
            more = self._read_at(offset + len(data), size - len(data))
            if not more:
                break
            data += more
        return data


class _OpenFiles:
    """The files read last, by path; reading names the offset, so threads and forked processes share them safely."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._unlock)

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    def get(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                self._files.move_to_end(path)
                return file
        file = _OpenFile(path)
        with self._lock:
            self._files[path] = file
            while len(self._files) > _MOST_OPEN:
                self._files.popitem(last=False)
        return file

    def forget(self, path: str) -> None:
        with self._lock:
            self._files.pop(path, None)


_open_files = _OpenFiles()


_held: dict[str, bytes] = {}


@contextmanager
def holding(members: Mapping[str, bytes]) -> Iterator[None]:
    """Read members, by their paths, from memory inside the block. For one thread at a time."""
    _held.update(members)
    try:
        yield
    finally:
        for path in members:
            _held.pop(path, None)


def forget_open(path: str) -> None:
    """Open a file anew at the next read: it may have been replaced by another of the same name."""
    _open_files.forget(path)
