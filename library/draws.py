"""Random tensors of a micro-batch: row i depends on (seed, step, micro-batch, i, name of the draw) and nothing else.

So a new draw never changes the others, several processes draw what one process with accumulation draws, and a resumed
run draws what the uninterrupted one drew. Nothing here touches a global generator, and nothing waits for the device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from library.contracts import StepKey
from library.randomness import derive, uniform

_FLOAT32_BITS = 24
_local = threading.local()


def seed_generators(seed: int) -> None:
    """Set the global generators of torch, Python and numpy, which modules that are not ours draw from."""
    import random

    import numpy as np

    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


class Draws:
    """All random numbers of one micro-batch, by name.

    Args:
        seed: The run's seed.
        key: Update and micro-batch (over all ranks) that the draws belong to.
        rows: Samples in the micro-batch.
        device: Where the tensors are needed.
        stream: Name of the stream; validation and sample images have their own.
    """

    __slots__ = ("_counters", "_device", "_rows", "_seed", "_stream")

    def __init__(self, seed: int, key: StepKey, rows: int, device: torch.device, stream: str = "noise") -> None:
        self._seed = seed
        self._counters = (key.step, key.micro)
        self._rows = rows
        self._device = torch.device(device)
        self._stream = stream

    def normal(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return standard normal noise [rows, *shape]; other types are rounded from the float32 draw."""
        return normal_rows(self._row_numbers(name), shape, self._device, dtype)

    def uniform(self, name: str) -> Tensor:
        """Return one number in [0, 1) per row, float32 [rows]."""
        step = 2.0**-_FLOAT32_BITS  # multiples of it are exact in float32, so rounding never yields 1
        values = [(number >> (64 - _FLOAT32_BITS)) * step for number in self._row_numbers(name)]
        return self._to_device(torch.tensor(values, dtype=torch.float32))

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """Return one integer with low <= value < high per row, int64 [rows]."""
        span = high - low
        if span <= 0:
            raise ValueError(f"no integer n with {low} <= n < {high}")
        values = [low + (number * span >> 64) for number in self._row_numbers(name)]
        return self._to_device(torch.tensor(values, dtype=torch.int64))

    def scalar(self, name: str) -> float:
        """Return one number in [0, 1) for the whole micro-batch, on the host."""
        return uniform(self._seed, self._stream, *self._counters, name)

    def _row_numbers(self, name: str) -> Iterable[int]:
        step, micro = self._counters
        return [derive(self._seed, self._stream, step, micro, row, name) for row in range(self._rows)]

    def _to_device(self, values: Tensor) -> Tensor:
        if self._device.type == "cuda":
            return values.pin_memory().to(self._device, non_blocking=True)
        return values.to(self._device)


class ImageDraws(Draws):
    """Draws whose row i depends on the seed, an image's key, a number and the draw's name, whatever the batch.

    Args:
        seed: Of the draws.
        keys: One name per row.
        number: Tells several draws for the same images apart.
        device: Where the tensors are needed.
        stream: Name of the stream.
    """

    __slots__ = ("_keys",)

    def __init__(self, seed: int, keys: Sequence[str], number: int, device: torch.device, stream: str) -> None:
        super().__init__(seed, StepKey(0, number), len(keys), device, stream)
        self._keys = tuple(keys)

    def _row_numbers(self, name: str) -> Iterable[int]:
        step, number = self._counters
        return [derive(self._seed, self._stream, step, number, key, name) for key in self._keys]


def normal_rows(
    seeds: Iterable[int], shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return standard normal noise [len(seeds), *shape] whose row i is drawn by a generator seeded with seeds[i].

    The numbers depend on the kind of device: CUDA generators use all 64 bits of a seed, the CPU's uses the lower 32, so
    once in some 65,000 rows two rows of a CPU run are alike, which does no harm.
    """
    seeds = list(seeds)
    device = torch.device(device)
    noise = torch.empty(len(seeds), *shape, dtype=torch.float32, device=device)
    generator = generator_for(device)
    for row, seed in zip(noise.unbind(0), seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return noise if dtype == torch.float32 else noise.to(dtype)


def generator_for(device: torch.device) -> torch.Generator:
    """Return this thread's generator for `device`; making one anew for each draw would cost more than the draw."""
    generators: dict[torch.device, torch.Generator] | None = getattr(_local, "generators", None)
    if generators is None:
        generators = _local.generators = {}
    generator = generators.get(device)
    if generator is None:
        generator = generators[device] = torch.Generator(device)
    return generator
