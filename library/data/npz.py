"""A small, bounded reader and writer of `.npz` files: what caches need and nothing that can run code.

`numpy.load` opens members lazily but costs 0.3 ms a file, reads headers with an expression parser each time and trusts
the sizes a file declares. Here the zip directory is read with two system calls, headers are remembered, every size is
checked before memory is taken, and the CRC of everything that is read is verified. Object arrays are refused.
"""

from __future__ import annotations

import ast
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

_END = struct.Struct("<4s4H2LH")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_TAIL = 4096
_LONGEST_TAIL = 66_000
_HEAD = 320
_MAX_DIRECTORY = 1 << 20
_MAX_HEADER = 2048
_MAX_HEADER_MEMBER = 1 << 20
_STORED, _DEFLATED = 0, 8
_PLAIN_KINDS = frozenset("fiubU")
_EPOCH = (1980, 1, 1, 0, 0, 0)


class BrokenNpz(Exception):
    """The file cannot be used; `str()` says why in a few words."""


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """What a member declares: numpy type text, shape, and the number of bytes before the data."""

    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of data that the shape needs."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class _Member:
    method: int
    crc: int
    packed: int
    size: int
    offset: int


class NpzFile:
    """An open `.npz`: names, array headers without data, and arrays with their CRC verified.

    Raises:
        BrokenNpz: from the constructor and every method, for anything that is wrong with the content.
        OSError: the file cannot be opened or read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = io.FileIO(os.fspath(path))
        self._tail = b""
        try:
            self._length = os.fstat(self._file.fileno()).st_size
            self._members = self._directory()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def names(self) -> tuple[str, ...]:
        """Array names, without `.npy`, in the order of the file."""
        return tuple(self._members)

    def header(self, name: str) -> ArrayHeader:
        """Read only the header of an array and check that the member is as long as it declares."""
        member = self._member(name)
        head, _ = self._head(member)
        if member.method == _DEFLATED:
            head = _inflate(head, _HEAD, name)
        header = _parse_header(head, name)
        if header.size + header.nbytes != member.size:
            raise BrokenNpz(f"{name} declares {header.nbytes} bytes, holds {member.size - header.size}")
        return header

    def read(self, name: str, max_bytes: int) -> NDArray[Any]:
        """Return an array; its CRC has been verified.

        Args:
            name: of the array.
            max_bytes: most bytes of data the caller expects; more is refused before anything is read.
        """
        header = self.header(name)
        if header.nbytes > max_bytes:
            raise BrokenNpz(f"{name} declares {header.nbytes} bytes, at most {max_bytes} expected")
        data = self.raw(name, max_bytes + _MAX_HEADER)
        array = np.frombuffer(data, np.dtype(header.dtype), prod(header.shape), header.size)
        return array.reshape(header.shape, order="F" if header.fortran else "C")

    def raw(self, name: str, max_bytes: int) -> bytes:
        """Return the bytes of a member, header included, after verifying their CRC."""
        member = self._member(name)
        if member.size > max_bytes:
            raise BrokenNpz(f"{name} has {member.size} bytes, at most {max_bytes} expected")
        _, start = self._head(member)
        data = self._pread(start, member.packed)
        if member.method == _DEFLATED:
            data = _inflate(data, member.size, name)
        if len(data) != member.size or zlib.crc32(data) != member.crc:
            raise BrokenNpz(f"bad CRC of {name}")
        return data

    def _member(self, name: str) -> _Member:
        if name not in self._members:
            raise BrokenNpz(f"no array {name}")
        return self._members[name]

    def _pread(self, offset: int, count: int) -> bytes:
        begin = offset - (self._length - len(self._tail))
        if begin >= 0 and begin + count <= len(self._tail):
            return self._tail[begin : begin + count]  # the record of origin stands at the end of our files
        self._file.seek(offset)
        pieces = []
        while count > 0:
            piece = self._file.read(count)
            if not piece:
                raise BrokenNpz("cut off")
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def _directory(self) -> dict[str, _Member]:
        if self._length < _END.size:
            raise BrokenNpz("empty file" if self._length == 0 else "cut off")
        entries, size, offset = self._end()
        if entries == 0xFFFF or offset == 0xFFFFFFFF or size > _MAX_DIRECTORY or offset + size > self._length:
            raise BrokenNpz("bad zip directory")
        data = self._pread(offset, size)
        members: dict[str, _Member] = {}
        at = 0
        for _ in range(entries):
            if at + _ENTRY.size > len(data):
                raise BrokenNpz("bad zip directory")
            fields = _ENTRY.unpack_from(data, at)
            name_end = at + _ENTRY.size + fields[10]
            name = data[at + _ENTRY.size : name_end].decode("utf-8", "replace").removesuffix(".npy")
            encrypted, method = fields[3] & 1, fields[4]
            if fields[0] != b"PK\1\2" or encrypted or method not in (_STORED, _DEFLATED) or name in members:
                raise BrokenNpz("bad zip directory")
            members[name] = _Member(method, fields[7], fields[8], fields[9], fields[16])
            at = name_end + fields[11] + fields[12]
        return members

    def _end(self) -> tuple[int, int, int]:
        for length in (_TAIL, _LONGEST_TAIL):
            self._tail = self._pread(max(0, self._length - length), min(self._length, length))
            found = self._tail.rfind(b"PK\5\6")
            if 0 <= found <= len(self._tail) - _END.size:
                fields = _END.unpack_from(self._tail, found)
                return fields[4], fields[5], fields[6]
        raise BrokenNpz("not a zip file" if self._pread(0, 2) != b"PK" else "cut off")

    def _head(self, member: _Member) -> tuple[bytes, int]:
        """Return the first bytes of a member as stored, and where in the file they begin."""
        length = min(_LOCAL.size + _HEAD, self._length - member.offset)
        if length < _LOCAL.size:
            raise BrokenNpz("bad zip directory")
        data = self._pread(member.offset, length)
        fields = _LOCAL.unpack_from(data)
        skip = _LOCAL.size + fields[9] + fields[10]
        if fields[0] != b"PK\3\4" or member.offset + skip + member.packed > self._length:
            raise BrokenNpz("bad zip directory")
        if skip + 128 > len(data):
            data = self._pread(member.offset, min(skip + _HEAD, self._length - member.offset))
        return data[skip : skip + member.packed], member.offset + skip


def _inflate(data: bytes, limit: int, name: str) -> bytes:
    try:
        return zlib.decompressobj(-15).decompress(data, max(limit, 1))
    except zlib.error as error:
        raise BrokenNpz(f"{name} cannot be unpacked") from error


def _parse_header(head: bytes, name: str) -> ArrayHeader:
    if head[:6] != b"\x93NUMPY" or len(head) < 12:
        raise BrokenNpz(f"{name} is not an array")
    version = head[6]
    begin = 10 if version == 1 else 12
    length = struct.unpack_from("<H" if version == 1 else "<L", head, 8)[0]
    if length > _MAX_HEADER or len(head) < begin + length:
        raise BrokenNpz(f"{name} has a bad array header")
    return _header_of(head[begin : begin + length], begin + length)


@lru_cache(maxsize=1024)
def _header_of(text: bytes, end: int) -> ArrayHeader:
    try:
        fields = ast.literal_eval(text.decode("latin-1").strip())
        descr, shape, fortran = fields["descr"], fields["shape"], bool(fields["fortran_order"])
        if not isinstance(descr, str) or np.dtype(descr).kind not in _PLAIN_KINDS:
            raise BrokenNpz("an array of objects is never read")
        if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape) or len(shape) > 8:
            raise BrokenNpz("bad array header")
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise BrokenNpz("bad array header") from error
    return ArrayHeader(descr, shape, fortran, end)


def pack_npz(arrays: Mapping[str, NDArray[Any]], kept: Iterable[tuple[str, bytes]] = ()) -> bytes:
    """Return an uncompressed `.npz` of `arrays` and of `kept` members given as raw bytes; equal input, equal bytes."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in kept:
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), data)
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), member.getbuffer())
    return target.getvalue()
