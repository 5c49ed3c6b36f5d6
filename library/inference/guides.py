"""Guide pictures of ControlNets: which file belongs to which model and prompt, and what is made of it first."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

GUIDES, PREPARATIONS_OPTION = "--guide_image_path", "--control_net_preps"

Prepare = Callable[["Image"], "Image"]
"""Makes what a ControlNet looks at from a picture of the final size."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """One kind of preparation: how it is written, what the text must match, what makes it from its numbers."""

    written: str
    pattern: str
    make: Callable[..., Prepare]


def _edges(low: str | None, high: str | None) -> Prepare:
    """Return what finds edges with the Canny detector of OpenCV; white on black, on the colours as they are."""
    return partial(_canny, thresholds=(int(low or _LOW), int(high or _HIGH)))


def _canny(picture: Image, thresholds: tuple[int, int]) -> Image:
    import cv2
    import numpy as np
    from PIL import Image as ImageModule

    found = cv2.Canny(np.asarray(picture.convert("RGB")), *thresholds)
    return ImageModule.fromarray(np.repeat(found[:, :, None], 3, axis=2))


_LOW, _HIGH = 63, 191
"""Thresholds that are not given, as in sd-scripts."""

PREPARATIONS: tuple[Preparation, ...] = (
    Preparation("none", r"none", lambda: lambda picture: picture),
    Preparation("canny_LOW_HIGH", r"canny(?:_(\d{1,4})(?:_(\d{1,4}))?)?", _edges),
)
"""Every kind; a further one is a further row."""


def preparation(text: str) -> Prepare:
    """Return the preparation that `--control_net_preps` names.

    Raises:
        UserError: there is none of this name.
    """
    known = " or ".join(row.written for row in PREPARATIONS)
    for row in PREPARATIONS:
        match = re.fullmatch(row.pattern, text.strip(), re.IGNORECASE | re.ASCII)
        if match is not None:
            return row.make(*match.groups())
    raise UserError(f"{text!r} is not known", f"Write {known}, such as canny_63_191.", where=PREPARATIONS_OPTION)


def guide_sets(pictures: Sequence[Sequence[Path]], nets: int, option: str = GUIDES) -> list[tuple[Path, ...]]:
    """Return the guide pictures of successive prompts, one for each of `nets` ControlNets.

    With as many sources (files or folders) as ControlNets, each has its own, whose pictures are taken in turn, from the
    start again when they end before the longest. Otherwise all pictures are taken one after the other, `nets` for each
    prompt; a single one is for all ControlNets.

    Args:
        pictures: the pictures of each source, in order.
        nets: number of ControlNets.
        option: names the pictures in messages.

    Raises:
        UserError: the pictures cannot be shared out evenly.
    """
    if len(pictures) == nets:
        longest = max(map(len, pictures), default=0)
        return [tuple(source[place % len(source)] for source in pictures) for place in range(longest)]
    every = [path for source in pictures for path in source]
    if len(every) == 1:
        return [(every[0],) * nets]
    if len(every) % nets:
        what = f"{len(every)} pictures cannot be shared out among {nets} ControlNets"
        raise UserError(what, f"Give {nets} files or folders, one for each ControlNet.", where=option)
    return [tuple(every[start : start + nets]) for start in range(0, len(every), nets)]
