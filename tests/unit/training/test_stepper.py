"""What the loop calls: backward passes that add up, and runs that give up in time."""

import pytest
import torch
from torch import nn

from library.contracts import ParamGroup
from library.errors import StopTraining
from library.training.optimizers import build_optimizer
from library.training.options import OptimizerOptions
from library.training.stepper import Stepper


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))


def stepper(module, *, lr=1e-2, accumulation=1, scaler=None, **options):
    options = OptimizerOptions(learning_rate=lr, **options)
    built = build_optimizer(options, [ParamGroup("unet", tuple(module.parameters()), lr)])
    return Stepper(built, options, accumulation=accumulation, scaler=scaler)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def finite(module):
    return all(torch.isfinite(param).all() for param in module.parameters())


def test_accumulated_micro_batches_average():
    data = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    whole, parts = model(), model()
    one, many = stepper(whole), stepper(parts, accumulation=4)
    one.backward(whole(data).square().sum(1).mean())
    for row in data:
        many.backward(parts(row).square().sum())
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert not one.step().skipped
    one.zero_grad()
    assert all(param.grad is None for param in whole.parameters())


def test_scaled_losses_give_the_same_step():
    plain, scaled = model(), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for module, steps in ((plain, stepper(plain)), (scaled, stepper(scaled, scaler=scaler))):
        steps.backward(module(torch.ones(2, 6)).square().sum())
        steps.step()
    assert same(plain, scaled)
    assert not same(plain, model())


def test_a_run_that_diverges_stops_within_the_limit():
    module = model()
    steps = stepper(module, max_nan_steps=3)
    found = []
    with pytest.raises(StopTraining, match="3 in a row, up to update 3") as caught:
        for _ in range(5):
            steps.backward(module(torch.full((1, 6), float("nan"))).sum())
            steps.step()
            found += steps.newly_skipped
            steps.zero_grad()
    assert caught.value.exit_code == 5
    assert found == [0, 1]
    assert steps.watch.skipped == 3
    assert same(module, model())


def test_a_learning_rate_that_is_far_too_high_ends_the_run_with_finite_weights():
    module = model()
    steps = stepper(module, optimizer_type="SGD", lr=1e6, max_nan_steps=2, max_grad_norm=0.0)
    with pytest.raises(StopTraining):
        for _ in range(50):
            steps.backward(module(torch.ones(2, 6)).square().sum())
            steps.step()
            steps.zero_grad()
    assert finite(module)


def test_updating_in_the_backward_pass_equals_a_step_and_stops_before_it_spoils_the_weights():
    module, plain = model(), model()
    fused, whole = stepper(module, fused_backward_pass=True, max_grad_norm=0.0), stepper(plain, max_grad_norm=0.0)
    for step in range(2):
        for each, trained in ((fused, module), (whole, plain)):
            each.backward(trained(torch.ones(2, 6) * (step + 1)).square().sum())
            each.step()
            each.zero_grad()
    assert same(module, plain)
    with pytest.raises(StopTraining, match="the loss of update 3") as caught:
        fused.backward(module(torch.full((1, 6), float("nan"))).sum())
    assert caught.value.exit_code == 5
    assert finite(module)
