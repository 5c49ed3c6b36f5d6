"""Experiments with the noise that pictures begin with: shifts of whole channels, and coarse noise on top of fine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from library.inference.extensions import Extension, StepHooks
from library.randomness import derive

if TYPE_CHECKING:
    from library.inference.extensions import BatchContext
    from library.inference.options import NoiseExperimentOptions

_LEVELS = 10


class NoiseExperiments(Extension):
    """Changes the noise of some pictures; what happens to one is a function of its seed alone.

    Pictures that start from another picture keep their noise. It must be the last of a renderer's extensions.
    """

    def __init__(self, options: NoiseExperimentOptions) -> None:
        self._options = options

    @contextmanager
    def begin(self, batch: BatchContext) -> Iterator[StepHooks]:
        """Let the batch begin with changed noise."""
        yield _NoiseHooks(batch, self._options)


class _NoiseHooks(StepHooks):
    def __init__(self, batch: BatchContext, options: NoiseExperimentOptions) -> None:
        self._batch = batch
        self._options = options

    def start(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the latents [B,C,h,w] to start from, each row changed by chances of its own."""
        latents, sigma = make(), self._batch.scheduler.init_noise_sigma
        rows = [
            self._changed(row / sigma, request.seed or 0) * sigma
            for row, request in zip(latents, self._batch.requests, strict=True)
        ]
        return torch.stack(rows).to(latents)

    def _changed(self, noise: Tensor, seed: int) -> Tensor:
        """Return noise [C,h,w] with what befalls the picture of this seed."""
        options = self._options
        generator = torch.Generator("cpu").manual_seed(derive(seed, "start noise") >> 1)
        # All chances are drawn whatever the options are, so that one experiment does not change another.
        pyramid, discount, offset, amount = torch.rand(4, generator=generator).tolist()
        if options.pyramid_noise_prob is not None and pyramid < options.pyramid_noise_prob:
            noise = _pyramid(noise, _between(options.pyramid_noise_discount_range, discount), generator)
        if options.noise_offset_prob is not None and offset < options.noise_offset_prob:
            shift = torch.randn((noise.shape[0], 1, 1), generator=generator)
            noise = noise + _between(options.noise_offset_range, amount) * shift.to(noise)
        return noise


def _between(ends: tuple[float, ...], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


def _pyramid(noise: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Add noise of ever lower resolution, each level `discount` times weaker, and bring all to unit deviation.

    As models that were trained with multi-resolution noise know it
    (https://wandb.ai/johnowhitaker/multires_noise/reports/Multi-Resolution-Noise-for-Diffusion-Model-Training).
    """
    channels, height, width = noise.shape
    for level in range(_LEVELS):
        shrink = (2 + 2 * float(torch.rand((), generator=generator))) ** level
        size = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = torch.randn((1, channels, *size), generator=generator)
        noise = noise + discount**level * F.interpolate(coarse, (height, width), mode="bilinear")[0].to(noise)
        if 1 in size:
            break
    return noise / noise.std()
