"""The training objective of Stable Diffusion: what is added to latents, what is to be predicted, how it is weighted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from library.contracts import Noised
from library.errors import UserError
from library.training.base_noise import TrainingNoise
from library.training.noise_schedule import TRAIN_TIMESTEPS, huber_thresholds, loss_weights, noise_schedule

if TYPE_CHECKING:
    from library.draws import Draws
    from library.training.options import LossOptions, NoiseOptions
    from library.training.scalars import Histogram

PREDICTION_TYPES = ("epsilon", "v_prediction")


class Objective(Protocol):
    """Noises latents and follows the losses; one of these per family of diffusion models."""

    prediction_type: str

    def noise(self, latents: Tensor, draws: Draws, timesteps: Tensor | int | None = None) -> Noised:
        """Noise scaled latents [B,C,h,w]; at given timesteps instead of drawn ones for validation."""

    def observe(self, noised: Noised, per_sample: Tensor) -> None:
        """Take note of the losses [B] of a micro-batch, without waiting for the device."""

    def after_update(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Adapt to what was observed, the same on all ranks; `reduce` sums a tensor over them."""

    def scalars(self) -> Mapping[str, Tensor]:
        """Return numbers of the last update that are drawn beside the loss; they stay on the device."""

    def histograms(self) -> Mapping[str, Histogram]:
        """Return distributions worth a look now and then; waits for the device."""

    def validation_timesteps(self, count: int) -> tuple[int, ...]:
        """Return `count` timesteps spread evenly over those that are trained."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be saved to continue."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""


class DDPMObjective:
    """Noise prediction or v-prediction over 1000 timesteps.

    Every draw has a name of its own, so switching an option on changes neither the base noise nor the timesteps.

    Args:
        prediction_type: "epsilon" or "v_prediction" (Salimans and Ho, arXiv 2202.00512).
        noise: Options of noise and timesteps.
        loss: Options of the loss; weights and Huber thresholds are tables over the timesteps.
        device: Where latents are noised.

    Raises:
        UserError: if no timestep lies between `--min_timestep` and `--max_timestep`.
    """

    def __init__(self, prediction_type: str, noise: NoiseOptions, loss: LossOptions, device: torch.device) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction type {prediction_type!r}")
        self.prediction_type = prediction_type
        self.schedule = noise_schedule(zero_terminal_snr=noise.zero_terminal_snr)
        self.low, self.high = _timestep_range(noise)
        self._noise = TrainingNoise(noise)
        signal = self.schedule.alphas_cumprod
        columns = [signal**0.5, (1.0 - signal) ** 0.5, loss_weights(self.schedule.snr, prediction_type, loss)]
        if loss.loss_type in ("huber", "smooth_l1"):
            columns.append(huber_thresholds(signal, loss))
        # One table, so that one gather fetches all that a sample needs to know of its timestep.
        self._table = torch.stack(columns, dim=1).to(device)

    @property
    def alphas_cumprod(self) -> Tensor:
        """Share of the signal's variance left at each timestep [1000], with zero terminal SNR if that is trained."""
        return self.schedule.alphas_cumprod

    def noise(self, latents: Tensor, draws: Draws, timesteps: Tensor | int | None = None) -> Noised:
        """Noise scaled latents [B,C,h,w].

        Args:
            latents: Scaled latents; the results are float32 whatever their type.
            draws: Random numbers of this micro-batch.
            timesteps: [B] int64 on the latents' device, or one for all; drawn when not given.
        """
        latents = latents.float()
        noise = self._noise.draw(latents, draws)
        t = self._timesteps(draws, timesteps, latents)
        at_t = self._table[t]
        signal, sigma = at_t[:, 0].view(-1, 1, 1, 1), at_t[:, 1].view(-1, 1, 1, 1)
        noisy = signal * latents + sigma * self._noise.perturbed(noise, draws)
        target = noise if self.prediction_type == "epsilon" else signal * noise - sigma * latents
        return Noised(noisy, t, target, weight=at_t[:, 2], huber_c=at_t[:, 3] if at_t.shape[1] > 3 else None)

    def observe(self, noised: Noised, per_sample: Tensor) -> None:
        """Nothing to follow: the weights do not depend on the losses."""

    def after_update(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Nothing to adapt."""

    def scalars(self) -> Mapping[str, Tensor]:
        """Return nothing: there are no numbers but those of every objective."""
        return {}

    def histograms(self) -> Mapping[str, Histogram]:
        """Return nothing: nothing is followed."""
        return {}

    def validation_timesteps(self, count: int) -> tuple[int, ...]:
        """Return the `count` inner points that divide the trained range evenly: 200, 400, 600, 800 for 4 of 0..1000."""
        return tuple(self.low + (self.high - self.low) * point // (count + 1) for point in range(1, count + 1))

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dictionary: everything follows from the options."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept what `state_dict` returned."""

    def _timesteps(self, draws: Draws, given: Tensor | int | None, latents: Tensor) -> Tensor:
        if given is None:
            return draws.integers("timestep", self.low, self.high)
        if isinstance(given, int):
            return torch.full((len(latents),), given, dtype=torch.int64, device=latents.device)
        return given


def _timestep_range(noise: NoiseOptions) -> tuple[int, int]:
    low = noise.min_timestep or 0
    high = TRAIN_TIMESTEPS if noise.max_timestep is None else noise.max_timestep
    if not 0 <= low < high <= TRAIN_TIMESTEPS:
        raise UserError(
            f"no timestep t with {low} <= t < {high}",
            f"Give 0 <= min_timestep < max_timestep <= {TRAIN_TIMESTEPS}.",
            where="--min_timestep/--max_timestep",
        )
    return low, high
