"""The denoising loop with classifier-free guidance: from noise that belongs to a picture to its latents.

Nothing in it waits for the device, except that samplers which add noise at every step copy it there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from library.contracts import Condition
from library.inference.extensions import DenoiserInput, Moment, StepHooks

Predict = Callable[[Moment, DenoiserInput], Tensor]
"""Denoiser: (where the loop is, what it is given) -> prediction [N,C,h,w]."""


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
    """What B pictures are to show, and how far they are led there and away from elsewhere.

    With `negative` alone the prediction is `n + scale (c - n)` for the predictions c and n of condition and negative
    condition: equation 6 of https://arxiv.org/abs/2207.12598 with the negative prompt in place of the empty one. With
    `empty` as well, both are measured from the prediction e of the empty prompt:
    `e + scale (c - e) - negative_scale (n - e)`.

    Attributes:
        condition: of the prompts.
        negative: of the negative prompts; None: no guidance.
        scale: [B].
        empty: of the empty prompt; None: the negative prompt takes its place.
        negative_scale: [B], with `empty`.
    """

    condition: Condition
    negative: Condition | None
    scale: Tensor
    empty: Condition | None = None
    negative_scale: Tensor | None = None

    @property
    def branches(self) -> tuple[Condition, ...]:
        """The conditions in the order in which they are stacked; that of the prompts comes last."""
        return tuple(item for item in (self.empty, self.negative, self.condition) if item is not None)

    def combine(self, prediction: Tensor) -> Tensor:
        """Return the prediction with guidance [B,C,h,w] for that of all branches [branches * B,C,h,w]."""
        if self.negative is None:
            return prediction
        *empty, away, towards = prediction.chunk(len(self.branches))
        scale = _per_picture(self.scale, prediction)
        if not empty or self.negative_scale is None:
            return away + scale * (towards - away)
        rest = empty[0]
        return rest + scale * (towards - rest) - _per_picture(self.negative_scale, prediction) * (away - rest)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to get from noise to a picture.

    Attributes:
        scheduler: a scheduler of diffusers on which `set_timesteps` was called.
        timesteps: those of its timesteps that are to be run, [S] in main memory.
        generators: one per picture; samplers that add noise draw it from them.
    """

    scheduler: Any
    timesteps: Tensor
    generators: Sequence[torch.Generator]

    def advance(self, t: Tensor, prediction: Tensor, latents: Tensor) -> Tensor:
        """Return the latents after the step from timestep t."""
        step = self.scheduler.step
        extra = {"generator": list(self.generators)} if "generator" in inspect.signature(step).parameters else {}
        return step(prediction, t, latents, **extra, return_dict=False)[0]


def picture_generator(seed: int) -> torch.Generator:
    """Return the generator from which all noise of the picture with this seed is drawn, on the CPU."""
    return torch.Generator("cpu").manual_seed(seed)


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Draw unit noise [B,C,h,w] float32, each picture from its own generator, so batches do not matter."""
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators]).to(device)


def denoise_latents(
    predict: Predict,
    sampling: Sampling,
    start: Tensor,
    guided: Guided,
    *,
    hooks: StepHooks | None = None,
    watch: Watch = UNWATCHED,
) -> Tensor:
    """Run the sampler and return the scaled latents [B,C,h,w] in float32.

    Args:
        predict: the denoiser; called once a step with all branches of the guidance in one batch.
        sampling: the sampler and its timesteps.
        start: latents [B,C,h,w] to start from, in the scale of the scheduler.
        guided: what to show.
        hooks: what extensions do at every step.
        watch: asked at every step whether to go on.

    Raises:
        RenderingStopped: `watch` said so.
    """
    latents, timesteps = start, sampling.timesteps
    conditions = guided.branches
    joined = reduce(join_conditions, conditions)
    on_device = timesteps.to(start.device)
    for index, value in enumerate(timesteps.tolist()):
        watch.step(index, len(timesteps))
        moment = Moment(index, len(timesteps), float(value))
        noisy = sampling.scheduler.scale_model_input(repeated(latents, len(conditions)), timesteps[index])
        call = DenoiserInput(noisy, on_device[index].expand(len(noisy)), joined)
        advance = partial(sampling.advance, timesteps[index])
        if hooks is None:
            latents = advance(guided.combine(predict(moment, call).float()), latents)
        else:
            prediction = guided.combine(hooks.predict(moment, call, partial(predict, moment)).float())
            latents = hooks.advance(moment, prediction, latents, advance)
    watch.step(len(timesteps), len(timesteps))
    return latents


def repeated(latents: Tensor, times: int) -> Tensor:
    """Return `latents` stacked `times` times along the batch."""
    return latents if times == 1 else torch.cat([latents] * times)


def _per_picture(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).reshape(-1, 1, 1, 1)


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
