"""Outputs of text encoders on disk: validity, reading and writing of one file. Knows no model.

`<image stem><suffix>.npz` holds the arrays of the image's caption under the names that the model family gives them, and
in `meta_json` what they depend on: the caption as it is served, the weights of the encoders, and how captions become
token ids. Files of sd-scripts tell nothing of that and are accepted when names and shapes fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.data import cache_files
from library.data.cache_files import META, BrokenCache, Verdict, fits, opened, read_meta

CAPTION_CHANGED = "caption changed"
OTHER_ENCODER = "other text encoder"
OTHER_SETTINGS = "other settings of captions"
OTHER_LENGTH = "other token length or width"

_PART = "text"
_ALIGNMENT = 8

Arrays = Mapping[str, NDArray[Any]]


def caption_hash(text: str) -> str:
    """Return what stands for a caption in cache files: 32 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class TextLayout:
    """Names, types and shapes of the arrays of one caption: the same for all captions of a run."""

    arrays: tuple[tuple[str, str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, arrays: Arrays) -> TextLayout:
        """Return the layout of the arrays of one caption, whatever it says."""
        return cls(tuple((name, array.dtype.str, array.shape) for name, array in arrays.items()))

    @property
    def slot_bytes(self) -> int:
        """Bytes that one caption takes in memory: its arrays, and a byte that says that they are there."""
        return sum(_padded(dtype, shape) for _, dtype, shape in self.arrays) + _ALIGNMENT

    def views(self, slot: NDArray[np.uint8]) -> tuple[dict[str, NDArray[Any]], NDArray[np.uint8]]:
        """Return the arrays in a slot of memory, and the byte that marks it filled."""
        found, start = {}, 0
        for name, dtype, shape in self.arrays:
            size = prod(shape) * np.dtype(dtype).itemsize
            found[name] = slot[start : start + size].view(dtype).reshape(shape)
            start += _padded(dtype, shape)
        return found, slot[start : start + 1]


def _padded(dtype: str, shape: tuple[int, ...]) -> int:
    return -(-prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT


def check_texts(path: str, layout: TextLayout, origin: Mapping[str, Any]) -> Verdict:
    """Look whether a file serves a caption; reads directory, headers and the record of origin, no arrays.

    Args:
        path: of the file.
        layout: of the arrays.
        origin: what they depend on, as `write_texts` gets it.
    """
    try:
        with opened(path) as file:
            if not all(fits(file, name, shape, _kinds(dtype)) for name, dtype, shape in layout.arrays):
                return Verdict(OTHER_LENGTH if layout.arrays[0][0] in file else cache_files.UNREADABLE)
            stored = read_meta(file, _PART)
    except BrokenCache as error:
        return Verdict(error.reason)
    return Verdict(known=False) if not stored else Verdict(_difference(stored, origin))


def _kinds(dtype: str) -> str:
    return "f" if np.dtype(dtype).kind == "f" else "iu"


def _difference(stored: Mapping[str, Any], origin: Mapping[str, Any]) -> str | None:
    reasons = {"family": cache_files.OTHER_FAMILY, "caption": CAPTION_CHANGED, "text_encoder": OTHER_ENCODER}
    for name in (*reasons, *origin):
        if stored.get(name) != origin.get(name):
            return reasons.get(name, OTHER_SETTINGS)
    return None


def read_texts(path: str, layout: TextLayout, caption: str | None) -> dict[str, NDArray[Any]]:
    """Read the arrays of a file; CRC, shape and finiteness are checked.

    Args:
        path: of the file.
        layout: of the arrays; other floating-point types are converted.
        caption: hash of the caption that they must stand for, where the file tells; None: whatever it is.

    Raises:
        BrokenCache: whatever is wrong with the file.
    """
    with opened(path) as file:
        for name, dtype, shape in layout.arrays:
            if not fits(file, name, shape, _kinds(dtype)):
                raise BrokenCache(f"{OTHER_LENGTH}: no fitting {name}")
        stored = read_meta(file, _PART) if caption is not None else {}
        if stored and stored.get("caption") != caption:
            raise BrokenCache(CAPTION_CHANGED)
        return {name: cache_files.read_array(file, name, shape, dtype) for name, dtype, shape in layout.arrays}


def write_texts(path: str, arrays: Arrays, origin: Mapping[str, Any]) -> None:
    """Write a file anew.

    Args:
        path: of the file.
        arrays: of one caption.
        origin: what they depend on.

    Raises:
        CannotSave: it could not be written.
    """
    cache_files.write_cache(path, {**arrays, META: cache_files.meta_array(_PART, origin)})
