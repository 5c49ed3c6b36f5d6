"""What a training method (full fine-tuning, adapters, textual inversion, ...) offers to the one loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from library.contracts import Batch, Condition, Noised, ParamGroup
    from library.draws import Draws
    from library.models.family import ModelFamily
    from library.training.model_saves import Describe, RunFacts
    from library.training.sampling import Renderer


class Method(Protocol):
    """Decides what trains and how it enters the step; the loop never asks which method it has."""

    light: bool
    """What is saved is small: it is saved as well when a signal ends the run."""

    flat_parameters: bool
    """Every parameter gets a gradient in every update, so they may lie in one long row (see `FlatParameters`)."""

    may_skip_parameters: bool
    """A registered parameter may get no gradient in some steps (DDP must then look for unused parameters)."""

    saved_beside: tuple[str, ...]
    """Endings of the names of files that `save` writes beside the model's, which they share their suffix with."""

    uses_global_randomness: bool
    """Modules draw from torch's global generator (dropout), which is then seeded before every micro step."""

    def attach(self) -> None:
        """Freeze, add adapters, switch on checkpointing: before anything is compiled or wrapped."""

    def trainable(self) -> nn.ModuleDict:
        """Return the modules that train now, under the names of the family's parts, in the reference's order."""

    def parts(self) -> dict[str, nn.Module]:
        """Return every module whose weights belong to a state folder, in the reference's order."""

    def param_groups(self) -> list[ParamGroup]:
        """Return the parameter groups of the optimizer, in the reference's order."""

    def accumulate_in_place(self) -> None:
        """Take note that gradients stay where they are for the whole run, so backward passes may add to them."""

    def enter_step(self, step: int) -> bool:
        """Freeze what stops training at this update; True when the trained set changed."""

    def before_micro_step(self, batch: Batch) -> None:
        """Get ready for a micro-batch of training."""

    def condition(self, batch: Batch, draws: Draws) -> Condition:
        """Return what the denoiser is conditioned on."""

    def predict(self, noised: Noised, condition: Condition, batch: Batch) -> Tensor:
        """Return the denoiser's prediction, [B,C,h,w]."""

    def target(self, noised: Noised, condition: Condition, batch: Batch) -> Tensor:
        """Return what the prediction is compared with, [B,C,h,w]."""

    def see_gradients(self) -> None:
        """Look at the gradients of an update, unscaled and clipped, before they are cleared."""

    def after_update(self, step: int) -> None:
        """Act on the weights after an optimizer step (max-norm and the like)."""

    def scalars(self) -> Mapping[str, Tensor | float]:
        """Return numbers of the last update that are drawn beside the loss; tensors stay on the device."""

    def train_mode(self) -> None:
        """Put the trained modules into training mode."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Return the context in which the trained modules are in evaluation mode, as they will be used."""

    @property
    def kind(self) -> str:
        """Format of saved models."""

    def parameter_count(self) -> int:
        """Return the number of values that a saved model has."""

    def samples(self, renderer: Renderer) -> Renderer:
        """Return what draws sample pictures with what is trained; `renderer` draws them with the model alone."""

    def describe(self, facts: RunFacts) -> Describe:
        """Return what makes the metadata of the models of a run."""

    def save(
        self, target: Path, kind: str, precision: torch.dtype | None, metadata: dict[str, str], *, epoch: int, step: int
    ) -> Path:
        """Write what was trained for use and return its path; `target` has no suffix."""


class PlainMethod:
    """What most methods do in most places: the denoiser predicts, the objective has the target, and that is all."""

    family: ModelFamily
    light = False
    flat_parameters = False
    may_skip_parameters = False
    saved_beside: tuple[str, ...] = ()
    uses_global_randomness = False

    def accumulate_in_place(self) -> None:
        """Nothing to do: autograd does so where gradients stay."""

    def enter_step(self, step: int) -> bool:
        """Nothing stops training during the run."""
        return False

    def before_micro_step(self, batch: Batch) -> None:
        """Nothing to do."""

    def predict(self, noised: Noised, condition: Condition, batch: Batch) -> Tensor:
        """Run the denoiser."""
        return self.family.denoise(noised.noisy, noised.t, condition)

    def target(self, noised: Noised, condition: Condition, batch: Batch) -> Tensor:
        """Return the objective's own target."""
        return noised.target

    def see_gradients(self) -> None:
        """Nothing to do."""

    def after_update(self, step: int) -> None:
        """Nothing to do: there is no constraint on the weights."""

    def samples(self, renderer: Renderer) -> Renderer:
        """Return the renderer: what is trained is the model, or part of it."""
        return renderer

    def scalars(self) -> Mapping[str, Tensor | float]:
        """Return nothing: there are no numbers but those of every method."""
        return {}
