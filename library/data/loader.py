"""One stream of batches for a whole run: loader workers, prefetching across epochs, and what happens when one dies."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import ProcessError
from multiprocessing.context import BaseContext
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from library.contracts import Batch, BatchKey, Position, RunLength, SampleKey, StepKey
from library.data.options import LoaderOptions
from library.data.plan import batch_keys
from library.errors import UserError
from library.faults import fault_point

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.data.serving import BatchDataset

_log = logging.getLogger(__name__)

_PREFETCH = 2
_GRACE_SECONDS = 60  # a worker outlives SIGTERM by this, so that the main process can finish its update
_BLANK_LIMIT = 20
_SMALL = 1 << 14  # bytes; larger messages would fill the pipe between the processes
_DEATH_POLLS = 20
_BROKEN_PIPES = (OSError, EOFError, RuntimeError, ValueError, ProcessError, UnpicklingError)


class PlannedBatches:
    """Serves the micro-batches of one rank, in the order of the plan, from any position to the end of the run.

    Attributes:
        wait_seconds: time that the consumer has spent waiting for batches so far.
        replaced: number of samples that had to be replaced so far.
        left_out: number of samples that streams passed over so far, by reason.
        workers: number of loader processes.
    """

    def __init__(
        self,
        data: TrainingData,
        length: RunLength,
        *,
        rank: int,
        seed: int,
        loader: LoaderOptions,
        start_method: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Prepare; nothing is started before `iterate`.

        Args:
            data: of the run, with its latent cache in place.
            length: of the run.
            rank: of this process among `length.world_size`.
            seed: of the run.
            loader: options of the workers.
            start_method: fork, spawn or forkserver; None for the platform's usual one.
            pin_memory: hand out batches in page-locked memory, for fast copies to a GPU.
        """
        if data.batch_count() != length.batches_per_epoch:
            raise ValueError(f"the run expects {length.batches_per_epoch} batches an epoch, not {data.batch_count()}")
        self._data, self._length, self._rank, self._seed = data, length, rank, seed
        self._start_method, self._pin_memory = start_method, pin_memory
        cached = data.reads_only_latents
        # A batch of latents is read in a few milliseconds. Handing it over from a process takes the main one as long,
        # unless the thread that pins memory for a GPU does that.
        self.workers = 0 if cached and not pin_memory else worker_count(loader, cached=cached)
        self.wait_seconds = 0.0
        self.replaced = 0
        self.left_out: Counter[str] = Counter()
        self._blank = 0

    def iterate(self, start: Position) -> Generator[Batch, None, None]:
        """Yield micro-batches from `start` to the last update of the run, over all epochs in between.

        Close the iterator (or exhaust it) to stop workers and threads.

        Raises:
            UserError: workers die again and again, or no image can be read any more.
        """
        dataset = self._dataset()
        source = self._in_processes(dataset, start) if self.workers else self._in_thread(dataset, start)
        try:
            while True:
                fault_point("loader.get")
                begin = time.perf_counter()
                batch = next(source, None)
                self.wait_seconds += time.perf_counter() - begin
                if batch is None:
                    return
                self._watch(batch)
                yield batch
        finally:
            source.close()

    def _dataset(self) -> Any:
        """Return what loader workers ask for batches."""
        return self._data.dataset(self._seed, self._length.total_steps)

    def _keys(self, start: Position) -> Iterator[BatchKey]:
        return batch_keys(self._data.planner, self._length, self._seed, self._rank, start)

    def _watch(self, batch: Batch) -> None:
        """Count samples that were replaced or left out, and stop when nothing but blank batches arrives."""
        self.left_out.update(batch.left_out)
        for text in batch.replaced:
            self.replaced += 1
            if self.replaced <= 5:
                _log.warning("replaced by another image of its bucket: %s", text)
        self._blank = self._blank + 1 if len(batch.replaced) == batch.size and not batch.loss_weight.any() else 0
        if self._blank >= _BLANK_LIMIT:
            raise UserError(
                f"{_BLANK_LIMIT} batches in a row could not be read, the last one because of {batch.replaced[-1]}",
                "Are the data still where they were?",
                where="data set",
            )

    def _in_thread(self, dataset: BatchDataset, start: Position) -> Any:
        """Load in a thread of this process, a few batches ahead."""

        def load(key: BatchKey) -> Batch:
            batch = dataset[key]
            return batch.pin_memory() if self._pin_memory else batch

        pending: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
            try:
                for key in self._keys(start):
                    pending.append(pool.submit(load, key))
                    if len(pending) > _PREFETCH:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _in_processes(self, dataset: BatchDataset, start: Position) -> Any:
        """Load in worker processes; when one dies, all are started once more at the batch that is due."""
        position, micro, failures = start, -1, 0
        while True:
            batches = self._torch_loader(dataset, self._after(position, micro))
            try:
                for batch in batches:
                    step_key = batch.key.step_key
                    position = Position(step_key.step, batch.key.epoch, batch.key.update_in_epoch)
                    micro = step_key.micro
                    yield batch
                return
            except WorkerDied as error:
                failures += 1
                if failures > 1:
                    raise UserError(
                        "a loader worker was killed, probably because memory ran out",
                        "Use fewer workers (--max_data_loader_n_workers) or smaller batches; in a container, give more "
                        "shared memory.",
                        where="data loader",
                    ) from error
                _log.warning("a loader worker died (%s); starting the workers once more", error)
            finally:
                batches.close()

    def _after(self, position: Position, micro: int) -> Iterable[BatchKey]:
        """Return the keys that follow micro-batch `micro` of the update at `position` (-1: from its first)."""
        return (key for key in self._keys(position) if key.step_key.step > position.step or key.step_key.micro > micro)

    def _torch_loader(self, dataset: BatchDataset, keys: Iterable[BatchKey]) -> Any:
        import torch
        from torch.utils.data import DataLoader

        loader: DataLoader[PackedBatch] = DataLoader(
            _Packing(dataset),  # type: ignore[arg-type]
            batch_size=None,
            sampler=keys,  # type: ignore[arg-type]
            num_workers=self.workers,
            prefetch_factor=_PREFETCH,
            worker_init_fn=prepare_worker,
            generator=torch.Generator().manual_seed(0),
            multiprocessing_context=_worker_context(self._start_method),
            pin_memory=self._pin_memory,
        )
        with _children_watched(()):
            iterator = iter(loader)
        workers = getattr(iterator, "_workers", ())
        try:
            while True:
                with _children_watched(workers):
                    packed = next(iterator, None)
                if packed is None:
                    return
                yield packed if isinstance(packed, Batch) else packed.unpack()
        finally:
            _end_workers(iterator)


