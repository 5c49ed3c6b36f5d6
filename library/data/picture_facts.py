"""What is found out about a picture by decoding it whole, in loader processes, and kept for the next time."""

from __future__ import annotations

import json
import logging
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library import files
from library.data.caches import file_sha256
from library.data.images import MAX_IMAGE_PIXELS, BadImage, image_header, load_image
from library.data.near_duplicates import THUMBNAIL, look_of
from library.errors import UserError
from library.text_files import read_text

_log = logging.getLogger(__name__)

FORMAT = 1
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """A picture that could be decoded.

    Attributes:
        stat: size in bytes and time of the last change in nanoseconds.
        size_wh: as stored, before it is turned.
        orientation: of EXIF, 1 for upright.
        digest: SHA-256 of the file in hexadecimal.
        look: difference hash of the upright picture, 64 bits.
        thumbnail: 8x8 RGB.
    """

    stat: tuple[int, int]
    size_wh: tuple[int, int]
    orientation: int
    digest: str
    look: int
    thumbnail: bytes

    def as_json(self) -> list[Any]:
        """Return a short list for a file of facts."""
        return [*self.stat, *self.size_wh, self.orientation, self.digest, self.look, b64encode(self.thumbnail).decode()]

    @classmethod
    def from_json(cls, value: Any) -> PictureFacts | None:
        """Return what `as_json` made, None for anything else."""
        try:
            size, mtime, width, height, orientation, digest, look, thumbnail = value
            small = b64decode(thumbnail, validate=True)
            numbers = (size, mtime, width, height, orientation, look)
            if not all(type(number) is int and 0 <= number < 1 << 64 for number in numbers):
                return None
        except (TypeError, ValueError):
            return None
        if len(small) != 3 * THUMBNAIL**2 or not isinstance(digest, str):
            return None
        return cls((size, mtime), (width, height), orientation, digest, look, small)


@dataclass(frozen=True, slots=True)
class PictureLook:
    """Picklable `path -> PictureFacts`: decodes a picture completely."""

    max_pixels: int = MAX_IMAGE_PIXELS

    def __call__(self, path: Path) -> PictureFacts:
        """Return the facts.

        Raises:
            BadImage: it cannot be used.
        """
        width, height, orientation = image_header(path, max_pixels=self.max_pixels)
        pixels = load_image(path, orientation=orientation, enough_wh=(64, 64), max_pixels=self.max_pixels)
        stat = stat_of(path)
        digest = file_sha256(str(path))
        if stat is None or digest is None:
            raise BadImage(path, "changed while it was read")
        return PictureFacts(stat, (width, height), orientation, digest, *look_of(pixels))


def stat_of(path: Path) -> tuple[int, int] | None:
    """Return size and time of the last change of a file, None when it cannot be asked for."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_size, info.st_mtime_ns


def write_facts(path: str | Path, facts: Mapping[Path, PictureFacts]) -> None:
    """Keep facts for `read_facts`.

    Raises:
        CannotSave: the file could not be written.
    """
    known = {str(picture.absolute()): found.as_json() for picture, found in facts.items()}
    files.write_text(path, json.dumps({"format": FORMAT, "pictures": known}) + "\n")


def read_facts(path: str | Path, pictures: Iterable[Path]) -> dict[Path, PictureFacts]:
    """Return the facts of those pictures that have not changed since they were written; none from a useless file."""
    if not Path(path).is_file():
        return {}
    try:
        content = json.loads(read_text(str(path), limit=_MAX_BYTES))
        known = content["pictures"] if content["format"] == FORMAT else {}
        get = known.get
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
        _log.warning("%s: cannot be used, so all pictures are looked at again", path)
        return {}
    found = {}
    for picture in pictures:
        facts = PictureFacts.from_json(get(str(picture.absolute())))
        if facts is not None and facts.stat == stat_of(picture):
            found[picture] = facts
    return found
