"""Progress bar, loss averages and curves. Values come as tensors and are read one update later, in one copy."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from library.training.events import EventWriter, RunPlace, Wandb, choose_place, open_writers
from library.training.scalars import DeferredScalars, LossAverage, learning_rates, peak_memory_mb

if TYPE_CHECKING:
    from library.contracts import Position, RunLength
    from library.training.options import LogOptions
    from library.training.sampling import SampledImage
    from library.training.scalars import Histogram, Scalar

__all__ = ["LossAverage", "Tracker", "learning_rates", "peak_memory_mb"]

_log = logging.getLogger(__name__)


class Tracker:
    """Follows one run. Only the main process shows and writes anything; others may call all methods.

    Used as a context: entering opens the writers, leaving brings everything to disk.
    """

    def __init__(
        self,
        log: LogOptions,
        *,
        length: RunLength,
        default_name: str = "dreambooth",
        is_main: bool = True,
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        """Create a tracker.

        Args:
            log: the options.
            length: of the run.
            default_name: tracker name of the script, used without `--log_tracker_name`.
            is_main: whether this process is rank 0.
            hparams: options without secrets and paths, stored with `--log_config`.
        """
        self.loss_average = LossAverage()
        self._log_options = log
        self._length = length
        self._default_name = default_name
        self._is_main = is_main
        self._hparams = hparams
        self._resumed: Mapping[str, Any] = {}
        self._start = 0
        self._place: RunPlace | None = None
        self._writers: list[EventWriter] = []
        self._scalars = DeferredScalars()
        self._bar: Any = None
        self._moment = time.perf_counter()

    def resume(self, state: Mapping[str, Any], loss_average: Mapping[str, Any], step: int) -> None:
        """Continue the curves of a saved run; call it before entering."""
        self._resumed, self._start = state, step
        self.loss_average.load_state_dict(loss_average)

    def state_dict(self) -> dict[str, Any]:
        """Return what continues the curves later. Reads what is pending, so that the loss average is up to date."""
        self.flush()
        if self._place is None:
            return dict(self._resumed)
        ids = [writer.run_id for writer in self._writers if isinstance(writer, Wandb)]
        return {"folder": self._place.folder, "wandb_id": ids[0] if ids else self._place.wandb_id}

    def __enter__(self) -> Tracker:
        if self._is_main:
            from tqdm.auto import tqdm

            self._place = choose_place(self._log_options, self._default_name, self._resumed, self._start)
            self._writers = open_writers(self._log_options, self._place, self._hparams)
            self._bar = tqdm(
                total=self._length.total_steps, initial=self._start, desc="steps", smoothing=0, dynamic_ncols=True
            )
        self._moment = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._is_main:
            return
        if kind is None or issubclass(kind, Exception):
            self.flush()
        for writer in list(self._writers):
            self._try(writer, writer.close)
        self._writers.clear()
        self._bar.close()

    def update(
        self, position: Position, values: Mapping[str, Scalar], *, images: int = 0, epoch_ended: bool = False
    ) -> None:
        """Take the values of one update; those of the update before are read and written now.

        Args:
            position: after the update.
            values: `loss` (one element, of this update) and whatever else is to be drawn: `lr/...`, `grad_norm`.
            images: number of images in the update, over all ranks.
            epoch_ended: whether the update was the last of its epoch.
        """
        if not self._is_main:
            return
        now = time.perf_counter()
        rate = {"images_per_second": images / max(now - self._moment, 1e-9)} if images else {}
        self._moment = now
        self._scalars.push((position, epoch_ended), {**values, **rate})
        for (where, ended), found in self._scalars.ready():
            self._show(where, found, epoch_ended=ended)

    def flush(self) -> None:
        """Read and write everything that is pending; waits for the device."""
        for (where, ended), found in self._scalars.drain():
            self._show(where, found, epoch_ended=ended)

    def pause(self) -> None:
        """Leave the time since the last update out of the speed: samples or saves were made."""
        self._moment = time.perf_counter()

    def write(self, scalars: Mapping[str, float], step: int, *, epoch: int | None = None) -> None:
        """Write other scalars at once, such as those of a validation."""
        for writer in list(self._writers):
            self._try(writer, partial(writer.write, scalars, step, epoch=epoch))

    def write_histograms(self, make: Callable[[], Mapping[str, Histogram]], step: int) -> None:
        """Write distributions, after all scalars up to here; what waits for the device is done only if anyone looks."""
        histograms = make() if self._writers else {}
        if histograms:
            self.flush()
        for name, histogram in histograms.items():
            for writer in list(self._writers):
                self._try(writer, partial(writer.histogram, name, histogram, step))

    def add_pictures(self, pictures: Iterable[Sequence[SampledImage]]) -> None:
        """Show sample pictures, given as one list per rank, in the order of their prompts."""
        everything = [picture for of_rank in pictures for picture in of_rank]
        self.flush()
        for picture in sorted(everything, key=lambda picture: picture.index):
            for writer in list(self._writers):
                self._try(
                    writer, partial(writer.picture, picture.tag, picture.image, picture.step, picture.request.prompt)
                )

    def _show(self, position: Position, values: dict[str, float], *, epoch_ended: bool) -> None:
        loss = values.get("loss", math.nan)
        # The last update of an epoch leads to update 0 of the next one.
        self.loss_average.add((position.update_in_epoch or self._length.updates_per_epoch) - 1, loss)
        average = self.loss_average.average
        if position.step % self._log_options.log_every_n_steps == 0:
            further = self._log_options.further_names(values, position.step)
            self.write({**values, "loss/current": loss, "loss/average": average, **further}, position.step)
        if epoch_ended:
            # Scripts of this kind have two names for it; whoever looks for either finds it.
            averages = {"loss/epoch": average, "loss/epoch_average": average}
            self.write(averages, position.step, epoch=position.epoch)
        if self._bar is not None:
            self._bar.set_postfix(avr_loss=average, refresh=False)
            self._bar.update(1)

    def _try(self, writer: EventWriter, action: Callable[[], object]) -> None:
        """Call `action`; a writer that fails (full disk, no network) is dropped with a warning."""
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a tracker must never end a training run
            self._writers = [other for other in self._writers if other is not writer]
            _log.warning("%s failed (%s) and is switched off; training goes on", type(writer).__name__, error)
