"""From a picture file to what a captioning model sees; runs in loader processes, so torch is imported late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library.data.images import Pixels, load_image

if TYPE_CHECKING:
    from torch import Tensor

_REDUCE_ABOVE = 4_000_000
"""Pixels from which on a JPEG is decoded at a half, a quarter or an eighth, never below twice the size needed."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3

_PLAIN_PROCESSORS = ("BlipImageProcessor", "CLIPImageProcessor", "ViTImageProcessor", "DeiTImageProcessor")
_ENDINGS = ("", "Fast", "Pil")


@dataclass(frozen=True)
class ImageRecipe:
    """Resize, cut, scale and normalise, as most image encoders want it. Called with a path, it gives uint8 [H, W, 3].

    Attributes:
        size_wh: the picture is squashed to this size; None: `shortest` counts.
        shortest: length of its shorter side, with the shape kept.
        crop_wh: what is cut out of its middle afterwards; None: nothing is.
        resample: number of Pillow's filter.
        scale: factor from 0..255 to what `mean` and `std` refer to.
        mean: of each channel, subtracted.
        std: of each channel, divided by.
    """

    size_wh: tuple[int, int] | None = None
    shortest: int | None = None
    crop_wh: tuple[int, int] | None = None
    resample: int = _BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, path: Path) -> Pixels:
        """Load and shrink a picture.

        Raises:
            BadImage: it cannot be used.
        """
        from PIL import Image

        wanted = self.size_wh or (self.shortest or 1,) * 2
        pixels = load_image(path, enough_wh=wanted, reduce_above=_REDUCE_ABOVE)
        picture = Image.fromarray(pixels)
        picture = picture.resize(self._resized(picture.size), resample=Image.Resampling(self.resample))
        if self.crop_wh is not None:
            # Pillow fills with black what lies outside the picture.
            left, top = ((have - want) // 2 for have, want in zip(picture.size, self.crop_wh, strict=True))
            picture = picture.crop((left, top, left + self.crop_wh[0], top + self.crop_wh[1]))
        return np.asarray(picture)

    def pixel_values(self, pictures: Sequence[Pixels]) -> Tensor:
        """Return normalised float32 pictures [B, 3, H, W]."""
        import torch

        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() * self.scale
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.size_wh is not None:
            return self.size_wh
        if self.shortest is None:
            return size
        short, long = min(size), max(size)
        longer = int(self.shortest * long / short)
        return (self.shortest, longer) if size[0] <= size[1] else (longer, self.shortest)


def recipe_of(processor: Any) -> ImageRecipe | None:
    """Return what an image processor of transformers does as a recipe; None when it does more than that."""
    if type(processor).__name__ not in {name + ending for name in _PLAIN_PROCESSORS for ending in _ENDINGS}:
        return None
    if not (processor.do_resize and processor.do_rescale and processor.do_normalize):
        return None
    size = _sizes(processor.size)
    crop = _sizes(getattr(processor, "crop_size", None)) if getattr(processor, "do_center_crop", False) else {}
    if not ({"height", "width"} <= set(size) or "shortest_edge" in size):
        return None
    return ImageRecipe(
        size_wh=(size["width"], size["height"]) if "width" in size else None,
        shortest=size.get("shortest_edge"),
        crop_wh=(crop["width"], crop["height"]) if crop else None,
        resample=int(processor.resample),
        scale=float(processor.rescale_factor),
        mean=tuple(map(float, processor.image_mean)),
        std=tuple(map(float, processor.image_std)),
    )


def _sizes(size: Any) -> Mapping[str, int]:
    if size is None:
        return {}
    if isinstance(size, int):
        return {"height": size, "width": size}
    names = ("height", "width", "shortest_edge")
    table = size if isinstance(size, Mapping) else vars(size)
    return {name: int(table[name]) for name in names if table.get(name) is not None}


def decoded(path: Path) -> Pixels:
    """Load a picture for models with a processor of their own: uint8 [H, W, 3], huge JPEGs reduced.

    Raises:
        BadImage: it cannot be used.
    """
    return load_image(path, enough_wh=(1344, 1344), reduce_above=4 * _REDUCE_ABOVE)
