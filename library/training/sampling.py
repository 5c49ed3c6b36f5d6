"""Sample pictures during training: when they are due, what they are called, and that their failures stay harmless."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from library import files
from library.errors import Problem, UserError
from library.inference.prompt_options import TRAINING_SAMPLES, Place
from library.inference.prompts import PromptRequest, load_prompts, read_prompts
from library.randomness import derive

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.diffusion import Watch
    from library.training.options import SampleOptions, SaveOptions

logger = logging.getLogger(__name__)


class Renderer(Protocol):
    """Makes pictures of prompts with the model in memory."""

    def session(self) -> AbstractContextManager[None]:
        """Return the context in which what rendering loads stays in memory."""

    def render(self, requests: Sequence[PromptRequest], *, watch: Watch) -> list[Image]:
        """Return one picture per request; each has its seed."""


@dataclass(frozen=True, slots=True)
class SampledImage:
    """A sample picture that was made and written; handed to the trackers."""

    index: int
    request: PromptRequest
    path: Path
    image: Image
    step: int
    epoch: int
    ending: str = ""
    """Of which weights it is a picture, as in the names of files; empty: those that train."""

    @property
    def tag(self) -> str:
        """Name under which trackers show the picture, the same at every step."""
        return f"sample_{self.index}{self.ending}"


@dataclass(frozen=True, slots=True)
class Process:
    """This process among all that train: prompts are dealt to the ranks in turn."""

    rank: int = 0
    world_size: int = 1


def sampling_problems(options: SampleOptions, place: Place = TRAINING_SAMPLES) -> tuple[Problem, ...]:
    """Return what is wrong with the prompt file as a whole, for the checks before anything is loaded."""
    try:
        if _wanted(options):
            read_prompts(options.sample_prompts or "", place=place)
    except UserError as error:
        return error.problems
    return ()


class SampleImages:
    """Makes the sample pictures of a run.

    The prompt file is read once, at the start. A prompt that cannot be used, or that fails while it is rendered, is
    reported and left out; nothing that happens here ends a training run.
    """

    def __init__(
        self,
        options: SampleOptions,
        save: SaveOptions,
        renderer: Renderer,
        *,
        seed: int,
        process: Process = Process(),
        should_stop: Callable[[], bool] | None = None,
        on_image: Callable[[SampledImage], None] | None = None,
    ) -> None:
        """Read the prompts, if sampling is on.

        Args:
            options: when and what to sample.
            save: where to; pictures go to `sample/` in the output folder.
            renderer: makes the pictures.
            seed: the run's seed, from which prompts without a seed derive theirs.
            process: this process among all.
            should_stop: asked at every denoising step; yes leaves the remaining pictures out.
            on_image: given every picture that was written.

        Raises:
            UserError: the prompt file is missing or cannot be read as a whole.
        """
        self._options = options
        self._folder = Path(options.folder or Path(save.output_dir or ".") / "sample")
        self._prefix = f"{save.output_name}_" if save.output_name else ""
        self._renderer = renderer
        self._seed = seed
        self._process = process
        self._should_stop = should_stop
        self._on_image = on_image
        self.failures = 0
        """Pictures that could not be made or written so far, on this rank."""
        self.prompts: list[PromptRequest] = []
        if _wanted(options):
            self.prompts = load_prompts(
                options.sample_prompts or "",
                default_sampler=options.sample_sampler,
                defaults=getattr(renderer, "sample_defaults", None),
                place=getattr(renderer, "sample_place", TRAINING_SAMPLES),
                strict=False,
            )
        for prompt in self.prompts:
            if prompt.controlnet_image and not getattr(renderer, "reads_guides", False):
                logger.warning("%s: --cn has no effect, this model has no ControlNet", prompt.where)

    def wants_first(self, step: int) -> bool:
        """Tell whether pictures are due before the first update; `step` is where the run starts."""
        return step == 0 and bool(self._options.sample_at_first) and bool(self.prompts)

    def due(self, step: int, epoch: int, epoch_ended: bool) -> bool:
        """Tell whether pictures are due after `step` updates, of which the last one may have ended an epoch.

        Args:
            step: updates done.
            epoch: epochs done.
            epoch_ended: whether the last update was the last of its epoch.
        """
        if not self.prompts:
            return False
        every_epochs = _every(self._options.sample_every_n_epochs)
        every_steps = _every(self._options.sample_every_n_steps)
        if every_epochs is not None:
            return epoch_ended and epoch % every_epochs == 0
        return every_steps is not None and step > 0 and step % every_steps == 0

    def run(self, step: int, epoch: int, *, ending: str = "") -> list[SampledImage]:
        """Make this rank's share of the pictures and return those that were written.

        The model must be in evaluation mode. Nothing is drawn from a global generator.

        Args:
            step: updates done; 0 before the first.
            epoch: epochs done; 0 before the first.
            ending: of the names of files, where the model has other weights than those that train.
        """
        from library.inference.diffusion import RenderingStopped

        mine = self.prompts[self._process.rank :: self._process.world_size]
        weights = f" with the {ending.strip('_').upper()} weights" if ending else ""
        logger.info("making %d sample picture%s%s", len(mine), "" if len(mine) == 1 else "s", weights)
        made: list[SampledImage] = []
        with self._renderer.session():
            for prompt in mine:
                try:
                    made.append(self._one(prompt, step, epoch, ending))
                except RenderingStopped:
                    logger.info("asked to stop: the remaining sample pictures are left out")
                    break
                except Exception as error:  # noqa: BLE001  a bad prompt, full memory or a full disk must not end training
                    self._report(prompt, error)
        return made

    def _report(self, prompt: PromptRequest, error: Exception) -> None:
        self.failures += 1
        logger.warning("%s: no picture: %s: %s", prompt.where, type(error).__name__, error)
        logger.debug("the sample failed here", exc_info=True)
        _free_memory()

    def _one(self, prompt: PromptRequest, step: int, epoch: int, ending: str) -> SampledImage:
        from library.inference.diffusion import Watch
        from library.inference.png_info import png_bytes

        seed = prompt.seed
        if seed is None:
            # 32 bits, so that the number in the file can be typed into other programs.
            seed = derive(self._seed, "image", step, prompt.index) & 0xFFFFFFFF
        request = replace(prompt, seed=seed)
        image = self._renderer.render([request], watch=Watch(self._should_stop))[0]
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._file_name(prompt, step, epoch)}{ending}.png"
        files.write_bytes(path, png_bytes(image, request))
        sampled = SampledImage(prompt.index, request, path, image, step, epoch, ending)
        if self._on_image is not None:
            self._on_image(sampled)
        return sampled

    def _file_name(self, prompt: PromptRequest, step: int, epoch: int) -> str:
        by_epoch = step == 0 or _every(self._options.sample_every_n_epochs) is not None
        number = f"e{epoch:06d}" if by_epoch else f"{step:06d}"
        now = time.strftime("%Y%m%d%H%M%S")
        seed = "" if prompt.seed is None else f"_{prompt.seed}"
        return f"{self._prefix}{number}_{prompt.index:02d}_{now}{seed}"


def _every(value: int | None) -> int | None:
    return value if value is not None and value > 0 else None


def _wanted(options: SampleOptions) -> bool:
    often = _every(options.sample_every_n_epochs) is not None or _every(options.sample_every_n_steps) is not None
    return bool(options.sample_prompts) and (often or options.sample_at_first)


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
