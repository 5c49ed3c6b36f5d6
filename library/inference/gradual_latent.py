"""Gradual latent: latents begin small and grow while they are denoised, so that large pictures keep one composition.

Growing blurs the noise that is still in the latents; an ancestral sampler adds fresh noise of the new size in the same
step, which is why only such a sampler will do. Unsharp masking makes up for the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from library.errors import UserError
from library.inference.extensions import Extension, Remarks, StepHooks
from library.inference.prompt_options import UnusableValue, unsharp_numbers

if TYPE_CHECKING:
    from library.inference.extensions import BatchContext, Moment, PictureInputs
    from library.inference.prompts import PromptRequest

logger = logging.getLogger(__name__)

SAMPLERS = ("euler_a", "k_euler_a")
OPTION = "--gradual_latent_timesteps"
_SIDE_STEP = 8


@dataclass(frozen=True, slots=True)
class Unsharp:
    """How grown latents are sharpened: `x + strength * (x - blurred x)`.

    Attributes:
        kernel: side of the Gaussian's window, odd.
        sigma: of the Gaussian.
        strength: of the sharpening.
        target: sharpen what the step leads to; else only what it starts from.
    """

    kernel: int
    sigma: float
    strength: float
    target: bool = True

    def __call__(self, latents: Tensor) -> Tensor:
        """Return sharpened latents [B,C,h,w]."""
        places = torch.arange(self.kernel, device=latents.device, dtype=latents.dtype) - (self.kernel - 1) / 2
        window = torch.exp(-0.5 * (places / self.sigma) ** 2)
        window = (window / window.sum()).expand(latents.shape[1], 1, 1, -1)
        half = self.kernel // 2
        # A picture smaller than the window cannot be mirrored at its border.
        how = "reflect" if half < min(latents.shape[-2:]) else "replicate"
        blurred = F.pad(latents, (half, half, half, half), mode=how)
        for turned in (window, window.transpose(2, 3)):
            blurred = F.conv2d(blurred, turned, groups=latents.shape[1])
        return latents + self.strength * (latents - blurred)


def read_unsharp(text: str | None, where: str = "") -> Unsharp | None:
    """Read `kernel,sigma,strength[,target]`, such as `3,0.5,0.5,1`; None or `none` means no sharpening.

    Raises:
        UserError: it is something else.
    """
    try:
        found = None if text is None else unsharp_numbers(text)
    except UnusableValue as error:
        raise UserError(f"unsharp parameters {text!r} cannot be read", f"Write {error}.", where=where) from None
    return None if found is None else Unsharp(*found)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradualLatent:
    """When and how latents grow.

    Attributes:
        timesteps: they grow below this timestep; None: they have their full size from the start.
        ratio: size at which they begin, for a full size of 1.
        ratio_step: how much the ratio grows each time.
        every_n_steps: they grow in every n-th step.
        s_noise: strength of the noise that a growing step adds.
        unsharp: sharpens grown latents.
    """

    timesteps: float | None = None
    ratio: float = 0.5
    ratio_step: float = 0.125
    every_n_steps: int = 3
    s_noise: float = 1.0
    unsharp: Unsharp | None = None

    def changed_by(self, request: PromptRequest) -> GradualLatent:
        """Return the settings with what a prompt itself says.

        Raises:
            UserError: its unsharp parameters cannot be read.
        """
        said: dict[str, Any] = dict(request.gradual_latent)
        if "unsharp_params" in said:
            said["unsharp"] = read_unsharp(str(said.pop("unsharp_params")), request.where)
        return replace(self, **said)

    def sizes(self, timesteps: Sequence[float], full_hw: tuple[int, int]) -> Mapping[int, tuple[int, int]]:
        """Return the steps in which latents grow, and the (height, width) that they have after each.

        The last of them always reaches the full size. The very last step is none of them: it adds no noise.

        Raises:
            UserError: there is no step for it.
        """
        ratio, waited, grown = self.ratio, self.every_n_steps, {}
        for index, timestep in enumerate(timesteps[:-1]):
            if timestep < (self.timesteps or 0) and ratio < 1 and waited >= self.every_n_steps:
                ratio, waited = min(ratio + self.ratio_step, 1.0), 0
                grown[index] = self.size(ratio, full_hw)
            waited += 1
        if not grown:
            what = f"there is no step below timestep {self.timesteps:g} in which latents could grow"
            raise UserError(what, "Give more steps or a higher timestep.", where=OPTION)
        last = max(grown)
        if grown[last] != full_hw:
            logger.warning("latents would grow to %.3g of their size only: the last growth is a larger one", ratio)
            grown[last] = full_hw
        return grown

    def size(self, ratio: float, full_hw: tuple[int, int]) -> tuple[int, int]:
        """Return a (height, width): multiples of 8, which the deepest level of the U-Net wants, or the full size."""
        if ratio >= 1:
            return full_hw
        height, width = (max(_SIDE_STEP, int(side * ratio) // _SIDE_STEP * _SIDE_STEP) for side in full_hw)
        return min(height, full_hw[0]), min(width, full_hw[1])


class GradualLatents(Extension):
    """Lets the latents of pictures that start from noise grow; it must be the first of a renderer's extensions."""

    def __init__(self, settings: GradualLatent) -> None:
        """Take what holds without a word in the prompt."""
        self._settings = settings
        self._remarks = Remarks(logger)

    def batch_key(self, request: PromptRequest, inputs: PictureInputs) -> GradualLatent | None:
        """Return the settings of a picture; None: it has its full size from the start.

        Raises:
            UserError: its sampler adds no noise of its own.
        """
        settings = self._settings.changed_by(request)
        if settings.timesteps is None:
            if request.gradual_latent:
                self._remarks.warn(request.where, f"gradual latent is off without --glt or {OPTION}")
            return None
        if inputs.image is not None or inputs.latents is not None:
            self._remarks.warn("", f"{OPTION} has no effect where a picture starts from another")
            return None
        if request.sampler.lower() not in SAMPLERS:
            what = f"gradual latent works with the sampler euler_a, not with {request.sampler}"
            raise UserError(what, "Give --sampler euler_a, or leave it out.", where=request.where)
        return settings

    @contextmanager
    def begin(self, batch: BatchContext) -> Iterator[StepHooks]:
        """Find the steps in which latents grow."""
        settings = self.batch_key(batch.requests[0], batch.inputs[0])
        if settings is None:
            yield StepHooks()
            return
        full_hw = batch.latent_shape[1], batch.latent_shape[2]
        sizes = settings.sizes(batch.timesteps.tolist(), full_hw)
        yield _GrowingHooks(settings, sizes, full_hw, batch.scheduler)


