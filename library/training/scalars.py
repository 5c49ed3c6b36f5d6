"""Numbers of a run that are read without making the host wait for the device, and the average of the losses."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Scalar: TypeAlias = "Tensor | float"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Numbers over ranges: `counts[i]`, not necessarily whole, from `edges[i]` to `edges[i + 1]`."""

    edges: Sequence[float]
    counts: Sequence[float]


class LossAverage:
    """Average over one epoch's worth of updates.

    During the first epoch the losses so far; later the loss of an update replaces that of the same update of the epoch
    before, so the average moves over one epoch. Losses that are not finite are left out.
    """

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._total = 0.0

    def add(self, index: int, loss: float) -> None:
        """Take the loss of update `index` of its epoch (from 0)."""
        if not math.isfinite(loss):
            return
        if index < len(self._losses):
            self._total -= self._losses[index]
            self._losses[index] = loss
        else:
            self._losses.append(loss)
        self._total += loss

    @property
    def average(self) -> float:
        """The moving average; 0 before the first loss."""
        return self._total / len(self._losses) if self._losses else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values that continue the average exactly."""
        return {"losses": list(self._losses), "total": self._total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; anything else starts anew."""
        losses, total = state.get("losses"), state.get("total")
        if isinstance(losses, list) and isinstance(total, (int, float)):
            self._losses, self._total = [float(loss) for loss in losses], float(total)


@dataclass(slots=True)
class _Waiting:
    """Scalars on their way to the host: `names` belong to the elements of `host`, which is filled at `done`."""

    label: Any
    known: dict[str, float]
    names: list[str]
    host: Tensor | None
    done: torch.cuda.Event | None

    def read(self) -> dict[str, float]:
        """Return all values; waits only for what the device has not finished."""
        if self.host is not None:
            if self.done is not None:
                self.done.synchronize()
            self.known.update(zip(self.names, self.host.tolist(), strict=True))
        return self.known


class DeferredScalars:
    """A queue of scalars: what is pushed now is read one push later, when the device has long finished it."""

    def __init__(self) -> None:
        self._queue: deque[_Waiting] = deque()

    def push(self, label: Any, values: Mapping[str, Scalar]) -> None:
        """Begin to bring `values` (numbers, or tensors of one element) to the host, all in one copy."""
        import torch

        tensors = {name: value.detach() for name, value in values.items() if isinstance(value, torch.Tensor)}
        # Nobody waits for the main memory, and what lies there cannot be stacked with what is on a device.
        tensors = {name: value for name, value in tensors.items() if value.device.type != "cpu"}
        known = {name: float(value) for name, value in values.items() if name not in tensors}
        if not tensors:
            self._queue.append(_Waiting(label, known, [], None, None))
            return
        together = torch.stack([value.float().reshape(()) for value in tensors.values()])
        done = None
        if together.is_cuda:
            host = torch.empty(together.shape, pin_memory=True)
            host.copy_(together, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        else:
            host = together
        self._queue.append(_Waiting(label, known, list(tensors), host, done))

    def ready(self) -> Iterator[tuple[Any, dict[str, float]]]:
        """Yield (label, values) of all but the newest push."""
        while len(self._queue) > 1:
            waiting = self._queue.popleft()
            yield waiting.label, waiting.read()

    def drain(self) -> Iterator[tuple[Any, dict[str, float]]]:
        """Yield everything, waiting for the device."""
        while self._queue:
            waiting = self._queue.popleft()
            yield waiting.label, waiting.read()


def learning_rates(names: Sequence[str], optimizer: torch.optim.Optimizer) -> dict[str, Scalar]:
    """Return `lr/<name>` of each parameter group, and `lr/d*lr/<name>` where the optimizer estimates a step size d.

    A group without a name, the only one, has `lr` and `lr/d*lr`.
    """
    found: dict[str, Scalar] = {}
    for name, group in zip(names, optimizer.param_groups, strict=True):
        of_group = f"/{name}" if name else ""
        found[f"lr{of_group}"] = group["lr"]
        if "d" in group:
            found[f"lr/d*lr{of_group}"] = group["d"] * group["lr"]
    return found


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory held so far, in MiB: of the GPU, else of this process (0 where that cannot be told)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
