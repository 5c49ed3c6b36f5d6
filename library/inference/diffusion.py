"""The denoising loop with classifier-free guidance: from noise that belongs to a picture to its latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from library.contracts import Condition

Predict = Callable[[Tensor, Tensor, Condition], Tensor]
"""Denoiser: (noisy [B,C,h,w] float32, timesteps [B], condition) -> prediction [B,C,h,w]."""


class RenderingStopped(Exception):
    """Rendering was given up between two denoising steps because it was asked to stop."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Who looks on while pictures are made: `should_stop` is asked, `progress(done, total)` told, at every step."""

    should_stop: Callable[[], bool] | None = None
    progress: Callable[[int, int], None] | None = None

    def step(self, done: int, total: int) -> None:
        """Report `done` of `total` steps.

        Raises:
            RenderingStopped: the answer of `should_stop` is yes.
        """
        if self.progress is not None:
            self.progress(done, total)
        if self.should_stop is not None and self.should_stop():
            raise RenderingStopped


UNWATCHED = Watch()
"""Nobody looks on and nobody stops."""


@dataclass(frozen=True, slots=True)
class Guided:
    """What B pictures are to show: condition and negative condition (None: no guidance), and scale [B]."""

    condition: Condition
    negative: Condition | None
    scale: Tensor


def picture_generator(seed: int) -> torch.Generator:
    """Return the generator from which all noise of the picture with this seed is drawn, on the CPU."""
    return torch.Generator("cpu").manual_seed(seed)


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Draw unit noise [B,C,h,w] float32, each picture from its own generator, so batches do not matter."""
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators]).to(device)


def denoise_latents(
    predict: Predict,
    scheduler: Any,
    start: Tensor,
    guided: Guided,
    generators: Sequence[torch.Generator],
    watch: Watch = UNWATCHED,
) -> Tensor:
    """Run the sampler and return the scaled latents [B,C,h,w] in float32.

    Args:
        predict: the denoiser; called once a step with condition and negative condition in one batch.
        scheduler: a scheduler of diffusers on which `set_timesteps` was called.
        start: latents [B,C,h,w] to start from, already multiplied by the scheduler's `init_noise_sigma`.
        guided: what to show.
        generators: one per picture; ancestral samplers draw their noise from them.
        watch: asked at every step whether to go on.

    Raises:
        RenderingStopped: `watch` said so.
    """
    latents = start
    both = guided.condition if guided.negative is None else join_conditions(guided.negative, guided.condition)
    scale = guided.scale.to(start).reshape(-1, 1, 1, 1)
    extra = {"generator": list(generators)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    total = len(scheduler.timesteps)
    for done, t in enumerate(scheduler.timesteps):
        watch.step(done, total)
        doubled = latents if guided.negative is None else torch.cat([latents, latents])
        noisy = scheduler.scale_model_input(doubled, t)
        prediction = predict(noisy, t.to(latents.device).expand(len(noisy)), both).float()
        if guided.negative is not None:
            away, towards = prediction.chunk(2)
            prediction = away + scale * (towards - away)
        latents = scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
    watch.step(total, total)
    return latents


def join_conditions(first: Condition, second: Condition) -> Condition:
    """Stack two conditions along the batch."""
    joined: dict[str, Any] = {}
    for item in fields(Condition):
        one, two = getattr(first, item.name), getattr(second, item.name)
        if isinstance(one, Tensor):
            joined[item.name] = torch.cat([one, two])
        elif item.name == "extra":
            joined[item.name] = {name: torch.cat([value, two[name]]) for name, value in one.items()}
        else:
            joined[item.name] = one
    return Condition(**joined)
