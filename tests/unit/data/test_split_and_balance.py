"""Validation split and balancing of regularization images."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.regularization import balanced_repeats
from library.data.split import validation_rows


@pytest.mark.parametrize(
    ("visits", "reg", "expected"),
    [
        (40, [1, 1, 1], [14, 13, 13]),
        (8, [1] * 20, [1] * 8 + [0] * 12),
        (6, [4, 4, 4], [4, 4, 0]),
        (5, [2, 2], [3, 2]),
        (0, [2, 2], [0, 0]),
        (5, [], []),
        (4, [2, 2], [2, 2]),
    ],
)
def test_worked_examples(visits, reg, expected):
    assert balanced_repeats(visits, np.array(reg, np.int32)).tolist() == expected


def walked(visits, repeats):
    """The rule as it is told: register, then add one by one."""
    result, total = [0] * len(repeats), 0
    if not repeats:
        return result
    first = True
    while total < visits:
        for index, own in enumerate(repeats):
            add = own if first else 1
            result[index] += add
            total += add
            if total >= visits:
                break
        first = False
    return result


@given(st.integers(0, 300), st.lists(st.integers(1, 20), max_size=12))
def test_equals_walking_the_list(visits, repeats):
    assert balanced_repeats(visits, np.array(repeats, np.int32)).tolist() == walked(visits, repeats)


@pytest.mark.parametrize(("share", "apart"), [(0.3, 3), (0.25, 2), (0.05, 0), (1.0, 10), (0.0, 0), (0.5, 5)])
def test_sizes_of_the_parts(share, apart):
    assert validation_rows([f"{i}.png" for i in range(10)], share, 7).sum() == apart


@given(st.lists(st.text(max_size=8), max_size=40, unique=True), st.floats(0, 1), st.integers(0, 2**40))
def test_split_is_a_function_of_seed_and_names(keys, share, seed):
    chosen = validation_rows(keys, share, seed)
    assert len(keys) - chosen.sum() == min(len(keys), math.ceil(len(keys) * (1 - share)))
    again = validation_rows(keys[::-1], share, seed)[::-1]
    assert (chosen == again).all()


def test_other_seeds_choose_others():
    keys = [f"{i}.png" for i in range(100)]
    assert (validation_rows(keys, 0.5, 1) != validation_rows(keys, 0.5, 2)).any()
