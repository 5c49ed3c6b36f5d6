"""Temporary files that all processes of a node map: written by its ranks, read by their loader workers."""

from __future__ import annotations

import os
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library import files
from library.errors import UserError
from library.lock_file import process_alive
from library.new_file import format_bytes

_LITTER_SECONDS = 600.0


class MappedFile:
    """Bytes that processes share by the path of their file; a pickled copy is the path alone."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._map: Any = None

    @classmethod
    def create(cls, size: int, *, what: str, option: str, folder: str | None = None) -> MappedFile:
        """Reserve a temporary file; it is removed when the object goes.

        Args:
            size: in bytes.
            what: it holds; the name of its folder begins so.
            option: that asks for it; with `_to_disk` behind it, it names the way that needs no such file.
            folder: to put it into; None: the system's folder for temporary files.

        Raises:
            UserError: there is not enough space.
        """
        prefix = f"{what}-"
        _clean_litter(Path(folder or tempfile.gettempdir()), prefix)
        holder = tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=folder)
        path = Path(holder) / f"{what}.bin"
        size = max(size, 1)
        try:
            _reserve(path, size)
        except OSError as error:
            files.remove_tree(holder)
            raise UserError(
                f"cannot reserve {format_bytes(size)} for {what} in {holder}: {error.strerror or error}",
                f"Use {option}_to_disk, or point TMPDIR to a larger disk.",
                where=option,
            ) from error
        made = cls(str(path))
        weakref.finalize(made, _remove, holder, os.getpid())
        return made

    def bytes(self, start: int, size: int) -> NDArray[np.uint8]:
        """Return `size` bytes from `start` on, shared by all processes of the node."""
        if self._map is None:
            self._map = np.memmap(self.path, np.uint8, "r+")
        return self._map[start : start + size]

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedFile, (self.path,)


def _reserve(path: Path, size: int) -> None:
    """Make a file of `size` bytes whose space is taken at once: a full disk must not kill a process later."""
    with path.open("xb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _clean_litter(folder: Path, prefix: str) -> None:
    """Remove what killed runs left: such files are large."""
    for left in folder.glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix).partition("-")[0]
        with suppress(OSError):
            old = time.time() - left.stat().st_mtime > _LITTER_SECONDS
            if pid.isdigit() and old and not process_alive(int(pid)):
                files.remove_tree(left)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        files.remove_tree(folder)
