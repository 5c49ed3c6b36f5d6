"""derive() is a promise to every saved state: the numbers below may never change."""

import random

import pytest

from library.randomness import derive, python_random, uniform

GOLDEN = [
    ((42, "order", 0, 1), 1585418476450611877),
    ((42, "noise", 12, 0, 3, "noise"), 13251935486386407970),
    (
        (
            0,
            "",
        ),
        2283521107298152996,
    ),
    ((-1, "net", 2**63, 0), 15100017822351451389),
    ((2**64 - 1, "init", "unet.down.0"), 5194762914952303668),
    ((7, "sample", "größe/日本.png", 5), 10426202599543352768),
]


@pytest.mark.parametrize(("arguments", "number"), GOLDEN)
def test_derived_numbers_are_those_of_every_release(arguments, number):
    assert derive(*arguments) == number


def test_seeds_are_taken_modulo_64_bits():
    assert derive(-1, "a") == derive(2**64 - 1, "a")


def test_arguments_cannot_be_confused_with_each_other():
    seen = {
        derive(1, "a"),
        derive(1, "a", 1),
        derive(1, "a", "1"),
        derive(1, "a", 1, 0),
        derive(1, "a", 0, 1),
        derive(1, "a1"),
        derive(1, "", "a", 1),
        derive(1, "a", "b", "c"),
        derive(1, "a", "bc"),
        derive(1, "a", "bc", ""),
        derive(11, "a"),
    }
    assert len(seen) == 11


def test_different_counters_give_different_numbers():
    assert len({derive(3, "noise", step, row) for step in range(1000) for row in range(300)}) == 300_000


def test_uniform_fills_the_unit_interval_evenly():
    values = [uniform(5, "u", index) for index in range(20_000)]
    assert 0 <= min(values) < 0.001
    assert 0.999 < max(values) < 1
    assert abs(sum(values) / len(values) - 0.5) < 0.01


def test_python_random_is_private_and_repeatable():
    state = random.getstate()
    first, second = python_random(9, "sample", 1, 2), python_random(9, "sample", 1, 2)
    assert [first.random() for _ in range(3)] == [second.random() for _ in range(3)]
    assert python_random(9, "sample", 1, 3).random() != python_random(9, "sample", 1, 2).random()
    assert random.getstate() == state
