"""Keeps count of updates without finite gradients, and ends a run that does not recover."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.errors import EXIT_DIVERGED, StopTraining

if TYPE_CHECKING:
    from library.training.stepping import StepOutcome

logger = logging.getLogger(__name__)

_WINDOW = 1000
_MOST_IN_WINDOW = 50


class NonFiniteWatch:
    """Counts skipped updates without waiting for the device.

    Outcomes on a GPU are copied to the host while it works on and are judged some updates later; always equally many,
    so that all ranks come to the same decision at the same time.

    Args:
        most_in_a_row: This many skipped updates in a row end the run, 0 like 1. More than 50 of the last 1000 do too.
        delay: Updates after which the outcome of one on a GPU is read.
    """

    def __init__(self, most_in_a_row: int, *, delay: int = 1) -> None:
        self.skipped = 0
        """Updates skipped so far, as far as known."""
        self._most_in_a_row = max(1, most_in_a_row)
        self._delay = delay
        self._in_a_row = 0
        self._recent: deque[bool] = deque(maxlen=_WINDOW)
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, outcome: StepOutcome) -> list[int]:
        """Take note of update `step` (from 0); return the updates now known to have been skipped.

        Raises:
            StopTraining: with exit status 5, if too many were skipped.
        """
        flags = torch.stack([outcome.skipped, outcome.counts])
        event = None
        if flags.is_cuda:
            on_host = torch.empty(2, dtype=torch.bool, pin_memory=True)
            flags = on_host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, flags, event))
        return self._read(self._delay if event is not None else 0)

    def flush(self) -> list[int]:
        """Wait for all outcomes and judge them: at the end of a run, and before weights are saved."""
        return self._read(0)

    def _read(self, leave: int) -> list[int]:
        found = []
        while len(self._pending) > leave:
            step, flags, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            skipped, counts = flags.tolist()
            self.skipped += skipped
            self._judge(step, counts)
            if skipped:
                found.append(step)
                logger.warning("update %d was skipped: its gradients are not finite", step + 1)
        return found

    def _judge(self, step: int, fault: bool) -> None:
        self._recent.append(fault)
        self._in_a_row = self._in_a_row + 1 if fault else 0
        if self._in_a_row >= self._most_in_a_row:
            raise diverged(f"{self._in_a_row} in a row, up to update {step + 1}")
        if fault and sum(self._recent) > _MOST_IN_WINDOW:
            raise diverged(f"{sum(self._recent)} of the last {len(self._recent)}, up to update {step + 1}")


def diverged(details: str) -> StopTraining:
    """Return the exception that ends a run because of values that are not finite."""
    return StopTraining(
        f"training diverged: losses or gradients that are not finite ({details}). Lower --learning_rate, use "
        "--mixed_precision bf16 or no, try --no_half_vae, and look for broken images",
        EXIT_DIVERGED,
    )
