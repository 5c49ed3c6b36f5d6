"""Parts of files on S3 and web servers, by fsspec: sizes, ranges, lists and whole copies. Optional packages."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from library import files
from library.data.image_headers import ReadAt
from library.errors import UserError

_log = logging.getLogger(__name__)
T = TypeVar("T")

_PACKAGES = {"s3": "s3fs", "http": "aiohttp", "https": "aiohttp"}
_WAITS = (0.5, 2.0, 5.0)
_CHUNK = 8 << 20
_FINAL = (FileNotFoundError, PermissionError, NotImplementedError)


def file_system(url: str) -> Any:
    """Return the fsspec file system that an address belongs to.

    Raises:
        UserError: a package that it needs is missing.
    """
    scheme = url.partition("://")[0]
    package = _PACKAGES[scheme]
    for name in ("fsspec", package):
        try:
            importlib.import_module(name)
        except ImportError as error:
            what = f"reading {scheme}:// addresses needs the package {name}"
            raise UserError(what, f"Run: pip install fsspec {package}", where=url) from error
    import fsspec

    # fsspec keeps one object per process, also after a fork; lists that it made once would hide new files.
    return fsspec.filesystem(scheme, use_listings_cache=False)


def remote_facts(url: str) -> tuple[int, str]:
    """Return the size of a remote file and what changes when it does: its tag or time of change.

    Raises:
        UserError: it cannot be reached, or its server does not say how long it is.
    """
    found = _attempt(url, lambda system: system.info(url))
    size = found.get("size")
    if not isinstance(size, int) or size < 0:
        raise UserError("the server does not say how long the file is", "Download it.", where=url)
    changes = [str(found[key]) for key in ("ETag", "etag", "LastModified", "mtime", "VersionId") if found.get(key)]
    return size, "|".join(changes)


def remote_reader(url: str) -> ReadAt:
    """Return what reads parts of a remote file; errors are OSError, after some attempts."""

    def read_at(offset: int, size: int) -> bytes:
        if size <= 0:
            return b""
        try:
            data = _attempt(url, lambda system: system.cat_file(url, start=offset, end=offset + size))
        except UserError as error:
            raise OSError(error.problems[0].what) from error
        if len(data) > size:
            raise OSError("the server sends whole files only")
        return bytes(data)

    return read_at


def list_remote(url: str) -> list[str]:
    """Return the addresses of all tar files below an address, sorted.

    Raises:
        UserError: it cannot be listed.
    """
    scheme = url.partition("://")[0]
    names = _attempt(url, lambda system: system.find(url))
    tars = sorted(name for name in names if name.endswith(".tar"))
    return [name if "://" in name else f"{scheme}://{name}" for name in tars]


def local_copy(url: str, folder: str | Path) -> Path:
    """Return a copy of a remote file in `folder`, made now or earlier from the same version of it.

    Raises:
        UserError: it cannot be read.
        CannotSave: the copy cannot be written.
    """
    size, version = remote_facts(url)
    mark = blake2b(f"{url}\n{size}\n{version}".encode(), digest_size=8).hexdigest()
    name = url.partition("?")[0].rstrip("/").rpartition("/")[2]
    target = Path(folder) / f"{mark}-{name}"
    if target.is_file() and target.stat().st_size == size:
        return target
    read_at = remote_reader(url)

    def pieces() -> Iterator[bytes]:
        for offset in range(0, size, _CHUNK):
            data = read_at(offset, min(_CHUNK, size - offset))
            if len(data) != min(_CHUNK, size - offset):
                raise UserError("became shorter while it was copied", where=url)
            yield data

    files.write_bytes(target, pieces())
    return target


def _attempt(url: str, action: Callable[[Any], T]) -> T:
    """Do something with a file system, several times where the network may be to blame."""
    passing: tuple[type[BaseException], ...] = (OSError, ValueError, RuntimeError, *_network_errors())
    for number in range(len(_WAITS) + 1):
        try:
            return action(file_system(url))
        except _FINAL as error:
            reason = "not found" if isinstance(error, FileNotFoundError) else _reason(error)
            raise UserError(f"cannot be read: {reason}", "Check the address and your access.", where=url) from error
        except passing as error:
            if number == len(_WAITS):
                what = f"cannot be read after {number + 1} attempts: {_reason(error)}"
                raise UserError(what, "Check the address and the network.", where=url) from error
            _log.debug("%s: %s; trying again", url, error)
            time.sleep(_WAITS[number])
    raise AssertionError("not reached")


def _network_errors() -> tuple[type[BaseException], ...]:
    """Return the errors of the clients that are installed; they share no base class."""
    found: list[type[BaseException]] = []
    for module, name in (("aiohttp", "ClientError"), ("botocore.exceptions", "BotoCoreError")):
        try:
            found.append(getattr(importlib.import_module(module), name))
        except ImportError:
            continue
    return tuple(found)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
