"""The only module that writes files: complete under their final name, or not there at all.

A file or folder is filled under a temporary name beside its target, brought to disk, checked and renamed. What was
there before stays until then, whatever happens: full disk, lost power, SIGKILL. Temporary names are
`.<name>.tmp-<pid>-<host and random hex>`; `clean_litter` removes those of dead processes at the next start.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import Problem
from library.faults import fault_point
from library.lock_file import LockFile, process_alive
from library.new_file import DISK_FULL, CannotSave, NewFile, format_bytes, free_bytes, raise_as_cannot_save

_log = logging.getLogger(__name__)

_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR})
_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.(?P<kind>tmp|old|del)-(?P<pid>\d+)-(?P<host>[0-9a-f]{4})[0-9a-f]{8}$")
_HOUR = 3600.0
_REPLACE_TRIES = 10

__all__ = [
    "CannotSave",
    "DISK_FULL",
    "LockFile",
    "NewFile",
    "atomic_file",
    "atomic_folder",
    "check_writable_folder",
    "clean_litter",
    "fault_point",
    "format_bytes",
    "free_bytes",
    "process_alive",
    "remove_tree",
    "temporary_beside",
    "write_bytes",
    "write_json",
    "write_text",
]


if TYPE_CHECKING:
    StrPath = str | os.PathLike[str]


@contextmanager
def atomic_file(
    path: StrPath,
    check: Callable[[Path], object] | None = None,
    *,
    size: int | None = None,
    sync: bool = True,
    kind: str = "save",
) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path` that replaces `path` when the block succeeds.

    The file then has been synchronized with the disk, has passed `check(temporary)` and has the mode of the file that
    it replaces, or that of the umask. A symbolic link stays and its target is replaced. Missing folders are made.

    Args:
        path: where the file shall appear.
        check: raises when the written file is not good; called before the replacement.
        size: expected number of bytes, for the message when the disk is full.
        sync: False for files that can be made again and are checked when read (caches).
        kind: prefix of the fault points (`save`, `cache`).

    Raises:
        CannotSave: the file could not be written; the previous one is untouched.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary_name(target, "tmp")
    written = 0
    try:
        fault_point(f"{kind}.open")
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb"):
            pass
        mode = _mode_of(target) or _mode_of(temporary) or 0o600
        yield temporary
        written = temporary.stat().st_size
        fault_point(f"{kind}.before_fsync")
        if sync:
            _sync_file(temporary)
        if check is not None:
            check(temporary)
        temporary.chmod(mode)
        fault_point(f"{kind}.before_replace")
        _replace(temporary, target)
        fault_point(f"{kind}.after_replace")
        if sync:
            _sync_folder(target.parent)
    except BaseException as error:
        written = max(written, _size_of(temporary))
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise_as_cannot_save(error, Path(path), temporary, size or written)
        raise


@contextmanager
def atomic_folder(path: StrPath, *, size: int | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place, complete and on disk, when the block succeeds.

    An existing folder is set aside first and removed afterwards; if the process dies between the two renames,
    `clean_litter` brings it back.

    Raises:
        CannotSave: the folder could not be written; a previous one is untouched.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary_name(target, "tmp")
    written = 0
    try:
        fault_point("save.open")
        if target.exists() and not target.is_dir():
            raise OSError(errno.EEXIST, "a file of that name is in the way", str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        written = _size_of(temporary)
        fault_point("save.before_fsync")
        _finish_tree(temporary)
        fault_point("save.before_replace")
        _exchange_folder(temporary, target)
        fault_point("save.after_replace")
    except BaseException as error:
        written = max(written, _size_of(temporary))
        shutil.rmtree(temporary, ignore_errors=True)
        raise_as_cannot_save(error, Path(path), temporary, size or written)
        raise


def write_bytes(path: StrPath, data: bytes | bytearray | memoryview | Iterable[bytes | memoryview]) -> None:
    """Write bytes, or pieces of bytes one after the other, as `atomic_file` does."""
    whole = isinstance(data, (bytes, bytearray, memoryview))
    size = memoryview(data).nbytes if whole else None  # type: ignore[arg-type]
    with atomic_file(path, size=size) as temporary, NewFile(temporary) as file:
        for piece in (data,) if whole else data:
            file.write(piece)  # type: ignore[arg-type]


def write_text(path: StrPath, text: str) -> None:
    """Write `text` as UTF-8 with the line ends that it has, as `atomic_file` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: StrPath, value: Any) -> None:
    """Write `value` as indented JSON (UTF-8, a final newline), as `atomic_file` does.

    File names that are no text in any encoding hold lone surrogates; these become escapes of JSON, which readers undo.

    Raises:
        ValueError: `value` holds NaN or an infinity, which JSON cannot express.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode("utf-8", "backslashreplace"))


def remove_tree(path: StrPath) -> None:
    """Remove a file, link or folder; nothing happens when it is missing.

    A folder loses its name first, so that a half-removed one is never met under it.
    """
    target = Path(path)
    if target.is_symlink() or not target.is_dir():
        target.unlink(missing_ok=True)
        return
    doomed = _temporary_name(target, "del")
    target.rename(doomed)
    shutil.rmtree(doomed)


def check_writable_folder(path: StrPath, where: str = "") -> list[Problem]:
    """Make `path` when it is missing, write a small file into it, and return what stands in the way (or nothing)."""
    folder = Path(path)
    where = where or str(folder)
    if folder.exists() and not folder.is_dir():
        return [Problem(where, f"{folder} is a file, not a folder", "Give the path of a folder")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        hint = "Free some space" if error.errno in DISK_FULL else "Check its permissions or choose another folder"
        return [Problem(where, f"cannot write into {folder}: {error.strerror or error}", hint)]
    return []


def clean_litter(folder: StrPath, min_age: float = _HOUR) -> list[Path]:
    """Undo what killed processes left in `folder`: restore folders set aside, remove temporary ones.

    Only names made by this module are touched, and only if the process that made them is gone. Temporary files must be
    older than `min_age` seconds; when another host made a name, a day must have passed.

    Returns:
        The final paths that were restored.
    """
    restored: list[Path] = []
    with suppress(OSError):
        for entry in sorted(Path(folder).iterdir()):
            match = _TEMPORARY.match(entry.name)
            if match is not None and _abandoned(entry, match, min_age):
                with suppress(OSError):
                    restored += _clear(entry, match)
    return restored


def _abandoned(entry: Path, match: re.Match[str], min_age: float) -> bool:
    """Whether nobody will come back to `entry`: its process is dead, and the file not young."""
    state = entry.lstat()
    if match["host"] != _host_mark():
        return time.time() - state.st_ctime > max(min_age, 24 * _HOUR)
    pid = int(match["pid"])
    if pid != os.getpid() and process_alive(pid):
        return False
    return match["kind"] != "tmp" or time.time() - state.st_mtime > min_age


def _clear(entry: Path, match: re.Match[str]) -> list[Path]:
    target = entry.with_name(match["name"])
    if match["kind"] == "old" and not target.exists():
        entry.rename(target)
        _log.warning("restored %s, which an interrupted save had set aside", target)
        return [target]
    remove_tree(entry)
    return []


def _host_mark() -> str:
    """Four hex digits that tell hosts apart without naming them."""
    return f"{zlib.crc32(socket.gethostname().encode('utf-8', 'replace')) & 0xFFFF:04x}"


def _temporary_name(target: Path, kind: str) -> Path:
    """Return a new name beside `target`; long names are cut, except where the name must be found again (`old`)."""
    tail = f".{kind}-{os.getpid()}-{_host_mark()}{secrets.token_hex(4)}"
    name = target.name
    if kind != "old":
        name = os.fsencode(name)[: 254 - len(tail)].decode("utf-8", "ignore")
    return target.with_name(f".{name}{tail}")


def temporary_beside(path: StrPath) -> Path:
    """Return a name beside `path` for a file that becomes part of something else; `clean_litter` finds it."""
    return _temporary_name(Path(os.path.realpath(path)), "tmp")


def _mode_of(path: Path) -> int | None:
    try:
        return stat.S_IMODE(path.stat().st_mode) & 0o777
    except OSError:
        return None


def _size_of(path: Path) -> int:
    """Bytes in a file or in all files of a folder; 0 when missing."""
    try:
        if path.is_dir():
            return sum(_size_of(child) for child in path.iterdir())
        return path.lstat().st_size
    except OSError:
        return 0


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to disk, where the system can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _finish_tree(folder: Path) -> None:
    """Give all files in `folder` the mode that the umask asks for and bring everything to disk."""
    mode = (_mode_of(folder) or 0o666) & 0o666
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            _finish_tree(child)
        else:
            _sync_file(child)
            child.chmod(mode)
    _sync_folder(folder)


def _exchange_folder(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`, setting aside and then removing what is there."""
    aside = None
    if target.exists():
        aside = _temporary_name(target, "old")
        target.rename(aside)
    fault_point("save.between_renames")
    try:
        temporary.rename(target)
    except OSError:
        if aside is not None:
            aside.rename(target)
        raise
    _sync_folder(target.parent)
    if aside is not None:
        with suppress(OSError):
            remove_tree(aside)


def _replace(temporary: Path, target: Path) -> None:
    """`os.replace`, patient with programs that keep the target open on Windows."""
    if os.name != "nt":
        temporary.replace(target)
        return
    for _ in range(_REPLACE_TRIES):
        try:
            temporary.replace(target)
            return
        except PermissionError:
            time.sleep(0.5)
    visible = target.with_name(f"{target.stem}-unsaved-{os.getpid()}{target.suffix}")
    temporary.rename(visible)
    raise CannotSave(f"cannot save {target}: another program keeps it open. The new version is {visible}", target)
