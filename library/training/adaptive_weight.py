"""Loss weights that follow the losses: levels of noise with a small loss count as much as those with a large one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from library.errors import UserError
from library.training.scalars import Histogram

BUCKETS = 300
_RANGE = (-10.0, 10.0)
_WEIGHTS = (1e-7, 1e7)
_KEPT = 0.99


class AdaptiveWeight:
    """One average loss per range of log SNR; the weight is its inverse. Nothing waits for the device.

    What is observed during an update changes the weights after it, the same on all processes.
    """

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.ones(BUCKETS, device=device)
        self._edges = torch.linspace(*_RANGE, BUCKETS - 1, device=device)
        # Sums of losses, and how many there were.
        self._seen = torch.zeros(2, BUCKETS, device=device)

    def buckets(self, log_snrs: Tensor) -> Tensor:
        """Return the number of the range that each log SNR [B] falls into, int64 [B]."""
        return torch.searchsorted(self._edges, log_snrs.contiguous())

    def weights(self, buckets: Tensor) -> Tensor:
        """Return the weights of samples in `buckets`, float32 [B]."""
        return (1 / self.losses[buckets]).clamp(*_WEIGHTS)

    def observe(self, buckets: Tensor, losses: Tensor) -> None:
        """Take note of losses [B] as they are before weighting; those that are not finite are passed over."""
        losses = losses.detach().float()
        finite = losses.isfinite()
        values = torch.stack([losses.where(finite, 0), finite.float()])
        self._seen.index_add_(1, buckets, values)

    def after_update(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move the averages towards the means of what was observed, over all samples of all processes."""
        total, count = reduce(self._seen)
        mean = total / count.clamp(min=1)
        self.losses = torch.where(count > 0, _KEPT * self.losses + (1 - _KEPT) * mean, self.losses)
        self._seen.zero_()

    def histogram(self) -> Histogram:
        """Return the averages over log SNR, the outermost ranges as wide as the others."""
        inner = self._edges.tolist()
        width = inner[1] - inner[0]
        return Histogram([inner[0] - width, *inner, inner[-1] + width], self.losses.tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {"bucket_losses": self.losses.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, or from what the original trainer keeps under `adaptive_loss` in info.json.

        Raises:
            UserError: it holds something else.
        """
        try:
            losses = torch.as_tensor(state["bucket_losses"], dtype=torch.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError("holds no losses by level of noise", where="adaptive loss weights") from error
        if losses.shape != (BUCKETS,) or not bool((losses.isfinite() & (losses >= 0)).all()):
            what = f"must hold {BUCKETS} losses, each a number from 0 on"
            raise UserError(what, "Start without them.", where="adaptive loss weights")
        self.losses = losses.to(self.losses.device, copy=True)
        self._seen.zero_()
