"""Training a ControlNet: a network beside a frozen model that steers it by what it sees in a second picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from library.contracts import ParamGroup
from library.training.methods.base import PlainMethod
from library.training.model_saves import model_metadata

if TYPE_CHECKING:
    from torch import Tensor

    from library.contracts import Batch, Condition, Noised
    from library.draws import Draws
    from library.models.family import ModelFamily
    from library.training.model_saves import Describe, RunFacts
    from library.training.options import TrainingOptions
    from library.training.sampling import Renderer

GUIDE = "control_guide"
"""Name of what the ControlNet looks at, [B,C,H,W], among the extras of a condition."""
_SEED_BITS = 53


class Control(Protocol):
    """A ControlNet of one model family: what it is made of, what it looks at, and how it is written."""

    @property
    def network(self) -> nn.Module:
        """The module that is trained."""

    def guide(self, batch: Batch, seed: int) -> Tensor:
        """Return what it looks at, [B,C,H,W] float32 on the device; chance follows from `seed`."""

    def residuals(self, guide: Tensor, noised: Noised, condition: Condition) -> Mapping[Any, object]:
        """Return what the family's `denoise` takes as `control`."""

    def samples(self, renderer: Renderer) -> Renderer:
        """Return what draws pictures with this ControlNet; `renderer` draws them without it."""

    def metadata(self) -> Mapping[str, str]:
        """Return what a file must tell so that the ControlNet can be used."""

    def save(
        self, path: Path, precision: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int
    ) -> Path:
        """Write it to `path`, whose suffix says how."""


class ControlNetTraining(PlainMethod):
    """Trains a ControlNet on a model that stays as it is."""

    def __init__(
        self, family: ModelFamily, control: Control, opts: TrainingOptions, *, drops_out: bool = False
    ) -> None:
        self.family = family
        self.control = control
        self.opts = opts
        # Whether the model's own dropout works while the ControlNet trains.
        self.uses_global_randomness = drops_out

    def attach(self) -> None:
        """Freeze the model; all of the ControlNet trains."""
        for part in self.family.parts().values():
            part.requires_grad_(False).eval()
        self.control.network.requires_grad_(True)
        if self.opts.memory.gradient_checkpointing:
            self.family.enable_gradient_checkpointing(preserve_rng_state=self.uses_global_randomness)
        self.train_mode()

    def parts(self) -> dict[str, nn.Module]:
        """Return the ControlNet."""
        return {"control_net": self.control.network}

    def trainable(self) -> nn.ModuleDict:
        """Return the ControlNet."""
        return nn.ModuleDict(self.parts())

    def param_groups(self) -> list[ParamGroup]:
        """One group."""
        parameters = tuple(self.control.network.parameters())
        return [ParamGroup("control_net", parameters, self.opts.optimizer.learning_rate)]

    def train_mode(self) -> None:
        """Training mode for the ControlNet; what must not adapt, such as its batch norms, sees to that itself.

        The model stays in evaluation mode unless its own dropout is wanted.
        """
        self.control.network.train()
        self.family.denoiser.train(self.uses_global_randomness)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, and back."""
        self.control.network.eval()
        self.family.denoiser.eval()
        try:
            yield
        finally:
            self.train_mode()

    @torch.no_grad()
    def condition(self, batch: Batch, draws: Draws) -> Condition:
        """Encode the captions, and make what the ControlNet looks at."""
        condition = self.family.condition(batch, draws)
        seed = int(draws.scalar("control_guide") * 2**_SEED_BITS)
        # Encoders of pictures have a type of their own, as where latents are cached.
        with torch.autocast(batch.loss_weight.device.type, enabled=False):
            guide = self.control.guide(batch, seed)
        return replace(condition, extra={**condition.extra, GUIDE: guide})

    def predict(self, noised: Noised, condition: Condition, batch: Batch) -> Tensor:
        """Run the ControlNet, then the denoiser with what it adds."""
        control = self.control.residuals(condition.extra[GUIDE], noised, condition)
        return self.family.denoise(noised.noisy, noised.t, condition, control)  # type: ignore[arg-type]

    def samples(self, renderer: Renderer) -> Renderer:
        """Return what draws sample pictures with the guides that prompts name by `--cn`."""
        return self.control.samples(renderer)

    @property
    def kind(self) -> str:
        """Format of saved ControlNets."""
        return self.opts.save.save_model_as or "safetensors"

    def parameter_count(self) -> int:
        """Return the number of values that a saved ControlNet has."""
        return sum(tensor.numel() for tensor in self.control.network.state_dict().values())

    def describe(self, facts: RunFacts) -> Describe:
        """Return what makes the metadata of the ControlNets of a run."""
        run, own = model_metadata(facts, kind="controlnet"), self.control.metadata()
        return lambda epoch, step: {**run(epoch, step), **own}

    def save(
        self, target: Path, kind: str, precision: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int
    ) -> Path:
        """Write the ControlNet for use and return its path; `target` has no suffix."""
        path = target.with_name(f"{target.name}.{kind}")
        return self.control.save(path, precision, metadata, epoch=epoch, step=step)
