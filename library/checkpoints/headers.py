"""What a model file is, from its first bytes: kind by content, and the checked header of a safetensors file.

Light: neither torch nor safetensors is imported and no tensor is read: files can be judged before anything is loaded.
Format: an unsigned 64-bit little-endian length n, n bytes of JSON, then the tensors without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from library.errors import UserError

MAX_HEADER_BYTES = 32 * 1024**2
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 16
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}
_DOWNLOAD_AGAIN = "Is the download incomplete? Fetch the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header: dtype name of the format, shape, and the bytes `begin:end` of the whole file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A checked header: every tensor lies inside the file, none overlap, nothing is left over."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: info.shape for name, info in self.tensors.items()}


def file_kind(path: str | Path) -> str:
    """Tell what a model file is by its content, whatever it is called.

    Returns:
        ``safetensors``, ``zip`` (a pickle of torch >= 1.6) or ``pickle`` (an older one).

    Raises:
        UserError: the file is missing, empty, a web page, a Git-LFS pointer, or no model file at all.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("no such file", "Check the path", where=str(path))
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    kind = _kind_of(head)
    if kind is None:
        raise _not_a_model(path, head)
    return kind


def _kind_of(head: bytes) -> str | None:
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if len(head) >= 2 and head[0] == 0x80 and 2 <= head[1] <= 5 and not _looks_like_header(head):
        return "pickle"
    return "safetensors" if _looks_like_header(head) else None


def _looks_like_header(head: bytes) -> bool:
    """Whether the first bytes can begin a safetensors file: a length, then a brace."""
    return len(head) > 8 and head[8:9] == b"{"


def _not_a_model(path: Path, head: bytes) -> UserError:
    where = str(path)
    start = head.lstrip().lower()
    if not head:
        return UserError("the file is empty", _DOWNLOAD_AGAIN, where=where)
    if head.startswith(b"version https://git-lfs"):
        return UserError("this is a Git-LFS pointer, not the model itself", "Run: git lfs pull", where=where)
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        hint = "The download gave an error page or needs a login; fetch the file again"
        return UserError("this is a web page (HTML), not a model", hint, where=where)
    if len(head) < 16 or not head.strip(b"\0"):
        return UserError("the file is cut short or filled with zeros", _DOWNLOAD_AGAIN, where=where)
    hint = "A model is a .safetensors or .ckpt file, or a Diffusers folder"
    return UserError("neither a safetensors file nor a PyTorch checkpoint", hint, where=where)


def read_header(path: str | Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file.

    Raises:
        UserError: the file is no safetensors file, truncated, or its header is not consistent.
    """
    path = Path(path)
    if file_kind(path) != "safetensors":
        raise UserError("a pickle, not a safetensors file", where=str(path))
    try:
        with path.open("rb") as file:
            file_size = path.stat().st_size
            raw = _read_json_bytes(path, file, file_size)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    entries, metadata = _parse(path, raw)
    data_start = 8 + len(raw)
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in entries.items()}
    _check_layout(path, tensors, data_start, file_size)
    return SafetensorsHeader(path, tensors, metadata, data_start, file_size)


def _read_json_bytes(path: Path, file: BinaryIO, file_size: int) -> bytes:
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise UserError(
            f"its header claims {length} bytes (limit {MAX_HEADER_BYTES})", _DOWNLOAD_AGAIN, where=str(path)
        )
    if 8 + length > file_size:
        raise _truncated(path, 8 + length, file_size)
    return file.read(length)


def _truncated(path: Path, expected: int, found: int) -> UserError:
    return UserError(f"incomplete: expected {expected} bytes, has {found}", _DOWNLOAD_AGAIN, where=str(path))


def _parse(path: Path, raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        what = str(error) if isinstance(error, _DuplicateName) else "its header is not valid JSON"
        raise UserError(what, _DOWNLOAD_AGAIN, where=str(path)) from error
    if not isinstance(header, dict):
        raise UserError("its header is not a table of tensors", where=str(path))
    metadata = header.pop("__metadata__", None) or {}
    if len(header) > MAX_TENSORS:
        raise UserError(f"it lists {len(header)} tensors (limit {MAX_TENSORS})", where=str(path))
    if not isinstance(metadata, dict):
        metadata = {}
    return header, {name: value for name, value in metadata.items() if isinstance(value, str)}


class _DuplicateName(ValueError):
    pass


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _DuplicateName(f"its header lists {name!r} twice")
            seen.add(name)
    return table


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = str(path)
    if not isinstance(entry, dict):
        raise UserError(f"the header entry of {name!r} is not a table", where=where)
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise UserError(f"tensor {name!r} has the unknown type {dtype!r}", where=where)
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise UserError(f"tensor {name!r} has an invalid shape", where=where)
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"tensor {name!r} has invalid offsets", where=where)
    if math.prod(shape) * DTYPE_BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise UserError(f"the shape of tensor {name!r} does not agree with its size", where=where)
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, file_size: int) -> None:
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            what = "overlaps another tensor" if info.begin < position else "leaves a hole before it"
            raise UserError(f"tensor {name!r} {what}", _DOWNLOAD_AGAIN, where=str(path))
        position = info.end
    if position > file_size:
        raise _truncated(path, position, file_size)
    if position < file_size:
        raise UserError(f"{file_size - position} bytes too many: expected {position}, has {file_size}", where=str(path))


def read_tensor_bytes(header: SafetensorsHeader, name: str) -> bytes:
    """Return the raw bytes of one tensor."""
    info = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(info.begin)
        return file.read(info.end - info.begin)
