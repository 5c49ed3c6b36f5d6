"""The points at which image to image, inpainting, ControlNet and the like enter the one denoising loop.

An `Extension` belongs to a renderer. For every batch it yields `StepHooks`, which hold what it needs for that batch and
are called while the batch is made. Where several extensions change the same thing, the first of the renderer's list is
the outermost. A renderer without extensions calls nothing of all this.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import logging

    import torch
    from PIL.Image import Image
    from torch import Tensor

    from library.contracts import Condition
    from library.inference.prompts import PromptRequest
    from library.models.family import ModelFamily


@dataclass(frozen=True, slots=True)
class PictureInputs:
    """What a picture is made from beside its prompt.

    Attributes:
        image: the picture to start from; any size, it is brought to that of the request.
        latents: scaled latents [C,h,w] to start from, in place of `image`.
        mask: with `image`: white is painted anew, black is kept.
        guides: what ControlNets look at, in their order; any size, edges and the like are found later.
        regions: colours that say which part of the prompt holds where.
    """

    image: Image | None = None
    latents: Tensor | None = None
    mask: Image | None = None
    guides: tuple[Image, ...] = ()
    regions: Image | None = None


NO_INPUTS = PictureInputs()
"""A picture that is made from its prompt alone."""


@dataclass(slots=True)
class BatchContext:
    """A batch of B pictures of one size that is about to be made.

    Attributes:
        family: the model.
        device: where it runs.
        requests: the pictures, B of them; size, steps, sampler and the keys of all extensions agree.
        inputs: what each is made from.
        generators: one per picture, on the CPU, seeded, nothing drawn yet: all noise comes from them.
        scheduler: scheduler of diffusers on which `set_timesteps` was called; may be replaced in `begin`.
        timesteps: what is going to be run, [S] in main memory; `begin` may cut steps off the start, and then tells the
            scheduler (`skip_steps`).
        latent_shape: (C, h, w) of the finished latents.
        branches: how often the batch is repeated for guidance, [branches * B] rows: (prompt,), (negative, prompt) or
            (empty, negative, prompt).
        vae_batch: how many pictures the VAE takes at a time.
        encode: makes the condition of further texts, [len(texts), ...] on the device; the second argument is the number
            of chunks to fill to (None: as many as the longest text needs).
    """

    family: ModelFamily
    device: torch.device
    requests: tuple[PromptRequest, ...]
    inputs: tuple[PictureInputs, ...]
    generators: tuple[torch.Generator, ...]
    scheduler: Any
    timesteps: Tensor
    latent_shape: tuple[int, int, int]
    branches: int
    vae_batch: int
    encode: Callable[[Sequence[str], int | None], Condition]

    def skip_steps(self, steps: int) -> None:
        """Leave out the first `steps` steps, which may be several entries of `timesteps` each."""
        entries = steps * self.scheduler.order
        self.timesteps = self.timesteps[entries:]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(entries)


@dataclass(frozen=True, slots=True)
class Moment:
    """Where the loop is: entry `index` of `total`; `timestep` is its value (0..999) as a number, no tensor."""

    index: int
    total: int
    timestep: float


@dataclass(frozen=True, slots=True)
class DenoiserInput:
    """What the denoiser is given: noisy [N,C,h,w], already scaled by the scheduler, t [N], and the condition of N rows.

    N is `branches * B`: all pictures of the batch with their negative prompts, then all of them with their prompts.
    """

    noisy: Tensor
    t: Tensor
    condition: Condition


class StepHooks:
    """What an extension does in one batch; every method may be left as it is here, where it changes nothing."""

    def start(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the latents [B,C,h,w] to start from; `make()` gives those without this extension."""
        return make()

    def control(self, moment: Moment, call: DenoiserInput) -> Mapping[str, Any] | None:
        """Return residuals for `family.denoise(control=...)`, or None; those of several extensions are added."""
        return None

    def predict(self, moment: Moment, call: DenoiserInput, predict: Callable[[DenoiserInput], Tensor]) -> Tensor:
        """Return the prediction [N,C,h,w]; `predict(call)` gives that without this extension, control included."""
        return predict(call)

    def advance(
        self, moment: Moment, prediction: Tensor, latents: Tensor, advance: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Return the latents after this step; `advance(prediction, latents)` gives those without this extension.

        Args:
            moment: where the loop is.
            prediction: [B,C,h,w] with guidance.
            latents: [B,C,h,w] before the step.
            advance: the step of the scheduler.
        """
        return advance(prediction, latents)


class Extension:
    """Changes how pictures are made; every method may be left as it is here, where it changes nothing."""

    def prompt(self, request: PromptRequest, text: str) -> str:
        """Return the text whose condition the denoiser gets; `text` is that without this extension."""
        return text

    def batch_key(self, request: PromptRequest, inputs: PictureInputs) -> Hashable:
        """Return what pictures must agree in to share a batch. Called for all pictures before any is made.

        Raises:
            UserError: this picture cannot be made as it is asked for.
        """
        return ()

    def begin(self, batch: BatchContext) -> AbstractContextManager[StepHooks]:
        """Prepare a batch, hooks on modules included, and undo at the end what was done."""
        return nullcontext(StepHooks())

    def finish(self, request: PromptRequest, inputs: PictureInputs, picture: Image) -> Image:
        """Return the finished picture, for example with kept parts pasted in."""
        return picture


class Remarks:
    """Warnings of an extension, each given once, however many pictures it holds for."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._given: set[str] = set()

    def warn(self, where: str, text: str) -> None:
        """Warn, with the place that is at fault; none is named if `where` is empty."""
        line = f"{where}: {text}" if where else text
        if line not in self._given:
            self._given.add(line)
            self._logger.warning("%s", line)


class HookChain(StepHooks):
    """Several hooks as one; the first is the outermost."""

    def __init__(self, outer: StepHooks, inner: StepHooks) -> None:
        self._outer = outer
        self._inner = inner

    def start(self, make: Callable[[], Tensor]) -> Tensor:
        """See `StepHooks.start`."""
        return self._outer.start(lambda: self._inner.start(make))

    def control(self, moment: Moment, call: DenoiserInput) -> Mapping[str, Any] | None:
        """See `StepHooks.control`."""
        return add_control(self._outer.control(moment, call), self._inner.control(moment, call))

    def predict(self, moment: Moment, call: DenoiserInput, predict: Callable[[DenoiserInput], Tensor]) -> Tensor:
        """See `StepHooks.predict`."""
        return self._outer.predict(moment, call, lambda changed: self._inner.predict(moment, changed, predict))

    def advance(
        self, moment: Moment, prediction: Tensor, latents: Tensor, advance: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """See `StepHooks.advance`."""
        return self._outer.advance(
            moment, prediction, latents, lambda given, now: self._inner.advance(moment, given, now, advance)
        )


def add_control(one: Mapping[str, Any] | None, two: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Add two sets of residuals: tensors, or sequences of tensors, under the argument names of the denoiser."""
    if one is None or two is None:
        return two if one is None else one
    total = {**one, **two}
    for name in one.keys() & two.keys():
        first, second = one[name], two[name]
        both = isinstance(first, (tuple, list))
        total[name] = tuple(a + b for a, b in zip(first, second, strict=True)) if both else first + second
    return total
