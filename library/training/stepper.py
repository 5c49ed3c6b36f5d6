"""What the loop needs of an optimizer: the backward pass of each micro-batch, and the step at the end of an update."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from library.training.fused_backward import FusedBackward
from library.training.non_finite import NonFiniteWatch
from library.training.stepping import StepOutcome, gradient_norm, step_or_skip

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from library.training.optimizers import BuiltOptimizer
    from library.training.options import OptimizerOptions


class Stepper:
    """Runs backward passes and steps.

    Args:
        built: The optimizer.
        options: Clipping, the limit of skipped updates, and whether the backward pass steps.
        accumulation: Micro-batches of an update on this rank; DDP averages over the ranks, so this is the divisor.
        scaler: `torch.amp.GradScaler` of float16 training.
        first_step: Updates already done.
        seed: The run's seed.
        share: Wraps the step so that processes share its gradients; None in a single process.
    """

    shards: Any = None
    """What a state stores in place of the optimizer, where each process holds a part of it (see `EngineStepper`)."""

    layout: Any = None
    """How the optimizer's values become those of the parameters, where processes hold pieces (see `WeightShares`)."""

    def __init__(
        self,
        built: BuiltOptimizer,
        options: OptimizerOptions,
        *,
        accumulation: int = 1,
        scaler: Any = None,
        first_step: int = 0,
        seed: int = 0,
        share: Callable[[nn.Module, bool], nn.Module] | None = None,
    ) -> None:
        self.built = built
        self._share = share
        self.watch = NonFiniteWatch(0 if options.fused_backward_pass else options.max_nan_steps)
        self.newly_skipped: list[int] = []
        """Updates that the last `step` found to have been skipped; on a GPU it learns of an update one later."""
        self._max_grad_norm = options.max_grad_norm
        self._accumulation = accumulation
        self._scaler = scaler
        self._step = first_step
        self._norm_of = gradient_norm
        self._params: list[Tensor] = [param for group in built.optimizer.param_groups for param in group["params"]]
        self._fused: FusedBackward | None = None
        if options.fused_backward_pass:
            self._fused = FusedBackward(built, options.max_grad_norm, seed=seed)
            self._fused.attach()
            self._fused.begin(first_step)

    def wrap(self, step: nn.Module, *, may_skip_parameters: bool) -> nn.Module:
        """Return the step as it is called in training; again after what trains has changed."""
        return step if self._share is None else self._share(step, may_skip_parameters)

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Return the context of one micro-batch's forward and backward pass; the last one of an update shares."""
        if last or self._share is None:
            return nullcontext()
        return cast("Any", module).no_sync()

    def observing(self) -> AbstractContextManager[None]:
        """Return the context in which every rank has all weights."""
        return nullcontext()

    def whole_weights(self, *, for_state: bool = False) -> AbstractContextManager[None]:
        """Return the context in which rank 0 has all weights, as they are to be written."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch, divided by the number of micro-batches.

        Raises:
            StopTraining: if the backward pass steps, and would spoil the weights since the loss is not finite.
        """
        if self._fused is not None:
            self._fused.backward(loss)
            return
        if self._accumulation > 1:
            loss = loss / self._accumulation
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        loss.backward()

    def step(self) -> StepOutcome:
        """Finish an update: clip, then step or skip.

        Raises:
            StopTraining: with exit status 5, if too many updates were skipped.
        """
        if self._fused is not None:
            outcome = self._fused.finish()
        else:
            outcome = step_or_skip(self.built, self._params, self._max_grad_norm, self._scaler, norm_of=self._norm_of)
        self.newly_skipped = self.watch.add(self._step, outcome)
        self._step += 1
        if self._fused is not None:
            self._fused.begin(self._step)
        return outcome

    def zero_grad(self) -> None:
        """Free all gradients."""
        self.built.zero_grad()
