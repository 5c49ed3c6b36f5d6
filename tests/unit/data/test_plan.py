from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.contracts import Position, RunLength
from library.data.plan import EpochPlanner, batch_keys

rows_strategy = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=40)


def make_planner(rows, batch_sizes=(4, 3, 1)):
    datasets, buckets, repeats = zip(*rows, strict=True)
    return EpochPlanner(datasets, buckets, repeats, batch_sizes)


def length_of(planner, total_steps, accumulation=1, world=1):
    return RunLength(total_steps, 1000, planner.batches_per_epoch, accumulation * world, accumulation, world)


@given(rows_strategy, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_image_is_visited_exactly_its_repeats(rows, epoch):
    planner = make_planner(rows)
    plan = planner.epoch(7, epoch)
    seen = Counter(plan.entries.tolist())
    assert seen == {index: repeats for index, (_, _, repeats) in enumerate(rows)}
    assert planner.samples_per_epoch == sum(repeats for _, _, repeats in rows)


@given(rows_strategy)
@settings(max_examples=60, deadline=None)
def test_batches_are_pure_and_only_the_last_of_a_bucket_is_partial(rows):
    planner = make_planner(rows)
    plan = planner.epoch(7, 0)
    partial = Counter()
    for index in range(len(plan)):
        _, members = plan.batch(index)
        kinds = {rows[member][:2] for member in members}
        assert len(kinds) == 1
        dataset, _ = kind = kinds.pop()
        size = (4, 3, 1)[dataset]
        assert 1 <= len(members) <= size
        partial[kind] += len(members) < size
    assert all(count <= 1 for count in partial.values())


def test_bucket_example_of_wide_and_tall_images():
    planner = make_planner([(0, 0, 3)] * 7 + [(0, 1, 3)] * 5, (4,))
    assert planner.batches_per_epoch == 6 + 4


def test_order_depends_on_seed_and_epoch_only():
    rows = [(0, i % 3, 2) for i in range(60)]
    plan = make_planner(rows).epoch(1, 4)
    again = make_planner(rows).epoch(1, 4)
    assert np.array_equal(plan.entries, again.entries) and np.array_equal(plan.offsets, again.offsets)
    assert not np.array_equal(plan.entries, make_planner(rows).epoch(1, 5).entries)
    assert not np.array_equal(plan.entries, make_planner(rows).epoch(2, 4).entries)


def test_order_is_the_same_for_ever():
    # Golden values: a resumed run must find the order that the first one had, whatever library versions lie between.
    plan = make_planner([(0, 0, 1)] * 6 + [(0, 1, 2)] * 2, (3,)).epoch(1234, 0)
    assert plan.entries.tolist() == [6, 7, 6, 7, 1, 0, 3, 4, 2, 5]
    assert plan.offsets.tolist() == [0, 3, 4, 7, 10]


def test_batches_of_data_sets_are_mixed():
    planner = make_planner([(i % 2, 0, 1) for i in range(200)], (1, 1))
    first_half = planner.epoch(0, 0).entries[:100] % 2
    assert 20 < first_half.sum() < 80
    assert planner.batches_of_dataset(0) == planner.batches_of_dataset(1) == 100


@given(rows_strategy, st.integers(1, 3), st.integers(1, 3), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_a_run_continues_where_it_was_cut(rows, accumulation, world, cut):
    planner = make_planner(rows)
    length = length_of(planner, 30, accumulation, world)
    for rank in range(world):
        whole = list(batch_keys(planner, length, 3, rank, Position()))
        position = Position()
        for _ in range(cut):
            position = position.advance(length)
        rest = list(batch_keys(planner, length, 3, rank, position))
        assert [key for key in whole if key.step_key.step >= cut] == rest


@given(rows_strategy, st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_ranks_share_updates_like_accumulation(rows, accumulation, world):
    planner = make_planner(rows)
    many = length_of(planner, 25, accumulation, world)
    one = length_of(planner, 25, accumulation * world, 1)
    alone = list(batch_keys(planner, one, 3, 0, Position()))
    ranks = [list(batch_keys(planner, many, 3, rank, Position())) for rank in range(world)]
    assert len({len(keys) for keys in ranks}) == 1, "all ranks take equally many micro steps"
    for rank, keys in enumerate(ranks):
        assert all(key.step_key.micro % world == rank for key in keys)
    together = sorted((key for keys in ranks for key in keys), key=lambda key: (key.step_key.step, key.step_key.micro))
    real = [key for key in together if key.share]
    assert [(key.step_key, key.samples) for key in real] == [(key.step_key, key.samples) for key in alone]
    for key in together:
        if not key.share:
            assert any(key.samples == other.samples for other in real if other.step_key.step == key.step_key.step)


def test_updates_never_cross_an_epoch_and_marks_are_right():
    planner = make_planner([(0, 0, 1)] * 7, (1,))
    length = length_of(planner, 4, accumulation=3)
    assert length.updates_per_epoch == 3
    keys = list(batch_keys(planner, length, 0, 0, Position()))
    assert [(k.step_key.step, k.step_key.micro, k.epoch, k.update_in_epoch) for k in keys] == [
        (0, 0, 0, 0), (0, 1, 0, 0), (0, 2, 0, 0),
        (1, 0, 0, 1), (1, 1, 0, 1), (1, 2, 0, 1),
        (2, 0, 0, 2),
        (3, 0, 1, 0), (3, 1, 1, 0), (3, 2, 1, 0),
    ]  # fmt: skip
    assert [k.last_in_update for k in keys] == [False, False, True] * 2 + [True] + [False, False, True]
    assert [k.last_in_epoch for k in keys] == [False] * 6 + [True] + [False] * 3


def test_positions_count_the_samples_of_an_epoch():
    planner = make_planner([(0, i % 2, 2) for i in range(9)], (4,))
    keys = list(batch_keys(planner, length_of(planner, planner.batches_per_epoch), 0, 0, Position()))
    assert sorted(sample.position for key in keys for sample in key.samples) == list(range(18))
    assert all(sample.step == key.step_key.step for key in keys for sample in key.samples)


def test_a_million_entries_are_planned_quickly():
    import time

    rng = np.random.default_rng(0)
    planner = EpochPlanner(np.zeros(100_000, int), rng.integers(0, 17, 100_000), np.full(100_000, 10), [4])
    begin = time.process_time()
    plan = planner.epoch(0, 0)
    assert len(plan.entries) == 1_000_000
    assert time.process_time() - begin < 3


def test_nothing_to_serve():
    planner = EpochPlanner([], [], [], [2])
    assert planner.batches_per_epoch == 0
    assert list(batch_keys(planner, length_of(planner, 5), 0, 0, Position())) == []
    planner = make_planner([(0, 0, 1)])
    assert list(batch_keys(planner, length_of(planner, 5), 0, 0, Position(step=5, epoch=5))) == []


def test_repeats_of_zero_leave_an_image_out():
    planner = EpochPlanner([0, 0], [0, 0], [0, 3], [2])
    assert set(planner.epoch(0, 0).entries.tolist()) == {1}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_order_is_the_table_order(world):
    planner = make_planner([(0, 1, 1), (0, 0, 1), (0, 1, 1), (0, 0, 1)], (2,))
    plan = planner.in_table_order()
    assert plan.entries.tolist() == [1, 3, 0, 2]
