"""Random parts of pictures: boxes and brush strokes, as people mark what shall be painted anew."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_SHAPES = 40
_BOX_SIDES = (0.15, 0.5)
_STROKE_WIDTH = (0.05, 0.15)
_STROKE_POINTS = (3, 8)
_STROKE_STEP = (0.08, 0.3)
_TURN = math.pi / 2


@dataclass(frozen=True, slots=True)
class MaskShapes:
    """How much of a picture is covered (0..1), and how likely a shape is a box; the others are brush strokes."""

    share: float
    p_box: float = 0.5


def random_mask(size_hw: tuple[int, int], shapes: MaskShapes, rng: random.Random) -> NDArray[np.bool_]:
    """Return a mask [H,W] that covers about `shapes.share` of the picture, at least; a function of `rng` alone."""
    mask = np.zeros(size_hw, np.uint8)
    for _ in range(_MOST_SHAPES):
        if mask.mean() >= shapes.share:
            break
        (_draw_box if rng.random() < shapes.p_box else _draw_stroke)(mask, rng)
    return mask.astype(bool)


def _draw_box(mask: NDArray[np.uint8], rng: random.Random) -> None:
    height, width = mask.shape
    box_height, box_width = (max(1, round(side * rng.uniform(*_BOX_SIDES))) for side in (height, width))
    top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
    mask[top : top + box_height, left : left + box_width] = 1


def _draw_stroke(mask: NDArray[np.uint8], rng: random.Random) -> None:
    """Draw a line of round ends whose direction wanders."""
    import cv2

    height, width = mask.shape
    side = min(height, width)
    thickness = max(1, round(side * rng.uniform(*_STROKE_WIDTH)))
    x, y, angle = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, 2 * math.pi)
    points: list[tuple[int, int]] = [(int(x), int(y))]
    for _ in range(rng.randint(*_STROKE_POINTS)):
        angle += rng.uniform(-_TURN, _TURN)
        step = side * rng.uniform(*_STROKE_STEP)
        x = min(max(x + step * math.cos(angle), 0), width - 1)
        y = min(max(y + step * math.sin(angle), 0), height - 1)
        points.append((int(x), int(y)))
    line: Any = np.array(points, np.int32).reshape(-1, 1, 2)
    cv2.polylines(mask, [line], isClosed=False, color=1, thickness=thickness)
    for point in points:
        cv2.circle(mask, point, thickness // 2, 1, -1)
