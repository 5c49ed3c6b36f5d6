"""The loss on images kept apart from training: at fixed timesteps, with fixed noise, so that runs can be compared.

The noise of an image follows from the validation seed and the image's name. So two runs whose `--validation_seed` and
images agree are judged alike, whatever their own seeds, batch sizes and numbers of processes are.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from library.data.loader import validation_batches
from library.draws import ImageDraws
from library.randomness import derive

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.training.options_progress import ValidationOptions
    from library.training.run import Run
    from library.training.step import TrainStep

logger = logging.getLogger(__name__)

TIMESTEPS = 4
"""Each image is judged at this many timesteps, spread evenly: 200, 400, 600 and 800 unless the range is limited."""


class Validator:
    """Computes the validation loss. Every rank takes its share of the batches; all learn the mean."""

    def __init__(self, run: Run, data: TrainingData, options: ValidationOptions) -> None:
        """Prepare.

        Args:
            run: processes, device and the seed of the noise where the data sets name none.
            data: of the run; its validation part is used.
            options: when to validate, and on how many batches at most, over all ranks.
        """
        self._run = run
        self._data = data.validation
        self._options = options
        seeds = [spec.validation_seed for spec in data.specs if spec.validation_seed is not None]
        self._seed = seeds[0] if seeds else run.seed
        if self._data is None and run.is_main:
            _warn_of_nothing(data, options)

    def due(self, step: int, epoch: int, *, epoch_ended: bool) -> tuple[str, ...]:
        """Return what the validation loss is wanted for: the update ("step"), the epoch ("epoch"), both or nothing.

        Args:
            step: updates done.
            epoch: the epoch (1 is the first) that the last of them belongs to.
            epoch_ended: whether that was its last update, or the last of the run.
        """
        if self._data is None:
            return ()
        every_step, every_epoch = self._options.validate_every_n_steps, self._options.validate_every_n_epochs or 1
        found = ("step",) if every_step and step % every_step == 0 else ()
        return (*found, "epoch") if epoch_ended and epoch % every_epoch == 0 else found

    @torch.no_grad()
    def loss(self, step: TrainStep) -> float:
        """Return the mean loss over images and timesteps; a collective call, in evaluation mode.

        Args:
            step: the training step, unwrapped.
        """
        if self._data is None:
            raise ValueError("there are no validation images")
        run = self._run
        # A module of somebody else's may draw in evaluation mode too; around this, the generators are set back.
        torch.manual_seed(derive(self._seed, "val"))
        total = torch.zeros(2, dtype=torch.float64, device=run.device if run.device.type == "cuda" else "cpu")
        limit = self._options.max_validation_steps
        timesteps = step.validation_timesteps(TIMESTEPS)
        for found in validation_batches(self._data, self._seed, rank=run.rank, world_size=run.world_size, limit=limit):
            batch = found.to(run.device)
            draws = [
                ImageDraws(self._seed, batch.record_keys, number, run.device, "val") for number in range(TIMESTEPS)
            ]
            batch = replace(batch, latents=step.latents(batch, draws[0]))
            for drawn, timestep in zip(draws, timesteps, strict=True):
                losses, noised = step.losses(batch, drawn, timestep)
                total[0] += (losses * noised.weight).sum()
                total[1] += batch.size
        summed, count = run.sum(total).tolist()
        return summed / max(count, 1.0)


def _warn_of_nothing(data: TrainingData, options: ValidationOptions) -> None:
    """Say so when validation was asked for, but no image was kept apart."""
    shares = [subset.validation_split for spec in data.specs for subset in spec.subsets if not subset.is_reg]
    if any(shares):
        logger.warning("no validation: %g of so few images is not a single one", max(shares))
    elif options.validate_every_n_steps or options.validate_every_n_epochs or options.max_validation_steps:
        logger.warning("no validation: no data set has a validation_split")
