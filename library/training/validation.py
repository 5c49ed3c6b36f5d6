"""The loss on images kept apart from training: at fixed timesteps, with fixed noise, so that runs can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from library.contracts import StepKey
from library.data.loader import validation_batches
from library.draws import Draws

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.training.run import Run
    from library.training.step import TrainStep

TIMESTEPS = 4
"""Each image is judged at this many timesteps, spread evenly: 200, 400, 600 and 800 unless the range is limited."""


class Validator:
    """Computes the validation loss. Every rank takes its share of the batches; all learn the mean."""

    def __init__(
        self, run: Run, data: TrainingData | None, *, seed: int | None = None, limit: int | None = None
    ) -> None:
        """Prepare.

        Args:
            run: processes and device.
            data: the images kept apart, or None.
            seed: of the noise; None: the run's.
            limit: most batches over all ranks.
        """
        self._run = run
        self._data = data
        self._seed = run.seed if seed is None else seed
        self._limit = limit

    @property
    def wanted(self) -> bool:
        """Whether there is anything to validate on."""
        return self._data is not None

    @torch.no_grad()
    def loss(self, step: TrainStep) -> float:
        """Return the mean loss over images and timesteps; a collective call, in evaluation mode.

        Args:
            step: the training step, unwrapped.
        """
        if self._data is None:
            raise ValueError("there are no validation images")
        run = self._run
        total = torch.zeros(2, dtype=torch.float64, device=run.device if run.device.type == "cuda" else "cpu")
        batches = validation_batches(
            self._data, self._seed, rank=run.rank, world_size=run.world_size, limit=self._limit
        )
        for batch in batches:
            index = batch.key.step_key.micro
            for number, timestep in enumerate(step.validation_timesteps(TIMESTEPS)):
                draws = Draws(self._seed, StepKey(index, number), batch.size, run.device, stream="val")
                losses, noised = step.losses(batch.to(run.device), draws, timestep)
                total[0] += (losses * noised.weight).sum()
                total[1] += batch.size
        summed, count = run.sum(total).tolist()
        return summed / max(count, 1.0)
