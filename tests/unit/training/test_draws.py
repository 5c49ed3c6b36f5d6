"""Noise is a function of names and counters: what the promises of exact resume and of equal ranks rest on."""

import random

import pytest
import torch

from library.contracts import StepKey
from library.draws import Draws, normal_rows

CPU = torch.device("cpu")


def draws(*, seed=42, step=3, micro=1, rows=4, stream="noise"):
    return Draws(seed, StepKey(step, micro), rows, CPU, stream)


def test_noise_is_standard_normal_and_every_row_differs():
    noise = draws(rows=8).normal("noise", (4, 32, 32))
    assert noise.shape == (8, 4, 32, 32)
    assert noise.dtype == torch.float32
    assert abs(noise.mean().item()) < 0.02
    assert abs(noise.std().item() - 1) < 0.02
    assert len({row.sum().item() for row in noise}) == 8


def test_a_row_does_not_depend_on_the_batch_it_is_in():
    alone, together = draws(rows=1), draws(rows=5)
    assert torch.equal(alone.normal("noise", (4, 8, 8))[0], together.normal("noise", (4, 8, 8))[0])
    assert alone.integers("t", 0, 1000)[0] == together.integers("t", 0, 1000)[0]
    assert alone.uniform("u")[0] == together.uniform("u")[0]


def test_a_draw_does_not_depend_on_the_draws_before_it():
    first, second = draws(), draws()
    first.normal("other", (4, 8, 8))
    first.scalar("strength")
    assert torch.equal(first.normal("noise", (4, 8, 8)), second.normal("noise", (4, 8, 8)))
    assert torch.equal(first.normal("noise", (4, 8, 8)), second.normal("noise", (4, 8, 8)))


@pytest.mark.parametrize("change", [{"seed": 43}, {"step": 4}, {"micro": 0}, {"stream": "val"}])
def test_every_counter_changes_every_draw(change):
    before, after = draws(), draws(**change)
    assert not torch.equal(before.normal("noise", (2, 4)), after.normal("noise", (2, 4)))
    assert not torch.equal(before.integers("t", 0, 10**9), after.integers("t", 0, 10**9))
    assert not torch.equal(before.uniform("u"), after.uniform("u"))
    assert before.scalar("s") != after.scalar("s")


def test_the_name_changes_the_draw():
    one = draws()
    assert not torch.equal(one.normal("a", (4,)), one.normal("b", (4,)))
    assert one.scalar("a") != one.scalar("b")


def test_integers_cover_their_range_and_no_more():
    numbers = torch.cat([draws(step=step, rows=50).integers("t", 5, 8) for step in range(20)])
    assert numbers.dtype == torch.int64
    assert set(numbers.tolist()) == {5, 6, 7}
    with pytest.raises(ValueError, match="no integer"):
        draws().integers("t", 5, 5)


def test_uniform_never_reaches_one():
    values = torch.cat([draws(step=step, rows=200).uniform("u") for step in range(20)])
    assert values.dtype == torch.float32
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1


def test_half_precision_noise_is_the_rounded_float32_noise():
    one = draws()
    assert torch.equal(one.normal("n", (4, 8, 8), torch.bfloat16), one.normal("n", (4, 8, 8)).bfloat16())


def test_global_generators_are_left_alone():
    torch.manual_seed(1)
    state, python_state = torch.get_rng_state(), random.getstate()
    first = draws().normal("noise", (4, 8, 8))
    torch.rand(3)
    random.seed(5)
    assert torch.equal(first, draws().normal("noise", (4, 8, 8)))
    torch.set_rng_state(state)
    random.setstate(python_state)
    draws().normal("noise", (4, 8, 8))
    draws().scalar("s")
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state


def test_rows_can_be_seeded_one_by_one():
    both = normal_rows([7, 8], (3, 5), CPU)
    assert torch.equal(both[1], normal_rows([8], (3, 5), CPU)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_draw_waits_for_the_gpu():
    one = Draws(42, StepKey(0, 0), 4, torch.device("cuda"))
    one.normal("warm-up", (4, 64, 64))
    torch.cuda.set_sync_debug_mode("error")
    try:
        noise, numbers = one.normal("noise", (4, 64, 64)), one.integers("t", 0, 1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(noise, Draws(42, StepKey(0, 0), 4, torch.device("cuda")).normal("noise", (4, 64, 64)))
    assert torch.equal(numbers.cpu(), Draws(42, StepKey(0, 0), 4, CPU).integers("t", 0, 1000))
