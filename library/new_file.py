"""A file being written, and what is said when writing fails. Used through `library.files`."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from library.errors import EXIT_CANNOT_SAVE, StopTraining
from library.faults import fault_point

if TYPE_CHECKING:
    StrPath = str | os.PathLike[str]

DISK_FULL = frozenset({errno.EFBIG, errno.ENOSPC, errno.EDQUOT})
_OS_ERROR_IN_TEXT = re.compile(r"os error (\d+)")
_BUFFER = 1 << 20


class CannotSave(StopTraining):
    """A file could not be written; `str()` names the file, the cause and, for a full disk, the space. Exit status 4."""

    def __init__(self, reason: str, path: StrPath = "", error_number: int | None = None, cause: str = "") -> None:
        super().__init__(reason, EXIT_CANNOT_SAVE)
        self.path = Path(path)
        self.error_number = error_number
        self.cause = cause or reason

    @property
    def disk_full(self) -> bool:
        """Whether the disk, the quota or the file size limit was exhausted (freeing space helps)."""
        return self.error_number in DISK_FULL


class NewFile:
    """A binary file being written that keeps the first `OSError`.

    Writers that replace the cause of a failure by an error of their own, or swallow it (`torch.save` does both,
    depending on the write that fails), thus cannot hide it: leaving the context raises the kept error. Bytes go through
    a buffer; `write` passes the fault point `<kind>.mid`.
    """

    def __init__(self, path: StrPath, kind: str = "save") -> None:
        self.path = Path(path)
        self.error: OSError | None = None
        self._kind = kind
        self._file = self._guard(lambda: self.path.open("wb", buffering=_BUFFER))

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data` and return its length in bytes."""

        def write() -> int:
            fault_point(f"{self._kind}.mid")
            return self._file.write(data)

        return self._guard(write)

    def rewrite_start(self, data: bytes) -> None:
        """Replace the first bytes; writing goes on at the end."""

        def rewrite() -> None:
            end = self._file.tell()
            self._file.seek(0)
            self._file.write(data)
            self._file.seek(end)

        self._guard(rewrite)

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._guard(self._file.flush)

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._file.tell()

    def close(self) -> None:
        """Flush and close; further calls do nothing."""
        if not self._file.closed:
            try:
                self._guard(self._file.flush)
            finally:
                with suppress(OSError):
                    self._file.close()

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            with suppress(OSError):
                self.close()
        if self.error is not None and error is not self.error:
            raise self.error from error

    def _guard(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            named = OSError(error.errno, error.strerror or str(error), str(self.path))
            if self.error is None:
                self.error = named
            raise named from error


def free_bytes(path: StrPath) -> int:
    """Return the space that this user may still fill on the disk of `path` (which need not exist yet)."""
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def format_bytes(count: float) -> str:
    """Return `count` bytes in words: ``1.9 GiB``."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if count < 1024 or unit == units[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def raise_as_cannot_save(error: BaseException, path: Path, temporary: Path, needed: int) -> None:
    """Raise `CannotSave` for `path` when `error` says that writing failed; return for all other errors."""
    if isinstance(error, CannotSave):
        if temporary not in error.path.parents:
            return
        number, cause = error.error_number, error.cause
    else:
        number, cause = _cause(error, Path(os.path.realpath(path)), temporary)
    if not cause:
        return
    if number in DISK_FULL:
        cause = f"disk full (needs {format_bytes(needed)}, free {format_bytes(free_bytes(path.parent))})"
    text = f"cannot save {path}: {cause}."
    if path.exists():
        text += f" Previous {path.name} is untouched."
    raise CannotSave(text, path, number, cause) from error


def _cause(error: BaseException, target: Path, temporary: Path) -> tuple[int | None, str]:
    """Return (errno, text) when `error` comes from writing the file, else (None, "")."""
    if isinstance(error, OSError):
        ours = error.filename is None or Path(os.fsdecode(error.filename)) in {target, temporary, target.parent}
        inside = error.filename is not None and temporary in Path(os.fsdecode(error.filename)).parents
        if ours or inside or error.errno in DISK_FULL:
            return error.errno, error.strerror or str(error)
    elif type(error).__name__ == "SafetensorError" and (match := _OS_ERROR_IN_TEXT.search(str(error))) is not None:
        # safetensors reports failures of the system as text only.
        return int(match[1]), os.strerror(int(match[1]))
    return None, ""
