"""Writes `.ckpt` and `.bin` files as `torch.save` lays them out, but tensor by tensor.

`torch.save` needs every tensor in its final dtype at once; here the pickle only describes the tensors, and their bytes
follow one after the other, converted on the way. Data begin at multiples of 64 bytes, so `torch.load` can map them.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.tensor_files import LazyTensor, stored_dtype, tensor_bytes
from library.errors import UserError
from library.files import NewFile, atomic_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ROOT = "archive"
_ALIGNMENT = 64
_LOCAL_HEADER = 30
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class _Storage:
    def __init__(self, kind: type, key: str, length: int) -> None:
        self.kind, self.key, self.length = kind, key, length


class _Described:
    """Pickles as a tensor whose data lie in another member of the archive."""

    def __init__(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.key, self.shape, self.dtype = key, shape, dtype

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        strides, count = [], 1
        for length in reversed(self.shape):
            strides.append(count)
            count *= max(1, length)
        numel = 0 if 0 in self.shape else count
        common: tuple[Any, ...] = (0, tuple(self.shape), tuple(reversed(strides)), False, OrderedDict())
        name = _STORAGES.get(str(self.dtype).removeprefix("torch."))
        if name is not None:
            storage = _Storage(getattr(torch, name), self.key, numel)
            return torch._utils._rebuild_tensor_v2, (storage, *common)
        storage = _Storage(torch.UntypedStorage, self.key, numel * self.dtype.itemsize)
        return torch._utils._rebuild_tensor_v3, (storage, *common, self.dtype)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        return ("storage", value.kind, value.key, "cpu", value.length) if isinstance(value, _Storage) else None


def write_ckpt(
    path: str | Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    counters: Mapping[str, int] | None,
    *,
    precision: torch.dtype | None = None,
    require_finite: bool = False,
) -> None:
    """Write tensors as a pickled checkpoint that `torch.load(weights_only=True)` opens.

    Args:
        path: the final name; the file appears there complete or not at all.
        tensors: on any device.
        counters: numbers beside the ``state_dict`` (epoch, global_step); None writes the bare table (a ``.bin`` file).
        precision: dtype that floating point tensors are converted to on the way; None keeps each tensor's own.
        require_finite: refuse to write NaN and infinity, also those that the conversion makes.

    Raises:
        NonFiniteWeights: `require_finite` and a tensor is not; nothing was written.
        CannotSave: the disk is full or the file cannot be written.
    """
    table = OrderedDict(
        (name, _Described(str(number), tuple(tensor.shape), stored_dtype(tensor, precision)))
        for number, (name, tensor) in enumerate(tensors.items())
    )
    described: dict[str, Any] = table if counters is None else {"state_dict": table, **counters}
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(described)
    with (
        atomic_file(path, check=_check_archive) as temporary,
        NewFile(temporary) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,  # type: ignore[call-overload]
    ):
        _add(archive, "data.pkl", [buffer.getbuffer()], len(buffer.getbuffer()))
        _add(archive, "byteorder", [b"little"], 6)
        for number, (name, tensor) in enumerate(tensors.items()):
            count = stored_dtype(tensor, precision).itemsize
            for length in tensor.shape:
                count *= length
            pieces = tensor_bytes(name, tensor, precision, require_finite=require_finite, path=path)
            _add(archive, f"data/{number}", pieces, count)
        _add(archive, "version", [b"3\n"], 2)


def _add(archive: zipfile.ZipFile, name: str, pieces: Any, size: int) -> None:
    """Append one member, stored as it is, its data aligned by a filler in the header as torch does it."""
    member = zipfile.ZipInfo(f"{_ROOT}/{name}")
    member.file_size = size
    start = archive.fp.tell() + _LOCAL_HEADER + len(member.filename) + 4  # type: ignore[union-attr]
    filler = -start % _ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", filler) + b"Z" * filler
    with archive.open(member, "w") as out:
        for piece in pieces:
            out.write(piece)


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    if not {f"{_ROOT}/data.pkl", f"{_ROOT}/version"} <= names:
        raise UserError("the archive was not written completely", where=str(path))
