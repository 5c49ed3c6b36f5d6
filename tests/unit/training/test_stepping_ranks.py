"""Two processes, a gradient that is not finite on one of them: both skip, both stop, both keep the same weights."""

import os

import pytest
import torch
from torch import distributed, multiprocessing, nn

UPDATES = 4


def work(rank, folder):
    from library.contracts import ParamGroup
    from library.errors import StopTraining
    from library.training.optimizers import build_optimizer
    from library.training.options import OptimizerOptions
    from library.training.stepper import Stepper

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = nn.parallel.DistributedDataParallel(nn.Linear(6, 3))
    options = OptimizerOptions(learning_rate=1e-2, max_nan_steps=2)
    built = build_optimizer(options, [ParamGroup("unet", tuple(module.parameters()), 1e-2)])
    stepper, log = Stepper(built, options), []
    try:
        for step in range(UPDATES):
            data = torch.full((2, 6), float(rank + step))
            if rank == 1 and step in (1, 3, 4):
                data[0, 0] = float("nan")
            stepper.backward(module(data).square().sum())
            log.append(float(stepper.step().grad_norm))
            stepper.zero_grad()
        stepper.backward(module(torch.full((2, 6), float("nan") if rank else 1.0)).square().sum())
        stepper.step()
    except StopTraining as stop:
        log.append(str(stop))
    torch.save((log, module.module.weight.detach().clone()), f"{folder}/{rank}.pt")
    distributed.barrier()
    del stepper, built, module  # before the threads that they use
    distributed.destroy_process_group()
    os._exit(0)  # threads of gloo may abort an ordinary exit


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_ranks_decide_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    (first, weight), (second, other) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(weight, other)
    assert torch.isfinite(weight).all()
    assert [str(entry) for entry in first] == [str(entry) for entry in second]
    assert [str(norm) == "nan" for norm in first[:-1]] == [False, True, False, True]
    assert "2 in a row, up to update 5" in first[-1]
