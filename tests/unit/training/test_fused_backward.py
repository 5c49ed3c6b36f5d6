"""Updating weights during the backward pass gives the bits of a step over all of them."""

import copy

import pytest
import torch
from torch import nn

from library.contracts import ParamGroup
from library.errors import StopTraining
from library.training.fused_backward import FusedBackward, round_at_random
from library.training.fused_checks import check_fused_backward
from library.training.optimizer_state import load_optimizer_state
from library.training.optimizers import OPTIMIZERS, build_optimizer
from library.training.options import LengthOptions, OptimizerOptions, PrecisionOptions

STEPPING = [row.names[0] for row in OPTIMIZERS if row.steps_one_parameter]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(288, 40), nn.Linear(40, 5)]
    return nn.Sequential(*layers).to(dtype)


def build(model, name, *args, lr=1e-2):
    params = list(model.parameters())
    groups = [ParamGroup("first", tuple(params[:3]), lr), ParamGroup("second", tuple(params[3:]), lr / 2)]
    return build_optimizer(OptimizerOptions(optimizer_type=name, optimizer_args=args, learning_rate=lr), groups)


def loss_of(model, step, dtype=torch.float32):
    data = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
    return model(data).float().square().mean()


def backward(model, step, dtype=torch.float32):
    loss_of(model, step, dtype).backward()


def train_whole(model, built, steps, max_grad_norm=0.0, dtype=torch.float32):
    for step in steps:
        backward(model, step, dtype)
        if max_grad_norm:
            for param in model.parameters():
                nn.utils.clip_grad_norm_([param], max_grad_norm)
        built.optimizer.step()
        built.optimizer.zero_grad()
        for group in built.optimizer.param_groups:  # as a schedule does
            group["lr"] = group["lr"] and group["lr"] * 0.9


def train_fused(model, built, steps, max_grad_norm=0.0, dtype=torch.float32, seed=0):
    fused, norms = FusedBackward(built, max_grad_norm, seed=seed), []
    fused.attach()
    for step in steps:
        fused.begin(step)
        fused.backward(loss_of(model, step, dtype))
        assert all(param.grad is None for param in model.parameters())
        norms.append(fused.finish().grad_norm)
        for group in built.optimizer.param_groups:
            group["lr"] = group["lr"] and group["lr"] * 0.9
    fused.detach()
    return norms


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", [*STEPPING, "Adam", "SGD"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_the_same_bits_as_a_whole_step(name, max_grad_norm):
    whole, fused = network(), network()
    one, other = build(whole, name), build(fused, name)
    train_whole(whole, one, range(4), max_grad_norm)
    train_fused(fused, other, range(4), max_grad_norm)
    assert same(whole, fused)
    assert not same(fused, network())
    assert [len(group["params"]) for group in other.optimizer.param_groups] == [3, 5]
    saved, expected = other.optimizer.state_dict(), one.optimizer.state_dict()
    assert saved["state"].keys() == expected["state"].keys()
    assert saved["param_groups"] == expected["param_groups"]


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Adafactor"])
def test_a_state_loaded_after_the_hooks_were_put_in_place(name):
    straight, resumed = network(), network()
    one, other = build(straight, name), build(resumed, name)
    train_fused(straight, one, range(2))
    fused = FusedBackward(other, 0.0)
    fused.attach()
    resumed.load_state_dict(straight.state_dict())
    load_optimizer_state(other.optimizer, copy.deepcopy(one.optimizer.state_dict()), where="a state")
    train_fused(straight, one, range(2, 4))
    for step in range(2, 4):
        fused.begin(step)
        backward(resumed, step)
        for group in other.optimizer.param_groups:
            group["lr"] = group["lr"] and group["lr"] * 0.9
    assert same(straight, resumed)


def test_the_norm_is_that_of_all_gradients():
    model = network()
    reference = network()
    backward(reference, 0)
    expected = nn.utils.get_total_norm([param.grad for param in reference.parameters()])
    norm = train_fused(model, build(model, "AdamW"), range(1), max_grad_norm=0.01)[0]
    torch.testing.assert_close(norm, expected)


def test_a_gradient_that_is_not_finite_is_reported():
    model = network()
    fused = FusedBackward(build(model, "AdamW"), 1.0)
    fused.attach()
    fused.begin(0)
    (model(torch.ones(1, 3, 8, 8)).sum() * float("nan")).backward()
    assert fused.finish().skipped


