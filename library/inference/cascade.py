"""Pictures of Stable Cascade: stage C makes small latents from a prompt, and a decoder makes the picture from them.

Stage C was trained on pictures at three quarters of the size of those that it is used for, and its encoder compresses
by 32: one of its latent pixels stands for 128/3 pixels of a result.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from library.inference.cascade_extensions import CascadeBatch, CascadeExtension, Control
from library.inference.cascade_samplers import SAMPLERS
from library.inference.cascade_sampling import (
    Denoiser,
    SamplingPlan,
    composed,
    noised_start,
    sample_latents,
    start_noise,
)
from library.inference.diffusion import UNWATCHED, Watch, join_conditions, picture_generator
from library.inference.prompt_options import CASCADE_SAMPLES
from library.inference.prompt_text import PromptEncoder, TokenizedPrompt, split_parts
from library.inference.prompts import PromptRequest
from library.inference.rendering import device_of, filled, in_order, on_device
from library.models.cascade.unet import StageInputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.contracts import Condition
    from library.inference.extensions import PictureInputs
    from library.models.family import ModelFamily

_COMPRESSION = (128, 3)
"""Pixels of a result for one latent pixel of stage C, as a fraction."""

CASCADE_DEFAULTS = PromptRequest(prompt="", width=1024, height=1024, steps=20, scale=4.0, sampler=SAMPLERS[0])
"""What prompts of Stable Cascade leave open."""


def latent_size(width: int, height: int) -> tuple[int, int]:
    """Return (h, w) of the latents of stage C for a picture of this size.

    >>> latent_size(1024, 768)
    (18, 24)
    """
    pixels, latents = _COMPRESSION
    return -(-height * latents // pixels), -(-width * latents // pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeSettings:
    """How latents of stage C are made, whatever they show.

    Attributes:
        batch_size: how many pictures of equal size and settings are made at a time.
        shift: of the noise schedule, where a prompt gives none.
        cfg_rho: share of a guided prediction that is brought back to the deviation of the unguided one.
        cfg_t_start: guide from this time on (1 is pure noise).
        cfg_t_stop: guide up to this time.
        sampler: of all pictures; None: the one that each asks for.
        composes: the word AND in a prompt separates parts, which are drawn together.
        steers_prompt_only: ControlNets leave the predictions for negative prompts alone.
    """

    batch_size: int = 1
    shift: float = 2.0
    cfg_rho: float = 0.7
    cfg_t_start: float = 1.0
    cfg_t_stop: float = 0.0
    sampler: str | None = None
    composes: bool = False
    steers_prompt_only: bool = False


@dataclass(frozen=True, slots=True)
class CascadeLatents:
    """What stage C made of one request, and what a decoder may need beside it.

    Attributes:
        request: the picture.
        latents: [16,h,w] float32.
        pooled: embedding [P] of the prompt.
        negative: embedding [P] of the negative prompt.
        generator: of the picture; further noise is drawn from it.
    """

    request: PromptRequest
    latents: Tensor
    pooled: Tensor
    negative: Tensor
    generator: torch.Generator

    @property
    def batch_key(self) -> Hashable:
        """Pictures of one size can be decoded together."""
        return self.request.width, self.request.height


class Decoder(Protocol):
    """Makes pictures from latents of stage C."""

    @property
    def steps(self) -> int:
        """How many denoising steps it takes."""

    def session(self) -> AbstractContextManager[None]:
        """Return the context in which what decoding loads stays in memory."""

    def decode(self, made: Sequence[CascadeLatents], watch: Watch) -> list[Image]:
        """Return one picture for each, in the same order.

        Raises:
            RenderingStopped: `watch` said stop.
            NotFinite: a network produced values that are not numbers.
        """


@dataclass(frozen=True, slots=True)
class _Job:
    """A request with the tokens of its parts and of its negative prompt."""

    request: PromptRequest
    inputs: PictureInputs
    plan: SamplingPlan
    parts: tuple[TokenizedPrompt, ...]
    negative: TokenizedPrompt
    extension_keys: tuple[Hashable, ...]

    @property
    def chunks(self) -> int:
        """How many chunks the longest of the texts that matter has."""
        texts = [*self.parts, self.negative] if self.plan.guided else self.parts
        return max(text.chunks for text in texts)

    @property
    def batch_key(self) -> Hashable:
        """Requests that agree in it can share a batch without changing each other's picture."""
        return self.request.width, self.request.height, self.plan, len(self.parts), self.chunks, self.extension_keys


