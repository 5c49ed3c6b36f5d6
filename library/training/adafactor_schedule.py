"""Reports the learning rate of an optimizer that chooses it itself."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class AdafactorSchedule(LRScheduler):
    """Shows the learning rate that Adafactor (relative_step=True) took last; it influences nothing.

    Args:
        optimizer: transformers' Adafactor.
        initial_lr: What is shown before the first step.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float) -> None:
        self.initial_lr = initial_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return one learning rate per group: that of the group's first tensor, since each tensor has its own."""
        return [self._rate(group) for group in self.optimizer.param_groups]

    def _rate(self, group: dict[str, Any]) -> float:
        state = self.optimizer.state.get(group["params"][0])
        return float(self.optimizer._get_lr(group, state)) if state else self.initial_lr  # type: ignore[attr-defined]