class PackedBatch:
    """A batch on its way from a worker, its small tensors as arrays.

    Torch hands every tensor over through a socket and a shared file, half a millisecond each, in the main process;
    small ones travel faster inside the pickled message.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch._map(lambda tensor: tensor.numpy() if tensor.nbytes <= _SMALL else tensor)

    def unpack(self) -> Batch:
        """Return the batch with tensors only."""
        import torch

        return self._batch._map(lambda value: value if isinstance(value, torch.Tensor) else torch.from_numpy(value))

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory; called by the loader's pinning thread."""
        return self.unpack().pin_memory()


class _Packing:
    """The data set as loader workers see it."""

    def __init__(self, dataset: BatchDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, key: BatchKey) -> PackedBatch:
        return PackedBatch(self._dataset[key])


class WorkerDied(RuntimeError):
    """A loader process is gone; the batches that it owed can be had from others."""


@contextmanager
def _children_watched(workers: Sequence[Any]) -> Iterator[None]:
    """Raise `WorkerDied` when one of `workers` is dead or dies inside the block, and never outside it.

    Torch installs a handler of SIGCHLD that raises anywhere, even in the middle of an optimizer step; this one takes
    its place while a batch is waited for, and the previous one comes back afterwards. It is needed: a worker killed
    half way through a message leaves the reader waiting for the rest.
    """
    number = getattr(signal, "SIGCHLD", None)
    if threading.current_thread() is not threading.main_thread():
        number = None
    before = None if number is None else signal.signal(number, lambda *_: _check(workers))
    try:
        _check(workers)
        yield
    except _BROKEN_PIPES as error:
        # What the dead worker held (a shared tensor, half a message) fails in many ways.
        for _ in range(_DEATH_POLLS):
            _check(workers, error)
            time.sleep(0.02)
        raise
    finally:
        if number is not None:
            signal.signal(number, before if before is not None else signal.SIG_DFL)


