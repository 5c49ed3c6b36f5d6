"""Regularization images are repeated, or left out, until they are as many as the training images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def balanced_repeats(training_visits: int, repeats: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the repeats of each regularization image; 0 leaves it out.

    The list is walked once and each image registered with its own repeats until there are as many visits as training
    images have; if the list ends before, it is walked again and again, adding one visit to each image in turn.

    Args:
        training_visits: Training images times their repeats.
        repeats: Repeats of each regularization image, in order, each at least 1.
    """
    result = np.zeros(len(repeats), np.int32)
    if training_visits <= 0 or not len(repeats):
        return result
    totals = np.cumsum(repeats, dtype=np.int64)
    used = int(np.searchsorted(totals, training_visits)) + 1
    if used <= len(repeats):
        result[:used] = repeats[:used]
        return result
    rounds, rest = divmod(training_visits - int(totals[-1]), len(repeats))
    result[:] = repeats + rounds
    result[:rest] += 1
    return result
