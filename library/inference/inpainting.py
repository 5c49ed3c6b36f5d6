"""Pictures of which a part is painted anew: where the mask is white.

After every step the kept part is put back with the noise of that step (RePaint without its repetitions,
https://arxiv.org/abs/2201.09865, equation 8), in the form and with the order of random draws of diffusers'
`StableDiffusionInpaintPipeline` for models with 4 input channels. Grey is a share of both. In the finished picture the
kept pixels are those of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from library.errors import UserError
from library.inference.diffusion import initial_noise
from library.inference.extensions import Extension, StepHooks
from library.inference.image_to_image import (
    levels_of,
    noised,
    picture_latents,
    skip_to_strength,
    strength_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.extensions import BatchContext, Moment, PictureInputs
    from library.inference.prompts import PromptRequest


class Inpainting(Extension):
    """Paints `PictureInputs.image` anew where `.mask` is white."""

    def __init__(self, *, paste: bool = True) -> None:
        """Create it; with `paste` the kept pixels of the original are put into the finished picture."""
        self._paste = paste

    def batch_key(self, request: PromptRequest, inputs: PictureInputs) -> float | None:
        """Return the strength, or None for a picture without mask.

        Raises:
            UserError: the strength cannot be used, there is no picture to the mask, or nothing white in it.
        """
        if inputs.mask is None:
            return None
        if inputs.image is None:
            raise UserError("a mask needs a picture that it belongs to", where=request.where)
        if not inputs.mask.convert("L").getbbox():
            raise UserError("the mask is black: nothing is to be painted", "White is painted.", where=request.where)
        return strength_of(request)

    @contextmanager
    def begin(self, batch: BatchContext) -> Iterator[StepHooks]:
        """Leave out the steps for which there would be more noise than the strength says."""
        if batch.inputs[0].mask is None:
            yield StepHooks()
        else:
            skip_to_strength(batch)
            yield _KeepHooks(batch)

    def finish(self, request: PromptRequest, inputs: PictureInputs, picture: Image) -> Image:
        """Put the kept pixels of the original into the picture."""
        if inputs.mask is None or inputs.image is None or not self._paste:
            return picture
        return pasted(picture, inputs.image, inputs.mask)


def pasted(picture: Image, original: Image, mask: Image) -> Image:
    """Return `picture` with the pixels of `original` where `mask` is black; both are brought to the picture's size."""
    from PIL import Image as ImageModule

    filtering = ImageModule.Resampling.LANCZOS
    kept, grey = (
        image if image.size == picture.size else image.resize(picture.size, filtering)
        for image in (original.convert("RGB"), mask.convert("L"))
    )
    return ImageModule.composite(picture, kept, grey)


class _KeepHooks(StepHooks):
    """Starts from the noised pictures and puts the kept part back, with the right amount of noise, after every step."""

    def __init__(self, batch: BatchContext) -> None:
        self._batch = batch
        size_wh = batch.requests[0].width, batch.requests[0].height
        masks = [inputs.mask.convert("L") for inputs in batch.inputs if inputs.mask is not None]
        levels = torch.stack([levels_of(mask, size_wh) for mask in masks])[:, None]
        self._mask = interpolate(levels, size=batch.latent_shape[1:]).to(batch.device)
        self._latents = self._noise = torch.empty(0)

    def start(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the noised pictures, or at full strength nothing but noise, and remember what they are made of."""
        batch = self._batch
        self._latents, self._noise = picture_latents(batch), self._draw()
        self._draw()  # The pipeline encodes the masked picture here, needed or not: later draws are to agree.
        if strength_of(batch.requests[0]) == 1:
            return self._noise * batch.scheduler.init_noise_sigma
        return noised(batch, self._latents, self._noise)

    def _draw(self) -> Tensor:
        return initial_noise(self._batch.generators, self._batch.latent_shape, self._batch.device)

    def advance(
        self, moment: Moment, prediction: Tensor, latents: Tensor, advance: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Return the painted part of the step's outcome and the kept part of the original."""
        painted, kept, following = advance(prediction, latents), self._latents, moment.index + 1
        if following < moment.total:
            kept = noised(self._batch, kept, self._noise, following)
        return (1 - self._mask) * kept + self._mask * painted
