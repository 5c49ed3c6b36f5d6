"""Pictures of which a part is painted anew: where the mask is white.

For ordinary models the kept part is put back after every step with the noise of that step (RePaint without its
repetitions, https://arxiv.org/abs/2201.09865, equation 8), in the form and with the order of random draws of diffusers'
`StableDiffusionInpaintPipeline`. Models made for inpainting (9 input channels) see the mask and what is kept instead.
Grey is a share of both. In the finished picture the kept pixels are those of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from library.errors import UserError
from library.inference.diffusion import initial_noise, repeated
from library.inference.extensions import Extension, StepHooks
from library.inference.image_to_image import (
    encode,
    levels_of,
    noised,
    picture_latents,
    pixels_of,
    read_picture,
    skip_to_strength,
    strength_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.extensions import BatchContext, DenoiserInput, Moment, PictureInputs
    from library.inference.prompts import PromptRequest


def read_mask(path: str | Path) -> Image:
    """Read a mask, upright by its EXIF orientation, as grey levels: white is painted anew.

    Raises:
        BadImage: the file is missing or no picture (a `UserError`).
    """
    return read_picture(path).convert("L")


_HALF = 0.5
"""Pixels whose mask is darker are shown to models made for inpainting."""


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
        """Leave out the steps for which there would be more noise than the strength says.

        Raises:
            UserError: a model made for inpainting has no mask.
        """
        sees_mask = _input_channels(batch.family.denoiser) > batch.latent_shape[0]
        if batch.inputs[0].mask is not None:
            skip_to_strength(batch)
            yield _SeeHooks(batch) if sees_mask else _KeepHooks(batch)
        elif sees_mask:
            what = "this is a model for inpainting, which needs a picture and a mask"
            raise UserError(what, "Give --image_path and --mask_path.", where=batch.requests[0].where)
        else:
            yield StepHooks()

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


def _input_channels(denoiser: Any) -> int:
    config = getattr(denoiser, "config", None)
    return getattr(config, "in_channels", 0)


class _MaskHooks(StepHooks):
    """Starts from the noised picture: what both ways of inpainting share."""

    def __init__(self, batch: BatchContext) -> None:
        self.batch = batch
        self._size_wh = batch.requests[0].width, batch.requests[0].height
        masks = [inputs.mask.convert("L") for inputs in batch.inputs if inputs.mask is not None]
        self.levels = torch.stack([levels_of(mask, self._size_wh) for mask in masks])[:, None]
        self.mask = interpolate(self.levels, size=batch.latent_shape[1:]).to(batch.device)
        """1 where the picture is painted anew, [B,1,h,w]."""
        self.strength = strength_of(batch.requests[0])

    def noise(self) -> Tensor:
        """Draw noise of the shape of the latents."""
        return initial_noise(self.batch.generators, self.batch.latent_shape, self.batch.device)

    def noised_start(self, latents: Tensor | None, noise: Tensor) -> Tensor:
        """Return what the loop starts from: at full strength nothing but noise."""
        if self.strength == 1 or latents is None:
            return noise * self.batch.scheduler.init_noise_sigma
        return noised(self.batch, latents, noise)

    def pixels(self) -> Tensor:
        """Return the pictures [B,3,H,W] in [-1,1]."""
        images = [inputs.image for inputs in self.batch.inputs if inputs.image is not None]
        return torch.stack([pixels_of(image, self._size_wh) for image in images])


class _KeepHooks(_MaskHooks):
    """Puts the kept part back, with the right amount of noise, after every step."""

    def __init__(self, batch: BatchContext) -> None:
        super().__init__(batch)
        self._latents = self._noise = torch.empty(0)

    def start(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the noised pictures and remember what they are made of."""
        self._latents = picture_latents(self.batch)
        self._noise = self.noise()
        self.noise()  # the pipeline encodes the masked picture here, for whatever model: later draws are to agree
        return self.noised_start(self._latents, self._noise)

    def advance(
        self, moment: Moment, prediction: Tensor, latents: Tensor, advance: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Return the painted part of the step's outcome and the kept part of the original."""
        painted, kept, following = advance(prediction, latents), self._latents, moment.index + 1
        if following < moment.total:
            kept = noised(self.batch, kept, self._noise, following)
        return (1 - self.mask) * kept + self.mask * painted


class _SeeHooks(_MaskHooks):
    """Shows the mask and what is kept to a model that was made for it: 4 + 1 + 4 channels."""

    def __init__(self, batch: BatchContext) -> None:
        super().__init__(batch)
        self._seen = torch.empty(0)

    def start(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the noised pictures and encode what is kept of them."""
        latents = None if self.strength == 1 else picture_latents(self.batch)
        noise = self.noise()
        kept = encode(self.batch, self.pixels() * (self.levels < _HALF))
        self._seen = repeated(torch.cat([self.mask, kept], dim=1), self.batch.branches)
        return self.noised_start(latents, noise)

    def predict(self, moment: Moment, call: DenoiserInput, predict: Callable[[DenoiserInput], Tensor]) -> Tensor:
        """Return the prediction of the model, which gets all nine channels."""
        return predict(replace(call, noisy=torch.cat([call.noisy, self._seen], dim=1)))
