"""An exponential moving average of what trains: float32, on a device of its choice, never part of a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.training.pieces import own_piece, piece_of, put_together

if TYPE_CHECKING:
    from library.training.options_ema import EmaOptions

_CHUNK = 1 << 26
"""Numbers that are converted at the same time where weights are not float32."""


class WeightAverage:
    """Follows weights: `average = decay * average + (1 - decay) * weights` every so many updates.

    Up to update `start` the average is a copy of the weights. Weights of modules are followed, buffers of floating
    point likewise; buffers of whole numbers are copied.

    Args:
        modules: What trains, by name, as in a state.
        decay: Share of the average that stays.
        start: First update (from 1) from which on `decay` counts.
        every: Updates from one change of the average to the next.
        device: Where the average is kept; None: beside the weights.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        *,
        decay: float,
        start: int = 0,
        every: int = 1,
        device: torch.device | None = None,
    ) -> None:
        if not 0 <= decay < 1 or every < 1 or start < 0:
            raise ValueError(f"impossible average: decay {decay}, start {start}, every {every}")
        self.decay, self.start, self.every = decay, start, every
        self.updates = 0
        self._wholes = dict(_tensors(modules))
        # What is cut up between processes is averaged piece by piece.
        self._followed = {name: own_piece(tensor) for name, tensor in self._wholes.items()}
        self._averages = {name: _copy(tensor, device) for name, tensor in self._followed.items()}
        floating = [name for name, tensor in self._averages.items() if tensor.is_floating_point()]
        self._chunks = _chunks(floating, self._averages)
        self._whole = [name for name in self._averages if name not in set(floating)]

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """Follow the weights after update `step` (from 1), if it is one of those that count.

        Args:
            step: Number of updates that the run has made.
            skipped: Whether the update was skipped, bool scalar; the average then stays as it is, without waiting for
                the device.
        """
        if step % self.every:
            return
        self.updates += 1
        share = 1.0 - (self.decay if step >= self.start else 0.0)
        for names in self._chunks:
            self._follow(names, share, skipped)
        for name in self._whole:
            self._averages[name].copy_(self._followed[name])

    def _follow(self, names: list[str], share: float, skipped: Tensor | None) -> None:
        averages = [self._averages[name] for name in names]
        weights = [self._followed[name].detach().to(average) for name, average in zip(names, averages, strict=True)]
        if skipped is not None:
            kept = skipped.to(averages[0].device)
            # Towards itself, an average stays bit by bit; a share of 0 would let NaN in.
            weights = [torch.where(kept, *pair) for pair in zip(averages, weights, strict=True)]
        torch._foreach_lerp_(averages, weights, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in place of the weights inside the block; afterwards both have the same bits as before.

        Where they are of one type, weights and average change places, which takes no memory. Weights of other types
        wait beside the average.
        """
        aside: dict[str, Tensor] = {}
        with torch.no_grad():
            try:
                for name, tensor in self._followed.items():
                    aside[name] = self._exchange(name, tensor)
                yield
            finally:
                for name, before in aside.items():
                    if before is self._averages[name]:
                        self._exchange(name, self._followed[name])
                    else:
                        self._followed[name].copy_(before)

    def _exchange(self, name: str, tensor: Tensor) -> Tensor:
        """Put the average `name` into `tensor`; return where the values of `tensor` are now."""
        average = self._averages[name]
        before = tensor.detach().to(average.device, copy=True)
        tensor.copy_(average)
        return average.copy_(before) if average.dtype == tensor.dtype else before

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the averages by name of part and parameter.

        Where weights are cut up between processes this is a collective call, and the first one alone gets them.
        """
        return {name: put_together(average, self._wholes[name]) for name, average in self._averages.items()}

    def numbers(self) -> Mapping[str, float | int]:
        """Return what else must be saved to continue."""
        return {"decay": self.decay, "start": self.start, "every": self.every, "updates": self.updates}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from what `tensors` and `numbers` returned.

        Raises:
            UserError: it is an average of another model.
        """
        missing, extra = set(self._averages) - set(tensors), set(tensors) - set(self._averages)
        wrong = [
            name for name, tensor in tensors.items() if name not in extra | missing and not self._fits(name, tensor)
        ]
        if missing or extra or wrong:
            first = sorted([*missing, *extra, *wrong])[0]
            raise UserError(
                f"the averaged weights (EMA) are those of another model: {first}", "Start without --resume."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._averages[name].copy_(piece_of(tensor, self._wholes[name]))
        updates = numbers.get("updates", 0)
        if not isinstance(updates, int) or updates < 0:
            raise UserError("the averaged weights (EMA) have lost their count of updates", "Start without --resume.")
        self.updates = updates

    def _fits(self, name: str, tensor: Tensor) -> bool:
        return tensor.shape == self._wholes[name].shape


def average_of(options: EmaOptions, modules: Mapping[str, nn.Module]) -> WeightAverage | None:
    """Return the average that the options ask for, None where they ask for none."""
    if options.ema_decay is None:
        return None
    return WeightAverage(
        modules,
        decay=options.ema_decay,
        start=options.ema_start_steps,
        every=options.ema_every_n_steps,
        device=None if options.ema_device is None else torch.device(options.ema_device),
    )


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for part, module in modules.items():
        # Not `state_dict()`, which may hand out products of parameters.
        for name, tensor in module.named_parameters():
            yield f"{part}.{name}", tensor
        stored = set(module.state_dict())
        yield from ((f"{part}.{name}", buffer) for name, buffer in module.named_buffers() if name in stored)


def _copy(tensor: Tensor, device: torch.device | None) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(device or tensor.device, dtype, copy=True)


def _chunks(names: list[str], tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return names in groups of limited size, each on one device, so that converted weights take little memory."""
    chunks: list[list[str]] = []
    room, device = 0, None
    for name in names:
        tensor = tensors[name]
        if not chunks or tensor.device != device or room < tensor.numel():
            chunks.append([])
            room, device = _CHUNK, tensor.device
        chunks[-1].append(name)
        room -= tensor.numel()
    return chunks
