"""How the gradients of an update become a step: at the end of the update, or while they arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from library.training.fused_backward import FusedBackward
from library.training.stepping import StepOutcome, step_or_skip, trainable

if TYPE_CHECKING:
    from torch import Tensor

    from library.training.optimizers import BuiltOptimizer


class Updater(Protocol):
    """One of these per run."""

    def begin(self, step: int) -> None:
        """Start update number `step`."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss."""

    def step(self) -> StepOutcome:
        """Apply the gradients and clear them."""


class WholeUpdater:
    """The ordinary way: gradients of all micro-batches are summed, clipped together, and applied.

    Args:
        built: The optimizer.
        divisor: Micro-batches of a full update on this rank; DDP averages over the ranks.
        max_grad_norm: Largest L2 norm of all gradients; 0 does not clip.
        scaler: Loss scaler of float16 training.
    """

    def __init__(self, built: BuiltOptimizer, divisor: int, max_grad_norm: float, scaler: Any = None) -> None:
        self._built = built
        self._params = trainable(built.optimizer.param_groups)
        self._factor = 1.0 / divisor
        self._max_grad_norm = max_grad_norm
        self._scaler = scaler

    def begin(self, step: int) -> None:
        """Nothing to prepare."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss."""
        loss = loss * self._factor if self._factor != 1.0 else loss
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def step(self) -> StepOutcome:
        """Clip, step or skip, and free the gradients."""
        outcome = step_or_skip(self._built, self._params, self._max_grad_norm, self._scaler)
        self._built.optimizer.zero_grad(set_to_none=True)
        return outcome


class FusedUpdater:
    """`--fused_backward_pass`: every parameter is stepped as soon as its gradient is complete."""

    def __init__(self, built: BuiltOptimizer, max_grad_norm: float, *, seed: int) -> None:
        self._fused = FusedBackward(built, max_grad_norm, seed=seed)
        self._fused.attach()

    def begin(self, step: int) -> None:
        """Tell the hooks which update their gradients belong to."""
        self._fused.begin(step)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass, which steps."""
        loss.backward()

    def step(self) -> StepOutcome:
        """Return what became of the update."""
        return self._fused.finish()
