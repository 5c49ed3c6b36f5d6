"""Pictures from prompts with a model in memory: the one core behind training samples and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from library.contracts import Condition
from library.inference.diffusion import UNWATCHED, Guided, Watch, denoise_latents, initial_noise, picture_generator
from library.inference.prompt_text import PromptEncoder, TokenizedPrompt
from library.inference.samplers import make_scheduler

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.prompts import PromptRequest
    from library.models.family import ModelFamily


class NotFinite(Exception):
    """A picture came out with values that are not numbers, even when it was decoded in float32."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A request with its tokens and its place in the answer."""

    place: int
    request: PromptRequest
    seed: int
    prompt: TokenizedPrompt
    negative: TokenizedPrompt

    @property
    def guided(self) -> bool:
        """From 0 to 1 the scale means no guidance, as in diffusers."""
        return not 0.0 <= self.request.scale <= 1.0

    @property
    def chunks(self) -> int:
        return max(self.prompt.chunks, self.negative.chunks) if self.guided else self.prompt.chunks

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Requests that agree in it can share a batch without changing each other's picture."""
        request = self.request
        return (request.width, request.height, request.steps, request.sampler, self.guided, self.chunks)


class DiffusionRenderer:
    """Renders prompts with a family of latent diffusion models.

    All noise of a picture comes from a CPU generator seeded with the picture's seed, in the order in which a diffusers
    pipeline draws it, so a picture depends neither on the batch it is made in nor on any global generator. Modules must
    be in evaluation mode; the caller sees to that.
    """

    def __init__(
        self,
        family: ModelFamily,
        *,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        zero_terminal_snr: bool = False,
        batch_size: int = 1,
    ) -> None:
        """Create the renderer; nothing is moved or loaded yet.

        Args:
            family: the model.
            autocast: makes the context in which encoders and denoiser run.
            zero_terminal_snr: use the noise schedule that ends in pure noise.
            batch_size: how many pictures of equal size and settings are made at a time.
        """
        self.family = family
        self._autocast = autocast
        self._zero_terminal_snr = zero_terminal_snr
        self._batch_size = batch_size
        self._encoder: PromptEncoder | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep what rendering loads until the end, then free it unless it was loaded before."""
        vae = getattr(self.family, "vae", None)
        was_loaded = getattr(vae, "loaded", True)
        try:
            yield
        finally:
            if not was_loaded:
                self.family.release_vae()

    @torch.no_grad()
    def render(self, requests: Sequence[PromptRequest], *, watch: Watch = UNWATCHED) -> list[Image]:
        """Return one picture per request, in the same order.

        Args:
            requests: what to make; every one must have its seed.
            watch: told and asked at every denoising step.

        Raises:
            RenderingStopped: `watch` said stop.
            NotFinite: the model produced values that are not numbers.
            UserError: a sampler is unknown or lacks its package.
        """
        if self._encoder is None:
            self._encoder = PromptEncoder(self.family)
        jobs = [_job(self._encoder, place, request) for place, request in enumerate(requests)]
        latents: dict[int, Tensor] = {}
        for batch in _batches(jobs, self._batch_size):
            for job, picture in zip(batch, self._latents(batch, self._encoder, watch), strict=True):
                latents[job.place] = picture
        return [self._decode(latents[place]) for place in range(len(jobs))]

    def _latents(self, batch: Sequence[_Job], encoder: PromptEncoder, watch: Watch) -> Tensor:
        family, device = self.family, _device_of(self.family.denoiser)
        request, chunks = batch[0].request, batch[0].chunks
        with self._autocast(), _on_device(family.text_encoders, device):
            condition = encoder.encode([job.prompt for job in batch], chunks, device)
            negative = encoder.encode([job.negative for job in batch], chunks, device) if batch[0].guided else None
        scheduler = make_scheduler(
            request.sampler, family.spec.prediction_type, zero_terminal_snr=self._zero_terminal_snr
        )
        scheduler.set_timesteps(request.steps, device=device)
        generators = [picture_generator(job.seed) for job in batch]
        down = family.spec.latent_downscale
        shape = (family.spec.latent_channels, request.height // down, request.width // down)
        start = initial_noise(generators, shape, device) * scheduler.init_noise_sigma
        scale = torch.tensor([job.request.scale for job in batch], device=device)
        return denoise_latents(
            self._predict, scheduler, start, Guided(condition, negative, scale), generators, watch=watch
        )

    def _predict(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with self._autocast():
            return self.family.denoise(noisy, t, condition)

    def _decode(self, latents: Tensor) -> Image:
        from PIL import Image

        pixels = self.family.decode(latents[None])[0].float()
        if not bool(torch.isfinite(pixels).all()):
            raise NotFinite("the picture holds values that are not numbers")
        levels = (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).mul(255).round()
        return Image.fromarray(levels.to(device="cpu", dtype=torch.uint8).numpy())


def _job(encoder: PromptEncoder, place: int, request: PromptRequest) -> _Job:
    if request.seed is None:
        raise ValueError("a picture needs a seed before it is rendered")
    return _Job(
        place, request, request.seed, encoder.tokenize(request.prompt), encoder.tokenize(request.negative_prompt)
    )


def _batches(jobs: Sequence[_Job], size: int) -> Iterator[list[_Job]]:
    groups: dict[tuple[object, ...], list[_Job]] = {}
    for job in jobs:
        groups.setdefault(job.batch_key, []).append(job)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextmanager
def _on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Move modules to `device` and, afterwards, back to where they were."""
    homes = [_device_of(module) for module in modules]
    try:
        for module, home in zip(modules, homes, strict=True):
            if home != device:
                module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            if home != device:
                module.to(home)
