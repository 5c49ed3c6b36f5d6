"""Which images are kept apart for validation: disjoint, complete, and decided by seed and image alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from library.randomness import derive


def validation_rows(keys: Sequence[str], share: float, seed: int) -> NDArray[np.bool_]:
    """Return which images belong to the validation part.

    Every image draws a number from its key, and the images with the largest numbers are kept apart. So the same
    images are chosen whatever else is in the data, and a folder used at two resolutions is split alike at both.

    Args:
        keys: One name per image that does not depend on where the data lie.
        share: Part of the images kept for validation, 0..1; ceil(n * (1 - share)) images stay in training.
        seed: The validation seed, or the seed of the run.
    """
    count = len(keys)
    chosen = np.zeros(count, np.bool_)
    training = min(count, math.ceil(count * (1 - share)))
    if training == count:
        return chosen
    numbers = np.fromiter((derive(seed, "validation_split", key) for key in keys), np.uint64, count)
    chosen[np.argsort(numbers, kind="stable")[training:]] = True
    return chosen
