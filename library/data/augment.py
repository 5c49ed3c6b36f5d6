"""From decoded pixels to a training sample: one geometry for the image, its alpha channel, its mask and its control.

Order: resize and crop, colour, flip, split alpha, normalise. All choices are made by `choose_view` from a generator
that the caller derives from (seed, epoch, position); applying a view is a pure function.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.contracts import Placement

Pixels = NDArray[np.uint8]

_COLOR_CHANCE = 0.33
_HUE_RANGE = 8.0  # OpenCV hue units, 180 for the full circle
_POWER_RANGE = (0.95, 1.05)
_CV2_NAMES = {
    "area": "INTER_AREA",
    "bilinear": "INTER_LINEAR",
    "linear": "INTER_LINEAR",
    "bicubic": "INTER_CUBIC",
    "cubic": "INTER_CUBIC",
    "nearest": "INTER_NEAREST_EXACT",
}
_PILLOW_NAMES = {"lanczos": "LANCZOS", "lanczos4": "LANCZOS", "box": "BOX"}
_UNIT = ((np.arange(256, dtype=np.float32) / np.float32(255)) - np.float32(0.5)) / np.float32(0.5)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How the images of one subset are varied, and how they are resized."""

    interpolation: str | None = None
    random_crop: bool = False
    flip: bool = False
    color: bool = False
    face_range: tuple[float, float] | None = None

    @property
    def draws(self) -> bool:
        """Whether anything but the flip depends on chance."""
        return self.random_crop or self.color or self.face_range is not None

    def fixed(self) -> Augmentation:
        """The same without anything that depends on chance: what caches and validation use."""
        return Augmentation(self.interpolation)


@dataclass(frozen=True, slots=True)
class View:
    """All choices made for one visit of an image."""

    placement: Placement
    flipped: bool = False
    recolor: Callable[[Pixels], Pixels] | None = None


def choose_view(
    placement: Placement,
    augmentation: Augmentation,
    *,
    flipped: bool,
    rng: random.Random | None,
    name: str = "",
    size_wh: tuple[int, int] = (0, 0),
) -> View:
    """Draw crop and colour for one visit.

    Args:
        placement: resize and centre crop found by the buckets.
        augmentation: of the subset.
        flipped: whether the image is mirrored (decided by the caller, since caches need it too).
        rng: private generator; needed when `augmentation.draws`.
        name: file name, which may describe a face (`..._<cx>_<cy>_<w>_<h>`).
        size_wh: upright size of the image, needed for faces.
    """
    if rng is None:
        return View(placement, flipped)
    face = face_in_name(name) if augmentation.face_range is not None else None
    if face is not None and augmentation.face_range is not None:
        placement = _face_placement(placement, augmentation, face, size_wh, rng)
    elif augmentation.random_crop:
        excess = [resized - bucket for resized, bucket in zip(placement.resized_wh, placement.bucket_wh, strict=True)]
        placement = replace(placement, crop_xy=(rng.randint(0, excess[0]), rng.randint(0, excess[1])))
    return View(placement, flipped, _choose_color(rng) if augmentation.color else None)


def apply_view(pixels: Pixels, view: View, interpolation: str | None) -> Pixels:
    """Resize, crop, recolour and mirror [H, W, C] pixels to the view's bucket; alpha keeps its colour."""
    placement = view.placement
    pixels = resize(pixels, placement.resized_wh, interpolation)
    (left, top), (width, height) = placement.crop_xy, placement.bucket_wh
    pixels = pixels[top : top + height, left : left + width]
    if view.recolor is not None:
        colored = view.recolor(np.ascontiguousarray(pixels[:, :, :3]))
        pixels = colored if pixels.shape[2] == 3 else np.concatenate([colored, pixels[:, :, 3:]], axis=2)
    return pixels[:, ::-1] if view.flipped else pixels


def resize(pixels: Pixels, size_wh: tuple[int, int], interpolation: str | None = None) -> Pixels:
    """Resize [H, W, C] pixels.

    Without a name: OpenCV's area average when no side grows, else Pillow's Lanczos. `lanczos`, `lanczos4` and `box` are
    Pillow's filters, the other names are OpenCV's.
    """
    height, width = pixels.shape[:2]
    if (width, height) == tuple(size_wh):
        return pixels
    if interpolation is None:
        interpolation = "area" if size_wh[0] <= width and size_wh[1] <= height else "lanczos"
    if interpolation in _PILLOW_NAMES:
        from PIL import Image

        method = getattr(Image.Resampling, _PILLOW_NAMES[interpolation])
        return np.asarray(Image.fromarray(pixels).resize(size_wh, method))
    cv2 = _opencv()
    method = getattr(cv2, _CV2_NAMES[interpolation])
    return np.asarray(cv2.resize(np.ascontiguousarray(pixels), size_wh, interpolation=method), np.uint8)


