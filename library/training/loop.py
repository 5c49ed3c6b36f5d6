"""The only training loop: updates made of micro-batches, and what happens between two updates."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from library.contracts import Position
from library.errors import StopTraining
from library.files import fault_point
from library.randomness import derive
from library.training.setup import Training, set_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from library.contracts import Batch
    from library.data.dataset import TrainingData
    from library.inference.render import DiffusionRenderer
    from library.models.family import ModelFamily
    from library.training.methods.base import Method
    from library.training.options import TrainingOptions
    from library.training.run import Run

logger = logging.getLogger(__name__)


def fit(
    run: Run,
    family: ModelFamily,
    method: Method,
    data: TrainingData,
    opts: TrainingOptions,
    *,
    renderer: DiffusionRenderer,
) -> None:
    """Train until the run's length is reached, a signal arrives, or training diverges.

    Raises:
        StopTraining: with exit status 130/143 after a signal, 5 when training diverged, 4 when saving failed.
    """
    training = set_up(run, family, method, data, opts, renderer=renderer)
    with training.tracker:
        Loop(run, training).train()


class Loop:
    """Runs updates; holds the position and nothing else that is not in `Training`."""

    def __init__(self, run: Run, training: Training) -> None:
        self.run = run
        self.training = training
        self.position: Position = training.position
        self.half_way = False
        """True between the start and the end of an optimizer step, when the weights fit no position."""

    def train(self) -> None:
        """Run all updates, then the final saves."""
        training, run = self.training, self.run
        if training.sampler.wants_first(self.position.step):
            self._sample()
        batches = training.loader.iterate(self.position)
        try:
            while self.position.step < training.length.total_steps:
                self._update(batches)
                self._between_updates()
        except StopTraining:
            raise
        except BaseException as error:
            self._rescue(error)
            raise
        finally:
            training.loader.close()
        run.barrier()
        self._finish()

    def _update(self, batches: Iterator[Batch]) -> None:
        """One optimizer update: K micro-batches over all ranks, then the step."""
        training, run = self.training, self.run
        if training.method.enter_step(self.position.step):
            training.rewrap(run)
        images, losses = 0, []
        while True:
            batch = next(batches)
            if run.device.type != "cpu":
                batch = batch.to(run.device)
            losses.append(self._micro_step(batch))
            images += batch.size if batch.key.share else 0
            training.tracker.count_replaced(batch.replaced)
            if batch.key.last_in_update:
                break
        fault_point("step.optimizer_mid")
        self.half_way = True
        outcome = training.stepper.step()
        training.lr_schedule.step()
        training.zero_grad()
        training.objective.after_update(run.reduce)
        training.method.after_update(self.position.step)
        self.half_way = False
        self.position = self.position.advance(training.length)
        training.record_update(run, self.position, losses, outcome, images)
        fault_point("step.after")

    def _micro_step(self, batch: Batch) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its mean unweighted loss, on the device."""
        training, run = self.training, self.run
        key = batch.key
        if training.method.uses_global_randomness:
            torch.manual_seed(derive(run.seed, "net", key.step_key.step, key.step_key.micro))
        fault_point("step.forward")
        held_back = nullcontext() if key.last_in_update or run.world_size == 1 else training.module.no_sync()
        with held_back:
            loss, per_sample = training.module(batch)
            fault_point("step.backward")
            training.stepper.backward(loss)
        return per_sample.mean() * key.share

    def _between_updates(self) -> None:
        """Track, stop, sample, save: in this order, after every update."""
        training, run = self.training, self.run
        step, epoch_ended = self.position.step, self.position.update_in_epoch == 0
        training.tracker.after_update(self.position, epoch_ended)
        wish = training.stop_wish(run)
        if wish.save_now:
            self._save_state_now("signal")
        if wish.signal is not None:
            self._stop(wish.signal)
        finished = step >= training.length.total_steps
        if training.sampler.due(step, self.position.epoch, epoch_ended):
            self._sample()
        if not finished:
            training.saver.after_update(self.position, epoch_ended)
