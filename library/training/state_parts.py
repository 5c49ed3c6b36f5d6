"""What the state of a run is made of, as far as saving and loading have to know it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Averages(Protocol):
    """An exponential moving average of weights, as a state needs it."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the averaged weights."""

    def numbers(self) -> Mapping[str, float | int]:
        """Return decay and update count."""

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from what the other two returned."""


class Stateful(Protocol):
    """Anything with the two methods of torch."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must be saved."""

    def load_state_dict(self, state: Any) -> Any:
        """Continue from it."""


class Layout(Protocol):
    """How values of an optimizer become those of the parameters, which states know, and back."""

    @property
    def shapes(self) -> list[list[tuple[int, ...]]]:
        """Shapes of the parameters of each group."""

    def spread(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return an optimizer's `state_dict()` as if each parameter stood for itself; perhaps a collective call."""

    def gather(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the opposite of `spread`."""


class Shards(Protocol):
    """Optimizer and exact weights of which each process holds a part, under a name of its rank in a state."""

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part: tensors and plain values only."""

    def load_state_dict(self, state: Mapping[str, Any], *, keep: Collection[str] = ()) -> None:
        """Continue from it; entries of the optimizer's groups named in `keep` keep their values."""


@dataclass(frozen=True, slots=True)
class StateParts:
    """What a state is made of. `modules` (unwrapped) are in the reference's order: denoiser, then text encoder.

    With `shards` they stand for the optimizer's values, and the modules have whole weights while a state is written.
    """

    modules: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    lr_schedule: Stateful
    scaler: Stateful | None = None
    objective: Stateful | None = None
    ema: Averages | None = None
    shards: Shards | None = None
    layout: Layout | None = None
    """Rows or pieces that stand for the parameters in the optimizer; states hold each parameter by itself."""

    def gathered(self) -> Gathered:
        """Return what processes may have in pieces; a collective call."""
        averages = None if self.ema is None else self.ema.tensors()
        if self.shards is not None:
            return Gathered(None, averages)
        state = self.optimizer.state_dict()
        return Gathered(state if self.layout is None else self.layout.spread(state), averages)


@dataclass(frozen=True, slots=True)
class Gathered:
    """What the first process writes of the optimizer, parameter by parameter, and of averages; None: nothing."""

    optimizer: dict[str, Any] | None
    averages: Mapping[str, Tensor] | None