@lru_cache(maxsize=1)
def _opencv() -> Any:
    """Import OpenCV without threads of its own: pictures are loaded in parallel already."""
    import cv2

    cv2.setNumThreads(0)
    return cv2


def normalise(pixels: Pixels) -> NDArray[np.float32]:
    """Turn uint8 [H, W, 3] into float32 [3, H, W] in [-1, 1]: (value / 255 - 0.5) / 0.5."""
    return _UNIT.take(np.ascontiguousarray(pixels[:, :, :3].transpose(2, 0, 1)))


def mask_of(channel: Pixels) -> NDArray[np.float32]:
    """Turn uint8 [H, W] into float32 weights in [0, 1]; 255 trains fully."""
    return np.ascontiguousarray(channel).astype(np.float32) / np.float32(255)


def face_in_name(name: str) -> tuple[int, int, int, int] | None:
    """Return (centre x, centre y, width, height) of the face that a file stem describes, or None.

    The stem has at least five parts separated by `_`, of which the last four are whole numbers.
    """
    parts = PurePath(name).stem.split("_")
    if len(parts) < 5 or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts[-4:]):
        return None
    x, y, width, height = (int(part) for part in parts[-4:])
    return (x, y, width, height) if max(width, height) > 0 else None


def _face_placement(
    placement: Placement,
    augmentation: Augmentation,
    face: tuple[int, int, int, int],
    size_wh: tuple[int, int],
    rng: random.Random,
) -> Placement:
    """Scale the image so that the face has the wished share of the picture, and crop around it."""
    low, high = augmentation.face_range or (1.0, 1.0)
    bucket = placement.bucket_wh
    face_size, short = max(face[2:]), min(bucket)
    cover = max(bucket[0] / size_wh[0], bucket[1] / size_wh[1])
    smallest = min(1.0, max(cover, short / (face_size * high)))
    largest = min(1.0, max(smallest, short / (face_size * low)))
    scale = smallest if smallest >= largest else rng.uniform(smallest, largest)
    scale = max(scale, cover)  # a picture smaller than the resolution is enlarged
    resized = tuple(max(int(side * scale + 0.5), need) for side, need in zip(size_wh, bucket, strict=True))
    crop = []
    for axis in (1, 0):  # vertical first, as the reference draws
        centre = int(face[axis] * scale + 0.5)
        start = centre - bucket[axis] // 2
        if augmentation.random_crop:
            reach = max(resized[axis] - centre, centre)
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif low != high and face_size > short // 10 and face_size >= 40:
            start += rng.randint(-(face_size // 20), face_size // 20)
        crop.append(max(0, min(start, resized[axis] - bucket[axis])))
    return Placement(bucket, (resized[0], resized[1]), (crop[1], crop[0]))


def _choose_color(rng: random.Random) -> Callable[[Pixels], Pixels] | None:
    """Choose a hue shift, a brightness power, or (two times in three) nothing."""
    if rng.random() >= _COLOR_CHANCE:
        return None
    if rng.random() < 0.5:
        return _HueShift(rng.uniform(-_HUE_RANGE, _HUE_RANGE))
    return _Power(rng.uniform(*_POWER_RANGE))


@dataclass(frozen=True, slots=True)
class _HueShift:
    amount: float

    def __call__(self, pixels: Pixels) -> Pixels:
        cv2 = _opencv()
        table = ((np.arange(256) + self.amount) % 180).astype(np.uint8)
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
        hsv[:, :, 0] = table[hsv[:, :, 0]]
        return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


@dataclass(frozen=True, slots=True)
class _Power:
    """value ** power on the scale 0..255: a change of brightness, about 153 to 255 for a value of 200."""

    power: float

    def __call__(self, pixels: Pixels) -> Pixels:
        table: Any = np.clip(np.arange(256, dtype=np.float64) ** self.power, 0, 255).astype(np.uint8)
        return table[pixels]
