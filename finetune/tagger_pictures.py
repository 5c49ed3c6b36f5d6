"""From a picture's file to the square that a tagger looks at. Runs in loader processes; no model is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.data.augment import resize
from library.data.images import MAX_IMAGE_PIXELS, Pixels, load_image


@dataclass(frozen=True)
class TaggerPicture:
    """Pixels [side, side, 3], blue green red, 0..255, and the upright size (width, height) of the picture."""

    pixels: Pixels
    size_wh: tuple[int, int]


@dataclass(frozen=True)
class Preparation:
    """Makes pictures of `side` pixels; an object of this kind is sent to loader processes."""

    side: int

    def __call__(self, path: Path) -> TaggerPicture:
        """Read a picture.

        Raises:
            BadImage: it cannot be used.
        """
        pixels = load_image(path, alpha=True)
        size_wh = (pixels.shape[1], pixels.shape[0])
        return TaggerPicture(square(on_white(pixels), self.side)[:, :, ::-1], size_wh)


def on_white(pixels: Pixels) -> Pixels:
    """Return [H, W, 3] pixels: what shines through transparent ones is white."""
    if pixels.shape[2] == 3:
        return pixels
    if (pixels[:, :, 3] == 255).all():
        return pixels[:, :, :3]
    from PIL import Image

    canvas = Image.new("RGBA", (pixels.shape[1], pixels.shape[0]), (255, 255, 255, 255))
    canvas.alpha_composite(Image.fromarray(np.ascontiguousarray(pixels)))
    return np.asarray(canvas)[:, :, :3]


def square(pixels: Pixels, side: int) -> Pixels:
    """Put [H, W, 3] pixels into the middle of a white square and resize that to [side, side, 3]."""
    height, width = pixels.shape[:2]
    long = max(width, height)
    if long * long > MAX_IMAGE_PIXELS:
        # The square of a long and narrow picture would fill the memory: shrink first to what still is plenty.
        share = 4 * side / long
        pixels = resize(pixels, (max(round(width * share), 1), max(round(height * share), 1)), "area")
        height, width = pixels.shape[:2]
        long = max(width, height)
    whole = np.full((long, long, 3), 255, np.uint8)
    left, top = (long - width) // 2, (long - height) // 2
    whole[top : top + height, left : left + width] = pixels
    return resize(whole, (side, side))
