"""What may change a picture of Stable Cascade beside its prompt: a picture to start from, one to look like."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.inference.image_to_image import levels_of
from library.inference.rendering import Part, on_device

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.extensions import PictureInputs
    from library.inference.prompts import PromptRequest

EFFNET_STEP = 32
"""Pixels of a picture that one latent pixel of the EfficientNet stands for."""


@dataclass(frozen=True, slots=True)
class CascadeBatch:
    """B pictures of one size that are about to be made.

    Attributes:
        requests: the pictures.
        inputs: what each is made from.
        size_hw: of their latents.
        device: where networks run.
    """

    requests: tuple[PromptRequest, ...]
    inputs: tuple[PictureInputs, ...]
    size_hw: tuple[int, int]
    device: torch.device


Control = Callable[[float], Mapping[int, Tensor] | None]
"""Share of the steps that is done -> residuals [B,c,h,w] by the number of the block of stage C, or nothing."""


class CascadeExtension:
    """Changes how pictures are made; every method may be left as it is here, where it changes nothing."""

    def batch_key(self, request: PromptRequest, inputs: PictureInputs) -> Hashable:
        """Return what pictures must agree in to share a batch.

        Raises:
            UserError: this picture cannot be made as it is asked for.
        """
        return ()

    def start(self, batch: CascadeBatch) -> Tensor | None:
        """Return the latents [B,16,h,w] of stage C to start from, without noise."""
        return None

    def image(self, batch: CascadeBatch) -> Tensor | None:
        """Return the embeddings [B,768] of pictures that the results shall look like."""
        return None

    def control(self, batch: CascadeBatch) -> Control | None:
        """Return what gives residuals for stage C."""
        return None


class StartPictures(CascadeExtension):
    """Starts from `PictureInputs.image`, which the EfficientNet sees at three quarters of the size of the result.

    Args:
        effnet: the encoder.
    """

    def __init__(self, effnet: Part) -> None:
        self._effnet = effnet

    def batch_key(self, request: PromptRequest, inputs: PictureInputs) -> bool:
        """Return whether the picture starts from another one."""
        return inputs.image is not None

    def start(self, batch: CascadeBatch) -> Tensor | None:
        """Return the latents of the pictures."""
        images = [given.image for given in batch.inputs if given.image is not None]
        if not images:
            return None
        height, width = (side * EFFNET_STEP for side in batch.size_hw)
        pixels = torch.stack([pixels_of(image, (width, height)) for image in images]).to(batch.device)
        effnet = self._effnet.model
        with on_device([effnet], batch.device):
            return torch.cat([effnet(one) for one in pixels.split(1)]).float()


class ImageVariation(CascadeExtension):
    """Lets `PictureInputs.image` say what is to be seen, as an embedding beside that of the prompt.

    Args:
        encoder: CLIP's image encoder.
    """

    def __init__(self, encoder: Part) -> None:
        self._encoder = encoder

    def batch_key(self, request: PromptRequest, inputs: PictureInputs) -> bool:
        """Return whether the picture shall look like another one."""
        return inputs.image is not None

    def image(self, batch: CascadeBatch) -> Tensor | None:
        """Return the embeddings of the pictures."""
        from library.models.cascade.vision import embed_images

        images = [given.image for given in batch.inputs if given.image is not None]
        if not images:
            return None
        encoder = self._encoder.model
        with on_device([encoder], batch.device):
            embed = partial(embed_images, encoder)
            return torch.cat([embed(pixels_of(image)[None].to(batch.device)) for image in images]).float()


def pixels_of(image: Image, size_wh: tuple[int, int] | None = None) -> Tensor:
    """Return pixels [3,H,W] in [0,1] of a picture, brought to a size if one is given."""
    levels: Any = levels_of(image.convert("RGB"), size_wh or image.size)
    return levels.permute(2, 0, 1)
