"""Arrays in one file: a line of JSON, then the bytes of each array at a multiple of 64, so that they can be mapped."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 64
_MAX_HEADER = 64 << 20


class NotAnArrayFile(ValueError):
    """The bytes are not what `pack_arrays` made of arrays, or were changed since."""


def pack_arrays(header: Mapping[str, Any], arrays: Iterable[tuple[str, NDArray[Any]]]) -> list[bytes]:
    """Return the pieces of a file that holds a JSON header and named arrays."""
    layout = []
    pieces: list[bytes] = []
    position = checksum = 0
    for name, array in arrays:
        data = np.ascontiguousarray(array).tobytes()
        layout.append((name, array.dtype.str, array.shape, position))
        padding = -len(data) % _ALIGNMENT
        checksum = zlib.crc32(data, checksum)
        pieces += [data, bytes(padding)]
        position += len(data) + padding
    # ASCII, so that undecodable file names in the header survive as escapes.
    line = json.dumps({"header": header, "layout": layout, "crc32": _with_header(header, layout, checksum)})
    line += " " * (-(len(line) + 1) % _ALIGNMENT) + "\n"
    return [line.encode("ascii"), *pieces]


def _with_header(header: Mapping[str, Any], layout: list[Any], checksum: int) -> int:
    return zlib.crc32(json.dumps([header, layout]).encode("ascii"), checksum)


def unpack_arrays(data: Any, *, verify: bool) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return header and arrays; the arrays are views of `data` (bytes or a mapped file).

    Args:
        data: The whole file.
        verify: Compare the checksum; for files that may have been damaged.

    Raises:
        NotAnArrayFile: The bytes are something else, cut off or damaged.
    """
    try:
        end = data.find(b"\n", 0, _MAX_HEADER) + 1
        top = json.loads(data[:end].decode("ascii"))
        checksum = 0
        arrays = {}
        for name, dtype, shape, position in top["layout"]:
            kind = np.dtype(dtype)
            if kind.hasobject:
                raise NotAnArrayFile("holds objects")
            arrays[name] = np.frombuffer(data, kind, int(np.prod(shape)), end + position).reshape(shape)
            if verify:
                checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).data, checksum)
        if verify and _with_header(top["header"], top["layout"], checksum) != top["crc32"]:
            raise NotAnArrayFile("the checksum differs")
        return dict(top["header"]), arrays
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise NotAnArrayFile(str(error)) from error
