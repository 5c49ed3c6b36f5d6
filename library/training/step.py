"""One training step: a micro-batch goes in, its loss comes out. The same for every family, method and objective."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.draws import Draws

if TYPE_CHECKING:
    from collections.abc import Callable

    from library.contracts import Batch, Noised
    from library.models.family import ModelFamily
    from library.training.methods.base import Method
    from library.training.objective import Objective


class Autocast:
    """Enters mixed precision for the parts that want it; losses, targets and a float32 VAE stay outside."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device_type = device.type
        self.dtype = dtype

    def __call__(self) -> AbstractContextManager[None]:
        """Return a fresh context; does nothing when training runs in full precision."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)


class TrainStep(nn.Module):
    """Batch to loss. Registers only what trains, so that wrappers (DDP, FSDP, ZeRO) see nothing else."""

    def __init__(
        self,
        family: ModelFamily,
        method: Method,
        objective: Objective,
        loss_function: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor],
        *,
        seed: int,
        autocast: Autocast,
    ) -> None:
        super().__init__()
        self.trainable = method.trainable()
        # Frozen parts and helpers are reached through plain objects: nn.Module would register the models inside.
        self._family, self._method, self._objective = [family], [method], [objective]
        self.loss_function = loss_function
        self.seed = seed
        self.autocast = autocast

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (loss of the micro-batch: a scalar, per-sample loss [B], detached and unweighted)."""
        draws = Draws(self.seed, batch.key.step_key, batch.size, batch.loss_weight.device)
        per_sample, noised = self.losses(batch, draws)
        if batch.key.share:  # padding repeats samples that were observed already
            self._objective[0].observe(noised, per_sample.detach())
        weighted = per_sample * batch.loss_weight * noised.weight
        return weighted.mean() * batch.key.share, per_sample.detach()

    def losses(self, batch: Batch, draws: Draws, timestep: int | None = None) -> tuple[Tensor, Noised]:
        """Return the loss of each sample [B], unweighted, and how it was noised.

        Args:
            batch: on the device.
            draws: all randomness of the micro-batch.
            timestep: one for all samples; None draws them.
        """
        family, method, objective = self._family[0], self._method[0], self._objective[0]
        with torch.no_grad():
            latents = self.latents(batch, draws)
            noised = objective.noise(family.scale_latents(latents.float()), draws, timestep)
        with self.autocast():
            condition = method.condition(batch, draws)
            prediction = method.predict(noised, condition, batch)
            target = method.target(noised, condition, batch)
        return self.loss_function(prediction.float(), target.float(), batch.mask, noised.huber_c), noised

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Return the unscaled latents of a batch: its own, or what the VAE makes of its pixels."""
        if batch.latents is not None:
            return batch.latents
        if batch.pixels is None:
            raise ValueError("a batch needs latents or pixels")
        return self._family[0].encode_images(batch.pixels, draws)

    def validation_timesteps(self, count: int) -> tuple[int, ...]:
        """Return `count` timesteps spread evenly over those that are trained."""
        return self._objective[0].validation_timesteps(count)
