"""Hashes of model files as other tools show them, remembered so that a 4 GB file is read once. Light."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.files import CannotSave, write_json

_log = logging.getLogger(__name__)

_LEGACY_OFFSET, _LEGACY_LENGTH = 0x100000, 0x10000
_BLOCK = 4 * 1024**2
_MAX_REMEMBERED = 500
_SETTLED_SECONDS = 2.0


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a whole file (`ss_new_sd_model_hash`), from memory if size and time are as they were.

    Raises:
        OSError: the file cannot be read.
    """
    path = Path(path).resolve()
    before = path.stat()
    mark = [before.st_size, before.st_mtime_ns, before.st_ino]
    # The memory holds no paths: a cache folder may be shared.
    key = hashlib.sha256(os.fsencode(path)).hexdigest()
    remembered = _read_memory().get(key)
    if isinstance(remembered, dict) and remembered.get("mark") == mark:
        return str(remembered["sha256"])
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    after = path.stat()
    # A file changed within the clock's resolution of being hashed could look unchanged later.
    if (after.st_size, after.st_mtime_ns) == (mark[0], mark[1]) and time.time() - after.st_mtime > _SETTLED_SECONDS:
        _remember(key, {"mark": mark, "sha256": digest.hexdigest(), "time": int(time.time())})
    return digest.hexdigest()


def legacy_hash(path: str | Path) -> str:
    """Return the short hash of the web UI's first versions: 8 hex digits of 64 KiB at 1 MiB (`ss_sd_model_hash`)."""
    with Path(path).open("rb") as file:
        file.seek(_LEGACY_OFFSET)
        return hashlib.sha256(file.read(_LEGACY_LENGTH)).hexdigest()[:8]


def data_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a safetensors file without its header: it stays when metadata change (`sshs_model_hash`).

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class NetworkHashes:
    """The two hashes in the metadata of LoRA files, taken from the tensor data as they pass.

    Args:
        header: what the file would begin with if its only metadata were the `ss_` ones; the older hash is of a window
            at a fixed place of such a file, which reaches into the header of large ones.
    """

    PLACEHOLDERS: Mapping[str, str] = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
    """Entries as long as the final ones."""

    def __init__(self, header: bytes) -> None:
        self._whole = hashlib.sha256()
        self._window = hashlib.sha256()
        self._position = 0
        self._add_to_window(header)

    def update(self, data: memoryview) -> None:
        """Take the next piece of the data."""
        self._whole.update(data)
        self._add_to_window(data)

    def _add_to_window(self, data: bytes | memoryview) -> None:
        start = max(0, _LEGACY_OFFSET - self._position)
        stop = _LEGACY_OFFSET + _LEGACY_LENGTH - self._position
        if stop > 0:
            self._window.update(data[start:stop])
        self._position += len(data)

    def entries(self) -> dict[str, str]:
        """Return the metadata entries."""
        return {"sshs_model_hash": self._whole.hexdigest(), "sshs_legacy_hash": self._window.hexdigest()[:8]}


def model_hashes(name: str) -> dict[str, str]:
    """Return the base model as metadata: ``sd_model_name``, ``sd_model_hash``, ``new_sd_model_hash``.

    Folders and names that are no local path have no hashes; the values are those that other trainers write then.
    """
    return _described(name, "sd_model")


def vae_hashes(name: str) -> dict[str, str]:
    """Return a replacing VAE as metadata: ``vae_name``, ``vae_hash``, ``new_vae_hash``."""
    return _described(name, "vae")


def _described(name: str, prefix: str) -> dict[str, str]:
    path = Path(name)
    table = {f"{prefix}_name": path.name if path.exists() else name}
    if path.is_dir():
        short = full = "IsADirectory"
    elif not path.exists():
        short = full = "NOFILE"
    else:
        short, full = legacy_hash(path), file_sha256(path)
    return {**table, f"{prefix}_hash": short, f"new_{prefix}_hash": full}


def cache_folder() -> Path:
    """Return the folder for what this program remembers between runs; `SD_FINETUNE_CACHE` overrides it."""
    given = os.environ.get("SD_FINETUNE_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sd-finetune-toolkit"


def _read_memory() -> dict[str, Any]:
    try:
        table = json.loads((cache_folder() / "hashes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        return {}
    return table if isinstance(table, dict) else {}


def _remember(key: str, entry: dict[str, Any]) -> None:
    table = {**_read_memory(), key: entry}
    newest = sorted(table, key=lambda name: -_time_of(table[name]))[:_MAX_REMEMBERED]
    try:
        write_json(cache_folder() / "hashes.json", {name: table[name] for name in newest})
    except (OSError, CannotSave, RuntimeError) as error:
        _log.debug("hash not remembered: %s", error)


def _time_of(entry: Any) -> int:
    value = entry.get("time") if isinstance(entry, dict) else None
    return value if isinstance(value, int) else 0