class _GrowingHooks(StepHooks):
    """The growth of one batch."""

    def __init__(
        self,
        settings: GradualLatent,
        sizes: Mapping[int, tuple[int, int]],
        full_hw: tuple[int, int],
        scheduler: Any,
    ) -> None:
        self._settings, self._sizes, self._full_hw, self._scheduler = settings, sizes, full_hw, scheduler

    def start(self, make: Callable[[], Tensor]) -> Tensor:
        """Return every n-th value of the noise: what is interpolated would be weaker and smoother than noise."""
        latents = make()
        return F.interpolate(latents, size=self._settings.size(self._settings.ratio, self._full_hw), mode="nearest")

    def advance(
        self, moment: Moment, prediction: Tensor, latents: Tensor, advance: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Take the step in the size that the latents have from now on.

        The step is linear in prediction and latents, so growing both is growing what comes out of it, apart from the
        noise that it adds, which has the new size.
        """
        size = self._sizes.get(moment.index)
        if size is None:
            return advance(prediction, latents)
        grown, unsharp = _grown(latents, size), self._settings.unsharp
        larger = _grown(prediction, size)
        if unsharp is not None and unsharp.target:
            return self._weaker_noise(advance, unsharp(larger), unsharp(grown))
        if unsharp is not None:
            sharpened = unsharp(grown)
            larger = larger + self._share_of_latents() * (grown - sharpened)
            grown = sharpened
        return self._weaker_noise(advance, larger, grown)

    def _share_of_latents(self) -> float:
        """Return what latents count in the direction of the step, for a prediction of 1: velocities need both.

        With x0 = x / (s^2 + 1) - v s / sqrt(s^2 + 1), the direction (x - x0) / s is
        (v + x s / sqrt(s^2 + 1)) / sqrt(s^2 + 1); the direction is to stay as it is when latents are sharpened.
        """
        if self._scheduler.config.prediction_type != "v_prediction":
            return 0.0
        sigma = float(self._scheduler.sigmas[self._scheduler.step_index])
        return sigma / (sigma**2 + 1) ** 0.5

    def _weaker_noise(self, advance: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, latents: Tensor) -> Tensor:
        """Take the step, with noise of `s_noise` times its strength."""
        after = advance(prediction, latents)
        if self._settings.s_noise == 1:
            return after
        scheduler = self._scheduler
        before, behind = (float(sigma) for sigma in scheduler.sigmas[scheduler.step_index - 1 :][:2])
        # Algorithm 2 of https://arxiv.org/abs/2206.00364 with its churn put behind the step, as k-diffusion has it.
        noise_squared = behind**2 * (before**2 - behind**2) / before**2
        still = latents + self._direction(prediction, latents, before) * ((behind**2 - noise_squared) ** 0.5 - before)
        return still + self._settings.s_noise * (after - still)

    def _direction(self, prediction: Tensor, latents: Tensor, sigma: float) -> Tensor:
        if self._scheduler.config.prediction_type != "v_prediction":
            return prediction
        return (prediction + latents * sigma / (sigma**2 + 1) ** 0.5) / (sigma**2 + 1) ** 0.5


def _grown(latents: Tensor, hw: tuple[int, int]) -> Tensor:
    return F.interpolate(latents.float(), size=hw, mode="bicubic", align_corners=False)
