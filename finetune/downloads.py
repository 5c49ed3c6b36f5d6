"""Files that are named by a URL: fetched once into torch's cache, where other programs look for them, too."""

from __future__ import annotations

import logging
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from library import files
from library.errors import UserError

_log = logging.getLogger(__name__)

_TIMEOUT = 30.0
_PIECE = 1 << 20


def fetch(url: str, option: str) -> Path:
    """Return the file of a URL, from the cache when it was fetched before.

    Raises:
        UserError: it cannot be fetched.
    """
    import torch

    where = f"{option} {url}"
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if not name or name in (".", "..") or "\\" in name or "\0" in name:
        raise UserError("names no file", where=where)
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if target.is_file() and target.stat().st_size:
        return target
    _log.info("fetching %s into %s", url, target.parent)
    try:
        _download(url, target)
    except (OSError, ValueError) as error:
        reason = f"the server says {error.code}" if isinstance(error, HTTPError) else str(error)
        hint = f"Fetch it where there is a network, and give the file or put it into {target.parent}."
        raise UserError(f"is not in the cache and cannot be fetched ({reason})", hint, where=where) from error
    return target


def _download(url: str, target: Path) -> None:
    from urllib.request import urlopen

    from tqdm import tqdm

    with urlopen(url, timeout=_TIMEOUT) as answer:
        size = int(answer.headers.get("Content-Length") or 0)
        with (
            files.atomic_file(target, size=size or None) as temporary,
            files.NewFile(temporary) as file,
            tqdm(total=size or None, desc=target.name, unit="B", unit_scale=True, leave=False) as bar,
        ):
            while piece := _read(answer):
                file.write(piece)
                bar.update(len(piece))
            if size and file.tell() != size:
                raise ValueError(f"the connection ended after {file.tell()} of {size} bytes")


def _read(answer: HTTPResponse) -> bytes:
    """Return the next piece. Errors of the network are no errors of writing, which would be reported as such."""
    try:
        return answer.read(_PIECE)
    except (OSError, HTTPException) as error:
        raise ValueError(f"the connection broke off: {error}") from error
