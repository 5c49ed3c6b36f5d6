"""What a training method (full fine-tuning, adapters, textual inversion, ...) offers to the one loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from library.contracts import Batch, Condition, Noised, ParamGroup
    from library.draws import Draws


class Method(Protocol):
    """Decides what trains and how it enters the step; the loop never asks which method it has."""

    may_skip_parameters: bool
    """A registered parameter may get no gradient in some steps (DDP must then look for unused parameters)."""

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

    def enter_step(self, step: int) -> bool:
        """Freeze what stops training at this update; True when the trained set changed."""

    def condition(self, batch: Batch, draws: Draws) -> Condition:
        """Return what the denoiser is conditioned on."""

    def predict(self, noised: Noised, condition: Condition, batch: Batch) -> Tensor:
        """Return the denoiser's prediction, [B,C,h,w]."""

    def target(self, noised: Noised, condition: Condition, batch: Batch) -> Tensor:
        """Return what the prediction is compared with, [B,C,h,w]."""

    def after_update(self, step: int) -> None:
        """Act on the weights after an optimizer step (max-norm and the like)."""

    def train_mode(self) -> None:
        """Put the trained modules into training mode."""
