"""How caches are filled: inputs are prepared, encoded and stored at the same time, split over the ranks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from library.training.run import Run

Item = TypeVar("Item")
Given = TypeVar("Given")

_READ_AHEAD = 3


class CachePlan(Protocol[Item]):
    """What must be encoded, in batches, split over ranks; what is kept in memory is split within each node."""

    def batches(
        self, batch_size: int, *, rank: int = 0, world_size: int = 1, in_memory: bool = False
    ) -> Iterator[list[Item]]:
        """Yield the batches of one rank."""


class CacheWorker(Generic[Item, Given]):
    """Keeps an encoder busy: threads prepare the next batches, and another one stores the finished ones."""

    def __init__(
        self,
        run: Run,
        *,
        what: str,
        prepare: Callable[[Item], Given],
        encode: Callable[[Sequence[Given]], Sequence[Callable[[], None]]],
    ) -> None:
        """Prepare.

        Args:
            run: processes and signals.
            what: is being done, for progress bar and messages.
            prepare: makes the input of one item; called in threads.
            encode: called here with the inputs of a batch; returns what stores the results, called in a thread.
        """
        self._run, self._what, self._prepare, self._encode = run, what, prepare, encode
        self._threads = max(1, min(8, (os.cpu_count() or 1) // run.local_world_size))

    def fill(self, plan: CachePlan[Item], batch_size: int) -> None:
        """Do this rank's share of `plan` and wait for the others. A collective call.

        Raises:
            StopTraining: a signal arrived; finished entries count at the next start.
        """
        run = self._run
        shares = ((run.rank, run.world_size, False), (run.local_rank, run.local_world_size, True))
        for rank, world_size, in_memory in shares:
            self._work(list(plan.batches(batch_size, rank=rank, world_size=world_size, in_memory=in_memory)))
        run.barrier()

    def _work(self, batches: list[list[Item]]) -> None:
        if not batches:
            return
        writing: deque[Future[None]] = deque()
        with (
            ThreadPoolExecutor(self._threads, "prepare") as readers,
            ThreadPoolExecutor(1, "write") as writer,
            tqdm(total=sum(map(len, batches)), desc=self._what, disable=not self._run.is_main, leave=False) as bar,
        ):
            for inputs in self._read_ahead(readers, batches):
                self._run.stop.check(self._what)
                writing.extend(writer.submit(store) for store in self._encode(inputs))
                while len(writing) > 4 * len(inputs):
                    writing.popleft().result()
                bar.update(len(inputs))
            for future in writing:
                future.result()

    def _read_ahead(self, pool: ThreadPoolExecutor, batches: list[list[Item]]) -> Iterator[list[Given]]:
        """Yield the inputs of each batch while the next ones are being prepared."""
        ahead: deque[list[Future[Any]]] = deque()
        for items in batches:
            ahead.append([pool.submit(self._prepare, item) for item in items])
            if len(ahead) >= _READ_AHEAD:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
