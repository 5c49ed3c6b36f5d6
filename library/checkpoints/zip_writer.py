"""A zip archive written in one go: members stored as they are, data aligned, checksums computed beside the writing.

The zipfile module computes checksums between writes, which takes longer than writing; here a thread does it meanwhile.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.files import NewFile

    Piece = bytes | memoryview

ALIGNMENT = 64
_ZIP64_FROM = 0xFFFFFFFF
_MANY = 0xFFFF
_IN_EXTRA = 0xFFFFFFFF
_FLAGS = 0x0808  # sizes and checksum follow the data; names are UTF-8
_SMALL = 1 << 16
_DATE = 33  # 1980-01-01: equal contents give equal files
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_DESCRIPTOR = struct.Struct("<4s3L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")


class ZipWriter:
    """Appends members to a new file; leaving the context without an error writes the index."""

    def __init__(self, file: NewFile) -> None:
        self._file = file
        self._members: list[tuple[bytes, int, int, int]] = []
        self._position = 0
        self._worker = ThreadPoolExecutor(1)

    def add(self, name: str, pieces: Iterable[Piece], size: int) -> None:
        """Append a member of `size` bytes, given in pieces.

        Raises:
            ValueError: the member is too large for the format or its pieces are not `size` bytes.
        """
        if size >= _IN_EXTRA:
            raise ValueError(f"{name} has {size} bytes, more than one member can hold")
        encoded, start = name.encode("utf-8"), self._position
        filler = -(start + _LOCAL.size + len(encoded) + 4) % ALIGNMENT
        extra = struct.pack("<2sH", b"FB", filler) + b"Z" * filler
        self._write(
            _LOCAL.pack(b"PK\3\4", 20, _FLAGS, 0, 0, _DATE, 0, 0, 0, len(encoded), len(extra)) + encoded + extra
        )
        before = self._position
        crc = self._write_checked(pieces)
        if self._position - before != size:
            raise ValueError(f"{name} has {self._position - before} bytes instead of {size}")
        self._write(_DESCRIPTOR.pack(b"PK\7\10", crc, size, size))
        self._members.append((encoded, crc, size, start))

    def __enter__(self) -> ZipWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._worker.shutdown()
        if error is None:
            self._write_index()

    def _write_checked(self, pieces: Iterable[Piece]) -> int:
        """Write pieces and return their checksum, computed by the thread where that takes longer than asking it to."""
        crc = 0
        for piece in pieces:
            if memoryview(piece).nbytes < _SMALL:
                crc = zlib.crc32(piece, crc)
                self._write(piece)
            else:
                pending = self._worker.submit(zlib.crc32, piece, crc)
                self._write(piece)
                crc = pending.result()
        return crc

    def _write(self, data: Piece) -> None:
        self._file.write(data)
        self._position += memoryview(data).nbytes

    def _write_index(self) -> None:
        start, count = self._position, len(self._members)
        for name, crc, size, offset in self._members:
            extra = struct.pack("<2HQ", 1, 8, offset) if offset >= _ZIP64_FROM else b""
            version, place = (45, _IN_EXTRA) if extra else (20, offset)
            sizes = (crc, size, size, len(name), len(extra), 0, 0, 0)
            fixed = (b"PK\1\2", version, version, _FLAGS, 0, 0, _DATE)
            self._write(_CENTRAL.pack(*fixed, *sizes, 0, place) + name + extra)
        length = self._position - start
        shown = (min(count, _MANY), length, start)
        if start + length >= _ZIP64_FROM or count >= _MANY:
            end = self._position
            self._write(_END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, length, start))
            self._write(_LOCATOR64.pack(b"PK\6\7", 0, end, 1))
            shown = (min(count, _MANY), _IN_EXTRA, _IN_EXTRA)
        self._write(_END.pack(b"PK\5\6", 0, 0, shown[0], *shown, 0))
