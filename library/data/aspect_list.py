"""The sizes that a list of aspect ratios stands for (`multi_aspect_ratio`): pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from library.errors import UserError

STEP = 32
LARGEST_RATIO = 16
"""Beyond it a number is most likely a slip: YAML reads an unquoted 16:9 as 969."""


def read_ratio(value: Any, *, where: str = "multi_aspect_ratio") -> Fraction:
    """Return width / height as written: `9/16`, `"16:9"`, `1.5` or `1`.

    Raises:
        UserError: it is no ratio.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)) or len(str(value)) > 40:
            raise ValueError("not a ratio")
        above, _, below = str(value).replace(":", "/").partition("/")
        ratio = Fraction(above.strip()) / Fraction(below.strip() or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{value!r} is no ratio of width to height", "Write 9/16 or 1.5.", where=where) from error
    if not 1 <= max(ratio, 1 / ratio if ratio > 0 else ratio) <= LARGEST_RATIO or ratio <= 0:
        hint = f"Write it as a fraction, such as 16/9; at most {LARGEST_RATIO} times as long as wide."
        raise UserError(f"{value!r} is no usable ratio of width to height", hint, where=where)
    return ratio


def aspect_sizes(image_size: int, ratios: Iterable[Any], *, step: int = STEP) -> tuple[tuple[int, int], ...]:
    """Return the sizes (width, height) of about `image_size` squared pixels, with the transposed ones, narrowest first.

    For a ratio r both sides are rounded down to a multiple of `step`: height sqrt(image_size^2 / r), width
    sqrt(image_size^2 * r). Several ratios may give the same size.

    Args:
        image_size: side of the square of the same area.
        ratios: as `read_ratio` reads them.
        step: that sides are multiples of.

    Raises:
        UserError: a ratio cannot be read, or a side would vanish.
    """
    area = image_size * image_size
    read = [read_ratio(ratio) for ratio in ratios]
    found = set()
    for ratio in {*read, *(1 / ratio for ratio in read)}:
        # Whole numbers throughout: the root of the whole part has the same multiples below it.
        height = math.isqrt(int(area / ratio)) // step * step
        width = math.isqrt(int(area * ratio)) // step * step
        if not (width and height):
            raise UserError(
                f"{ratio} leaves a side shorter than {step} at size {image_size}", where="multi_aspect_ratio"
            )
        found.add((width, height))
    return tuple(sorted(found))
