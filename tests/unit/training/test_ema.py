"""The moving average of weights: its formula, its start, and exact returns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from library.checkpoints.tensor_files import open_tensors, write_safetensors
from library.contracts import Position, RunLength
from library.errors import UserError
from library.training import ema
from library.training.ema import WeightAverage, average_of
from library.training.objective_cascade import GDFObjective
from library.training.options import LossOptions, NoiseOptions
from library.training.options_cascade import CascadeLossOptions
from library.training.options_ema import EmaOptions
from library.training.state import StateInfo, StateParts, load_state, save_state, verify_state


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))
    made.register_buffer("passing", torch.zeros(3), persistent=False)
    return made.to(dtype)


def change(module, amount):
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(amount * (number + 1))
        module[1].running_mean.add_(amount)
        module[1].num_batches_tracked.add_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formula_start_and_interval(dtype):
    trained = model(dtype)
    average = WeightAverage({"unet": trained}, decay=0.9, start=6, every=2)
    wanted = {f"unet.{name}": tensor.float().clone() for name, tensor in trained.state_dict().items()}
    assert set(average.tensors()) == set(wanted)
    for step in range(1, 13):
        change(trained, 0.125)
        average.update(step)
        if step % 2 == 0:
            share = 0.1 if step >= 6 else 1.0
            for name, tensor in trained.state_dict().items():
                old = wanted[f"unet.{name}"]
                wanted[f"unet.{name}"] = old + share * (tensor.float() - old)
    for name, tensor in average.tensors().items():
        if name.endswith("num_batches_tracked"):
            assert tensor.item() == 12
        else:
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)
    assert average.updates == 6


def test_small_changes_of_half_precision_weights_are_not_lost():
    trained = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(trained.weight, 1.0)
    average = WeightAverage({"a": trained}, decay=0.999)
    nn.init.constant_(trained.weight, 1.0078125)
    for step in range(1, 101):
        average.update(step)
    wanted = 1.0078125 - 0.0078125 * 0.999**100
    assert average.tensors()["a.weight"].item() == pytest.approx(wanted, abs=2e-6)


def test_weights_come_back_bit_for_bit():
    trained = model(torch.bfloat16)
    average = WeightAverage({"a": trained}, decay=0.5)
    change(trained, 0.3)
    average.update(1)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in trained.parameters()]
    with average.applied():
        for name, tensor in trained.state_dict().items():
            assert torch.equal(tensor, average.tensors()[f"a.{name}"].to(tensor.dtype))
        assert not torch.equal(trained[0].weight, before["0.weight"])
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [parameter.data_ptr() for parameter in trained.parameters()] == addresses


def test_a_resumed_average_goes_on_exactly(tmp_path):
    def run(trained, average, steps):
        for step in steps:
            change(trained, 0.01 * step)
            average.update(step)

    settings = {"decay": 0.97, "start": 3, "every": 3}
    whole = model()
    straight = WeightAverage({"a": whole}, **settings)
    run(whole, straight, range(1, 21))
    half = model()
    first = WeightAverage({"a": half}, **settings)
    run(half, first, range(1, 11))
    write_safetensors(tmp_path / "ema.safetensors", first.tensors(), {"format": "pt"})
    numbers = dict(first.numbers())
    half_again = model(seed=5)
    half_again.load_state_dict(half.state_dict())
    second = WeightAverage({"a": half_again}, **settings)
    second.restore(dict(open_tensors(tmp_path / "ema.safetensors")), numbers)
    run(half_again, second, range(11, 21))
    assert second.updates == straight.updates
    for name, tensor in straight.tensors().items():
        assert torch.equal(tensor, second.tensors()[name])


def test_skipped_updates_leave_it_alone():
    trained = model()
    average = WeightAverage({"a": trained}, decay=0.5)
    before = {name: tensor.clone() for name, tensor in average.tensors().items()}
    with torch.no_grad():
        trained[0].weight.fill_(math.nan)
    average.update(1, skipped=torch.tensor(True))
    assert torch.equal(average.tensors()["a.0.weight"], before["a.0.weight"])
    with torch.no_grad():
        trained[0].weight.fill_(3.0)
    average.update(2, skipped=torch.tensor(False))
    torch.testing.assert_close(average.tensors()["a.0.weight"], (before["a.0.weight"] + 3) / 2)


def test_chunks_do_not_matter(monkeypatch):
    results = []
    for size in (1, 40, 1 << 20):
        monkeypatch.setattr(ema, "_CHUNK", size)
        trained = model()
        average = WeightAverage({"a": trained}, decay=0.9)
        change(trained, 0.5)
        average.update(1)
        results.append(dict(average.tensors()))
    for other in results[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in results[0].items())


def test_an_average_of_another_model_is_refused():
    average = WeightAverage({"a": model()}, decay=0.9)
    good = {name: tensor.clone() for name, tensor in average.tensors().items()}
    for wrong in ({**good, "a.more": torch.zeros(1)}, {**good, "a.0.weight": torch.zeros(1)}, {}):
        with pytest.raises(UserError, match="another model"):
            average.restore(wrong, {})
    with pytest.raises(UserError, match="count"):
        average.restore(good, {"updates": "x"})
    for settings in ({"decay": 1.0}, {"decay": 0.9, "every": 0}):
        with pytest.raises(ValueError, match="impossible"):
            WeightAverage({"a": model()}, **settings)


def test_a_state_carries_average_and_adaptive_weights(tmp_path):
    """With the real writer of states, as a run of Stable Cascade will use it."""

    def parts(seed):
        trained = model(seed=seed)
        optimizer = torch.optim.AdamW(trained.parameters())
        aim = GDFObjective(
            NoiseOptions(), LossOptions(), CascadeLossOptions(adaptive_loss_weight=True), torch.device("cpu")
        )
        average = average_of(EmaOptions(ema_decay=0.9), {"unet": trained})
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return StateParts({"unet": trained}, optimizer, schedule, objective=aim, ema=average)

    before, after = parts(0), parts(1)
    change(before.modules["unet"], 0.3)
    before.ema.update(1)
    before.objective.adaptive.observe(torch.tensor([7]), torch.tensor([0.5]))
    before.objective.after_update(lambda tensor: tensor)
    before.optimizer.step()
    length = RunLength(10, 2, 10, 2, 2, 1)
    info = StateInfo(position=Position(1, 0, 1), seed=1, length=length, output_name="x")
    save_state(tmp_path / "x-state", before, info)
    load_state(verify_state(tmp_path / "x-state"), after)
    assert torch.equal(after.objective.adaptive.losses, before.objective.adaptive.losses)
    for name, tensor in before.ema.tensors().items():
        assert torch.equal(after.ema.tensors()[name], tensor)
    assert after.ema.updates == 1


def test_options():
    assert average_of(EmaOptions(), {"a": model()}) is None
    made = average_of(
        EmaOptions(ema_decay=0.9, ema_start_steps=5, ema_every_n_steps=2, ema_device="cpu"), {"a": model()}
    )
    assert (made.decay, made.start, made.every) == (0.9, 5, 2)
    assert list(EmaOptions(ema_decay=1.0).check())
    assert not list(EmaOptions(ema_decay=0.9).check())
