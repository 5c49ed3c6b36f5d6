"""Chance in networks: initial values, and what adapters leave out in a step.

What is left out is drawn from torch's global generators. The trainer seeds those before every micro-batch, and gradient
checkpointing and compilation know how to draw from them again, which no generator of our own would give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from library.randomness import derive


def initial_generator(*names: str) -> torch.Generator:
    """Return the generator of initial values: a function of torch's seed and the names of what gets them."""
    return torch.Generator().manual_seed(derive(torch.initial_seed() & (2**63 - 1), "init", *names) >> 1)


def uniform(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers from [0, 1), drawn where they are needed, so that nobody waits."""
    return torch.rand(tuple(shape), device=device)


def number_below(count: int) -> int:
    """Return one of 0 .. count - 1, from the generator of the CPU, so that no device is waited for."""
    return int(torch.randint(count, ()))
