"""Parts of files on S3 and web servers, by fsspec: sizes, ranges, lists and whole copies. Optional packages."""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from library.data.image_headers import ReadAt
from library.errors import UserError

_log = logging.getLogger(__name__)
T = TypeVar("T")

_PACKAGES = {"s3": "s3fs", "http": "aiohttp", "https": "aiohttp"}
_WAITS = (0.5, 2.0, 5.0)
_CONNECT_SECONDS, _READ_SECONDS = 20, 60
"""How long a server may be silent before that counts as an error; then there are further attempts."""
_REFUSED = (401, 403, 404, 410)
_FINAL = (FileNotFoundError, PermissionError, NotImplementedError)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound")
"""Errors of botocore that are about this machine, not about the network."""


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
    system = fsspec.filesystem(scheme, use_listings_cache=False, **_patience(scheme))
    # Attempts are counted here, not there.
    system.retries = 1
    return system


def _patience(scheme: str) -> dict[str, Any]:
    """Return the settings of a file system with which no server can keep a run waiting for ever."""
    if scheme == "s3":
        limits = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS, "retries": {"max_attempts": 0}}
        return {"config_kwargs": limits}
    import aiohttp

    # No limit on the whole: a large piece over a slow line may take its time.
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(None, None, _READ_SECONDS, _CONNECT_SECONDS)}}


def read_ahead(read_at: ReadAt, size: int, amount: int) -> ReadAt:
    """Return what asks for pieces of `amount`, one after the other, for reading a file of `size` from front to end.

    Small pieces would each take a way over the network.
    """
    begin, held = 0, b""

    def read(offset: int, length: int) -> bytes:
        nonlocal begin, held
        length = min(length, size - offset)
        if not begin <= offset <= offset + length <= begin + len(held):
            kept = held[offset - begin :] if begin <= offset < begin + len(held) else b""
            held = kept + read_at(offset + len(kept), min(max(length, amount), size - offset) - len(kept))
            begin = offset
        return held[offset - begin : offset - begin + length]

    return read


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


def _attempt(url: str, action: Callable[[Any], T]) -> T:
    """Do something with a file system, several times where the network may be to blame."""
    expected: tuple[type[BaseException], ...] = (OSError, ValueError, RuntimeError, asyncio.TimeoutError)
    expected += _network_errors()
    for number in range(len(_WAITS) + 1):
        try:
            return action(file_system(url))
        except expected as error:
            if _is_final(url, error):
                reason = "not found" if isinstance(error, FileNotFoundError) else _reason(error)
                hint = "Check the address and your access."
                if type(error).__name__ in _NO_CREDENTIALS:
                    hint = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
                raise UserError(f"cannot be read: {reason}", hint, where=url) from error
            if number == len(_WAITS):
                what = f"cannot be read after {number + 1} attempts: {_reason(error)}"
                raise UserError(what, "Check the address and the network.", where=url) from error
            _log.debug("%s: %s; trying again", url, error)
            time.sleep(_WAITS[number])
    raise AssertionError("not reached")


def _is_final(url: str, error: BaseException) -> bool:
    """Tell whether another attempt would end alike."""
    if isinstance(error, FileNotFoundError) and url.startswith("http") and error.__cause__ is not None:
        # So fsspec calls it too if a web server does not answer.
        cause = error.__cause__
        return isinstance(cause, _FINAL) or getattr(cause, "status", None) in _REFUSED
    return isinstance(error, _FINAL) or type(error).__name__ in _NO_CREDENTIALS


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
