"""Tensors in files: memory-mapped reading of safetensors and .ckpt, streaming writing, finite checks.

Reading copies nothing: tensors are views of the mapped file (private pages, so writing to one never reaches the file).
Writing holds one tensor at a time besides what the caller holds. torch is imported when a function needs it, so that
the header functions stay cheap to import.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.hashes import NetworkHashes
from library.checkpoints.headers import DTYPE_BITS, SafetensorsHeader, file_kind, read_header
from library.errors import EXIT_DIVERGED, StopTraining, UserError
from library.files import NewFile, atomic_file

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

__all__ = [
    "LazyTensor",
    "MappedTensors",
    "NonFiniteWeights",
    "SafetensorsHeader",
    "all_finite",
    "all_zero",
    "open_tensors",
    "read_header",
    "write_safetensors",
]

_CHUNK_BYTES = 32 * 1024**2
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
}
# The library orders tensors by this rank, highest first, so that everything stays aligned.
_RANK = {name: rank for rank, name in enumerate(
    ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16",
     "I32", "U32", "F32", "C64", "F64", "I64", "U64")
)}  # fmt: skip


class NonFiniteWeights(StopTraining):
    """Weights to be saved hold NaN or infinity; the file was not written. Exit status 5."""

    def __init__(self, names: Iterable[str], path: str | Path, cause: str = "NaN or infinity in the weights") -> None:
        self.names = tuple(names)
        self.cause = cause
        shown = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
        super().__init__(f"{path}: not saved: {cause} ({shown})", EXIT_DIVERGED)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is made when it is written, such as the joined q, k and v rows of OpenCLIP."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


@cache
def _dtype_tables() -> tuple[dict[str, torch.dtype], dict[torch.dtype, str]]:
    import torch

    known = {name: getattr(torch, attribute) for name, attribute in _DTYPES.items() if hasattr(torch, attribute)}
    return known, {dtype: name for name, dtype in known.items()}


class MappedTensors(Mapping[str, "Tensor"]):
    """The tensors of one safetensors file as views of its mapping, made on access.

    Replacing or moving the file is harmless; truncating it while it is mapped makes later accesses fault.
    """

    def __init__(self, header: SafetensorsHeader) -> None:
        self.header = header
        self._map: mmap.mmap | None = None

    def __getitem__(self, name: str) -> Tensor:
        import torch

        info = self.header.tensors[name]
        dtype = _dtype_tables()[0].get(info.dtype)
        if dtype is None:
            raise UserError(
                f"tensor {name!r} has type {info.dtype}, which this torch lacks", where=str(self.header.path)
            )
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=dtype)
        aligned = info.begin % (DTYPE_BITS[info.dtype] // 8) == 0
        raw = torch.frombuffer(self._mapping(), dtype=torch.uint8, count=info.end - info.begin, offset=info.begin)
        return (raw if aligned else raw.clone()).view(dtype).view(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            with self.header.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._map


def open_tensors(path: str | Path) -> Mapping[str, Tensor]:
    """Open a model file as a mapping of names to memory-mapped tensors, judged by content and not by its suffix.

    Of a pickle only the tensors of its state dict are given; see `pickles.load_state_dict` for the rest.

    Raises:
        UserError: the file is damaged, no model file, or a pickle that is not allowed.
    """
    if file_kind(path) == "safetensors":
        return MappedTensors(read_header(path))
    from library.checkpoints.pickles import load_state_dict

    return load_state_dict(path).tensors


def _flat_chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor as one-dimensional pieces of at most `_CHUNK_BYTES` each."""
    flat = tensor.detach().reshape(-1)
    yield from flat.split(max(1, _CHUNK_BYTES // max(1, tensor.element_size())))


def _chunk_sum(chunk: Tensor) -> Tensor:
    """Return a sum that is not finite if any element is not: several times faster than `isfinite`."""
    return (chunk.float() if chunk.element_size() == 1 else chunk).sum()


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _exactly_finite(tensor: Tensor) -> bool:
    chunks = (chunk.float() if chunk.element_size() == 1 else chunk for chunk in _flat_chunks(tensor))
    return all(bool(chunk.isfinite().all()) for chunk in chunks)


def all_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity. One pass in pieces, one host read per device."""
    import torch

    sums: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if _is_float(tensor) and tensor.numel() and not tensor.is_meta:
            total = torch.stack([_chunk_sum(chunk).isfinite() for chunk in _flat_chunks(tensor)]).all()
            sums.setdefault(tensor.device, []).append((name, total))
    suspects = {
        name
        for found in sums.values()
        for (name, _), good in zip(found, torch.stack([total for _, total in found]).tolist(), strict=True)
        if not good
    }
    # A sum can overflow although every element is finite, so suspects are looked at element by element.
    return [name for name in tensors if name in suspects and not _exactly_finite(tensors[name])]


def all_zero(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the matrices and kernels that hold nothing but zeros, as damaged files do."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.dim() >= 2 and tensor.numel() and not any(bool(chunk.any()) for chunk in _flat_chunks(tensor))
    ]


def stored_dtype(tensor: Tensor | LazyTensor, precision: torch.dtype | None) -> torch.dtype:
    """Return the dtype a tensor is written in: `precision` for floating point, its own for everything else."""
    return precision if precision is not None and tensor.dtype.is_floating_point else tensor.dtype


def stored_size(tensor: Tensor | LazyTensor, precision: torch.dtype | None) -> int:
    """Return the number of bytes that a tensor takes in a file."""
    return stored_dtype(tensor, precision).itemsize * math.prod(tensor.shape)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    precision: torch.dtype | None = None,
    require_finite: bool = False,
    progress: Callable[[int], object] | None = None,
    network_hashes: bool = False,
) -> None:
    """Write a safetensors file tensor by tensor, byte for byte as the safetensors library would.

    Args:
        path: the final name; the file appears there complete or not at all.
        tensors: on any device, contiguous or not.
        metadata: strings for the header.
        precision: dtype that floating point tensors are converted to on the way; None keeps each tensor's own.
        require_finite: refuse to write NaN and infinity, also those that the conversion makes.
        progress: called with the number of bytes after each piece of a tensor.
        network_hashes: add the hashes that LoRA files carry, computed while the data are written.

    Raises:
        NonFiniteWeights: `require_finite` and a tensor is not; nothing was written.
        CannotSave: the disk is full or the file cannot be written.
        UserError: a tensor has a type that the format lacks, or no data.
    """
    names = _dtype_tables()[1]
    kinds = {name: _format_dtype(name, tensor, precision, names) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-_RANK[kinds[name]], name))
    sizes = {name: stored_size(tensors[name], precision) for name in order}
    rows = {name: (kinds[name], tensors[name].shape, sizes[name]) for name in order}
    header, hashes = _encode_header(rows, metadata), None
    if network_hashes:
        texts = dict(metadata or {})
        header = _encode_header(rows, {**texts, **NetworkHashes.PLACEHOLDERS})
        hashes = NetworkHashes(_encode_header(rows, {n: text for n, text in texts.items() if n.startswith("ss_")}))
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_file(path, check=read_header, size=len(header) + sum(sizes.values())))
        file = stack.enter_context(NewFile(temporary))
        file.write(header)
        for name in order:
            for data in tensor_bytes(name, tensors[name], precision, require_finite=require_finite, path=path):
                file.write(data)
                if progress is not None:
                    progress(data.nbytes)
                if hashes is not None:
                    hashes.update(data)
        if hashes is not None:
            file.rewrite_start(_encode_header(rows, {**texts, **hashes.entries()}))


def _format_dtype(name: str, tensor: Tensor | LazyTensor, precision: Any, names: Mapping[Any, str]) -> str:
    dtype = stored_dtype(tensor, precision)
    if dtype not in names:
        raise UserError(f"tensor {name!r} has type {dtype}, which safetensors files cannot hold")
    return names[dtype]


def _encode_header(rows: Mapping[str, tuple[str, Any, int]], metadata: Mapping[str, str] | None) -> bytes:
    """Encode (dtype, shape, size in bytes) by name, in the order in which the tensors follow."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (kind, shape, size) in rows.items():
        table[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(
    name: str,
    tensor: Tensor | LazyTensor,
    precision: torch.dtype | None,
    *,
    require_finite: bool,
    path: str | Path,
) -> Iterator[memoryview]:
    """Yield the bytes of one tensor, converted and checked in pieces, so that little memory is needed."""
    import torch

    value = tensor.make() if isinstance(tensor, LazyTensor) else tensor
    if value.is_meta:
        raise UserError(f"tensor {name!r} has no data (meta device)", where=str(path))
    target = stored_dtype(tensor, precision)
    for chunk in _flat_chunks(value):
        piece = chunk.to(device="cpu", dtype=target).contiguous()
        if not piece.numel():
            continue
        if require_finite and _is_float(piece) and not _chunk_sum(piece).isfinite() and not _exactly_finite(piece):
            if _exactly_finite(chunk):
                kind = str(target).removeprefix("torch.")
                raise NonFiniteWeights([name], path, f"values too large for {kind}, choose another --save_precision")
            raise NonFiniteWeights([name], path)
        yield piece.view(torch.uint8).numpy().data
