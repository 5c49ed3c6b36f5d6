"""The training objective of Stable Cascade, stages C and B: noise is predicted at continuous times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from library.contracts import Noised
from library.inference.gdf import amplitudes, diffuse, log_snr, noise_condition
from library.training.adaptive_weight import AdaptiveWeight
from library.training.base_noise import TrainingNoise
from library.training.noise_schedule import huber_thresholds

if TYPE_CHECKING:
    from library.draws import Draws
    from library.training.options import LossOptions, NoiseOptions
    from library.training.options_cascade import CascadeLossOptions
    from library.training.scalars import Histogram

_EARLIEST = 0.001
_STEPS = 1000
"""Options and validation count times in thousandths."""
_PYRAMID_LEVELS = 10
_PYRAMID_DISCOUNT = 0.75
_PYRAMID_LARGEST = 16

_WEIGHTINGS: Mapping[str, Callable[[Tensor], Tensor]] = {
    # Choi et al., arXiv 2204.00227, with k and gamma 1
    "p2": lambda level: torch.sigmoid(-level),
    "constant": torch.ones_like,
    "snr": torch.exp,
    "snr+1": lambda level: level.exp() + 1,
    # Hang et al., arXiv 2303.09556
    "min-snr": lambda level: level.exp().clamp(max=5),
    "min-snr+1": lambda level: (level.exp() + 1).clamp(max=5),
    # Salimans and Ho, arXiv 2202.00512
    "truncated": lambda level: level.exp().clamp(min=1),
    "sech": lambda level: 1 / (level / 2).cosh(),
    # Yu et al., arXiv 2310.08442
    "debiased": lambda level: 1 / level.exp().clamp(max=1000).sqrt(),
    "sigmoid": torch.sigmoid,
}
"""Weight of the loss as a function of log SNR."""


@dataclass(frozen=True, slots=True)
class CascadeNoised(Noised):
    """A noised micro-batch that remembers which range of noise each sample belongs to, int64 [B]."""

    buckets: Tensor | None = None


class GDFObjective:
    """Noise prediction with the cosine schedule over t in [0, 1]; t, its condition and the weights stay float32.

    Args:
        noise: Options of noise and of the range of times, in thousandths.
        loss: Options of the loss; `--min_snr_gamma` and `--debiased_estimation_loss` weight it as they do elsewhere.
        cascade: Weightings of this family.
        device: Where latents are noised.
        pyramid: Stage B: add coarse noise to the fine one.
    """

    prediction_type = "epsilon"

    def __init__(
        self,
        noise: NoiseOptions,
        loss: LossOptions,
        cascade: CascadeLossOptions,
        device: torch.device,
        *,
        pyramid: bool = False,
    ) -> None:
        self.low = noise.min_timestep or 0
        self.high = _STEPS if noise.max_timestep is None else noise.max_timestep
        self._noise = TrainingNoise(noise)
        self._loss = loss
        self._pyramid = pyramid
        self._weighting = weighting_of(loss, cascade)
        adaptive = cascade.adaptive_loss_weight or cascade.loss_weighting == "adaptive"
        self.adaptive = AdaptiveWeight(device) if adaptive else None
        # Sum and number of the losses of an update, unweighted.
        self._seen = torch.zeros(2, device=device)
        self._raw_loss: Tensor | None = None

    def noise(self, latents: Tensor, draws: Draws, timesteps: Tensor | int | None = None) -> CascadeNoised:
        """Noise scaled latents [B,C,h,w].

        `t` of the result is what the network is told: the noise condition, float32 [B].

        Args:
            latents: Scaled latents; the results are float32 whatever their type.
            draws: Random numbers of this micro-batch.
            timesteps: One number in thousandths for all, or times in [0, 1] as float [B]; drawn when not given.
        """
        latents = latents.float()
        target = self._noise.draw(latents, draws)
        if self._pyramid:
            target = pyramid_noise(target, draws)
        t = self._times(draws, timesteps, latents)
        level = log_snr(t)
        noisy = diffuse(latents, self._noise.perturbed(target, draws), level)
        buckets = None if self.adaptive is None else self.adaptive.buckets(level)
        weight = self._weighting(level)
        if self.adaptive is not None and buckets is not None:
            weight = weight * self.adaptive.weights(buckets)
        return CascadeNoised(noisy, noise_condition(level), target, weight, self._huber(t, level), buckets)

    def observe(self, noised: Noised, per_sample: Tensor) -> None:
        """Take note of the losses [B] of a micro-batch, for the log and for adaptive weights."""
        self._seen[0] += per_sample.detach().float().sum()
        self._seen[1] += len(per_sample)
        if self.adaptive is not None and isinstance(noised, CascadeNoised) and noised.buckets is not None:
            self.adaptive.observe(noised.buckets, per_sample)

    def after_update(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Adapt the weights to what was observed; `reduce` sums a tensor over all ranks."""
        total, count = reduce(self._seen)
        self._raw_loss = total / count.clamp(min=1)
        self._seen = torch.zeros_like(self._seen)
        if self.adaptive is not None:
            self.adaptive.after_update(reduce)

    def scalars(self) -> Mapping[str, Tensor]:
        """Return the loss of the last update before weighting."""
        return {} if self._raw_loss is None else {"raw_loss": self._raw_loss}

    def histograms(self) -> Mapping[str, Histogram]:
        """Return the losses that adaptive weights follow, over log SNR."""
        return {} if self.adaptive is None else {"adaptive_loss": self.adaptive.histogram()}

    def validation_timesteps(self, count: int) -> tuple[int, ...]:
        """Return the `count` inner points, in thousandths, that divide the trained range evenly."""
        return tuple(self.low + (self.high - self.low) * point // (count + 1) for point in range(1, count + 1))

    def state_dict(self) -> dict[str, Any]:
        """Return the adaptive weights; nothing where the weights follow from the options."""
        return {} if self.adaptive is None else self.adaptive.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            UserError: the state is of something else.
        """
        if self.adaptive is not None:
            self.adaptive.load_state_dict(state)

    def _times(self, draws: Draws, given: Tensor | int | None, latents: Tensor) -> Tensor:
        """Return times in (0, 1], float32 [B]: drawn evenly, and never quite 0, where there is nothing to predict."""
        low, high = self.low / _STEPS, self.high / _STEPS
        if given is None:
            t = high - (high - low) * draws.uniform("timestep") + _EARLIEST
            return t.clamp(max(low, _EARLIEST), high)
        if isinstance(given, int):
            t = torch.full((len(latents),), given / _STEPS, device=latents.device)
        else:
            t = given.float() if given.is_floating_point() else given.float() / _STEPS
        return t.clamp(_EARLIEST, 1)

    def _huber(self, t: Tensor, level: Tensor) -> Tensor | None:
        loss = self._loss
        if loss.loss_type not in ("huber", "smooth_l1"):
            return None
        if loss.huber_schedule == "exponential":
            return loss.huber_c**t * loss.huber_scale
        return huber_thresholds(amplitudes(level)[0] ** 2, loss)


def weighting_of(loss: LossOptions, cascade: CascadeLossOptions) -> Callable[[Tensor], Tensor]:
    """Return the product of the weightings that are switched on, as a function of log SNR; p2 where there is none.

    Adaptive weights are not among them: they change during a run.
    """
    gamma, debiased = loss.min_snr_gamma, loss.debiased_estimation_loss
    others = gamma or debiased or cascade.adaptive_loss_weight
    name = cascade.loss_weighting or ("constant" if others else "p2")

    def weight(level: Tensor) -> Tensor:
        result = _WEIGHTINGS["constant" if name == "adaptive" else name](level)
        if gamma:
            result = result * (gamma * (-level).exp()).clamp(max=1)
        return result * _WEIGHTINGS["debiased"](level) if debiased else result

    return weight


def pyramid_noise(noise: Tensor, draws: Draws) -> Tensor:
    """Add noise of lower resolutions, 16 and less to a side, to noise [B,C,h,w], and bring all to unit variance."""
    channels, height, width = noise.shape[1:]
    total = 1.0
    result = noise
    for level in range(1, _PYRAMID_LEVELS):
        size = (height >> level, width >> level)
        if min(size) < 1:
            break
        if min(size) <= _PYRAMID_LARGEST:
            strength = _PYRAMID_DISCOUNT**level
            coarse = draws.normal(f"pyramid_{level}", (channels, *size))
            result = result + strength * functional.interpolate(coarse, (height, width), mode="nearest")
            total += strength**2
        if 1 in size:
            break
    return result / total**0.5
