"""A lock that one run holds on its output name; the lock of a dead process is taken over."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from library.errors import UserError

_log = logging.getLogger(__name__)
_held: dict[str, int] = {}
_held_guard = threading.Lock()


def process_alive(pid: int) -> bool:
    """Whether a process of this host has the number `pid`."""
    if os.name == "nt":
        return _process_alive_on_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


class LockFile:
    """Holds `path` for this process; the file tells pid and host of the holder.

    The operating system's record lock decides, since it vanishes with the process. Where the file system has none, the
    pid in the file does. Child processes do not inherit the lock.
    """

    def __init__(self, path: str | os.PathLike[str], what: str = "output name") -> None:
        self.path = Path(path)
        self._what = what
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another living process holds it.
        """
        key = os.path.realpath(self.path)
        with _held_guard:
            if _held.get(key) == os.getpid():
                raise self._refusal({"pid": os.getpid(), "host": socket.gethostname()})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._open_locked()
            _held[key] = os.getpid()
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            holder = {"pid": os.getpid(), "host": socket.gethostname()}
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, json.dumps(holder).encode())

    def release(self) -> None:
        """Give the lock back and remove the file; does nothing when it is not held (or was inherited by a fork)."""
        key = os.path.realpath(self.path)
        with _held_guard:
            if self._descriptor is None or _held.get(key) != os.getpid():
                return
            del _held[key]
            with suppress(OSError):
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> LockFile:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def _open_locked(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                holder = _read_holder(descriptor)
                if not _lock(descriptor) or not self._dead(holder, descriptor):
                    raise self._refusal(holder)
                if _same_file(descriptor, self.path):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _dead(self, holder: dict[str, Any], descriptor: int) -> bool:
        """Judge by the content when the system's lock is granted (or cannot be had: `_lock` then says True)."""
        if not holder:
            return True
        if holder.get("host") != socket.gethostname():
            _log.warning("taking over %s from pid %s on host %s", self.path, holder.get("pid"), holder.get("host"))
            return True
        return _locks_work(descriptor) or not process_alive(int(holder.get("pid", 0)))

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        who = f"pid {holder.get('pid', '?')} on {holder.get('host', '?')}"
        hint = f"Wait until it has ended or choose another {self._what}"
        return UserError(f"in use by another run ({who})", hint, where=str(self.path))


def _read_holder(descriptor: int) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = json.loads(os.read(descriptor, 4096))
        if isinstance(holder, dict) and isinstance(holder.get("pid"), int):
            return holder
    return {}


def _same_file(descriptor: int, path: Path) -> bool:
    """False when the file was unlinked by its last holder between our opening and locking it."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_ino, mine.st_dev) == (there.st_ino, there.st_dev)


def _lock(descriptor: int) -> bool:
    """Return False when another process holds the lock, True when it is ours or the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in {errno.EACCES, errno.EAGAIN}
    return True


def _locks_work(descriptor: int) -> bool:
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _process_alive_on_windows(pid: int) -> bool:
    import ctypes

    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    handle = kernel.OpenProcess(0x1000, False, pid)
    if not handle:
        return False
    kernel.CloseHandle(handle)
    return True
