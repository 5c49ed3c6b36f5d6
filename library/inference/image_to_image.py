"""Pictures that start from a picture: it is encoded, noised as far as the strength says, and denoised from there.

SDEdit (https://arxiv.org/abs/2108.01073) in the form, and with the order of random draws, of diffusers'
`StableDiffusionImg2ImgPipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.errors import UserError
from library.inference.diffusion import initial_noise
from library.inference.extensions import Extension, StepHooks

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.extensions import BatchContext, PictureInputs
    from library.inference.prompts import PromptRequest

DEFAULT_STRENGTH = 0.8
SIDE_STEP = 32
"""Sides of a picture that is made from another are multiples of it, cut down from those of the original."""


def read_picture(path: str | Path) -> Image:
    """Read a picture to start from, upright by its EXIF orientation, as RGB.

    Raises:
        BadImage: the file is missing or no picture (a `UserError`).
    """
    from PIL import Image as ImageModule

    from library.data.images import load_image

    return ImageModule.fromarray(load_image(path))


def size_from(picture: Image, where: str) -> tuple[int, int]:
    """Return (width, height) of what is made from `picture`: its own size, cut down to multiples of 32.

    Raises:
        UserError: a side is shorter than 32 pixels; `where` names the picture.
    """
    width, height = (side - side % SIDE_STEP for side in picture.size)
    if not width or not height:
        what = f"is {picture.size[0]}x{picture.size[1]}, too small to start from"
        raise UserError(what, f"Sides need {SIDE_STEP} pixels or more.", where=where)
    return width, height


def strength_of(request: PromptRequest) -> float:
    """Return how much of the picture is painted anew, above 0 up to 1.

    Raises:
        UserError: it is out of range, or so small that none of the steps is left.
    """
    strength = DEFAULT_STRENGTH if request.strength is None else request.strength
    if not 0.0 <= strength <= 1.0:
        raise UserError(f"strength {strength:g} is not from 0 to 1", where=request.where)
    if int(request.steps * strength) < 1:
        what = f"strength {strength:g} of {request.steps} steps leaves none to paint with"
        raise UserError(what, f"Give a strength of {1 / request.steps:.2g} or more.", where=request.where)
    return strength


class ImageToImage(Extension):
    """Starts from `PictureInputs.image` or `.latents`; those with a mask are left to `Inpainting`."""

    def batch_key(self, request: PromptRequest, inputs: PictureInputs) -> float | None:
        """Return the strength, or None for a picture that starts from noise.

        Raises:
            UserError: the strength cannot be used.
        """
        return strength_of(request) if _starts_from_picture(inputs) else None

    @contextmanager
    def begin(self, batch: BatchContext) -> Iterator[StepHooks]:
        """Leave out the steps for which there would be more noise than the strength says."""
        if _starts_from_picture(batch.inputs[0]):
            skip_to_strength(batch)
            yield _StartHooks(batch)
        else:
            yield StepHooks()


class _StartHooks(StepHooks):
    """Replaces the noise at the start by the noised picture."""

    def __init__(self, batch: BatchContext) -> None:
        self._batch = batch

    def start(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the pictures with the noise of the first timestep."""
        batch = self._batch
        latents = picture_latents(batch)
        return noised(batch, latents, initial_noise(batch.generators, batch.latent_shape, batch.device))


def _starts_from_picture(inputs: PictureInputs) -> bool:
    return inputs.mask is None and (inputs.image is not None or inputs.latents is not None)


def skip_to_strength(batch: BatchContext) -> None:
    """Leave out the steps at the start that the strength does not reach."""
    request = batch.requests[0]
    batch.skip_steps(request.steps - int(request.steps * strength_of(request)))


def noised(batch: BatchContext, latents: Tensor, noise: Tensor, index: int = 0) -> Tensor:
    """Return `latents` [B,C,h,w] with as much of `noise` as belongs to entry `index` of the batch's timesteps."""
    return batch.scheduler.add_noise(latents, noise, batch.timesteps[index].repeat(len(latents)))


def picture_latents(batch: BatchContext) -> Tensor:
    """Return scaled latents [B,C,h,w] of the pictures to start from; those given as latents are taken as they are.

    Pictures are encoded to a sample of the posterior with noise of their own generators.
    """
    given = [inputs.latents for inputs in batch.inputs if inputs.latents is not None]
    if len(given) == len(batch.inputs):
        return torch.stack([latents.to(batch.device, torch.float32) for latents in given])
    size_wh = batch.requests[0].width, batch.requests[0].height
    images = [inputs.image for inputs in batch.inputs if inputs.image is not None]
    pixels = torch.stack([pixels_of(image, size_wh) for image in images])
    noise = initial_noise(batch.generators, batch.latent_shape, batch.device)
    groups = zip(pixels.split(batch.vae_batch), noise.split(batch.vae_batch), strict=True)
    latents = torch.cat([batch.family.encode_latents(*group) for group in groups])
    return batch.family.scale_latents(latents)


def pixels_of(image: Image, size_wh: Sequence[int]) -> Tensor:
    """Return pixels [3,H,W] in [-1,1] of a picture, brought to the size by Lanczos' filter where it has another."""
    levels = levels_of(image.convert("RGB"), size_wh)
    return levels.permute(2, 0, 1) * 2 - 1


def levels_of(image: Image, size_wh: Sequence[int]) -> Tensor:
    """Return levels in [0,1], [H,W,3] or [H,W] as the mode of the picture is, at the given size."""
    import numpy as np
    from PIL import Image as ImageModule

    width, height = size_wh
    if image.size != (width, height):
        image = image.resize((width, height), ImageModule.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255)
