"""The only training loop: updates made of micro-batches, and what happens between two updates."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import torch

from library import log
from library.contracts import Batch, Position
from library.draws import seed_generators
from library.errors import StopTraining
from library.files import fault_point
from library.randomness import derive
from library.training.observers import observe
from library.training.save_names import EMA_SUFFIX
from library.training.setup import Training, make_sampler, make_saver, set_up
from library.training.tracking import learning_rates, peak_memory_mb
from library.training.validation import Validator

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.models.family import ModelFamily
    from library.training.methods.base import Method
    from library.training.options import TrainingOptions
    from library.training.run import Run
    from library.training.sampling import SampledImage

logger = logging.getLogger(__name__)

_HISTOGRAMS_EVERY = 100


def fit(run: Run, family: ModelFamily, method: Method, data: TrainingData, opts: TrainingOptions) -> None:
    """Train until the run's length is reached, a signal arrives, or training diverges.

    Raises:
        StopTraining: with exit status 130 or 143 after a signal, 5 when training diverged, 4 when saving failed.
    """
    training = set_up(run, family, method, data, opts)
    with run.stop.deferred(), training.tracker:
        Loop(run, training, data).train()


@contextmanager
def long_lived_objects() -> Iterator[None]:
    """Keep the garbage collector from walking through models and libraries, which live as long as the run."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Loop:
    """Runs updates. Holds the position in the run; everything else is in `Training`."""

    def __init__(self, run: Run, training: Training, data: TrainingData) -> None:
        self.run = run
        self.training = training
        self.position: Position = run.begin.position
        self.sampler = make_sampler(training)
        self.saver = make_saver(training, data, lambda: self.position)
        self.validator = Validator(run, data, run.opts.validation_options())
        self.waited = 0.0
        self.half_way = False
        """True between the start and the end of an optimizer step, when the weights belong to no position."""

    def train(self) -> None:
        """Run all updates, then the final saves."""
        total = self.training.length.total_steps
        log.summary.step = self.position.step
        if self.run.begin.stored is not None:
            log.summary.last_state = str(self.run.begin.stored.folder)
        if self.run.begin.finished:
            logger.info("nothing to do: all %d updates of this run are done", total)
        elif self.sampler.wants_first(self.position.step):
            self._sample()
        batches = self.training.loader.iterate(self.position)
        with closing(batches), long_lived_objects():
            try:
                while self.position.step < total:
                    self._update(batches)
                    self._between_updates()
            except StopTraining:
                raise
            except BaseException:
                self._rescue()
                raise
        self.training.tracker.flush()
        self.training.stepper.watch.flush()
        # A launcher that restarts a finished run again and again must not pile up copies of its last model.
        if not (self.run.begin.finished and self.saver.final_is_there()):
            self.saver.finish(self.position)
        self._summarise()
        if self.training.uploader is not None:
            self.training.uploader.close()

    def _update(self, batches: Iterator[Batch]) -> None:
        """One optimizer update: its micro-batches on this rank, then the step."""
        training = self.training
        if training.method.enter_step(self.position.step):
            training.wrap()
        images, losses = 0, []
        while True:
            batch = next(batches)
            if self.run.device.type != "cpu":
                batch = batch.to(self.run.device)
            losses.append(self._micro_step(batch))
            images += batch.size if batch.key.share else 0
            if batch.key.last_in_update:
                break
        self.half_way = True
        fault_point("step.optimizer_mid")
        outcome = training.stepper.step()
        training.method.see_gradients()
        training.stepper.zero_grad()
        training.lr_schedule.step()
        training.objective.after_update(self.run.sum)
        training.method.after_update(self.position.step)
        if training.average is not None:
            training.average.update(self.position.step + 1, outcome.skipped)
        in_update = training.length.batches_in_update(self.position.update_in_epoch)
        self.position = self.position.advance(training.length)
        self.half_way = False
        fault_point("step.after")
        self._track(torch.stack(losses).sum() / in_update, outcome.grad_norm, images)

    def _micro_step(self, batch: Batch) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its loss as trained (0 for padding), on the device."""
        training, key = self.training, batch.key
        if training.method.uses_global_randomness:
            seed_generators(derive(self.run.seed, "net", key.step_key.step, key.step_key.micro))
        training.method.before_micro_step(batch)
        fault_point("step.forward")
        with training.stepper.accumulating(training.module, last=key.last_in_update):
            loss, _ = training.module(batch)
            fault_point("step.backward")
            training.stepper.backward(loss)
        return loss.detach()

    def _track(self, loss: torch.Tensor, grad_norm: torch.Tensor, images: int) -> None:
        """Hand the update's numbers to the tracker, as tensors: nothing waits for the device."""
        training, world = self.training, self.run.world_size
        loss = self.run.sum(loss)
        values = {
            "loss": loss,
            "grad_norm": grad_norm,
            **learning_rates(training.rate_names, training.built.optimizer),
            **training.method.scalars(),
            **training.objective.scalars(),
            "data_wait_seconds": training.loader.wait_seconds - self.waited,
            "peak_memory_mb": peak_memory_mb(self.run.device),
        }
        self.waited = training.loader.wait_seconds
        ended = self.position.update_in_epoch == 0
        training.tracker.update(self.position, values, images=images * world, epoch_ended=ended)

    def _between_updates(self) -> None:
        """Stop, sample, save: in this order, after every update."""
        position, epoch_ended = self.position, self.position.update_in_epoch == 0
        log.summary.step = position.step
        ended = position.step == self.training.length.total_steps
        if self.run.is_main and (ended or position.step % _HISTOGRAMS_EVERY == 0):
            self.training.tracker.write_histograms(self.training.objective.histograms, position.step)
        if epoch_ended:
            fault_point("epoch.end")
        signum, save_now = self._wishes()
        if signum:
            self._stop(signum)
        if save_now:
            self.saver.save_state_now(position)
        if self.sampler.due(position.step, position.epoch, epoch_ended):
            self._sample()
        self.saver.after_update(position, epoch_ended=epoch_ended)
        self._note_state()
        epoch = position.epoch + (not epoch_ended)
        judged = self.validator.due(position.step, epoch, epoch_ended=epoch_ended or ended)
        if judged:
            self._validate(judged, epoch)

    def _wishes(self) -> tuple[int, bool]:
        """Return the signal that any rank received (0: none), and whether any was asked to save a state."""
        stop = self.run.stop
        signum, save = stop.requested or 0, stop.take_save_request()
        if self.run.world_size == 1:
            return signum, save
        wishes = torch.tensor([signum, int(save)], device=self.run.device)
        torch.distributed.all_reduce(wishes, op=torch.distributed.ReduceOp.MAX)
        signum, wanted = wishes.tolist()
        if signum:
            stop.request(signum)
        return int(signum), bool(wanted)

    def _stop(self, signum: int) -> None:
        """Save a state and end the run because of a signal."""
        name = signal.Signals(signum).name
        if self.run.opts.state.no_save_on_interrupt:
            raise self.run.stop.stop(f"stopped by {name} after update {self.position.step}; no state was saved")
        folder = self.saver.save_state_now(self.position, insist=True)
        self._note_state()
        if self.training.method.light:
            self.saver.save_interrupted(self.position)
        raise self.run.stop.stop(
            f"stopped by {name} after update {self.position.step} of {self.training.length.total_steps}. To go on, run "
            f"the same command with --resume={folder}"
        )

    def _sample(self) -> None:
        fault_point("sample.mid")
        pictures = self._pictures()
        if self.training.average is not None:
            # Before the weights are put together, of which each process averages its pieces.
            with self.training.average.applied():
                pictures += self._pictures(EMA_SUFFIX)
        self.training.tracker.add_pictures(self.run.ranks.gather(pictures))
        self.training.tracker.pause()

    def _pictures(self, ending: str = "") -> list[SampledImage]:
        """Make this rank's pictures; some ranks may have more of them, so that none may wait for another meanwhile."""
        with self.training.stepper.observing(), observe(self.training.method, self.training.built):
            return self.sampler.run(self.position.step, self.position.epoch, ending=ending)

    def _validate(self, judged: tuple[str, ...], epoch: int) -> None:
        """Measure the validation loss and write it down for all that is judged by it: the update, the epoch."""
        fault_point("val.mid")
        training = self.training
        with training.stepper.observing(), observe(training.method, training.built):
            loss = self.validator.loss(training.step)
        training.tracker.flush()
        average = training.tracker.loss_average.average
        for what in judged:
            scalars = {f"loss/validation/{what}_average": loss, f"loss/validation/{what}_divergence": loss - average}
            training.tracker.write(scalars, self.position.step, epoch=epoch if what == "epoch" else None)
        training.tracker.pause()
        logger.info("update %d: validation loss %.5f", self.position.step, loss)

    def _rescue(self) -> None:
        """Save the state of the last whole update when something unexpected ends the run."""
        if self.half_way or self.position == self.run.begin.position or self.run.world_size > 1:
            return
        logger.error("saving the state after update %d before the run ends with an error", self.position.step)
        try:
            self.training.stepper.zero_grad()
            self.saver.save_state_now(self.position)
            self._note_state()
        except StopTraining as error:
            logger.error("%s", error.reason)

    def _note_state(self) -> None:
        if self.saver.last_state is not None:
            log.summary.last_state = str(self.saver.last_state)

    def _summarise(self) -> None:
        self._note_state()
        if self.training.loader.replaced:
            log.summary.skip("images replaced during training", self.training.loader.replaced)
        for reason, count in sorted(self.training.loader.left_out.items()):
            log.summary.skip(f"streamed samples left out: {reason}", count)
        if self.sampler.failures:
            log.summary.skip("sample pictures that failed", self.sampler.failures)
        if self.saver.failures:
            log.summary.skip("saves that failed", len(self.saver.failures))
        logger.info("done: %s", self.saver.last_model or "no model was written")
