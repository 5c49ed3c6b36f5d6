"""The context in which samples, validation and saves of the trained model run, leaving no trace in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from library.training.methods.base import Method
    from library.training.optimizers import BuiltOptimizer


@contextmanager
def observe(method: Method, built: BuiltOptimizer) -> Iterator[None]:
    """Evaluation mode, no gradients, the averaged weights of schedule-free optimizers; everything as before afterwards.

    Schedule-free `eval()` followed by `train()` does not give the same bits back, so the trained weights are copied
    before and restored bit for bit.
    """
    with torch.random.fork_rng(), torch.no_grad(), _averaged_weights(method, built), method.evaluating():
        yield


@contextmanager
def _averaged_weights(method: Method, built: BuiltOptimizer) -> Iterator[None]:
    if not built.row.has_eval_mode:
        yield
        return
    parameters = [parameter for part in method.parts().values() for parameter in part.parameters()]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer: Any = built.optimizer
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, before in zip(parameters, kept, strict=True):
            parameter.detach().copy_(before)
