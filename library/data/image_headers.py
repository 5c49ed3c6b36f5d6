"""Size and EXIF orientation from the first bytes of image files.

JPEG, PNG and WebP, that is nearly everything, are read by a few lines here; all other formats and every oddity go to
Pillow, which also words the complaint when a file is no image. Both agree: what Pillow would find in the part of the
file before the pixels is what is found here.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

HEAD_BYTES = 4096
"""Bytes worth reading at once: holds the whole header of most files."""

ReadAt = Callable[[int, int], bytes]
"""(offset, length) -> that part of the file, shorter at its end."""

Header = tuple[int, int, int]
"""(width, height, EXIF orientation); the size is that of the stored pixels, before orientation."""

_XMP_MARK = b"http://ns.adobe.com/xap/1.0/\x00"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_START_OF_FRAME = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))
_ORIENTATION_TAG = 0x0112
_INTEGER_TYPES = {1: "B", 3: "H", 4: "I"}
_MAX_SEGMENTS = 10_000


class BadHeader(ValueError):
    """A file that is no usable image; the text says why, `hint` what to do."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def parse_header(head: bytes, read_at: ReadAt) -> Header | None:
    """Return size and orientation of a JPEG, PNG or WebP file, or None when Pillow has to be asked.

    Args:
        head: The first bytes of the file, `HEAD_BYTES` of them or all.
        read_at: Reads further parts of the file; called only for headers longer than `head`.
    """
    try:
        if head[:2] == b"\xff\xd8":
            return _jpeg(head, read_at)
        if head[:8] == b"\x89PNG\r\n\x1a\n":
            return _png(head, read_at)
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return _webp(head, read_at)
    except (IndexError, struct.error):
        return None  # Cut off or damaged: Pillow knows the words for it.
    return None


def _jpeg(head: bytes, read_at: ReadAt) -> Header | None:
    """Walk the segments up to the start of frame; EXIF comes before it, as Pillow reads it."""
    orientation = 0
    from_xmp = 0
    window, start, position = head, 0, 2
    for _ in range(_MAX_SEGMENTS):
        if position - start + 10 > len(window):
            window, start = read_at(position, HEAD_BYTES), position
        at = position - start
        if window[at] != 0xFF:
            return None
        marker = window[at + 1]
        if marker == 0xFF or marker in _WITHOUT_LENGTH:
            position += 1 if marker == 0xFF else 2
            continue
        length = window[at + 2] << 8 | window[at + 3]
        if marker in _START_OF_FRAME:
            height = window[at + 5] << 8 | window[at + 6]
            width = window[at + 7] << 8 | window[at + 8]
            return _checked(width, height, orientation or from_xmp)
        if marker in (0xDA, 0xD9) or length < 2:
            return None
        if marker == 0xE1:
            body = _body(window, at + 4, length - 2, position + 4, read_at)
            if body[:6] == b"Exif\0\0":
                orientation = orientation or _exif_orientation(body[6:])
            elif body.startswith(_XMP_MARK):
                from_xmp = from_xmp or _xmp_orientation(body)
        position += 2 + length
    return None


def _body(window: bytes, at: int, length: int, position: int, read_at: ReadAt) -> bytes:
    if at + length <= len(window):
        return window[at : at + length]
    return read_at(position, length)


def _png(head: bytes, read_at: ReadAt) -> Header | None:
    if head[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", head, 16)
    orientation = 0
    window, start, position = head, 0, 33
    for _ in range(_MAX_SEGMENTS):
        if position - start + 8 > len(window):
            window, start = read_at(position, HEAD_BYTES), position
        length, kind = struct.unpack_from(">I4s", window, position - start)
        if kind in (b"IDAT", b"IEND"):
            return _checked(width, height, orientation)
        if kind in (b"iTXt", b"tEXt", b"zTXt"):
            text = _body(window, position - start + 8, min(length, 64), position + 8, read_at)
            if text.startswith((b"XML:com.adobe.xmp", b"Raw profile type exif")):
                return None
        if kind == b"eXIf" and length <= 1 << 20:
            orientation = _exif_orientation(_body(window, position - start + 8, length, position + 8, read_at))
        position += 12 + length
    return None


def _webp(head: bytes, read_at: ReadAt) -> Header | None:
    if len(head) < 30:
        return None
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return _checked(width & 0x3FFF, height & 0x3FFF, 0)
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return _checked((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 0)
    if kind != b"VP8X":
        return None
    width = int.from_bytes(head[24:27], "little") + 1
    height = int.from_bytes(head[27:30], "little") + 1
    flags = head[20]
    if flags & 0x04 and not flags & 0x08:
        return None  # XMP alone may hold an orientation: rare enough to leave it to Pillow.
    return _checked(width, height, _webp_orientation(head, read_at) if flags & 0x08 else 0)


def _webp_orientation(head: bytes, read_at: ReadAt) -> int:
    """Find the EXIF chunk, which comes after the pixels."""
    position = 12
    for _ in range(_MAX_SEGMENTS):
        chunk = head[position : position + 8] if position + 8 <= len(head) else read_at(position, 8)
        if len(chunk) < 8:
            break
        length = int.from_bytes(chunk[4:8], "little")
        if chunk[:4] == b"EXIF":
            body = read_at(position + 8, min(length, 1 << 20))
            return _exif_orientation(body[6:] if body[:6] == b"Exif\0\0" else body)
        position += 8 + length + (length & 1)
    return 0


def _checked(width: int, height: int, orientation: int) -> Header | None:
    if width < 1 or height < 1:
        return None
    return width, height, orientation if 1 <= orientation <= 8 else 1


def _exif_orientation(tiff: bytes) -> int:
    """Return the orientation from the first directory of a TIFF block, 0 when there is none or it is damaged."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 0
    try:
        (offset,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, offset)
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == _ORIENTATION_TAG and kind in _INTEGER_TYPES and values == 1:
                return int(struct.unpack_from(order + _INTEGER_TYPES[kind], tiff, entry + 8)[0])
    except struct.error:
        return 0
    return 0


def _xmp_orientation(data: bytes) -> int:
    match = _XMP_ORIENTATION.search(data)
    return int(match[1]) if match else 0


def ask_pillow(path: str, max_pixels: int) -> Header:
    """Return size and orientation of any supported file the slow way.

    Raises:
        BadHeader: It is no image, or has more than `max_pixels` pixels.
    """
    from library.data import images

    try:
        width, height = images.image_size(path, exif_transpose=False, max_pixels=max_pixels)
    except images.BadImage as error:
        problem = error.problems[0]
        raise BadHeader(problem.what, problem.hint) from error
    return width, height, _pillow_orientation(path)


def _pillow_orientation(path: str) -> int:
    from PIL import Image

    from library.data import images

    known = [name for name in images.FORMATS if name in Image.OPEN]
    with Path(path).open("rb") as file, Image.open(file, formats=known) as image:
        return images.orientation_of(image)


def at_offset(descriptor: int) -> ReadAt:
    """Return a reader of parts of an open file."""
    if hasattr(os, "pread"):
        return lambda offset, length: os.pread(descriptor, length, offset)

    def seek_and_read(offset: int, length: int) -> bytes:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)

    return seek_and_read


def too_many_pixels(pixels: int, limit: int) -> BadHeader:
    """Return the complaint about an image larger than the limit."""
    amount = f"{pixels / 1e9:.1f} Gpx" if pixels >= 1e9 else f"{pixels / 1e6:.0f} Mpx"
    reason = f"image has {amount}, limit {limit / 1e6:.0f} Mpx (--max_image_pixels)"
    return BadHeader(reason, "Shrink it or raise the limit.")
