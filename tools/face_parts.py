"""Faces in pictures: found by OpenCV's YuNet from a local file, turned upright, scaled and cut out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from library.data.augment import resize
from library.data.images import Pixels

_TOP = 5000
_OVERLAP = 0.3
"""Faces that share more than this of their area are one."""


@dataclass(frozen=True, slots=True)
class Face:
    """A face in pixels: centre, width and height of its box, both eyes (the one further left first), and score."""

    center: tuple[float, float]
    size: tuple[float, float]
    eyes: tuple[tuple[float, float], tuple[float, float]]
    score: float

    @property
    def angle(self) -> float:
        """Degrees by which the line between the eyes falls to the right; 0 is upright."""
        (left_x, left_y), (right_x, right_y) = self.eyes
        return math.degrees(math.atan2(right_y - left_y, right_x - left_x))

    @property
    def area(self) -> float:
        """Area of the box."""
        return self.size[0] * self.size[1]


@lru_cache(maxsize=1)
def load_detector(path: str, score: float) -> Any:
    """Open a YuNet model, once for each process.

    Raises:
        cv2.error: it is no model that OpenCV can read.
    """
    import cv2

    cv2.setNumThreads(0)
    return cv2.FaceDetectorYN.create(path, "", (64, 64), score, _OVERLAP, _TOP)


def find_faces(pixels: Pixels, model: str, score: float) -> list[Face]:
    """Return the faces in RGB pixels [H, W, 3], largest first.

    Args:
        pixels: of the picture.
        model: file of a YuNet model (face_detection_yunet_2023mar.onnx of the OpenCV zoo).
        score: how sure the detector must be, 0 to 1.
    """
    detector = load_detector(model, score)
    detector.setInputSize((pixels.shape[1], pixels.shape[0]))
    _, rows = detector.detect(np.ascontiguousarray(pixels[:, :, ::-1]))
    faces = [_face(row) for row in ([] if rows is None else rows)]
    return sorted(faces, key=lambda face: (-face.area, face.center))


def _face(row: Sequence[float]) -> Face:
    """Read a row: x, y, width, height, five points (x, y), score; the first two points are the eyes."""
    x, y, width, height = (float(value) for value in row[:4])
    first, second = (float(row[4]), float(row[5])), (float(row[6]), float(row[7]))
    eyes = (first, second) if first[0] <= second[0] else (second, first)
    return Face((x + width / 2, y + height / 2), (width, height), eyes, float(row[14]))


def upright(pixels: Pixels, face: Face) -> Pixels:
    """Turn pixels around the centre of a face until its eyes are level; what comes in at the corners is mirrored."""
    import cv2

    turn = cv2.getRotationMatrix2D(face.center, face.angle, 1.0)
    size = (pixels.shape[1], pixels.shape[0])
    turned = cv2.warpAffine(pixels, turn, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(turned, np.uint8)


@dataclass(frozen=True, slots=True)
class Cut:
    """A picture around a face: its pixels, and the face's centre and size in it."""

    pixels: Pixels
    center: tuple[float, float]
    size: tuple[float, float]

    def scaled(self, factor: float) -> Cut:
        """Return it enlarged or shrunk by a factor."""
        height, width = (max(1, round(side * factor)) for side in self.pixels.shape[:2])
        if (height, width) == self.pixels.shape[:2]:
            return self
        across, down = width / self.pixels.shape[1], height / self.pixels.shape[0]
        center = (self.center[0] * across, self.center[1] * down)
        return Cut(resize(self.pixels, (width, height)), center, (self.size[0] * across, self.size[1] * down))

    def cropped(self, width: int, height: int) -> Cut:
        """Return a part of this size, the face as far in the middle as the edges allow; sides only get smaller."""
        height, width = min(height, self.pixels.shape[0]), min(width, self.pixels.shape[1])
        left = min(max(round(self.center[0] - width / 2), 0), self.pixels.shape[1] - width)
        top = min(max(round(self.center[1] - height / 2), 0), self.pixels.shape[0] - height)
        center = (self.center[0] - left, self.center[1] - top)
        return Cut(self.pixels[top : top + height, left : left + width], center, self.size)

    @property
    def description(self) -> str:
        """The face as `--face_crop_aug_range` reads it at the end of a file name: `_cx_cy_width_height`."""
        return "".join(f"_{max(0, round(value)):04d}" for value in (*self.center, *self.size))


def draw(cut: Cut) -> Pixels:
    """Return the pixels with the face's box drawn."""
    import cv2

    shown = np.ascontiguousarray(cut.pixels)
    left, top = (round(center - size / 2) for center, size in zip(cut.center, cut.size, strict=True))
    cv2.rectangle(shown, (left, top, round(cut.size[0]), round(cut.size[1])), (255, 0, 255), 2)
    return shown
