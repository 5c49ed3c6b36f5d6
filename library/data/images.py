"""Opening pictures safely: one code path from a file to upright RGB or RGBA pixels.

Only known raster formats are opened, by content; sizes are checked before memory is taken; EXIF orientation is applied
for images and masks alike; every colour mode ends as 8-bit RGB or RGBA. What is done with the pixels is in `augment`.
"""

from __future__ import annotations

import logging
import stat
import struct
import threading
import warnings
import zlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from library.data.storage import locator_of
from library.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_log = logging.getLogger(__name__)

MAX_IMAGE_PIXELS = 179_000_000
MAX_FILE_BYTES = 1 << 30
REDUCE_ABOVE = 89_000_000  # pixels; larger JPEGs are decoded at a half, a quarter or an eighth when that is enough
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "AVIF", "JXL", "GIF", "TIFF")

_PLUGINS = (
    "JpegImagePlugin",
    "PngImagePlugin",
    "WebPImagePlugin",
    "BmpImagePlugin",
    "AvifImagePlugin",
    "GifImagePlugin",
)
_DECODING_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    struct.error,
    zlib.error,
)
_noted: set[str] = set()
_noted_lock = threading.Lock()

Pixels = NDArray[np.uint8]


class BadImage(UserError):
    """A picture that cannot be used; `reason` says why in a few words, without the path."""

    def __init__(self, path: str | Path, reason: str, hint: str = "") -> None:
        super().__init__(reason, hint, where=str(path))
        self.reason = f"{reason}. {hint}".rstrip(". ") if hint else reason


def load_image(
    path: str | Path,
    *,
    size_wh: tuple[int, int] | None = None,
    orientation: int | None = None,
    alpha: bool = False,
    enough_wh: tuple[int, int] | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
    reduce_above: int = REDUCE_ABOVE,
) -> Pixels:
    """Decode a picture to uint8 pixels [H, W, 3], or [H, W, 4] when `alpha` is asked for and the file has some.

    Args:
        path: of the file; its content decides the format, not its name.
        size_wh: upright size known from the scan; another size is an error.
        orientation: EXIF orientation to apply, 1 for none; None reads it from the file.
        alpha: keep transparency (also of palette images) as a fourth channel.
        enough_wh: upright size that the caller will shrink the picture to; huge JPEGs are then decoded reduced.
        max_pixels: limit checked before anything is allocated.
        reduce_above: pixels from which on `enough_wh` matters.

    Raises:
        BadImage: for every kind of unusable file.
    """
    with _opened(path, max_pixels) as image:
        try:
            turn = orientation_of(image) if orientation is None else orientation
            full = _upright_size(image.size, turn)
            if size_wh is not None and full != tuple(size_wh):
                raise BadImage(path, f"is {full[0]}x{full[1]}, was {size_wh[0]}x{size_wh[1]} when scanned")
            reduced = full[0] * full[1] > reduce_above and _draft(image, enough_wh, turn)
            expected = image.size
            image.load()
            if image.size != expected:
                raise _other_size(path, expected, image.size)
            pixels = _to_rgb(image, alpha, path)
        except _DECODING_ERRORS as error:
            raise BadImage(path, f"cannot be decoded: {_short(error)}") from error
        except MemoryError as error:
            raise BadImage(path, "does not fit into memory") from error
    if turn > 1:
        pixels = _turned(pixels, turn)
    if reduced:
        return pixels
    if pixels.shape[:2] != (full[1], full[0]):
        raise _other_size(path, full, (pixels.shape[1], pixels.shape[0]))
    return pixels


def check_decodable(
    path: str | Path, size_wh: tuple[int, int], *, orientation: int | None = None, max_pixels: int = MAX_IMAGE_PIXELS
) -> str | None:
    """Decode a picture completely and return what is wrong with it, or None.

    Args:
        path: of the file.
        size_wh: upright size found by the scan.
        orientation: EXIF orientation as applied by the scan; None reads it from the file.
        max_pixels: limit checked before anything is allocated.
    """
    try:
        load_image(
            path, size_wh=size_wh, orientation=orientation, alpha=True, enough_wh=(64, 64), max_pixels=max_pixels
        )
    except BadImage as error:
        return error.reason
    return None


