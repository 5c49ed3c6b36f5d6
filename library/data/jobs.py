"""What tools share that look at every picture of a folder with a model: which pictures, batches, failures, summary.

Three things go on at the same time: pictures are prepared ahead, the model works, and results are written. A picture
that cannot be used is named at the end and does not stop the others. What is written at any moment is complete, so a
run that was stopped is continued by running it again and skipping what exists.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from library.data.bad_files import BadFile, printable
from library.data.folder_listing import list_folder, same_stems
from library.data.images import BadImage
from library.data.picture_loading import PictureLoading, Unusable, reason_of
from library.errors import StopTraining, UserError
from library.log import summary
from library.signals import StopFlag

_log = logging.getLogger(__name__)

Prepared = TypeVar("Prepared")
Result = TypeVar("Result")

_LISTED = 1000
_HOPELESS = 10
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class PictureJob(Generic[Prepared, Result]):
    """What is done with every picture.

    Attributes:
        title: of the progress bar, such as "captioning".
        prepare: makes the input of one picture. Runs in loader processes: a function or an object of an importable
            module, of which everything can be pickled. It raises `UserError` (`BadImage`) or `OSError` for a bad one.
        work: the model, called here with paths and inputs of a batch; returns one result for each. A failing batch is
            tried again picture by picture, and whatever a single picture raises counts against this picture, except
            `UserError` and `StopTraining`, which end the run.
        finish: takes the result of one picture, usually to write it; called in order, in one other thread. It raises
            `UserError` where this picture alone fails.
        gather: makes one thing of the inputs of a batch, which `work` then gets; called in another thread while the
            model works.
    """

    title: str
    prepare: Callable[[Path], Prepared]
    work: Callable[[list[Path], Any], Sequence[Result]]
    finish: Callable[[Path, Result], None]
    gather: Callable[[list[Prepared]], Any] = list


@dataclass
class JobReport:
    """How a job went. `busy_seconds` is the time that the model worked, `seconds` the whole time."""

    title: str
    done: int = 0
    skipped: int = 0
    failed: list[BadFile] = field(default_factory=list)
    seconds: float = 0.0
    busy_seconds: float = 0.0

    def close(self) -> None:
        """Log the summary with every picture that failed.

        Raises:
            UserError: nothing at all could be done.
        """
        parts = [f"{self.done} pictures done"]
        if self.skipped:
            parts.append(f"{self.skipped} skipped because their result exists")
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        speed = f"; {self.done / self.seconds:.1f} pictures per second" if self.done and self.seconds else ""
        _log.info("%s: %s%s", self.title, ", ".join(parts), speed)
        if not self.failed:
            return
        summary.skip("pictures that failed", len(self.failed))
        lines = [str(bad) for bad in self.failed[:_LISTED]]
        if len(self.failed) > _LISTED:
            lines.append(f"and {len(self.failed) - _LISTED} more")
        if not self.done and not self.skipped:
            first = self.failed[0]
            what = f"none of {len(self.failed)} pictures could be used; {printable(first.path)}: {first.reason}"
            if len(lines) > 1:
                _log.warning("failed:\n%s", "\n".join(lines))
            raise UserError(what, first.hint, where=self.title)
        _log.warning("failed:\n%s", "\n".join(lines))


def find_pictures(folder: Path, *, recursive: bool | None) -> list[Path]:
    """Return the pictures in `folder`, sorted folder by folder, spelled as `folder` is.

    Hidden files and folders are left out. Links to folders are followed, each folder once.

    Args:
        folder: which one.
        recursive: look into its sub-folders, too; None: the tool has no option for that.

    Raises:
        UserError: the folder is missing, cannot be read, or holds no picture.
    """
    where = printable(str(folder))
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(what, f"Looked for {printable(str(folder.absolute()))}.", where=where)
    found: list[Path] = []
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        real = os.path.realpath(current)
        if real in seen:
            continue
        seen.add(real)
        try:
            listing = list_folder(str(current))
        except OSError as error:
            if current == folder:
                raise UserError(error.strerror or str(error), where=where) from error
            _log.warning("%s: cannot be listed: %s", printable(str(current)), error.strerror or error)
            continue
        _warn_same_stems(current, listing.images)
        # Broken links and pipes are kept: they are reported as bad pictures.
        names = [*listing.images, *(os.path.basename(bad.path) for bad in listing.bad)]  # noqa: PTH119
        found += [path for name in sorted(names) if not (path := current / name).is_dir()]
        if recursive:
            waiting += sorted((item for item in current.iterdir() if _is_folder(item)), reverse=True)
    if not found:
        hint = "Give --recursive to look into its sub-folders, too." if recursive is False else ""
        raise UserError("holds no pictures", hint, where=where)
    return found


def _is_folder(path: Path) -> bool:
    return not path.name.startswith(".") and path.is_dir()


def _warn_same_stems(folder: Path, names: Sequence[str]) -> None:
    same = same_stems(names)
    if same:
        second, first = next(iter(same.items()))
        _log.warning(
            "%s: %d pictures share the name of another one up to the suffix, and with it its captions (%s and %s)",
            printable(str(folder)),
            len(same),
            printable(first),
            printable(second),
        )


def run_pictures(
    paths: Sequence[Path],
    job: PictureJob[Prepared, Result],
    *,
    batch_size: int = 1,
    workers: int | None = None,
    skip: Callable[[Path], bool] | None = None,
) -> JobReport:
    """Do `job` for all pictures, in order.

    Args:
        paths: of the pictures.
        job: what to do.
        batch_size: most pictures that the model gets at once.
        workers: number of loader processes (at most one for each core); None or 0: a thread of this process.
        skip: tells which pictures are done already.

    Returns:
        What was done. Call its `close` when nothing else is left to do.

    Raises:
        UserError: the model or the workers cannot work at all.
        StopTraining: a signal arrived, or a result could not be saved.
    """
    report = JobReport(job.title)
    todo = [path for path in paths if skip is None or not skip(path)]
    report.skipped = len(paths) - len(todo)
    begin = time.perf_counter()
    try:
        with StopFlag(watch_parent=False, announce=False):
            if todo:
                _Run(job, report, max(batch_size, 1)).do(todo, _processes(workers))
    except SystemExit as stopped:
        left = len(todo) - report.done - len(report.failed)
        reason = f"stopped while {job.title}: {report.done} pictures are done, {left} are left"
        raise StopTraining(reason, stopped.code if isinstance(stopped.code, int) else 1) from stopped
    finally:
        report.seconds = time.perf_counter() - begin
    order = {str(path): index for index, path in enumerate(todo)} if report.failed else {}
    report.failed.sort(key=lambda bad: order[bad.path])
    return report


def _processes(workers: int | None) -> int:
    if not workers:
        return 0
    from library.data.loader import available_cores

    return min(workers, available_cores())


class _Run(Generic[Prepared, Result]):
    """One run of a job."""

    def __init__(self, job: PictureJob[Prepared, Result], report: JobReport, batch_size: int) -> None:
        self._job, self._report, self._batch_size = job, report, batch_size
        self._writing: deque[tuple[Path, Future[None]]] = deque()
        self._hopeless = 0

    def do(self, todo: Sequence[Path], workers: int) -> None:
        from tqdm import tqdm

        ahead = self._batch_size * _BATCHES_AHEAD + workers
        loading = PictureLoading(self._job.prepare, workers=workers, ahead=ahead)
        try:
            with (
                ThreadPoolExecutor(1, "gather") as gatherer,
                ThreadPoolExecutor(1, "finish") as self._writer,
                closing(loading),
                tqdm(total=len(todo), desc=self._job.title, unit="picture", leave=False) as bar,
            ):
                batches = self._batches(loading.iterate(todo))
                coming = gatherer.submit(next, batches, None)
                while (batch := coming.result()) is not None:
                    coming = gatherer.submit(next, batches, None)
                    self._do_batch(*batch)
                    self._collect(limit=4 * self._batch_size)
                    bar.update(self._report.done + len(self._report.failed) + len(self._writing) - bar.n)
        finally:
            # The threads have ended, so what was done before an interruption is counted, too.
            self._collect(limit=0)

    def _batches(
        self, loaded: Iterator[tuple[Path, Prepared | Unusable]]
    ) -> Iterator[tuple[list[Path], list[Prepared], Any]]:
        """Yield paths, inputs, and the inputs as one; in the thread that gathers."""
        paths: list[Path] = []
        inputs: list[Prepared] = []
        for path, made in loaded:
            if isinstance(made, Unusable):
                self._fail(path, made.reason)
                continue
            paths.append(path)
            inputs.append(made)
            if len(paths) == self._batch_size:
                yield paths, inputs, self._gathered(inputs)
                paths, inputs = [], []
        if paths:
            yield paths, inputs, self._gathered(inputs)

    def _gathered(self, inputs: list[Prepared]) -> Any:
        """Return the inputs as one, or the error, which belongs to the model's side."""
        try:
            return self._job.gather(inputs)
        except Exception as error:  # noqa: BLE001 - a picture may upset a processor in any way; it is tried alone
            return _Failure(error)

    def _do_batch(self, paths: list[Path], inputs: list[Prepared], gathered: Any) -> None:
        """Let the model look at a batch; when that fails, at each of its pictures."""
        try:
            results = self._results(paths, gathered)
        except (StopTraining, SystemExit, KeyboardInterrupt):
            raise
        except Exception as error:  # noqa: BLE001 - one bad picture must not end the run
            if isinstance(error, UserError) and not isinstance(error, BadImage):
                raise
            if len(paths) == 1:
                self._give_up(paths[0], error)
                return
            _log.warning("a batch failed and is tried picture by picture: %s", reason_of(error))
            for path, one in zip(paths, inputs, strict=True):
                self._do_batch([path], [one], self._gathered([one]))
            return
        self._hopeless = 0
        for path, result in zip(paths, results, strict=True):
            self._writing.append((path, self._writer.submit(self._job.finish, path, result)))

    def _results(self, paths: list[Path], gathered: Any) -> Sequence[Result]:
        if isinstance(gathered, _Failure):
            raise gathered.error
        begin = time.perf_counter()
        try:
            return self._job.work(paths, gathered)
        finally:
            self._report.busy_seconds += time.perf_counter() - begin

    def _give_up(self, path: Path, error: Exception) -> None:
        """Note a picture that the model fails at. When it fails at everything, that is no matter of pictures."""
        _log.debug("%s", path, exc_info=error)
        self._fail(path, reason_of(error))
        self._hopeless += not isinstance(error, BadImage)
        if self._hopeless >= _HOPELESS and not self._report.done and not self._writing:
            raise error

    def _fail(self, path: Path, reason: str) -> None:
        self._report.failed.append(BadFile(str(path), reason))

    def _collect(self, *, limit: int) -> None:
        """See what became of written results; wait until at most `limit` are under way.

        Raises:
            CannotSave: the disk is full, for example.
        """
        while self._writing and (len(self._writing) > limit or self._writing[0][1].done()):
            path, future = self._writing.popleft()
            try:
                future.result()
            except UserError as error:
                self._fail(path, reason_of(error))
            else:
                self._report.done += 1


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error on its way to the thread of the model."""

    error: Exception
