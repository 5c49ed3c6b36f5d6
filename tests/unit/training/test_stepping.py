"""A step, or no step: clipping, gradients that are not finite, float16 scaling, and when a run gives up."""

import pytest
import torch
from torch import nn

from library.contracts import ParamGroup
from library.errors import StopTraining
from library.training.non_finite import NonFiniteWatch
from library.training.optimizers import build_optimizer
from library.training.options import OptimizerOptions
from library.training.stepping import StepOutcome, _step_on_device, gradient_norm, step_or_skip

NAMES = ["AdamW", "SGD", "AdamW8bit", "Lion", "Prodigy", "AdamWScheduleFree"]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(30, 40), (40,), (7,)]]


def build(params, name="AdamW", lr=1.0, **options):
    options = OptimizerOptions(optimizer_type=name, learning_rate=lr, **options)
    return build_optimizer(options, [ParamGroup("unet", tuple(params), lr)])


def give_gradients(params, seed=1, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * size


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("name", NAMES)
def test_clipping_is_that_of_torch(name, max_grad_norm):
    ours, theirs = parameters(), parameters()
    built, reference = build(ours, name, lr=1.0), build(theirs, name, lr=1.0)
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        outcome = step_or_skip(built, ours, max_grad_norm)
        limit = max_grad_norm or float("inf")
        norm = (
            nn.utils.clip_grad_norm_(theirs, limit)
            if max_grad_norm
            else nn.utils.get_total_norm([param.grad for param in theirs])
        )
        reference.optimizer.step()
        torch.testing.assert_close(outcome.grad_norm, norm)
        assert not outcome.skipped
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_within_the_limit_are_not_changed_at_all(name):
    ours, theirs = parameters(), parameters()
    built, reference = build(ours, name), build(theirs, name)
    for params in (ours, theirs):
        give_gradients(params)
    step_or_skip(built, ours, 1e6)
    reference.optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_update_leaves_no_trace(name, bad):
    ours, theirs = parameters(), parameters()
    built, reference = build(ours, name), build(theirs, name)
    for seed in range(4):
        give_gradients(ours, seed)
        if seed in (0, 2):
            ours[1].grad[3] = bad
        outcome = step_or_skip(built, ours, 1.0)
        assert outcome.skipped == (seed in (0, 2))
        if seed not in (0, 2):
            give_gradients(theirs, seed)
            step_or_skip(reference, theirs, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    for one, other in zip(ours, theirs, strict=True):
        for key, value in built.optimizer.state[one].items():
            expected = reference.optimizer.state[other][key]
            assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected


def test_the_kernel_of_adamw_skips_and_clips_by_itself():
    """What happens on a GPU, where the host does not know the norm."""
    ours, theirs = parameters(), parameters()
    built, reference = build(ours), build(theirs)
    for seed, bad in enumerate([True, False, True, False]):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        if bad:
            ours[0].grad[0, 0] = float("nan")
        norm = gradient_norm([param.grad for param in ours])
        _step_on_device(built.optimizer, norm, ~torch.isfinite(norm), 1.0)
        if not bad:
            step_or_skip(reference, theirs, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert built.optimizer.state[ours[0]]["step"] == 2


def test_the_optimizer_keeps_no_marks_of_clipping():
    params = parameters()
    built = build(params)
    give_gradients(params)
    step_or_skip(built, params, 1.0)
    assert not hasattr(built.optimizer, "found_inf")
    assert not hasattr(built.optimizer, "grad_scale")


def test_parameters_without_gradients_are_left_out():
    params = parameters()
    built = build(params)
    before = params[2].detach().clone()
    give_gradients(params[:2])
    outcome = step_or_skip(built, params, 1.0)
    torch.testing.assert_close(
        outcome.grad_norm, nn.utils.get_total_norm([params[0].grad, params[1].grad]), rtol=1, atol=50
    )
    assert torch.equal(params[2], before)
    for param in params:
        param.grad = None
    assert step_or_skip(built, params, 1.0).grad_norm == 0


def test_the_norm_of_half_precision_gradients_is_exact():
    gradients = [torch.full((1000,), 300.0, dtype=torch.float16), torch.full((1000,), 300.0, dtype=torch.bfloat16)]
    assert gradient_norm(gradients).item() == pytest.approx(300 * 2000**0.5, rel=1e-6)


def scaler(scale=2.0**10):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_scaled_gradients_give_the_same_step(name):
    ours, theirs, grad_scaler = parameters(), parameters(), scaler()
    built, reference = build(ours, name, lr=1e-2), build(theirs, name, lr=1e-2)
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        factor = grad_scaler.scale(torch.ones(()))
        for param in ours:
            param.grad.mul_(factor)
        outcome = step_or_skip(built, ours, 1.0, grad_scaler)
        expected = step_or_skip(reference, theirs, 1.0)
        torch.testing.assert_close(outcome.grad_norm, expected.grad_norm)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert grad_scaler.get_scale() > 2.0**10


@pytest.mark.parametrize(("scale", "counts"), [(2.0**10, False), (0.5, True)])
def test_a_scale_that_is_too_high_is_no_fault_of_the_run(scale, counts):
    params, grad_scaler = parameters(), scaler(scale)
    built = build(params)
    before = [param.detach().clone() for param in params]
    grad_scaler.scale(torch.ones(()))
    give_gradients(params)
    params[0].grad[0, 0] = float("inf")
    outcome = step_or_skip(built, params, 1.0, grad_scaler)
    assert outcome.skipped
    assert bool(outcome.counts) == counts
    assert grad_scaler.get_scale() == scale / 2
    assert all(torch.equal(one, other) for one, other in zip(params, before, strict=True))


def outcome(bad, counts=None):
    flag = torch.tensor(bad)
    return StepOutcome(torch.ones(()), flag, flag if counts is None else torch.tensor(counts))


@pytest.mark.parametrize(("limit", "allowed"), [(0, 0), (1, 0), (10, 9)])
def test_too_many_skipped_updates_in_a_row_end_the_run(limit, allowed):
    watch = NonFiniteWatch(limit)
    for round_ in range(3):
        for step in range(allowed):
            assert watch.add(step, outcome(True)) == [step]
        assert watch.add(99, outcome(False)) == []
        assert watch.skipped == (round_ + 1) * allowed
    with pytest.raises(StopTraining, match="diverged") as caught:
        for step in range(allowed + 1):
            watch.add(step, outcome(True))
    assert caught.value.exit_code == 5


def test_too_many_skipped_updates_now_and_then_end_the_run():
    watch = NonFiniteWatch(10)
    with pytest.raises(StopTraining, match="51 of the last"):
        for step in range(1000):
            watch.add(step, outcome(step % 10 == 0))
    patient = NonFiniteWatch(10)
    for step in range(3000):
        patient.add(step, outcome(step % 25 == 0))
    assert patient.skipped == 120


def test_skips_of_the_loss_scale_are_counted_but_forgiven():
    watch = NonFiniteWatch(2)
    for step in range(20):
        watch.add(step, outcome(True, counts=False))
    assert watch.skipped == 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_of_fused_adamw_never_waits_for_the_gpu():
    params = [nn.Parameter(torch.randn(64, 64, device="cuda")) for _ in range(4)]
    built, watch = build(params), NonFiniteWatch(3)

    def update(step, bad):
        for param in params:
            param.grad = torch.full_like(param, bad)
        return watch.add(step, step_or_skip(built, params, 1.0))

    update(0, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert update(1, float("nan")) == []
        assert update(2, 1.0) == [1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.flush() == []
    assert all(torch.isfinite(param).all() for param in params)
