"""Regions of a picture: read from colours, and brought to the size of any layer of the denoiser."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_CHANNELS = 3
_MOST_CODES = 7


def region_masks(picture: Image, parts: int, size_wh: tuple[int, int], colour_codes: int | None = None) -> Tensor:
    """Return where the parts of a prompt hold, [parts,H,W] in [0,1].

    Red, green and blue say where the first, second and third part hold; channels may overlap and have shades. With
    colour codes regions have colours instead: the number of the part, written in binary, says which of red (1), green
    (2) and blue (4) are full: 1 red, 2 green, 3 yellow, 4 blue, 5 magenta, 6 cyan, 7 white.

    Later parts hold everywhere, and so does one whose region is empty.

    Args:
        picture: of the regions; any size.
        parts: number of parts.
        size_wh: of the picture to be made.
        colour_codes: how many parts have colours (7 at most); None: channels.
    """
    import numpy as np
    from PIL import Image as ImageModule

    # Between two colours of a code may lie a third: such pictures are enlarged without mixing.
    how = ImageModule.Resampling.BILINEAR if colour_codes is None else ImageModule.Resampling.NEAREST
    levels = torch.from_numpy(np.array(picture.convert("RGB").resize(size_wh, how), np.float32)).permute(2, 0, 1) / 255
    regions = _CHANNELS if colour_codes is None else min(colour_codes, _MOST_CODES)
    masks = torch.ones(parts, *levels.shape[1:])
    for number in range(min(parts, regions)):
        mask = levels[number] if colour_codes is None else _coded(levels > 0.5, number + 1)
        if bool(mask.any()):
            masks[number] = mask
        else:
            logger.warning("the picture of regions has none for part %d, which holds everywhere now", number + 1)
    return masks


def _coded(full: Tensor, code: int) -> Tensor:
    wanted = torch.tensor([code & 1, code & 2, code & 4]).bool()
    return (full == wanted[:, None, None]).all(0).float()


class Regions:
    """Where the parts of B prompts hold, and which part is being read at the moment.

    Args:
        masks: [parts,B,H,W] in [0,1], on the device of the denoiser.
    """

    def __init__(self, masks: Tensor) -> None:
        self._masks = masks
        self._aspect = masks.shape[2] / masks.shape[3]
        self._sized: dict[tuple[int, int], Tensor] = {}
        self._read: int | None = None

    @contextmanager
    def reading(self, part: int) -> Iterator[None]:
        """Say that words are those of a part, until the end of the context; they are the negative prompt's else."""
        self._read = part
        try:
            yield
        finally:
            self._read = None

    def share(self, part: int, reads_words: bool, output: Tensor) -> Tensor | float:  # noqa: FBT001 - a callback
        """Return how much of a part's network counts in a layer's output.

        Args:
            part: its number.
            reads_words: the layer reads words: those of the part count, others do not.
            output: [N,C,h,w], [N,h*w,C], or [N,C] of a layer that knows no places, where all of it counts.
        """
        if reads_words:
            return float(part == self._read)
        if output.dim() < 3:
            return 1.0
        images = output.dim() == 4
        height, width = output.shape[2:] if images else grid(output.shape[1], self._aspect)
        mask = self._at((height, width))[part]
        mask = mask.repeat(output.shape[0] // mask.shape[0], 1, 1)
        return mask[:, None] if images else mask.flatten(1)[..., None]

    def weights(self, places: Tensor) -> Tensor:
        """Return what each part counts at [B,h*w,C] places: [parts,B,h*w,1], together 1 at each place."""
        masks = self._at(grid(places.shape[1], self._aspect)).flatten(2)[..., None]
        total = masks.sum(0)
        # Where no part holds, all count alike.
        return torch.where(total > 0, masks / total.clamp(min=1e-6), torch.full_like(masks, 1 / len(masks)))

    def _at(self, hw: tuple[int, int]) -> Tensor:
        if hw not in self._sized:
            self._sized[hw] = F.interpolate(self._masks, size=hw, mode="area")
        return self._sized[hw]


@lru_cache(maxsize=256)
def grid(places: int, aspect: float) -> tuple[int, int]:
    """Return the (height, width) of `places` positions whose ratio comes closest to `aspect`.

    Attention layers are not told the shape of their picture, and halving rounds odd sides, so it cannot be computed.
    """
    shapes = ((height, places // height) for height in range(1, places + 1) if places % height == 0)
    return min(shapes, key=lambda hw: max(hw[0] / hw[1] / aspect, hw[1] / hw[0] * aspect))