def test_a_loss_that_is_not_finite_ends_the_run_before_it_spoils_the_weights():
    model = network()
    fused = FusedBackward(build(model, "AdamW"), 1.0)
    fused.attach()
    fused.begin(6)
    with pytest.raises(StopTraining, match="the loss of update 7") as caught:
        fused.backward(model(torch.ones(1, 3, 8, 8)).sum() * float("nan"))
    assert caught.value.exit_code == 5
    assert same(model, network())


def test_parameters_that_stopped_training_are_left_alone():
    model = network()
    built = build(model, "AdamW")
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    train_fused(model, built, range(2))
    assert torch.equal(model[0].weight, before)


def test_bfloat16_under_adafactor_is_rounded_at_random_and_repeatably():
    def run(seed, lr):
        model = network(torch.bfloat16)
        built = build(model, "Adafactor", "relative_step=False", "scale_parameter=False", lr=lr)
        train_fused(model, built, range(6), dtype=torch.bfloat16, seed=seed)
        return model

    assert same(run(1, 1e-2), run(1, 1e-2))
    assert not same(run(1, 1e-2), run(2, 1e-2))
    # Steps far below the precision of the weights: lost by rounding to nearest, kept on average by rounding at random.
    whole, start = network(torch.bfloat16), network(torch.bfloat16)
    built = build(whole, "Adafactor", "relative_step=False", "scale_parameter=False", lr=1e-6)
    train_whole(whole, built, range(6), dtype=torch.bfloat16)
    moved = [
        (run(1, 1e-6)[4].weight != start[4].weight).sum().item(),
        (whole[4].weight != start[4].weight).sum().item(),
    ]
    assert moved[0] > 5 * max(1, moved[1])


def test_the_state_under_random_rounding_is_that_of_the_parameter():
    model = network(torch.bfloat16)
    built = build(model, "Adafactor")
    train_fused(model, built, range(2), dtype=torch.bfloat16)
    assert set(built.optimizer.state) == set(model.parameters())
    assert built.optimizer.state[model[4].weight]["step"] == 2


def test_random_rounding_is_right_on_average():
    value = torch.full((40_000,), 1.0 + 2**-7 * 0.3)
    rounded = round_at_random(value, 1, 2, 3)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(rounded.float().mean().item() - value[0].item()) < 2**-7 * 0.02
    assert abs(round_at_random(-value, 1, 2, 3).float().mean().item() + value[0].item()) < 2**-7 * 0.02
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf"), float("-inf")])
    assert torch.equal(round_at_random(exact, 1, 2, 3), exact.bfloat16())
    assert round_at_random(torch.tensor([float("nan")]), 1, 2, 3).isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": {"optimizer_type": "Prodigy"}}, "Prodigy needs all gradients at once"),
        ({"optimizer": {"optimizer_type": "AdamWScheduleFree"}}, "needs all gradients at once"),
        ({"optimizer": {"optimizer_type": "prodigyplus.ProdigyPlus"}}, "needs all gradients at once"),
        ({"length": {"gradient_accumulation_steps": 2}}, "cannot be accumulated"),
        ({"precision": {"mixed_precision": "fp16"}}, "Use --mixed_precision bf16"),
        ({"world_size": 2}, "one process, and 2 run"),
        ({"sharded": True, "world_size": 2}, "the engine"),
        ({}, None),
        ({"optimizer": {"use_8bit_adam": True}}, None),
    ],
)
def test_refusals(options, message):
    def check(switch):
        optimizer = OptimizerOptions(fused_backward_pass=switch, **options.get("optimizer", {}))
        length, precision = LengthOptions(**options.get("length", {})), PrecisionOptions(**options.get("precision", {}))
        more = {name: options[name] for name in ("world_size", "sharded") if name in options}
        return [str(problem) for problem in check_fused_backward(optimizer, length, precision, **more)]

    assert check(False) == []
    found = check(True)
    assert len(found) == (message is not None)
    assert all(message in text for text in found)


def test_an_optimizer_that_needs_all_gradients_is_refused():
    model = network()
    built = build_optimizer(
        OptimizerOptions(optimizer_type="Prodigy", learning_rate=1.0), [ParamGroup("a", tuple(model.parameters()), 1.0)]
    )
    with pytest.raises(ValueError, match="one parameter"):
        FusedBackward(built, 1.0)
