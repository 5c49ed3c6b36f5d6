"""Large pictures in two passes: a small one first, which settles what there is to see, then a large one from it.

Models repeat themselves in pictures much larger than those they were trained on. The small picture is enlarged, as
pixels or as latents, and the second pass starts from it like any picture that starts from another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from library.errors import UserError
from library.inference.diffusion import UNWATCHED, Watch
from library.inference.extensions import NO_INPUTS, PictureInputs
from library.inference.image_to_image import SIDE_STEP
from library.inference.inpainting import pasted

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.prompts import PromptRequest
    from library.inference.render import DiffusionRenderer

DEFAULT_FIRST_STEPS = 28


class Upscaler(Protocol):
    """What `create_upscaler` of an upscaler module returns."""

    def support_latents(self) -> bool:
        """Tell whether it enlarges latents rather than pictures."""

    upscale: Callable[..., list[Image] | Tensor]
    """Called with (vae, pictures or None, scaled latents [B,C,h,w] or None, type of the VAE, width, height, batch size,
    batch size of the VAE); returns pictures of that size in pixels, or their scaled latents."""


@dataclass(frozen=True, slots=True)
class HighresPictures:
    """What came out of the two passes; `first` only if it was asked for."""

    first: tuple[Image, ...]
    second: tuple[Image, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HighresFix:
    """How pictures are made in two passes.

    Attributes:
        scale: size of the first pass for a second one of 1.
        steps: denoising steps of the first pass; the second has those of the request.
        strength: strength of the first pass, for pictures that start from another; None: that of the request, which in
            any case is the strength of the second pass.
        latents: enlarge latents, by this filter; None: enlarge pixels by Lanczos' filter.
        upscaler: enlarges in place of either.
        second_guided: the second pass, too, follows guide pictures.
    """

    scale: float
    steps: int = DEFAULT_FIRST_STEPS
    strength: float | None = None
    latents: Literal["bilinear", "bicubic"] | None = None
    upscaler: Upscaler | None = None
    second_guided: bool = True

    def __post_init__(self) -> None:
        """Refuse a first pass that is larger than the second."""
        if not 0.0 < self.scale <= 1.0:
            raise UserError(f"the first pass cannot be {self.scale:g} of the size", "Give a number between 0 and 1.")

    def first_request(self, request: PromptRequest) -> PromptRequest:
        """Return what is asked of the first pass: sides of at least 64 pixels, cut down to multiples of 32."""
        width, height = (
            max(2 * SIDE_STEP, int(side * self.scale + 0.5) // SIDE_STEP * SIDE_STEP)
            for side in (request.width, request.height)
        )
        strength = request.strength if self.strength is None else self.strength
        return replace(request, width=width, height=height, steps=self.steps, strength=strength)

    def render(
        self,
        renderer: DiffusionRenderer,
        requests: Sequence[PromptRequest],
        inputs: Sequence[PictureInputs] | None = None,
        *,
        keep_first: bool = False,
        watch: Watch = UNWATCHED,
    ) -> HighresPictures:
        """Return one picture per request, and those of the first pass if they are wanted.

        The renderer needs the extension `ImageToImage`, and `Inpainting` for pictures with a mask.

        Args:
            renderer: makes the pictures.
            requests: sizes, steps and strengths are those of the second pass.
            inputs: what the first pass starts from; masks and regions hold for both.
            keep_first: return the pictures of the first pass as well.
            watch: told and asked at every denoising step of each pass.

        Raises:
            UserError: as `DiffusionRenderer.render`, or the upscaler returned something of another size.
        """
        given = [NO_INPUTS] * len(requests) if inputs is None else list(inputs)
        first_requests = [self.first_request(request) for request in requests]
        latents = renderer.render_latents(first_requests, given, watch=watch)
        small: list[Image] = []
        if keep_first or not self._stays_latent:
            small = renderer.finish(first_requests, given, renderer.decode(latents))
        large = self._enlarged(renderer, requests, small, latents)
        starts = [self._second_inputs(*pair) for pair in zip(given, large, strict=True)]
        second = renderer.render(requests, starts, watch=watch)
        return HighresPictures(tuple(small if keep_first else ()), tuple(second))

    @property
    def _stays_latent(self) -> bool:
        """Whether the second pass is made from the latents of the first without their picture."""
        return self.latents is not None if self.upscaler is None else self.upscaler.support_latents()

    def _second_inputs(self, inputs: PictureInputs, large: Image | Tensor) -> PictureInputs:
        """Return what the second pass starts from; under a mask the original is what is kept."""
        guides = inputs.guides if self.second_guided else ()
        if isinstance(large, Tensor):
            image = inputs.image if inputs.mask is not None else None
            return replace(inputs, image=image, latents=large, guides=guides)
        if inputs.mask is not None and inputs.image is not None:
            large = pasted(large, inputs.image, inputs.mask)
        return replace(inputs, image=large, latents=None, guides=guides)

    def _enlarged(
        self,
        renderer: DiffusionRenderer,
        requests: Sequence[PromptRequest],
        small: Sequence[Image],
        latents: Sequence[Tensor],
    ) -> Sequence[Image | Tensor]:
        """Return the first pass in the size of the second."""
        from PIL.Image import Resampling

        if self.upscaler is not None:
            source: Sequence[Image | Tensor] = latents if self._stays_latent else small
            return [
                _upscaled(renderer, self.upscaler, request, picture)
                for request, picture in zip(requests, source, strict=True)
            ]
        sizes = [(request.width, request.height) for request in requests]
        if self.latents is None:
            return [picture.resize(size, Resampling.LANCZOS) for picture, size in zip(small, sizes, strict=True)]
        down = renderer.family.spec.latent_downscale
        return [
            interpolate(picture[None], size=(height // down, width // down), mode=self.latents)[0]
            for picture, (width, height) in zip(latents, sizes, strict=True)
        ]


@torch.no_grad()
def _upscaled(
    renderer: DiffusionRenderer, upscaler: Upscaler, request: PromptRequest, picture: Image | Tensor
) -> Image | Tensor:
    """Let the module enlarge one picture by itself, so that it does not matter which ones it is made with."""
    vae, down = getattr(renderer.family, "vae", None), renderer.family.spec.latent_downscale
    dtype, size_wh = getattr(vae, "dtype", torch.float32), (request.width, request.height)
    source = (None, picture[None]) if isinstance(picture, Tensor) else ([picture], None)
    made = upscaler.upscale(getattr(vae, "model", None), *source, dtype, *size_wh, 1, 1)[0]
    got = (made.shape[-1] * down, made.shape[-2] * down) if isinstance(made, Tensor) else made.size
    if got != size_wh:
        what = f"the upscaler made {got[0]}x{got[1]} pixels of what was to become {size_wh[0]}x{size_wh[1]}"
        raise UserError(what, where=request.where)
    return made