def image_header(path: str | Path, *, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int, int]:
    """Return (width, height, EXIF orientation) that the header declares, without decoding; the size is the stored one.

    Raises:
        BadImage: for every kind of unusable file.
    """
    with _opened(path, max_pixels) as image:
        return image.size[0], image.size[1], orientation_of(image)


def image_size(path: str | Path, *, exif_transpose: bool = True, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Return the (width, height) that the header declares, upright if `exif_transpose`, without decoding.

    Raises:
        BadImage: for every kind of unusable file.
    """
    width, height, orientation = image_header(path, max_pixels=max_pixels)
    return _upright_size((width, height), orientation if exif_transpose else 1)


def orientation_of(image: Image) -> int:
    """Return the EXIF orientation 1..8 of an open image; damaged EXIF data count as 1."""
    from PIL import Image as ImageModule

    try:
        # PNG's own getexif decodes the picture to look for a late chunk; the header is where writers put it.
        value = ImageModule.Image.getexif(image).get(0x0112, 1)
    except _DECODING_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def carried_texts(path: str | Path, *, behind_pixels: bool = False) -> dict[str, str]:
    """Return the texts that a picture carries, such as the prompt that it was made from, by name.

    Args:
        path: of the file.
        behind_pixels: look behind the pixels of a PNG, too, where some programs write; that decodes it.

    Raises:
        BadImage: for every kind of unusable file.
    """
    with _opened(path, MAX_IMAGE_PIXELS) as image:
        try:
            if behind_pixels and image.format == "PNG":
                image.load()
            return {str(name): str(value) for name, value in image.info.items() if isinstance(value, str)}
        except _DECODING_ERRORS as error:
            raise BadImage(path, f"cannot be decoded: {_short(error)}") from error


class _opened:  # noqa: N801 - used as a function
    """Context of an open image whose size is within the limit."""

    def __init__(self, path: str | Path, max_pixels: int) -> None:
        self._member = locator_of(path)
        self._path, self._max_pixels = Path(path), max_pixels
        self._file: BinaryIO | None = None
        self._image: Image | None = None

    def __enter__(self) -> Image:
        try:
            self._file = self._open_file()
            self._image = self._identify(self._file)
        except BaseException:
            self.__exit__()
            raise
        return self._image

    def __exit__(self, *_: object) -> None:
        for opened in (self._image, self._file):
            if opened is not None:
                opened.close()

    def _open_file(self) -> BinaryIO:
        try:
            if self._member is not None:
                return self._member.open()
            info = self._path.stat()
            if not stat.S_ISREG(info.st_mode):
                raise BadImage(self._path, "is not a regular file")
            if info.st_size == 0:
                raise BadImage(self._path, "empty file")
            if info.st_size > MAX_FILE_BYTES:
                raise BadImage(self._path, f"has {info.st_size >> 20} MiB, the limit is {MAX_FILE_BYTES >> 20} MiB")
            return self._path.open("rb")
        except (OSError, ValueError) as error:
            raise BadImage(self._path, getattr(error, "strerror", None) or str(error)) from error

    def _identify(self, file: BinaryIO) -> Image:
        from PIL import Image, UnidentifiedImageError

        formats = _pillow_formats()
        try:
            head = file.read(64)
            self._check_size(_webp_size(head) or (0, 0))
            file.seek(0)
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError as error:
            raise BadImage(self._path, *_what_it_is(head)) from error
        except MemoryError as error:
            raise BadImage(self._path, "does not fit into memory") from error
        except _DECODING_ERRORS as error:
            raise BadImage(self._path, f"cannot be opened: {_short(error)}") from error
        self._check_size(image.size)
        return image

    def _check_size(self, size: tuple[int, int]) -> None:
        pixels = size[0] * size[1]
        if pixels > self._max_pixels:
            raise BadImage(
                self._path,
                f"image has {_mega(pixels)}, limit {_mega(self._max_pixels)} (--max_image_pixels)",
                "Shrink it or raise the limit",
            )


@lru_cache(maxsize=1)
def _pillow_formats() -> tuple[str, ...]:
    """Return the allowed formats that this Pillow can read, after taking its own size check out of the way.

    Pillow's check knows one global limit and counts decoded frames; ours is an option and is made before decoding.
    """
    import importlib

    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on damaged metadata, which are not used
    for plugin in (*_PLUGINS, "TiffImagePlugin", "pillow_jxl"):
        try:
            importlib.import_module(plugin if plugin == "pillow_jxl" else f"PIL.{plugin}")
        except ImportError:
            _log.debug("no %s in this Pillow", plugin)
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Return the canvas size of a WebP file: its decoder takes memory for it as soon as the file is opened."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return None
    if head[12:16] == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _what_it_is(head: bytes) -> tuple[str, str]:
    """Name the usual impostors by the first bytes of the file."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "Git-LFS pointer", "Run git lfs pull"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "not an image (looks like HTML)", "Download it again"
    if text.startswith((b"%!ps", b"%pdf", b"\xc5\xd0\xd3\xc6")):
        return "not an image (looks like PostScript or PDF)", "Convert it to PNG"
    if head.isascii() and head.decode("ascii").isprintable():
        return "not an image (looks like text)", ""
    return "not an image that can be read, or damaged", ""


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if orientation >= 5 else (size[0], size[1])


def _draft(image: Image, enough_wh: tuple[int, int] | None, orientation: int) -> bool:
    """Let the JPEG decoder of a huge picture skip detail that the following reduction would throw away."""
    if enough_wh is None:
        return False
    if image.size[0] * image.size[1] > REDUCE_ABOVE:
        _note("huge", "pictures above %d megapixels are decoded reduced where possible", REDUCE_ABOVE // 1_000_000)
    width, height = _upright_size(enough_wh, orientation)
    before = image.size
    return image.draft("RGB", (2 * width, 2 * height)) is not None and image.size != before


def _to_rgb(image: Image, alpha: bool, path: str | Path) -> Pixels:
    """Convert a loaded image of any mode to 8-bit RGB, or RGBA when it has transparency that is wanted."""
    mode = image.mode
    if mode.startswith("I"):
        return _grey_to_rgb(_from_16_bit(np.asarray(image)))
    if mode == "F":
        return _grey_to_rgb(_from_float(np.asarray(image), path))
    if mode == "CMYK":
        _note("cmyk", "CMYK pictures are converted without their colour profile (first one: %s)", path)
    has_alpha = mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    pixels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    return pixels if alpha or not has_alpha else np.ascontiguousarray(pixels[:, :, :3])


def _from_16_bit(values: NDArray[Any]) -> Pixels:
    """Scale 16-bit greys to 8 bits: 65535 / 257 is 255."""
    wide = np.clip(values.astype(np.int64), 0, 65535)
    return ((wide + 128) // 257).astype(np.uint8)


def _from_float(values: NDArray[Any], path: str | Path) -> Pixels:
    """Scale float greys to 8 bits: 0..1 is stretched, anything larger is taken as 0..255."""
    if not np.isfinite(values).all():
        raise BadImage(path, "holds NaN or infinite values")
    scale = 255.0 if values.size and values.max() <= 1.0 else 1.0
    return (np.clip(values * scale, 0, 255) + 0.5).astype(np.uint8)


def _grey_to_rgb(grey: Pixels) -> Pixels:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Apply an EXIF orientation to an array [H, W, C]."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _other_size(path: str | Path, says: tuple[int, int], decodes: tuple[int, int]) -> BadImage:
    return BadImage(path, f"says {says[0]}x{says[1]}, decodes to {decodes[0]}x{decodes[1]}")


def _mega(pixels: int) -> str:
    return f"{pixels / 1e9:.1f} Gpx" if pixels >= 1_000_000_000 else f"{pixels / 1e6:.0f} Mpx"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _note(kind: str, message: str, *arguments: object) -> None:
    """Log a message once per process."""
    with _noted_lock:
        if kind in _noted:
            return
        _noted.add(kind)
    _log.warning(message, *arguments)
