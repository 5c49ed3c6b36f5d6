"""The order of a run: which images make up which batch, as a function of (seed, epoch) alone.

An epoch visits every image exactly `repeats` times, a batch holds images of one bucket only, and partial batches are
kept. An optimizer update takes K = accumulation x world size consecutive batches: micro-batch m of update u of an epoch
is batch u*K + m, and rank r runs m = r, r + world, ... So the order does not depend on the number of ranks or workers,
and a run can be continued anywhere by arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from library.contracts import BatchKey, Position, RunLength, SampleKey, StepKey
from library.randomness import derive

_GROUP = -1  # counter of the generator that orders the batches of all data sets together


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """One epoch in order. Batch i is `entries[offsets[i]:offsets[i + 1]]`; a sample's position is its index in entries.

    Attributes:
        epoch: 0-based.
        entries: rows of the record table, int32 [samples].
        offsets: int64 [batches + 1].
    """

    epoch: int
    entries: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.offsets) - 1

    def batch(self, index: int) -> tuple[range, list[int]]:
        """Return the positions in the epoch and the table rows of batch `index`."""
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        return range(start, stop), self.entries[start:stop].tolist()


class EpochPlanner:
    """Plans epochs of one group of data sets.

    Args:
        datasets: number of the data set of each table row, [N].
        buckets: bucket number of each row, [N]; two rows can share a batch when both numbers agree.
        repeats: visits of each row in an epoch, [N]; 0 leaves a row out.
        batch_sizes: images per batch of each data set.
    """

    def __init__(
        self,
        datasets: Sequence[int] | NDArray[np.integer],
        buckets: Sequence[int] | NDArray[np.integer],
        repeats: Sequence[int] | NDArray[np.integer],
        batch_sizes: Sequence[int],
    ) -> None:
        dataset_of, bucket_of = np.asarray(datasets, np.int64), np.asarray(buckets, np.int64)
        times = np.asarray(repeats, np.int64)
        rows = np.lexsort((np.arange(len(dataset_of)), bucket_of, dataset_of))
        self._entries = np.repeat(rows, times[rows]).astype(np.int32)
        of_entry = dataset_of[self._entries]
        keys = np.stack([of_entry, bucket_of[self._entries]])
        edges = np.flatnonzero(np.any(keys[:, 1:] != keys[:, :-1], axis=0)) + 1 if keys.size else np.zeros(0, np.int64)
        self._starts = np.concatenate([[0], edges]) if keys.size else edges
        self._groups = np.diff(np.concatenate([self._starts, [len(self._entries)]]))
        self._group_of_entry = _smallest(np.repeat(np.arange(len(self._groups)), self._groups))
        self._spans = [
            (index, int(np.searchsorted(of_entry, index, "left")), int(np.searchsorted(of_entry, index, "right")))
            for index in range(len(batch_sizes))
        ]
        sizes = np.asarray(batch_sizes, np.int64)[of_entry[self._starts]]
        self._batch_starts, self._batch_lengths = _cut(self._starts, self._groups, sizes)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches over all data sets, partial ones included."""
        return len(self._batch_starts)

    @property
    def samples_per_epoch(self) -> int:
        """Number of visits: the sum of the repeats."""
        return len(self._entries)

    def batches_of_dataset(self, index: int) -> int:
        """Number of batches of one data set in an epoch."""
        _, start, stop = self._spans[index]
        return int(np.count_nonzero((self._batch_starts >= start) & (self._batch_starts < stop)))

    def epoch(self, seed: int, epoch: int) -> EpochPlan:
        """Return the plan of one epoch (0-based)."""
        entries = np.empty_like(self._entries)
        for index, start, stop in self._spans:
            shuffled = start + _permutation(stop - start, seed, index, epoch)
            grouped = shuffled[np.argsort(self._group_of_entry[shuffled], kind="stable")]
            entries[start:stop] = self._entries[grouped]
        order = _permutation(self.batches_per_epoch, seed, _GROUP, epoch)
        return self._in_order(epoch, entries, order)

    def in_table_order(self) -> EpochPlan:
        """Return an epoch without any shuffling, bucket by bucket, for validation."""
        return self._in_order(0, self._entries, np.arange(self.batches_per_epoch))

    def _in_order(self, epoch: int, entries: NDArray[np.int32], order: NDArray[np.int64]) -> EpochPlan:
        lengths = self._batch_lengths[order]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        source = np.repeat(self._batch_starts[order] - offsets[:-1], lengths) + np.arange(len(entries))
        return EpochPlan(epoch, entries[source], offsets)


def _smallest(values: NDArray[np.int64]) -> NDArray[np.integer]:
    """Use 16 bits where they suffice: a stable sort of them is a radix sort, ten times as fast."""
    return values.astype(np.uint16) if values.size == 0 or values[-1] < 1 << 16 else values


def _cut(
    starts: NDArray[np.int64], groups: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut groups of entries into batches of at most `sizes`; return the batches' starts and lengths."""
    counts = -(-groups // np.maximum(sizes, 1))
    group = np.repeat(np.arange(len(groups)), counts)
    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    offset = inside * sizes[group]
    return starts[group] + offset, np.minimum(sizes[group], groups[group] - offset)


def _permutation(count: int, seed: int, dataset: int, epoch: int) -> NDArray[np.int64]:
    """Return a permutation made of the raw stream of PCG64, which numpy keeps the same in all versions."""
    source = np.random.PCG64(derive(seed, "order", dataset, epoch))
    return np.argsort(source.random_raw(count), kind="stable")


def batch_keys(planner: EpochPlanner, length: RunLength, seed: int, rank: int, start: Position) -> Iterator[BatchKey]:
    """Yield the micro-batches of one rank from `start` to the last update of the run, over all epochs in between.

    The plan of the next epoch is made by a thread while this one is served. The last update of an epoch may have fewer
    batches than K; it is filled up to a multiple of the ranks with batches of share 0 that repeat its own first ones,
    so that all ranks take equally many steps.
    """
    if planner.batches_per_epoch == 0 or start.step >= length.total_steps:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan") as maker:
        upcoming: Future[EpochPlan] = maker.submit(planner.epoch, seed, start.epoch)
        position = start
        while position.step < length.total_steps:
            plan = upcoming.result()
            upcoming = maker.submit(planner.epoch, seed, position.epoch + 1)
            epoch = position.epoch
            while position.epoch == epoch and position.step < length.total_steps:
                yield from update_keys(plan, length, position, rank)
                position = position.advance(length)


def update_keys(plan: EpochPlan, length: RunLength, position: Position, rank: int) -> Iterator[BatchKey]:
    """Yield the micro-batches that `rank` runs in one update of `plan`."""
    first = position.update_in_epoch * length.micro_batches_per_update
    real = min(length.micro_batches_per_update, len(plan) - first)
    rounds = -(-real // length.world_size)
    last_in_epoch = first + real >= len(plan)
    for turn in range(rounds):
        micro = turn * length.world_size + rank
        last = turn + 1 == rounds
        positions, rows = plan.batch(first + micro % real)
        yield BatchKey(
            step_key=StepKey(position.step, micro),
            epoch=plan.epoch,
            update_in_epoch=position.update_in_epoch,
            last_in_update=last,
            last_in_epoch=last and last_in_epoch,
            share=1.0 if micro < real else 0.0,
            samples=tuple(
                SampleKey(row, plan.epoch, place, position.step) for row, place in zip(rows, positions, strict=True)
            ),
        )
