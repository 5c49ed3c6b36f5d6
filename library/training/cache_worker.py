"""How caches are filled: inputs are prepared, encoded and stored at the same time, split over the ranks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from tqdm import tqdm

from library.errors import UserError

if TYPE_CHECKING:
    from library.training.processes import Processes

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
        run: Processes,
        *,
        what: str,
        prepare: Callable[[Item], Given],
        encode: Callable[[Sequence[Given]], Sequence[Callable[[], None]]],
        failed: Callable[[UserError], None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            run: processes and signals.
            what: is being done, for progress bar and messages.
            prepare: makes the input of one item; called in threads.
            encode: called here with the inputs of a batch; returns what stores the results, called in a thread.
            failed: takes the errors of single items, which are left out; None: the first one ends the work.
        """
        self._run, self._what, self._prepare, self._encode, self._failed = run, what, prepare, encode, failed
        self._threads = max(1, min(8, (os.cpu_count() or 1) // run.local_world_size))

    def fill(self, plan: CachePlan[Item], batch_size: int) -> None:
        """Do this rank's share of `plan` and wait for the others. A collective call.

        Raises:
            UserError: an item cannot be prepared or stored, and nobody takes such errors.
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
            for items, futures in self._read_ahead(readers, batches):
                inputs = self._results(futures)
                self._run.stop.check(self._what)
                if inputs:
                    writing.extend(writer.submit(store) for store in self._encode(inputs))
                while len(writing) > 4 * len(items):
                    self._results([writing.popleft()])
                bar.update(len(items))
            self._results(writing)

    def _results(self, futures: Iterable[Future[Any]]) -> list[Any]:
        """Wait, and return what came out, without what failed and may be left out."""
        found = []
        for future in futures:
            try:
                found.append(future.result())
            except UserError as error:
                if self._failed is None:
                    raise
                self._failed(error)
        return found

    def _read_ahead(
        self, pool: ThreadPoolExecutor, batches: list[list[Item]]
    ) -> Iterator[tuple[list[Item], list[Future[Given]]]]:
        """Yield each batch and its inputs to be while the next ones are being prepared."""
        ahead: deque[tuple[list[Item], list[Future[Given]]]] = deque()
        for items in batches:
            ahead.append((items, [pool.submit(self._prepare, item) for item in items]))
            if len(ahead) >= _READ_AHEAD:
                yield ahead.popleft()
        yield from ahead
