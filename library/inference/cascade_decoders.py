"""From latents of stage C to pictures: through stages B and A, or through the previewer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.inference.cascade_samplers import SAMPLERS
from library.inference.cascade_sampling import STAGE_B, SamplingPlan, sample_latents, start_noise
from library.inference.rendering import Part, alike, batches, kept, on_device, to_picture
from library.models.cascade.unet import StageInputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.cascade import CascadeLatents
    from library.inference.diffusion import Watch

_DOWNSCALE = 4
"""Pixels for one latent pixel of stage A, in each direction."""


class PreviewDecoder:
    """Makes small pictures, eight pixels for each latent pixel, without any steps.

    Args:
        previewer: the network; it may wait on another device.
        device: where it runs; None: where the latents are.
    """

    steps = 0

    def __init__(self, previewer: Part, device: torch.device | None = None) -> None:
        self._previewer = previewer
        self._device = device

    def session(self) -> AbstractContextManager[None]:
        """Return the context in which the previewer stays in memory."""
        return kept([self._previewer])

    @torch.no_grad()
    def decode(self, made: Sequence[CascadeLatents], watch: Watch) -> list[Image]:
        """Return the small pictures; see `cascade.Decoder`."""
        if not made:
            return []
        device = self._device or made[0].latents.device
        previewer = self._previewer.model
        with on_device([previewer], device):
            return [
                _picture(pixels)
                for group in alike([item.latents for item in made], 1)
                for pixels in previewer(torch.stack(group).to(device))
            ]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBSettings:
    """How stage B works.

    Attributes:
        batch_size: how many pictures are decoded at a time.
        steps: denoising steps.
        scale: of guidance; 1: none.
        shift: of the noise schedule.
        cfg_rho: share of a guided prediction that is brought back to the deviation of the unguided one.
        sampler: one of `SAMPLERS`.
    """

    batch_size: int = 1
    steps: int = STAGE_B.steps
    scale: float = 1.1
    shift: float = STAGE_B.shift
    cfg_rho: float = STAGE_B.cfg_rho
    sampler: str = SAMPLERS[0]

    @property
    def plan(self) -> SamplingPlan:
        """What the sampler is told."""
        return SamplingPlan(
            steps=self.steps, cfg=self.scale, cfg_rho=self.cfg_rho, shift=self.shift, sampler=self.sampler
        )


class StageBDecoder:
    """Makes pictures of full size: stage B makes latents of stage A, which stage A decodes one picture at a time.

    Args:
        stage_b: the network; it may wait elsewhere.
        stage_a: the decoder; likewise.
        settings: how stage B works.
        device: where both run; None: where the latents are.
        autocast: makes the context in which stage B runs.
    """

    def __init__(
        self,
        stage_b: Part,
        stage_a: Part,
        settings: StageBSettings | None = None,
        *,
        device: torch.device | None = None,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._stage_b = stage_b
        self._stage_a = stage_a
        self.settings = settings or StageBSettings()
        self._device = device
        self._autocast = autocast

    @property
    def steps(self) -> int:
        """Steps of stage B."""
        return self.settings.steps

    def session(self) -> AbstractContextManager[None]:
        """Return the context in which both stages stay in memory."""
        return kept([self._stage_b, self._stage_a])

    @torch.no_grad()
    def decode(self, made: Sequence[CascadeLatents], watch: Watch) -> list[Image]:
        """Return the pictures; see `cascade.Decoder`."""
        if not made:
            return []
        device = self._device or made[0].latents.device
        latents: dict[int, Tensor] = {}
        with on_device([self._stage_b.model], device):
            for batch in batches(made, self.settings.batch_size):
                found = self.latents(batch, device, watch)
                latents.update(zip(map(id, batch), found, strict=True))
        stage_a = self._stage_a.model
        with on_device([stage_a], device):
            return [_picture(stage_a.decode(latents[id(item)][None])[0]) for item in made]

    def latents(self, batch: Sequence[CascadeLatents], device: torch.device, watch: Watch) -> Tensor:
        """Return the latents of stage A [B,4,H/4,W/4] of pictures of one size."""
        effnet = torch.stack([item.latents for item in batch]).to(device)
        pooled = torch.stack([item.pooled for item in batch] + [item.negative for item in batch]).to(device)
        # Zeros stand for no condition.
        both = torch.cat([effnet, torch.zeros_like(effnet)])

        stage_b = self._stage_b.model

        def denoise(noisy: Tensor, ratio: Tensor) -> Tensor:
            rows = len(noisy)
            with self._autocast():
                return stage_b(noisy, ratio, StageInputs(pooled[:rows, None], effnet=both[:rows]))

        generators = [item.generator for item in batch]
        request = batch[0].request
        shape = (stage_b.config.channels, request.height // _DOWNSCALE, request.width // _DOWNSCALE)
        start = start_noise(generators, shape, device)
        return sample_latents(denoise, self.settings.plan, generators, start, watch=watch)


def _picture(pixels: Tensor) -> Image:
    """Turn pixels [3,H,W] in [0,1] into a picture."""
    return to_picture(pixels.float() * 2 - 1)
