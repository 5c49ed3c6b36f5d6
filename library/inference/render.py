"""Pictures from prompts with a model in memory: the one core behind training samples and generation."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.inference.diffusion import (
    UNWATCHED,
    Guided,
    Sampling,
    Watch,
    denoise_latents,
    initial_noise,
    picture_generator,
)
from library.inference.extensions import (
    BatchContext,
    DenoiserInput,
    Extension,
    HookChain,
    Moment,
    PictureInputs,
    StepHooks,
)
from library.inference.prompt_text import PromptEncoder, TokenizedPrompt
from library.inference.rendering import alike, device_of, filled, in_order, on_device, to_picture
from library.inference.samplers import make_scheduler

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.contracts import Condition
    from library.inference.prompts import PromptRequest
    from library.models.family import ModelFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderSettings:
    """How pictures are made, whatever they show.

    Attributes:
        batch_size: how many pictures of equal size and settings are made at a time.
        vae_batch: how many pictures are encoded and decoded at a time.
        zero_terminal_snr: use the noise schedule that ends in pure noise.
        zero_steps_offset: samplers that step through every n-th timestep start at 0 instead of 1.
    """

    batch_size: int = 1
    vae_batch: int = 1
    zero_terminal_snr: bool = False
    zero_steps_offset: bool = False


@dataclass(frozen=True, slots=True)
class _Job:
    """A request with its tokens."""

    request: PromptRequest
    inputs: PictureInputs
    seed: int
    prompt: TokenizedPrompt
    negative: TokenizedPrompt
    empty: TokenizedPrompt | None
    extension_keys: tuple[Hashable, ...]

    @property
    def guided(self) -> bool:
        """From 0 to 1 the scale means no guidance, as in diffusers, unless there is a scale for the negative prompt."""
        return self.empty is not None or not 0.0 <= self.request.scale <= 1.0

    @property
    def chunks(self) -> int:
        """How many chunks the longest of the texts that matter has."""
        texts = [self.prompt, self.negative] if self.guided else [self.prompt]
        return max(text.chunks for text in texts)

    @property
    def batch_key(self) -> tuple[Hashable, ...]:
        """Requests that agree in it can share a batch without changing each other's picture."""
        request = self.request
        guidance = (self.guided, self.empty is not None, self.chunks)
        return (request.width, request.height, request.steps, request.sampler, *guidance, *self.extension_keys)


