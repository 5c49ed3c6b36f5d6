"""Several processes on a machine without GPU: torchrun and srun do not tell accelerate that they are to be one run."""

import accelerate
import pytest
import torch

from library.training.options import DistributedOptions
from library.training.processes import make_accelerator


@pytest.mark.parametrize(("world", "gpu", "cpu"), [("2", False, True), ("2", True, False), ("1", False, False)])
def test_accelerate_is_told_to_join_processes_on_the_cpu(monkeypatch, world, gpu, cpu):
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(accelerate, "Accelerator", lambda **arguments: asked.update(arguments))
    make_accelerator(DistributedOptions())
    assert asked["cpu"] is cpu
