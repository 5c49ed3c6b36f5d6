"""Draws picture after picture into a folder: batches, failures that stop nothing else, and Ctrl-C."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from library.cli import TRACEBACK_VARIABLE
from library.errors import StopTraining, UserError
from library.inference.diffusion import Watch
from library.inference.extensions import NO_INPUTS, PictureInputs
from library.signals import StopFlag

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.generation_networks import NetworkBank
    from library.inference.outputs import PictureFolder
    from library.inference.prompts import PromptRequest

logger = logging.getLogger(__name__)

_NOTICE = "Finishing this picture. Ctrl-C again ends at once."


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture to make: what it shows, what it is made from, and the file that this came from."""

    request: PromptRequest
    inputs: PictureInputs = NO_INPUTS
    origin: Path | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Finished pictures of a batch, in order: the mark of their stage in file names, and what they were made from."""

    mark: str
    requests: Sequence[PromptRequest]
    images: Sequence[Image]


Make = Callable[[Sequence["PromptRequest"], Sequence[PictureInputs], Watch], Sequence[Stage]]


class Studio:
    """Draws pictures and remembers how that went.

    Args:
        make: draws a batch.
        bank: the networks, whose strengths pictures choose.
        folder: where the pictures go.
        batch_size: how many pictures are drawn at a time.
    """

    def __init__(self, make: Make, bank: NetworkBank, folder: PictureFolder, *, batch_size: int) -> None:
        self._make = make
        self._bank = bank
        self._folder = folder
        self._batch_size = batch_size
        self._stop = StopFlag(notice=_NOTICE)
        self.failed = 0
        """Pictures that could not be made."""

    @property
    def networks(self) -> list[Any]:
        """The networks that are attached to the model."""
        return self._bank.networks

    def draw(self, pictures: Iterable[Picture]) -> None:
        """Draw pictures in order, neighbours that may share a batch together.

        Raises:
            StopTraining: Ctrl-C was pressed, or a picture cannot be saved.
        """
        waiting: list[Picture] = []
        for picture in pictures:
            if waiting and (len(waiting) >= self._batch_size or self._key(picture) != self._key(waiting[0])):
                self._draw(waiting)
                waiting = []
            waiting.append(picture)
        if waiting:
            self._draw(waiting)

    def _key(self, picture: Picture) -> tuple[Hashable, ...]:
        request = picture.request
        return request.width, request.height, request.steps, request.sampler, self._bank.strengths(request)

    def _draw(self, batch: Sequence[Picture]) -> None:
        with self._stop, self._stop.deferred():
            stages = self._attempt(batch)
            if stages is not None:
                self._save(batch, stages)
            elif len(batch) > 1:
                # One of them is bad, or together they are too many.
                for picture in batch:
                    self._save([picture], self._attempt([picture]) or ())
            if self._stop.requested is not None:
                made = len(self._folder.written)
                made_text = "1 picture is" if made == 1 else f"{made} pictures are"
                raise self._stop.stop(f"interrupted; {made_text} in {self._folder.path}")

    def _attempt(self, batch: Sequence[Picture]) -> Sequence[Stage] | None:
        """Return what was made, or None when it failed; the failure of a single picture is reported."""
        requests = [picture.request for picture in batch]
        try:
            self._bank.set_strengths(self._bank.strengths(requests[0]))
            with tqdm(total=requests[0].steps, leave=False, disable=None, unit="step") as bar:
                watch = Watch(progress=lambda done, total: _show(bar, done, total))
                return self._make(requests, [picture.inputs for picture in batch], watch)
        except StopTraining:
            raise
        except Exception as error:  # noqa: BLE001  full memory or a picture gone wrong must not end the others
            if len(batch) == 1:
                self._report(requests[0], error)
        # Not before: the error holds on to everything that was in memory where it happened.
        _free_memory()
        return None

    def _save(self, batch: Sequence[Picture], stages: Sequence[Stage]) -> None:
        for place, picture in enumerate(batch):
            for stage in stages:
                request, image = stage.requests[place], stage.images[place]
                path = self._folder.write(image, request, stage=stage.mark, origin=picture.origin)
                logger.info("%s", path)

    def _report(self, request: PromptRequest, error: Exception) -> None:
        self.failed += 1
        place = f"{request.where}, seed {request.seed}" if request.where else f"seed {request.seed}"
        known = isinstance(error, UserError)
        what = str(error) if known else f"{type(error).__name__}: {error}"
        what = what.partition("\n")[0].removeprefix(f"{request.where}: ")
        shown = not known and os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")
        logger.error("%s: no picture: %s", place, what, exc_info=error if shown else None)


def _show(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
