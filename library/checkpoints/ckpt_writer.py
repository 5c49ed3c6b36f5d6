"""Writes `.ckpt` and `.bin` files as `torch.save` lays them out, but tensor by tensor.

`torch.save` needs every tensor in its final dtype at once; here the pickle only describes the tensors, and their bytes
follow one after the other, converted on the way. Data begin at multiples of 64 bytes, so `torch.load` can map them.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.tensor_files import LazyTensor, stored_dtype, stored_size, tensor_bytes
from library.checkpoints.zip_writer import ZipWriter
from library.errors import UserError
from library.files import NewFile, atomic_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ROOT = "archive"
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
    progress: Callable[[int], object] | None = None,
    arrange: Callable[[Mapping[str, Any]], Any] | None = None,
) -> None:
    """Write tensors as a pickled checkpoint that `torch.load(weights_only=True)` opens.

    Args:
        path: the final name; the file appears there complete or not at all.
        tensors: on any device.
        counters: numbers beside the ``state_dict`` (epoch, global_step); None writes the bare table (a ``.bin`` file).
        precision: dtype that floating point tensors are converted to on the way; None keeps each tensor's own.
        require_finite: refuse to write NaN and infinity, also those that the conversion makes.
        progress: called with the number of bytes after each tensor.
        arrange: given the table of tensors, returns the tables and lists that the file holds in its place.

    Raises:
        NonFiniteWeights: `require_finite` and a tensor is not; nothing was written.
        CannotSave: the disk is full or the file cannot be written.
    """
    # A plain dict: the A1111 web interface takes no other type for an embedding.
    table = {
        name: _Described(str(number), tuple(tensor.shape), stored_dtype(tensor, precision))
        for number, (name, tensor) in enumerate(tensors.items())
    }
    described: Any = table if arrange is None else arrange(table)
    if counters is not None:
        described = {"state_dict": described, **counters}
    sizes = {name: stored_size(tensor, precision) for name, tensor in tensors.items()}
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(described)
    with (
        atomic_file(path, check=_check_archive, size=sum(sizes.values())) as temporary,
        NewFile(temporary) as file,
        ZipWriter(file) as archive,
    ):
        archive.add(f"{_ROOT}/data.pkl", [buffer.getvalue()], buffer.tell())
        archive.add(f"{_ROOT}/byteorder", [b"little"], 6)
        for number, (name, tensor) in enumerate(tensors.items()):
            pieces = tensor_bytes(name, tensor, precision, require_finite=require_finite, path=path)
            archive.add(f"{_ROOT}/data/{number}", pieces, sizes[name])
            if progress is not None:
                progress(sizes[name])
        archive.add(f"{_ROOT}/version", [b"3\n"], 2)


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    if not {f"{_ROOT}/data.pkl", f"{_ROOT}/version"} <= names:
        raise UserError("the archive was not written completely", where=str(path))
