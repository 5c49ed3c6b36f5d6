"""Weights are updated while gradients arrive, so that never more than a few gradients are in memory.

As soon as the gradient of a tensor is complete, the optimizer steps that tensor alone and the gradient is freed. There
is still one optimizer with one state; a step is the same to the last bit as one over all tensors.

Two things differ from an ordinary step, because nothing is known of the gradients still to come: `--max_grad_norm`
limits the norm of each tensor's gradient by itself, and gradients that are not finite end the run, since half a step
cannot be taken back. `check_fused_backward` in `fused_checks.py` says when all this cannot be done.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.draws import generator_for
from library.randomness import derive
from library.training.non_finite import diverged
from library.training.stepping import StepOutcome, clip_factor

if TYPE_CHECKING:
    from library.training.optimizers import BuiltOptimizer


class FusedBackward:
    """Steps each parameter of an optimizer in the moment its gradient is complete.

    bfloat16 weights under Adafactor are rounded at random, up or down in proportion to the distance, so that updates
    smaller than their precision are not lost. The random bits are derived from the seed, the update and the tensor.

    Args:
        built: The optimizer; its row must have `steps_one_parameter`.
        max_grad_norm: Largest L2 norm of one tensor's gradient; 0 does not clip.
        seed: The run's seed.
    """

    def __init__(self, built: BuiltOptimizer, max_grad_norm: float, *, seed: int = 0) -> None:
        if not built.row.steps_one_parameter:
            raise ValueError(f"{built.row.import_path} cannot step one parameter at a time")
        self._optimizer = built.optimizer
        self._max_grad_norm = max_grad_norm
        self._seed = seed
        self._rounds_at_random = built.row.is_adafactor
        self._step = 0
        self._norms: list[Tensor] = []
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Put a hook on every parameter of the optimizer that trains."""
        groups = enumerate(self._optimizer.param_groups)
        numbered = ((number, param) for number, group in groups for param in group["params"])
        for index, (number, param) in enumerate(numbered):
            if param.requires_grad:
                self._handles.append(param.register_post_accumulate_grad_hook(self._hook(number, index)))

    def detach(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def begin(self, step: int) -> None:
        """Tell which update the next backward pass belongs to."""
        self._step = step
        self._norms.clear()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass, which steps. Costs one read of the loss by the host.

        Raises:
            StopTraining: with exit status 5, if the loss is not finite and would spoil the weights.
        """
        if not math.isfinite(loss.item()):
            raise diverged(f"the loss of update {self._step + 1}")
        loss.backward()

    def finish(self) -> StepOutcome:
        """Return the outcome of the update after its backward pass; `skipped` means that the weights are spoilt."""
        norm = torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else torch.zeros(())
        self._norms.clear()
        spoilt = ~torch.isfinite(norm)
        return StepOutcome(norm, spoilt, spoilt)

    def _hook(self, group: int, index: int) -> Callable[[Tensor], None]:
        def hook(param: Tensor) -> None:
            self._clip(param)
            if self._rounds_at_random and param.dtype == torch.bfloat16:
                self._step_rounded(group, param, index)
            else:
                self._step_one(group, param)
            param.grad = None

        return hook

    def _clip(self, param: Tensor) -> None:
        if param.grad is None:
            raise ValueError("a gradient hook ran without gradient")
        norm = torch.linalg.vector_norm(param.grad, dtype=torch.float32)
        self._norms.append(norm)
        if self._max_grad_norm:
            param.grad.mul_(clip_factor(norm, self._max_grad_norm))

    def _step_one(self, number: int, param: Tensor) -> None:
        """Step with the optimizer's view narrowed to one parameter; writes to the group's other entries persist.

        Groups are found by number, as loading a state replaces their dictionaries.
        """
        optimizer = self._optimizer
        groups, group = optimizer.param_groups, optimizer.param_groups[number]
        params = group["params"]
        optimizer.param_groups, group["params"] = [group], [param]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups, group["params"] = groups, params

    def _step_rounded(self, group: int, param: Tensor, index: int) -> None:
        """Step a float32 copy of a bfloat16 parameter under the parameter's state, then round it back at random."""
        state = self._optimizer.state
        exact = param.detach().float()
        exact.grad = None if param.grad is None else param.grad.float()
        if param in state:
            state[exact] = state.pop(param)
        try:
            self._step_one(group, exact)
        finally:
            if exact in state:
                state[param] = state.pop(exact)
        with torch.no_grad():
            param.copy_(round_at_random(exact, self._seed, self._step, index))


def round_at_random(values: Tensor, seed: int, *counters: int) -> Tensor:
    """Round float32 `values` to bfloat16, up with the probability of the part that is cut off.

    The expected result is the value itself. Adding 16 random bits below those that bfloat16 keeps carries into them
    with just that probability; cutting off then rounds towards zero.
    """
    generator = generator_for(values.device).manual_seed(derive(seed, "round", *counters))
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = (values.contiguous().view(torch.int32) + noise) & -(1 << 16)
    return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()
