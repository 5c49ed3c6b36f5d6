"""What may train beside a network, such as rows of the text encoder's table, as the method of networks sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from library.contracts import ParamGroup
    from library.models.family import ModelFamily


class Companion(Protocol):
    """Trains through frozen text encoders, and is stored in the network's file."""

    name: str
    """What its module is called in states."""

    @property
    def saved_beside(self) -> tuple[str, ...]:
        """Endings of the names of files that `save_beside` writes."""

    def attach(self, family: ModelFamily, seed: int) -> nn.Module:
        """Make the model use it, and return the module that holds its parameters."""

    def load(self, bundled: Mapping[str, Tensor], where: str) -> None:
        """Begin with what a network's file holds beside the network; `where` names it."""

    def param_groups(self, rate: float) -> list[ParamGroup]:
        """Return its parameter groups, given the learning rate of everything."""

    def file_tensors(self) -> dict[str, Tensor]:
        """Return what the network's file holds of it."""

    def metadata(self) -> dict[str, str]:
        """Return what the network's file says about it."""

    def save_beside(self, path: Path, precision: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write files of its own beside the network's file, which has been written."""
