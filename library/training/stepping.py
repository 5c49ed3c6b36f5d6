"""From gradients to weights: norm, clipping, and no step at all when a gradient is not finite.

Where the optimizer allows it the device decides by itself, so that the host never waits for a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

if TYPE_CHECKING:
    from library.training.optimizers import BuiltOptimizer

_TINY = 1e-6
"""Keeps the division by the norm finite; the same number as in torch's own clipping."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of an update.

    Attributes:
        grad_norm: L2 norm of all gradients before clipping, float32 scalar on their device.
        skipped: Whether the weights were left as they are, because the norm is not finite; bool scalar likewise.
        counts: Whether that is a fault: float16 training skips steps in order to find its loss scale.
    """

    grad_norm: Tensor
    skipped: Tensor
    counts: Tensor


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together as a float32 scalar, whatever their types."""
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


def step_or_skip(
    built: BuiltOptimizer,
    params: Sequence[Tensor],
    max_grad_norm: float,
    scaler: Any = None,
    *,
    norm_of: Callable[[Sequence[Tensor]], Tensor] = gradient_norm,
) -> StepOutcome:
    """Clip the gradients to `max_grad_norm`, then step, unless a gradient is not finite.

    Under DDP every rank comes to the same result, as the gradients are the same bits everywhere. On a GPU this costs no
    wait if `built.row.skips_on_device`, else one (which `torch.amp.GradScaler` does itself when there is one).

    Args:
        built: The optimizer.
        params: All that is clipped together; those without gradient are left out.
        max_grad_norm: Largest L2 norm; 0 does not clip.
        scaler: `torch.amp.GradScaler` of float16 training.
        norm_of: Computes the norm of gradients, which may be pieces of what several processes have.
    """
    if scaler is not None:
        return _step_scaled(built.optimizer, params, max_grad_norm, scaler)
    gradients = [param.grad for param in params if param.grad is not None]
    norm = norm_of(gradients)
    finite = torch.isfinite(norm)
    outcome = _outcome(norm, finite)
    if built.row.skips_on_device and norm.device.type != "cpu":
        _step_on_device(built.optimizer, norm, ~finite, max_grad_norm)
        return outcome
    value = norm.item()
    if value - value != 0:  # infinite or not a number
        return outcome
    if not max_grad_norm or value <= max_grad_norm:
        built.optimizer.step()
    elif built.row.skips_on_device:
        _step_on_device(built.optimizer, norm, None, max_grad_norm)
    else:
        torch._foreach_mul_(gradients, max_grad_norm / (value + _TINY))
        built.optimizer.step()
    return outcome


def clip_factor(norm: Tensor, max_grad_norm: float) -> Tensor:
    """Return what gradients of this norm are multiplied with: 1 where they are small enough."""
    return (max_grad_norm / (norm + _TINY)).clamp(max=1.0)


def _outcome(norm: Tensor, finite: Tensor, counts: Tensor | None = None) -> StepOutcome:
    skipped = ~finite
    return StepOutcome(norm, skipped, skipped if counts is None else skipped & counts)


def _step_on_device(optimizer: Any, norm: Tensor, skip: Tensor | None, max_grad_norm: float) -> None:
    """Let the fused kernel clip and skip: it divides gradients by `grad_scale` and does nothing if `found_inf` is 1.

    Where the host knows that nothing is to be skipped (`skip` is None) torch need not correct the step counters.
    """
    if skip is not None:
        optimizer.found_inf = skip.float()
    if max_grad_norm:
        optimizer.grad_scale = ((norm + _TINY) / max_grad_norm).clamp(min=1.0)
    try:
        optimizer.step()
    finally:
        for name in ("found_inf", "grad_scale"):
            vars(optimizer).pop(name, None)


def _step_scaled(optimizer: Any, params: Sequence[Tensor], max_grad_norm: float, scaler: Any) -> StepOutcome:
    scaler.unscale_(optimizer)
    norm = gradient_norm([param.grad for param in params if param.grad is not None])
    if max_grad_norm:
        clip_grads_with_norm_(params, max_grad_norm, norm)
    scaler.step(optimizer)
    # While the scale is above 1, a step that overflows only means that the scale was too high.
    blame = scaler._get_scale_async() < 1.0
    scaler.update()
    return _outcome(norm, torch.isfinite(norm), blame)
