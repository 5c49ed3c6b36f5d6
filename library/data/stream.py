"""Batches of streamed tar files: the interface of planned batches, for data sets that are too large to index.

The order is no plan: it depends on the numbers of ranks and of loader processes. With equal numbers a resumed run goes
on with exactly the batches that an uninterrupted one would have had; the tar files before that place are walked through
again, without their pictures. With other numbers, or other tar files, it goes on somewhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from library.contracts import Batch, BatchKey, Placement, Position, SampleKey, StepKey
from library.data.loader import PlannedBatches
from library.data.records import TextColumn
from library.data.serving import BatchDataset, Catalogue, Placements
from library.data.shard_scan import shard_key
from library.data.storage import MARK, Locator, holding
from library.data.stream_source import SlotStream, StreamBroken, StreamedSample, StreamSettings
from library.data.subset_rows import Source, table_of
from library.errors import UserError

if TYPE_CHECKING:
    from library.contracts import RunLength
    from library.data.stream_data import StreamedData


class StreamedBatches(PlannedBatches):
    """Serves the micro-batches of one rank from streamed tar files, from any position to the end of the run."""

    def __init__(self, data: StreamedData, length: RunLength, *, rank: int, **settings: Any) -> None:
        """Prepare; see `PlannedBatches`.

        Raises:
            UserError: there are fewer tar files than ranks.
        """
        super().__init__(data, length, rank=rank, **settings)  # type: ignore[arg-type]
        self._streamed = data
        shards, world = len(data.settings.shards), length.world_size
        if data.settings.resampled:
            return
        if shards < world:
            what = f"{shards} tar files cannot be shared out to {world} processes"
            hint = f"Make {world} or more of it, train without it, or add --webdataset_resampled."
            raise UserError(what, hint, where="--webdataset_streaming")
        self.workers = data.lanes(self.workers, world)

    def _dataset(self) -> StreamDataset:
        length, data = self._length, self._streamed
        lanes = max(self.workers, 1)
        return StreamDataset(
            data.catalogue, data.settings, self._seed, length.total_steps, (self._rank, length.world_size, lanes)
        )

    def _keys(self, start: Position) -> Iterator[BatchKey]:
        length, position = self._length, start
        while position.step < length.total_steps:
            yield from self._keys_of_update(position)
            position = position.advance(length)

    def _keys_of_update(self, position: Position) -> Iterator[BatchKey]:
        """Yield the micro-batches of this rank in one update; the index of their sample counts those of the run."""
        length = self._length
        real = length.batches_in_update(position.update_in_epoch)
        rounds = -(-real // length.world_size)
        last = position.update_in_epoch + 1 == length.updates_per_epoch
        before = self._streamed.batches_before(length, position)
        for turn in range(rounds):
            micro = turn * length.world_size + self._rank
            ends = turn + 1 == rounds
            yield BatchKey(
                step_key=StepKey(position.step, micro),
                epoch=position.epoch,
                update_in_epoch=position.update_in_epoch,
                last_in_update=ends,
                last_in_epoch=ends and last,
                share=1.0 if micro < real else 0.0,
                samples=(SampleKey(before + turn, position.epoch, before + turn, position.step),),
            )


class StreamDataset:
    """What loader workers run: each key of theirs asks for the next batch of their stream.

    Args:
        catalogue: how samples are served; its table is empty.
        settings: what is streamed.
        seed: of the run.
        total_steps: length of the run.
        place: rank, number of ranks, and loader processes of each.
    """

    def __init__(
        self, catalogue: Catalogue, settings: StreamSettings, seed: int, total_steps: int, place: tuple[int, int, int]
    ) -> None:
        self._catalogue, self._settings, self._seed, self._total_steps = catalogue, settings, seed, total_steps
        self._rank, self._world, self._lanes = place
        self._streams: dict[int, SlotStream] = {}

    def __getitem__(self, key: BatchKey) -> Batch:
        """Load one micro-batch; a picture that cannot be used is replaced by another of its batch."""
        number = key.samples[0].index
        lane = number % self._lanes
        stream = self._streams.get(lane)
        if stream is None:
            slot, slots = self._rank * self._lanes + lane, self._world * self._lanes
            spec = self._catalogue.specs[0]
            stream = SlotStream(self._settings, spec, seed=self._seed, slot=slot, slots=slots)
            self._streams[lane] = stream
        try:
            samples = stream.batch(number // self._lanes)
        except StreamBroken as error:
            samples = self._nothing(str(error))
        return replace(self._served(key, samples), left_out=stream.take_left_out())

    def _served(self, key: BatchKey, samples: Sequence[StreamedSample]) -> Batch:
        catalogue = self._catalogue
        spec = catalogue.specs[0]
        table = table_of(_source_of(samples), spec.subsets[0], self._settings.exif)
        placements = Placements.of([sample.placement for sample in samples])
        given = key.samples[0]
        first = (given.position * self._world + self._rank) * spec.batch_size
        keys = tuple(replace(given, index=row, position=first + row) for row in range(len(samples)))
        served = BatchDataset(replace(catalogue, table=table, placements=placements), self._seed, self._total_steps)
        with holding({str(sample.picture): sample.data for sample in samples if sample.data is not None}):
            return served[replace(key, samples=keys)]

    def _nothing(self, reason: str) -> list[StreamedSample]:
        """Return samples that cannot be read, named by the reason, so that the batch is left blank and counted."""
        spec = self._catalogue.specs[0]
        size = spec.bucket_sizes[0] if spec.bucket_sizes else spec.resolution_wh
        picture = Locator(self._settings.shards[0], f"no more samples ({reason})", 0, 0)
        return [StreamedSample(picture, None, (*size, 1), "", Placement(size, size, (0, 0)))] * spec.batch_size


def _source_of(samples: Sequence[StreamedSample]) -> Source:
    shards = list(dict.fromkeys(sample.picture.shard for sample in samples))
    return Source(
        names=TextColumn.of([str(sample.picture).removeprefix(f"{sample.picture.shard}{MARK}") for sample in samples]),
        captions=TextColumn.of([sample.caption for sample in samples]),
        headers=np.array([sample.header for sample in samples], np.int32).reshape(-1, 3),
        stats=np.array([(sample.picture.size, 0, 0) for sample in samples], np.int64).reshape(-1, 3),
        folders=np.array([shards.index(sample.picture.shard) for sample in samples], np.int32),
        folder_list=[(f"{shard}{MARK}", shard_key(shard)) for shard in shards],
    )


def batches_of(data: Any, length: RunLength, **settings: Any) -> PlannedBatches:
    """Return what serves the batches of any kind of data; see `PlannedBatches`."""
    kind = StreamedBatches if data.streamed else PlannedBatches
    return kind(data, length, **settings)
