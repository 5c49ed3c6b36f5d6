"""What all renderers share: batches of pictures that agree, devices, and pictures from pixels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from library.inference.extensions import NO_INPUTS, PictureInputs

if TYPE_CHECKING:
    from PIL.Image import Image


class Batched(Protocol):
    """A picture to make; those with equal keys can share a batch."""

    @property
    def batch_key(self) -> Hashable:
        """What pictures of a batch agree in."""


Job = TypeVar("Job", bound=Batched)


Result = TypeVar("Result")


class NotFinite(Exception):
    """A picture came out with values that are not numbers, even when it was decoded in float32."""


def filled(inputs: Sequence[PictureInputs] | None, count: int) -> Sequence[PictureInputs]:
    """Return inputs for so many pictures, none where nothing is given."""
    return [NO_INPUTS] * count if inputs is None else inputs


def batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Yield batches of at most `size` jobs that agree in their keys, in order of the first of each."""
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.batch_key, []).append(job)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def in_order(jobs: Sequence[Job], size: int, make: Callable[[list[Job]], Iterable[Result]]) -> list[Result]:
    """Return what `make` makes of each job, in their order; it is given batches, and yields one result per job."""
    made: dict[int, Result] = {}
    for batch in batches(jobs, size):
        made.update(zip(map(id, batch), make(batch), strict=True))
    return [made[id(job)] for job in jobs]


def alike(latents: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Cut a sequence into runs of at most `size` tensors of one shape."""
    group: list[Tensor] = []
    for picture in latents:
        if group and (len(group) >= size or picture.shape != group[0].shape):
            yield group
            group = []
        group.append(picture)
    if group:
        yield group


def to_picture(pixels: Tensor) -> Image:
    """Turn pixels [3,H,W] in [-1,1] into a picture."""
    from PIL import Image

    if not bool(torch.isfinite(pixels).all()):
        raise NotFinite("the picture holds values that are not numbers")
    levels = (pixels / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).mul(255).round()
    return Image.fromarray(levels.to(device="cpu", dtype=torch.uint8).numpy())


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's weights."""
    return next(module.parameters()).device


@contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Move modules to `device` and, afterwards, back to where they were."""
    homes = [device_of(module) for module in modules]
    try:
        for module, home in zip(modules, homes, strict=True):
            if home != device:
                module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            if home != device:
                module.to(home)


class Part(Protocol):
    """A network that is built when it is needed."""

    @property
    def model(self) -> Any:
        """The network, built now if it was not there."""

    @property
    def loaded(self) -> bool:
        """Whether it is in memory."""

    def release(self) -> None:
        """Free it."""


@dataclass(frozen=True, slots=True)
class HeldPart:
    """A network that is in memory anyway, such as one that trains, as a `Part`."""

    model: nn.Module
    loaded: bool = True

    def release(self) -> None:
        """Stay: it is somebody else's."""


@contextmanager
def kept(parts: Sequence[Part]) -> Iterator[None]:
    """Keep parts that are built meanwhile until the end, and free those that were not there before."""
    before = [part.loaded for part in parts]
    try:
        yield
    finally:
        for part, was_loaded in zip(parts, before, strict=True):
            if not was_loaded:
                part.release()
