"""From noise to latents of Stable Cascade: the sampling loop of its schedule, for stage C and stage B alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.inference.cascade_samplers import SAMPLERS
from library.inference.diffusion import UNWATCHED, Watch, initial_noise, repeated
from library.inference.gdf import amplitudes, clean, log_snr, noise_condition, per_picture

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(latents [N,C,h,w] float32, noise condition [N] float32) -> predicted noise [N,C,h,w].

With guidance N is twice the number of pictures: first those with their condition, then those without."""

_ROUNDING = 1e-6
"""Of times in float32."""


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How latents are made.

    Attributes:
        steps: number of them.
        cfg: strength of guidance; a pair goes linearly from the first at t = 1 to the second at t = 0. 1 or None: no
            guidance.
        cfg_rho: share of a guided prediction that is brought to the deviation of the one with condition
            (https://arxiv.org/abs/2305.08891, section 3.4), each picture by itself.
        shift: of the noise schedule.
        t_start: time to begin at; below 1 with given latents.
        t_end: time to end at.
        cfg_t_start: guide from this time on.
        cfg_t_stop: guide up to this time.
        sampler: one of `SAMPLERS`.
    """

    steps: int = 20
    cfg: float | tuple[float, float] | None = 4.0
    cfg_rho: float = 0.7
    shift: float = 2.0
    t_start: float = 1.0
    t_end: float = 0.0
    cfg_t_start: float = 1.0
    cfg_t_stop: float = 0.0
    sampler: str = "ddpm"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS or self.steps < 1 or not 0 <= self.t_end < self.t_start <= 1:
            raise ValueError(f"impossible plan {self}")

    def times(self) -> Tensor:
        """Return the times that the loop goes through, float32 [steps + 1]."""
        return torch.linspace(self.t_start, self.t_end, self.steps + 1)

    def guidance_at(self, t: float) -> float | None:
        """Return the strength of guidance at a time, None where there is none."""
        if self.cfg is None or not self.cfg_t_stop - _ROUNDING <= t <= self.cfg_t_start + _ROUNDING:
            return None
        scale = self.cfg[0] * t + self.cfg[1] * (1 - t) if isinstance(self.cfg, tuple) else self.cfg
        return None if scale == 1 else scale

    @property
    def guided(self) -> bool:
        """Whether any step is guided."""
        return any(self.guidance_at(t) is not None for t in self.times()[:-1].tolist())


STAGE_C = SamplingPlan()
STAGE_B = SamplingPlan(steps=10, cfg=1.1, shift=1.0)


def sample_latents(
    denoise: Denoiser,
    plan: SamplingPlan,
    generators: Sequence[torch.Generator],
    start: Tensor,
    *,
    watch: Watch = UNWATCHED,
) -> Tensor:
    """Run the sampler and return latents [B,C,h,w] in float32.

    Args:
        denoise: the network with its conditions.
        plan: what to do.
        generators: one per picture, on the CPU; noise of the steps comes from them, so batches do not matter.
        start: latents to start from: noise (`start_noise`), or a picture's latents as `noised_start` gives them.
        watch: asked at every step whether to go on.

    Raises:
        RenderingStopped: `watch` said so.
    """
    times = plan.times()
    levels = log_snr(times, plan.shift)
    # Looked up here once, so that no step waits for the device.
    on_device = levels.to(start.device)
    conditions = noise_condition(levels).to(start.device)
    latents, count = start.float(), len(start)
    for index, t in enumerate(times[:-1].tolist()):
        watch.step(index, plan.steps)
        scale = plan.guidance_at(t)
        branches = 2 if scale is not None else 1
        prediction = denoise(repeated(latents, branches), conditions[index].expand(branches * count)).float()
        if scale is not None:
            prediction = guide(prediction, scale, plan.cfg_rho)
        latents = step(plan.sampler, latents, prediction, on_device[index : index + 2], generators)
    watch.step(plan.steps, plan.steps)
    return latents


def start_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return the noise [B,C,h,w] that pictures begin with, each from its own generator."""
    return initial_noise(generators, shape, device)


def noised_start(latents: Tensor, plan: SamplingPlan, generators: Sequence[torch.Generator]) -> Tensor:
    """Return latents [B,C,h,w] of pictures as they are at the plan's `t_start`: where image-to-image begins."""
    noise = initial_noise(generators, tuple(latents.shape[1:]), latents.device)  # type: ignore[arg-type]
    a, b = amplitudes(log_snr(torch.tensor(plan.t_start), plan.shift).to(latents.device))
    return a * latents.float() + b * noise


def composed(denoise: Denoiser, parts: int, pictures: int) -> Denoiser:
    """Return what predicts the noise of prompts of several parts.

    What the parts add to the prediction without condition is summed: "Compositional Visual Generation with Composable
    Diffusion Models" (https://arxiv.org/abs/2206.01714), equation 11, with weights of 1. Without guidance there is
    nothing that a part is measured from, and their mean is taken.

    Args:
        denoise: predicts for each part of all pictures, and then without condition.
        parts: how many a prompt has.
        pictures: how many there are.
    """
    if parts == 1:
        return denoise

    def compose(latents: Tensor, ratio: Tensor) -> Tensor:
        guided = len(latents) > pictures
        count = parts + guided
        found = denoise(repeated(latents[:pictures], count), ratio[:1].expand(count * pictures)).chunk(count)
        if not guided:
            return torch.stack(found).mean(0)
        *towards, away = found
        return torch.cat([away + torch.stack([one - away for one in towards]).sum(0), away])

    return compose


def guide(prediction: Tensor, scale: float, rho: float) -> Tensor:
    """Return the guided prediction [B,C,h,w] of predictions with and without condition [2B,C,h,w]."""
    towards, away = prediction.chunk(2)
    guided = torch.lerp(away, towards, scale)
    if not rho:
        return guided
    ratio = per_picture(towards.flatten(1).std(1) / guided.flatten(1).std(1))
    return rho * guided * ratio + (1 - rho) * guided


def step(
    sampler: str, latents: Tensor, prediction: Tensor, levels: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return the latents [B,C,h,w] one step later.

    Sources: DDPM and DDIM: Song et al., arXiv 2010.02502, equations 12 and 16 (eta 1 and 0); LCM: Luo et al., arXiv
    2310.04378, algorithm 3.

    Args:
        sampler: one of `SAMPLERS`.
        latents: [B,C,h,w] float32.
        prediction: of the noise in them.
        levels: log SNR of the latents and of the result [2].
        generators: one per picture.
    """
    x0 = clean(latents, prediction, levels[0].expand(len(latents)))
    (a, b), (a_next, b_next) = amplitudes(levels[0]), amplitudes(levels[1])
    if sampler == "ddim":
        return a_next * x0 + b_next * prediction
    fresh = initial_noise(generators, tuple(latents.shape[1:]), latents.device)  # type: ignore[arg-type]
    if sampler == "lcm":
        return a_next * x0 + b_next * fresh
    sigma = b_next / b * (1 - (a / a_next) ** 2).clamp(min=0).sqrt()
    return a_next * x0 + (b_next**2 - sigma**2).clamp(min=0).sqrt() * prediction + sigma * fresh