def _check(workers: Sequence[Any], cause: BaseException | None = None) -> None:
    dead = [str(worker.pid) for worker in workers if worker.exitcode not in (None, 0)]
    if dead:
        raise WorkerDied(f"process {', '.join(dead)} exited unexpectedly") from cause


class SharedFlag:
    """A `multiprocessing.Event` that can be set and looked at, and has no lock.

    Torch asks workers to finish through an event, which they look at between batches. A worker that is killed in the
    middle of that would keep the event's lock, and the main process would wait for it for ever.
    """

    def __init__(self, context: BaseContext) -> None:
        self._value = context.RawValue(ctypes.c_bool, False)

    def is_set(self) -> bool:
        """Return whether `set` was called in any process."""
        return bool(self._value.value)

    def set(self) -> None:
        """Make it true for all processes."""
        self._value.value = True


def _worker_context(start_method: str | None) -> BaseContext:
    """Return the context of a start method (None: the platform's usual one), its events without locks."""
    kind = type(multiprocessing.get_context(start_method or multiprocessing.get_start_method()))
    return type("WorkerContext", (kind,), {"Event": lambda self: SharedFlag(self)})()  # type: ignore[no-any-return]


def _end_workers(iterator: Any) -> None:
    """End the workers of torch's iterator: politely, or at once where one of them is dead.

    A worker that was killed may have taken the lock of the common queue along. The others would wait for it until they
    are killed too; nobody is interested in what they still hold.
    """
    workers = getattr(iterator, "_workers", ())
    if all(worker.exitcode in (None, 0) for worker in workers):
        iterator._shutdown_workers()
        return
    iterator._shutdown = True
    if hasattr(iterator, "_pin_memory_thread_done_event"):
        iterator._pin_memory_thread_done_event.set()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    for queue in (iterator._worker_result_queue, *iterator._index_queues):
        queue.cancel_join_thread()
    if iterator._worker_pids_set:
        import torch

        torch._C._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False


def prepare_worker(_worker_id: int) -> None:
    """Set up a loader process: no threads of its own, and signals are the main process's business."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGTERM", "SIGUSR1"):
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, _outlive_parent if name == "SIGTERM" else signal.SIG_IGN)


def _outlive_parent(_number: int, _frame: Any) -> None:
    """SIGTERM usually goes to the whole process group: stay until the main process has finished its update."""
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_GRACE_SECONDS)
    else:
        raise SystemExit(143)


def worker_count(loader: LoaderOptions, *, cached: bool) -> int:
    """Return the number of loader processes: at most one per core, and one is enough to read cached latents."""
    wanted = min(loader.max_data_loader_n_workers, available_cores())
    return min(wanted, 1) if cached else wanted


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def validation_batches(
    data: TrainingData, seed: int, *, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterator[Batch]:
    """Yield the validation batches of one rank: always the same, unshuffled, without anything random, in this process.

    Args:
        data: the validation part, `TrainingData.validation`.
        seed: of the run, for captions with wildcards.
        rank: of this process.
        world_size: number of processes; batch i belongs to rank i modulo `world_size`.
        limit: most batches over all ranks.
    """
    plan = data.planner.in_table_order()
    dataset = data.dataset(seed, 0)
    count = len(plan) if limit is None else min(limit, len(plan))
    for index in range(rank, count, world_size):
        positions, rows = plan.batch(index)
        samples = tuple(SampleKey(row, 0, position, 0) for row, position in zip(rows, positions, strict=True))
        yield dataset[BatchKey(StepKey(0, index), 0, index, True, index + 1 == count, 1.0, samples)]
