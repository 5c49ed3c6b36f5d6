"""Copies of tar files that are not at hand: on a server, or what a command writes. Each is made once, whole or not."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from library import files
from library.data.remote_files import remote_facts, remote_reader
from library.data.shards import is_pipe
from library.errors import UserError
from library.file_names import safe_file_name
from library.lock_file import LockFile

_log = logging.getLogger(__name__)

_CHUNK = 8 << 20
_POLL_SECONDS = 0.5


def shard_copy(shard: str, folder: str | Path) -> Path:
    """Return a copy of a tar file in `folder`: of an address, or of what a `pipe:` entry writes.

    Raises:
        UserError: it cannot be had.
        CannotSave: the copy cannot be written.
    """
    return _output_of(shard, Path(folder)) if is_pipe(shard) else local_copy(shard, folder)


def local_copy(url: str, folder: str | Path) -> Path:
    """Return a copy of a remote file in `folder`, made now or earlier from the same version of it.

    Raises:
        UserError: it cannot be read.
        CannotSave: the copy cannot be written.
    """
    size, version = remote_facts(url)
    name = safe_file_name(url.partition("?")[0].rstrip("/").rpartition("/")[2]) or "shard.tar"
    mark = _mark(f"{url}\n{size}\n{version}")
    target = Path(folder) / f"{mark}-{name}"
    read_at = remote_reader(url)

    def pieces() -> Iterator[bytes]:
        for offset in range(0, size, _CHUNK):
            data = read_at(offset, min(_CHUNK, size - offset))
            if len(data) != min(_CHUNK, size - offset):
                raise UserError("became shorter while it was copied", where=url)
            yield data

    with _alone(target) as missing:
        if missing:
            files.write_bytes(target, pieces())
    return target


def _output_of(entry: str, folder: Path) -> Path:
    """Return what the command of an entry writes, kept from an earlier start if there was one."""
    target = folder / f"{_mark(entry)}-pipe.tar"

    def pieces() -> Iterator[bytes]:
        command, written = entry.partition(":")[2], 0
        with subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            try:
                while process.stdout is not None and (data := process.stdout.read(_CHUNK)):
                    written += len(data)
                    yield data
            except GeneratorExit:
                # Nobody wants the rest, such as when the disk is full.
                process.kill()
                raise
        if process.returncode or not written:
            what = f"the command ended with status {process.returncode}" if process.returncode else "wrote nothing"
            raise UserError(what, "Try it in a shell.", where=entry)

    with _alone(target) as missing:
        if missing:
            _log.info("running the command of %s", entry)
            files.write_bytes(target, pieces())
    return target


@contextmanager
def _alone(target: Path) -> Iterator[bool]:
    """Keep other processes from making the same copy inside the block; yield whether it must be made.

    A copy is complete or not there, and the lock of a dead process counts for nothing.
    """
    if target.is_file():
        yield False
        return
    lock = LockFile(target.with_name(f".{target.name}.lock"))
    while True:
        try:
            lock.acquire()
        except UserError:
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            what = f"cannot save {target}: {error.strerror or error}"
            raise files.CannotSave(what, target, error.errno) from error
        else:
            break
    try:
        yield not target.is_file()
    finally:
        lock.release()


def _mark(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
