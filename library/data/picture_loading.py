"""Preparing pictures ahead of the model that looks at them: in a thread, or in processes of their own.

Processes are started afresh (spawned), so they import what prepares a picture and nothing else: neither torch nor the
model. One that dies, most often because memory ran out, is replaced, and the picture that ended it is named.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Generic, TypeVar

from library.data.images import BadImage
from library.errors import UserError
from library.signals import worker_signals

Prepared = TypeVar("Prepared")

_MOST_DEATHS = 5


@dataclass(frozen=True, slots=True)
class Unusable:
    """Stands for what could not be made of a picture. Exceptions with arguments of their own cannot travel."""

    reason: str


def reason_of(error: BaseException) -> str:
    """Return why a picture cannot be used, without its path, which stands beside it wherever this is shown."""
    if isinstance(error, BadImage):
        return error.reason
    if isinstance(error, UserError):
        problem = error.problems[0]
        return f"{problem.what.rstrip('.')}. {problem.hint}".strip(". ")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "does not fit into memory"
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class PictureLoading(Generic[Prepared]):
    """Yields prepared pictures in order while the next ones are being prepared."""

    def __init__(self, prepare: Callable[[Path], Prepared], *, workers: int, ahead: int) -> None:
        """Prepare; nothing is started before the first picture is asked for.

        Args:
            prepare: makes the input of one picture; importable by its name when `workers` is not 0.
            workers: number of processes; 0 loads in a thread of this process.
            ahead: number of pictures that may wait.
        """
        self._prepare, self._workers, self._ahead = prepare, workers, max(ahead, 1)
        self._pool: Executor | None = None
        self._broken = False
        self._deaths = 0
        self._closed = False

    def iterate(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Prepared | Unusable]]:
        """Yield each path with what was made of it; ends early after `close`.

        Raises:
            UserError: worker processes die again and again.
        """
        waiting: deque[tuple[Path, Future[Prepared | Unusable] | None]] = deque()
        with suppress(CancelledError):
            for path in paths:
                waiting.append((path, self._submit(path)))
                # After the death of a process whatever waits is settled first, one by one.
                while waiting and (self._broken or len(waiting) > self._ahead):
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)

    def close(self) -> None:
        """Stop; pictures that are being decoded at this moment are waited for."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, path: Path) -> Future[Prepared | Unusable] | None:
        """Return the future of a picture, None when the processes turn out to be dead."""
        if self._closed:
            raise CancelledError
        try:
            return self._running().submit(_prepared, self._prepare, path)
        except BrokenExecutor:
            self._broken = True
            return None
        except (RuntimeError, OSError) as error:
            if self._closed:  # shut down between the lines above
                raise CancelledError from error
            hint = "Processes or memory are probably short: use fewer workers (--max_data_loader_n_workers), or 0."
            raise UserError(f"cannot be started ({error})", hint, where="loader workers") from error

    def _next(
        self, waiting: deque[tuple[Path, Future[Prepared | Unusable] | None]]
    ) -> tuple[Path, Prepared | Unusable]:
        path, future = waiting.popleft()
        made: Prepared | Unusable | None = None
        try:
            made = None if future is None else future.result()
        except BrokenExecutor:
            self._broken = True
        if future is None or made is None:
            made = self._alone(path)
        if not waiting:
            self._broken = False
        return path, made

    def _alone(self, path: Path) -> Prepared | Unusable:
        """Prepare a picture while nothing else is, so that it is known whose fault a dead process is."""
        for _ in range(2):
            future = self._submit(path)
            try:
                if future is not None:
                    made = future.result()
                    self._deaths = 0
                    return made
            except BrokenExecutor:
                self._discard()
                break
            # The processes had died before this picture met them.
            self._discard()
        self._deaths += 1
        if self._deaths >= _MOST_DEATHS:
            raise UserError(
                f"{_MOST_DEATHS} pictures in a row ended the process that loaded them, {path} the last one",
                "Memory is probably short: use fewer workers (--max_data_loader_n_workers), or 0.",
                where="loader workers",
            )
        return Unusable("ended the process that loaded it; is it larger than the memory allows?")

    def _running(self) -> Executor:
        if self._pool is None:
            if self._workers:
                self._pool = ProcessPoolExecutor(self._workers, get_context("spawn"), initializer=_start_worker)
            else:
                self._pool = ThreadPoolExecutor(1, "pictures")
        return self._pool

    def _discard(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _prepared(prepare: Callable[[Path], Prepared], path: Path) -> Prepared | Unusable:
    """Call `prepare`; what a bad picture raises becomes its reason."""
    try:
        return prepare(path)
    except Exception as error:  # noqa: BLE001 - a bad picture may upset anything, and must not end the run
        return Unusable(reason_of(error))


def _start_worker() -> None:
    """Set up a loader process: Ctrl-C is not its business, and it does not outlive the process that started it."""
    worker_signals()
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