class CascadeRenderer:
    """Renders prompts with stage C and a decoder.

    All noise of a picture comes from a CPU generator seeded with the picture's seed: the start of stage C, its steps,
    then stage B. So a picture depends neither on the batch it is made in nor on any global generator. Modules must be
    in evaluation mode. Those that wait on another device come for as long as they are used, and go back.
    """

    sample_defaults = CASCADE_DEFAULTS
    """What prompts of sample pictures leave open."""
    sample_place = CASCADE_SAMPLES
    """The options that they may have."""

    def __init__(
        self,
        family: ModelFamily,
        decoder: Decoder,
        settings: CascadeSettings | None = None,
        *,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        extensions: Sequence[CascadeExtension] = (),
        encoder: PromptEncoder | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Create the renderer; nothing is moved or loaded yet.

        Args:
            family: stage C as denoiser, its tokenizer and text encoder.
            decoder: makes the pictures.
            settings: how latents are made.
            autocast: makes the context in which text encoder and stage C run.
            extensions: what changes how pictures are made.
            encoder: turns prompts into conditions; None: one is made when the first picture is asked for.
            device: where networks run; None: where stage C is.
        """
        self.family = family
        self.decoder = decoder
        self.settings = settings or CascadeSettings()
        self._autocast = autocast
        self._extensions = tuple(extensions)
        self._encoder = encoder
        self._device = device

    def extended(self, *extensions: CascadeExtension) -> CascadeRenderer:
        """Return a renderer that is like this one and has further extensions."""
        other = copy(self)
        other._extensions = (*self._extensions, *extensions)
        return other

    def session(self) -> AbstractContextManager[None]:
        """Keep what rendering loads until the end, then free it unless it was loaded before."""
        return self.decoder.session()

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
            NotFinite: a network produced values that are not numbers.
            UserError: an extension refuses a picture.
        """
        steps = max((request.steps for request in requests), default=0)
        made = self.render_latents(requests, inputs, watch=part_of(watch, 0, steps + self.decoder.steps))
        return self.decoder.decode(made, part_of(watch, steps, steps + self.decoder.steps))

    @torch.no_grad()
    def render_latents(
        self,
        requests: Sequence[PromptRequest],
        inputs: Sequence[PictureInputs] | None = None,
        *,
        watch: Watch = UNWATCHED,
    ) -> list[CascadeLatents]:
        """Return the latents of stage C, one per request; arguments and errors as for `render`."""
        encoder = self._encoder = self._encoder or PromptEncoder(self.family)
        given = zip(requests, filled(inputs, len(requests)), strict=True)
        jobs = [self._job(encoder, request, picture) for request, picture in given]
        return in_order(jobs, self.settings.batch_size, lambda batch: self._latents(batch, encoder, watch))

    def plan(self, request: PromptRequest) -> SamplingPlan:
        """Return how the latents of a request are made."""
        settings = self.settings
        return SamplingPlan(
            steps=request.steps,
            cfg=request.scale if request.scale_end is None else (request.scale, request.scale_end),
            cfg_rho=settings.cfg_rho,
            shift=settings.shift if request.shift is None else request.shift,
            t_start=1.0 if request.strength is None else request.strength,
            cfg_t_start=settings.cfg_t_start,
            cfg_t_stop=settings.cfg_t_stop,
            sampler=settings.sampler or request.sampler,
        )

    def _job(self, encoder: PromptEncoder, request: PromptRequest, inputs: PictureInputs) -> _Job:
        if request.seed is None:
            raise ValueError("a picture needs a seed before it is rendered")
        parts = split_parts(request.prompt) if self.settings.composes else [request.prompt]
        return _Job(
            request=request,
            inputs=inputs,
            plan=self.plan(request),
            parts=tuple(encoder.tokenize(text) for text in parts),
            negative=encoder.tokenize(request.negative_prompt),
            extension_keys=tuple(extension.batch_key(request, inputs) for extension in self._extensions),
        )

    def _latents(self, jobs: Sequence[_Job], encoder: PromptEncoder, watch: Watch) -> Iterator[CascadeLatents]:
        device = self._device or device_of(self.family.denoiser)
        plan = jobs[0].plan
        requests = tuple(job.request for job in jobs)
        size_hw = latent_size(requests[0].width, requests[0].height)
        batch = CascadeBatch(requests, tuple(job.inputs for job in jobs), size_hw, device)
        texts = self._texts(jobs, encoder, device)
        images = [image for extension in self._extensions if (image := extension.image(batch)) is not None]
        starts = [start for extension in self._extensions if (start := extension.start(batch)) is not None]
        generators = [picture_generator(request.seed or 0) for request in requests]
        noise_shape = (_channels(self.family.denoiser), *size_hw)
        if starts:
            start = noised_start(starts[0], plan, generators)
        else:
            start = start_noise(generators, noise_shape, device)
        controls = [control for extension in self._extensions if (control := extension.control(batch)) is not None]
        inputs = _inputs(texts, images[0] if images else None)
        denoise = composed(self._denoiser(inputs, controls, plan, len(jobs)), len(texts) - 1, len(jobs))
        with on_device([self.family.denoiser], device):
            latents = sample_latents(denoise, plan, generators, start, watch=watch)
        *parts, negative = (_pooled(text).float() for text in texts)
        # Stage B gets one text: what the parts have in common.
        prompt = torch.stack(parts).mean(0)
        for row, request in enumerate(requests):
            yield CascadeLatents(request, latents[row], prompt[row], negative[row], generators[row])

    def _texts(self, jobs: Sequence[_Job], encoder: PromptEncoder, device: torch.device) -> list[Condition]:
        """Return the conditions of each part of the prompts, and those of the negative prompts."""
        texts = [*zip(*(job.parts for job in jobs), strict=True), [job.negative for job in jobs]]
        with self._autocast(), on_device(self.family.text_encoders, device):
            return [encoder.encode(prompts, jobs[0].chunks, device) for prompts in texts]

    def _denoiser(
        self, inputs: StageInputs, controls: Sequence[Control], plan: SamplingPlan, pictures: int
    ) -> Denoiser:
        """Return stage C with its conditions: those of the prompts, behind them those of the negative prompts."""
        done, most = 0, len(inputs.pooled)

        def denoise(latents: Tensor, ratio: Tensor) -> Tensor:
            nonlocal done
            residuals = [found for control in controls if (found := control(done / plan.steps)) is not None]
            done += 1
            rows = len(latents)
            given = StageInputs(*(None if value is None else value[:rows] for value in inputs))  # type: ignore[arg-type]
            left_alone = pictures if self.settings.steers_prompt_only and rows == most else 0
            with self._autocast():
                return self.family.denoiser(latents, ratio, given, control=_joined(residuals, rows, left_alone))

        return denoise


def part_of(watch: Watch, before: int, total: int) -> Watch:
    """Return what watches a part of the work, of which `before` of `total` steps are done when it begins."""
    told = watch.progress
    return Watch(watch.should_stop, None if told is None else lambda done, _: told(before + done, total))


def _channels(denoiser: nn.Module) -> int:
    return int(denoiser.config.channels)  # type: ignore[union-attr,arg-type]


def _pooled(condition: Condition) -> Tensor:
    if condition.pooled is None:
        raise TypeError("the text encoder of Stable Cascade has a pooled output")
    return condition.pooled


def _inputs(texts: Sequence[Condition], image: Tensor | None) -> StageInputs:
    """Return the conditions of all branches, the negative prompt's last; without prompt there is no image either."""
    together = reduce(join_conditions, texts)
    images = None if image is None else torch.cat([*[image] * (len(texts) - 1), torch.zeros_like(image)])
    return StageInputs(_pooled(together), text=together.hidden, image=images)


def _joined(residuals: Sequence[Mapping[int, Tensor]], rows: int, left_alone: int) -> dict[int, Tensor] | None:
    """Return the sum of residuals, repeated for all branches; so many rows at the end get none."""
    from library.models.cascade.control_net import add_controls

    if not residuals:
        return None
    total = {block: value.repeat(rows // len(value), 1, 1, 1) for block, value in add_controls(residuals).items()}
    for value in total.values() if left_alone else ():
        value[-left_alone:] = 0
    return total
