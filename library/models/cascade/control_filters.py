"""What a ControlNet of stage C looks at: filters that make it from a picture, by name.

A filter has two parts. `prepare` makes an array of one picture, in a loader process, from the picture and a private
generator, so the same visit of a picture gives the same bits everywhere. `finish` makes the condition of a batch of
such arrays on the device of the model. A further filter is a class with `num_channels` and a row of `FILTERS`; users
name a class of their own as `module:Class`. Light: numpy alone is imported here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from library.models.cascade.control_masks import MaskShapes, random_mask

if TYPE_CHECKING:
    from torch import Tensor

Picture = NDArray[np.uint8]
"""RGB, [H,W,3]."""
Array = NDArray[np.float32]
Encode = Callable[["Tensor"], "Tensor"]
"""Pictures [N,3,H,W] in [-1,1] to latents of stage C."""

_EDGES = (100, 200)
_BLUR = 141
_HALF = 0.5


class ControlFilter(Protocol):
    """Makes what a ControlNet looks at; picklable."""

    from_file: bool
    """What it gets is a ready picture of `conditioning_data_dir`, not the picture that is trained."""

    @property
    def kept(self) -> str:
        """Names all but the picture that decides what `find` finds (`library.contracts.ConditionFinder`), or empty."""

    @property
    def num_channels(self) -> int:
        """Channels of the condition."""

    def open_files(self) -> None:
        """Read what would be found out to be wrong only when the first picture is there.

        Raises:
            UserError: a file cannot be used.
        """

    def prepare(self, picture: Picture, rng: random.Random, mask: NDArray[np.bool_] | None = None) -> Array:
        """Return what can be made of one picture, float32 [C,h,w].

        Args:
            picture: of the size that is trained.
            rng: all that is left to chance.
            mask: [H,W], what is to be painted; for filters that work with masks.
        """

    def finish(self, prepared: Tensor, encode: Encode, seed: int) -> Tensor:
        """Return the condition [N,num_channels,h,w] of a batch of prepared arrays, on their device."""


class PlainFilter:
    """What most filters have in common: the picture is trained, and the prepared array is the condition."""

    from_file = False

    @property
    def kept(self) -> str:
        """Names all but the picture that decides what `find` finds; empty: there is nothing worth being kept."""
        return ""

    def open_files(self) -> None:
        """Nothing to read."""

    def finish(self, prepared: Tensor, encode: Encode, seed: int) -> Tensor:
        """Return what was prepared."""
        return prepared


@dataclass(frozen=True, kw_only=True)
class CannyFilter(PlainFilter):
    """Edges by Canny's detector, [1,H,W] in [0,1].

    Attributes:
        resize: edges are looked for in a copy with sides of this many pixels; None: in the picture itself.
    """

    resize: int | None = 224
    num_channels = 1

    def problem(self) -> str:
        """Return what is wrong with the parameters, or nothing."""
        return "resize: must be at least 8" if self.resize is not None and self.resize < 8 else ""

    @property
    def kept(self) -> str:
        """Names what decides where edges are."""
        return f"canny {self.resize}"

    def prepare(self, picture: Picture, rng: random.Random, mask: NDArray[np.bool_] | None = None) -> Array:
        """Find edges."""
        return self.paint(self.find(picture), (picture.shape[0], picture.shape[1]), rng)

    def find(self, picture: Picture) -> dict[str, NDArray[Any]]:
        """Return where edges are, one bit for each pixel of the copy."""
        cv2 = _opencv()
        small: Any = picture
        if self.resize is not None:
            # Cut off, not rounded, as the official filter does.
            small = cv2.resize(picture.astype(np.float32), (self.resize, self.resize), interpolation=cv2.INTER_LINEAR)
        edges = cv2.Canny(np.ascontiguousarray(small.astype(np.uint8)), *_EDGES)
        return {"edges": np.packbits(edges > 0, axis=1)}

    def accepts(self, found: Mapping[str, NDArray[Any]], size_hw: tuple[int, int]) -> bool:
        """Whether `find` could have found this in a picture of this size."""
        height, width = self._copy_size(size_hw)
        edges = found.get("edges")
        return edges is not None and edges.dtype == np.uint8 and edges.shape == (height, -(-width // 8))

    def paint(self, found: Mapping[str, NDArray[Any]], size_hw: tuple[int, int], rng: random.Random) -> Array:
        """Return the edges in a map of the size of the picture."""
        small = np.unpackbits(found["edges"], axis=1, count=self._copy_size(size_hw)[1])
        edges: Any = small.astype(np.float32)
        if edges.shape != size_hw:
            edges = _opencv().resize(edges, size_hw[::-1], interpolation=_opencv().INTER_LINEAR)
        return np.ascontiguousarray(edges[None])

    def _copy_size(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        return size_hw if self.resize is None else (self.resize, self.resize)


@dataclass(frozen=True, kw_only=True)
class InpaintFilter(PlainFilter):
    """The picture with a part painted white, and which part, [4,H,W]: inpainting, and outpainting where it is turned.

    Attributes:
        share: least and greatest share of the picture that random boxes and brush strokes cover.
        p_outpaint: probability that all but the chosen part is painted over.
        saliency_model_path: a model that sees what matters in a picture; it chooses in place of chance.
        threshold: range of what counts as salient; `thresold` in official files.
    """

    share: tuple[float, float] = (0.1, 0.5)
    p_outpaint: float = 0.4
    saliency_model_path: str | None = None
    threshold: tuple[float, float] = (0.04, 0.4)
    num_channels = 4

    def problem(self) -> str:
        """Return what is wrong with the parameters, or nothing."""
        if not 0 <= self.p_outpaint <= 1:
            return "p_outpaint: must be between 0 and 1"
        for name in ("share", "threshold"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                return f"{name}: must be two numbers between 0 and 1, the smaller one first"
        if self.saliency_model_path is None:
            return ""
        from library.models.cascade.control_saliency import saliency_problem

        return saliency_problem(self.saliency_model_path)

    def open_files(self) -> None:
        """Read the saliency model, if there is one.

        Raises:
            UserError: it cannot be used.
        """
        if self.saliency_model_path is not None:
            from library.models.cascade.control_saliency import open_saliency

            open_saliency(self.saliency_model_path)

    def prepare(self, picture: Picture, rng: random.Random, mask: NDArray[np.bool_] | None = None) -> Array:
        """Choose a part, unless it is given, and paint it over."""
        # Drawn in this order whatever they are used for: an option changes no draw but its own.
        outpaint, threshold = rng.random() < self.p_outpaint, rng.uniform(*self.threshold)
        chosen = mask
        if chosen is None:
            chosen = self._chosen(picture, rng, threshold) ^ outpaint
            if self.saliency_model_path is not None:
                chosen = _blurred(chosen, picture.shape[:2])
        painted = np.where(chosen[:, :, None], np.uint8(255), picture)
        return np.concatenate([levels(painted), chosen[None].astype(np.float32)])

    def _chosen(self, picture: Picture, rng: random.Random, threshold: float) -> NDArray[np.bool_]:
        if self.saliency_model_path is None:
            height, width = picture.shape[:2]
            return random_mask((height, width), MaskShapes(rng.uniform(*self.share)), rng)
        from library.models.cascade.control_saliency import saliency

        return saliency(self.saliency_model_path, picture) > threshold


@dataclass(frozen=True, kw_only=True)
class SuperResolutionPixels(PlainFilter):
    """The picture in coarse squares, [3,H,W]: as if it had been enlarged from `scale_factor` times its size."""

    scale_factor: float = 0.25
    num_channels = 3

    def problem(self) -> str:
        """Return what is wrong with the parameters, or nothing."""
        return _scale_problem(self.scale_factor)

    def prepare(self, picture: Picture, rng: random.Random, mask: NDArray[np.bool_] | None = None) -> Array:
        """Shrink and enlarge."""
        return levels(_nearest(_nearest(picture, *_scaled(picture, self.scale_factor)), *picture.shape[:2]))


@dataclass(frozen=True, kw_only=True)
class SuperResolutionLatents(PlainFilter):
    """Latents of the picture at `scale_factor` times its size, enlarged to those of the picture, [16,H/32,W/32]."""

    scale_factor: float = 0.5
    num_channels = 16

    def problem(self) -> str:
        """Return what is wrong with the parameters, or nothing."""
        return _scale_problem(self.scale_factor)

    def prepare(self, picture: Picture, rng: random.Random, mask: NDArray[np.bool_] | None = None) -> Array:
        """Shrink; pixels in [-1,1]."""
        return levels(_nearest(picture, *_scaled(picture, self.scale_factor))) * np.float32(2) - np.float32(1)

    def finish(self, prepared: Tensor, encode: Encode, seed: int) -> Tensor:
        """Encode, and enlarge the latents."""
        from torch.nn import functional

        return functional.interpolate(encode(prepared), scale_factor=1 / self.scale_factor, mode="nearest")


@dataclass(frozen=True, kw_only=True)
class FolderPictures(PlainFilter):
    """Ready pictures, such as drawn edges or depths, from `conditioning_data_dir`, [channels,H,W] in [0,1].

    Attributes:
        channels: 1 for the grey values, 3 for the colours.
    """

    channels: int = 1
    from_file = True

    @property
    def num_channels(self) -> int:
        """Channels of the condition."""
        return self.channels

    def problem(self) -> str:
        """Return what is wrong with the parameters, or nothing."""
        return "" if self.channels in (1, 3) else "channels: must be 1 (grey) or 3 (colours)"

    def prepare(self, picture: Picture, rng: random.Random, mask: NDArray[np.bool_] | None = None) -> Array:
        """Take the picture as it is, or its grey values (those of Rec. 601)."""
        colours = levels(picture)
        if self.channels == 3:
            return colours
        weights = np.array([0.299, 0.587, 0.114], np.float32)
        return np.ascontiguousarray((colours * weights[:, None, None]).sum(0, dtype=np.float32)[None])


def _identity_filter() -> type[Any]:
    from library.models.cascade.control_identity import IdentityFilter

    return IdentityFilter


FILTERS: dict[str, Callable[[], type[Any]]] = {
    "canny": lambda: CannyFilter,
    "inpaint": lambda: InpaintFilter,
    "identity": _identity_filter,
    "sr_effnet": lambda: SuperResolutionLatents,
    "sr": lambda: SuperResolutionPixels,
    "folder": lambda: FolderPictures,
}
"""Name -> what returns the class of the filter."""


# Pixels ------------------------------------------------------------------------------------------------------------


def _opencv() -> Any:
    import cv2

    cv2.setNumThreads(0)
    return cv2


def levels(picture: Picture) -> Array:
    """Turn a picture [H,W,3] into float32 [3,H,W] in [0,1]."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1)).astype(np.float32) / np.float32(255)


def _scale_problem(scale: float) -> str:
    inverse = 1 / scale if scale > 0 else 0
    return "" if inverse >= 1 and inverse == int(inverse) else "scale_factor: must be 1 divided by a whole number"


def _scaled(picture: Picture, scale: float) -> tuple[int, int]:
    return max(int(picture.shape[0] * scale), 1), max(int(picture.shape[1] * scale), 1)


def _nearest(picture: Any, height: int, width: int) -> Any:
    """Resize [H,W,...] so that a pixel becomes the one at its upper left corner's place, as torch's `nearest` does."""
    rows = np.arange(height) * picture.shape[0] // height
    columns = np.arange(width) * picture.shape[1] // width
    return picture[rows[:, None], columns[None, :]]


def _blurred(chosen: NDArray[np.bool_], size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Enlarge a rough map and round its corners off."""
    wide = _nearest(chosen, *size_hw).astype(np.float32)
    return np.asarray(_opencv().GaussianBlur(wide, (_BLUR, _BLUR), 0) > _HALF)