class DiffusionRenderer:
    """Renders prompts with a family of latent diffusion models.

    All noise of a picture comes from a CPU generator seeded with the picture's seed, in the order in which a diffusers
    pipeline draws it, so a picture depends neither on the batch it is made in nor on any global generator. Modules must
    be in evaluation mode; the caller sees to that.
    """

    def __init__(
        self,
        family: ModelFamily,
        settings: RenderSettings | None = None,
        *,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        extensions: Sequence[Extension] = (),
        encoder: PromptEncoder | None = None,
    ) -> None:
        """Create the renderer; nothing is moved or loaded yet.

        Args:
            family: the model.
            settings: how pictures are made.
            autocast: makes the context in which encoders and denoiser run.
            extensions: what changes how pictures are made.
            encoder: turns prompts into conditions; None: one is made when the first picture is asked for.
        """
        self.family = family
        self.settings = settings or RenderSettings()
        self._autocast = autocast
        self._extensions = tuple(extensions)
        self._encoder = encoder

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

    def render(
        self,
        requests: Sequence[PromptRequest],
        inputs: Sequence[PictureInputs] | None = None,
        *,
        watch: Watch = UNWATCHED,
    ) -> list[Image]:
        """Return one picture per request, in the same order.

        Args:
            requests: what to make; every one must have its seed.
            inputs: what each picture is made from beside its prompt; None: nothing.
            watch: told and asked at every denoising step.

        Raises:
            RenderingStopped: `watch` said stop.
            NotFinite: the model produced values that are not numbers.
            UserError: a sampler is unknown or lacks its package, or an extension refuses a picture.
        """
        return self.finish(requests, inputs, self.decode(self.render_latents(requests, inputs, watch=watch)))

    @torch.no_grad()
    def render_latents(
        self,
        requests: Sequence[PromptRequest],
        inputs: Sequence[PictureInputs] | None = None,
        *,
        watch: Watch = UNWATCHED,
    ) -> list[Tensor]:
        """Return the scaled latents [C,h,w] of one picture per request; arguments and errors as for `render`."""
        encoder = self._encoder = self._encoder or PromptEncoder(self.family)
        given = zip(requests, filled(inputs, len(requests)), strict=True)
        jobs = [self._job(encoder, request, picture) for request, picture in given]
        return in_order(jobs, self.settings.batch_size, lambda batch: self._latents(batch, encoder, watch))

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> list[Image]:
        """Return one picture for each of the scaled latents [C,h,w], as they come out of the VAE.

        Raises:
            NotFinite: the VAE produced values that are not numbers.
        """
        pictures: list[Image] = []
        for group in alike(latents, self.settings.vae_batch):
            pictures.extend(to_picture(pixels) for pixels in self.family.decode(torch.stack(group)).float())
        return pictures

    def finish(
        self,
        requests: Sequence[PromptRequest],
        inputs: Sequence[PictureInputs] | None,
        pictures: Sequence[Image],
    ) -> list[Image]:
        """Return decoded pictures with what extensions do to them at the end."""
        finished = []
        for request, given, picture in zip(requests, filled(inputs, len(requests)), pictures, strict=True):
            for extension in self._extensions:
                picture = extension.finish(request, given, picture)
            finished.append(picture)
        return finished

    def _job(self, encoder: PromptEncoder, request: PromptRequest, inputs: PictureInputs) -> _Job:
        if request.seed is None:
            raise ValueError("a picture needs a seed before it is rendered")
        text = request.prompt
        for extension in self._extensions:
            text = extension.prompt(request, text)
        return _Job(
            request=request,
            inputs=inputs,
            seed=request.seed,
            prompt=encoder.tokenize(text),
            negative=encoder.tokenize(request.negative_prompt),
            empty=None if request.negative_scale is None else encoder.tokenize(""),
            extension_keys=tuple(extension.batch_key(request, inputs) for extension in self._extensions),
        )

    def _latents(self, batch: Sequence[_Job], encoder: PromptEncoder, watch: Watch) -> Tensor:
        device = device_of(self.family.denoiser)
        guided = self._guided(batch, encoder, device)
        context = self._context(batch, encoder, device, len(guided.branches))
        with ExitStack() as stack:
            active = [stack.enter_context(extension.begin(context)) for extension in self._extensions]
            hooks = reduce(HookChain, active) if active else None
            sampling = Sampling(context.scheduler, context.timesteps, context.generators)
            make = partial(_noise, context)
            start = make() if hooks is None else hooks.start(make)
            return denoise_latents(self._predictor(hooks), sampling, start, guided, hooks=hooks, watch=watch)

    def _guided(self, batch: Sequence[_Job], encoder: PromptEncoder, device: torch.device) -> Guided:
        """Encode the texts of a batch; encoders that are elsewhere come to the device for it."""
        chunks, guided = batch[0].chunks, batch[0].guided
        empty = [job.empty for job in batch if job.empty is not None]
        scales = torch.tensor([[job.request.scale, job.request.negative_scale or 0.0] for job in batch], device=device)
        with self._encoding(device):
            return Guided(
                condition=encoder.encode([job.prompt for job in batch], chunks, device),
                negative=encoder.encode([job.negative for job in batch], chunks, device) if guided else None,
                scale=scales[:, 0],
                empty=encoder.encode(empty, chunks, device) if empty else None,
                negative_scale=scales[:, 1] if empty else None,
            )

    @contextmanager
    def _encoding(self, device: torch.device) -> Iterator[None]:
        with self._autocast(), on_device(self.family.text_encoders, device):
            yield

    def _context(
        self, batch: Sequence[_Job], encoder: PromptEncoder, device: torch.device, branches: int
    ) -> BatchContext:
        spec, request = self.family.spec, batch[0].request
        scheduler = make_scheduler(
            request.sampler,
            spec.prediction_type,
            zero_terminal_snr=self.settings.zero_terminal_snr,
            zero_steps_offset=self.settings.zero_steps_offset,
        )
        scheduler.set_timesteps(request.steps)

        def encode(texts: Sequence[str], chunks: int | None = None) -> Condition:
            prompts = [encoder.tokenize(text) for text in texts]
            with self._encoding(device):
                return encoder.encode(prompts, chunks or max(prompt.chunks for prompt in prompts), device)

        down = spec.latent_downscale
        return BatchContext(
            family=self.family,
            device=device,
            requests=tuple(job.request for job in batch),
            inputs=tuple(job.inputs for job in batch),
            generators=tuple(picture_generator(job.seed) for job in batch),
            scheduler=scheduler,
            timesteps=scheduler.timesteps,
            latent_shape=(spec.latent_channels, request.height // down, request.width // down),
            branches=branches,
            vae_batch=self.settings.vae_batch,
            encode=encode,
        )

    def _predictor(self, hooks: StepHooks | None) -> Callable[[Moment, DenoiserInput], Tensor]:
        def predict(moment: Moment, call: DenoiserInput) -> Tensor:
            with self._autocast():
                control = None if hooks is None else hooks.control(moment, call)
                return self.family.denoise(call.noisy, call.t, call.condition, control)

        return predict


def _noise(batch: BatchContext) -> Tensor:
    """Return what a picture starts from that is made from nothing."""
    return initial_noise(batch.generators, batch.latent_shape, batch.device) * batch.scheduler.init_noise_sigma
