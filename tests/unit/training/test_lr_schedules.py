"""Learning rates, update by update, against the functions of transformers and diffusers."""

import logging
import warnings

import pytest
import torch
from diffusers.optimization import get_piecewise_constant_schedule
from transformers import optimization as oracle

from library.contracts import ParamGroup
from library.errors import UserError
from library.training.lr_schedules import LR_SCHEDULES, build_lr_schedule, check_lr_schedule, updates_of
from library.training.optimizers import build_optimizer
from library.training.options import OptimizerOptions, ScheduleOptions
from library.training.options_cascade import StageCTuneOptions
from library.training.options_cascade_run import CascadeScheduleOptions

RATE, STEPS = 1e-3, 60


def make(name="constant", *, total=STEPS, optimizer=None, **options):
    optimizer = optimizer or OptimizerOptions(learning_rate=RATE)
    params = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    groups = [ParamGroup("unet", (params[0],), RATE), ParamGroup("text_encoder1", (params[1],), RATE / 2)]
    built = build_optimizer(optimizer, groups)
    return build_lr_schedule(ScheduleOptions(lr_scheduler=name, **options), optimizer, built, total), built, params


def run(schedule, steps=STEPS + 5):
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about schedules that are stepped without their optimizer
        for _ in range(steps):
            rates.append([group["lr"] for group in schedule.optimizer.param_groups])
            schedule.step()
    return rates


def reference(make_schedule, **arguments):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": [params[0]], "lr": RATE}, {"params": [params[1]], "lr": RATE / 2}]
    return make_schedule(torch.optim.AdamW(groups, lr=RATE), **arguments)


def problems(name="constant", optimizer=None, **options):
    schedule = ScheduleOptions(lr_scheduler=name, **options)
    return [str(problem) for problem in check_lr_schedule(schedule, optimizer or OptimizerOptions())]


WARM = {"num_warmup_steps": 10}
WHOLE = {**WARM, "num_training_steps": STEPS}
CASES = [
    ("constant", {}, oracle.get_constant_schedule, {}),
    ("constant_with_warmup", {}, oracle.get_constant_schedule_with_warmup, WARM),
    ("linear", {}, oracle.get_linear_schedule_with_warmup, WHOLE),
    ("cosine", {}, oracle.get_cosine_schedule_with_warmup, WHOLE),
    (
        "cosine",
        {"lr_scheduler_args": ("num_cycles=1.5",)},
        oracle.get_cosine_schedule_with_warmup,
        {**WHOLE, "num_cycles": 1.5},
    ),
    (
        "cosine_with_restarts",
        {"lr_scheduler_num_cycles": 3},
        oracle.get_cosine_with_hard_restarts_schedule_with_warmup,
        {**WHOLE, "num_cycles": 3},
    ),
    ("polynomial", {}, oracle.get_polynomial_decay_schedule_with_warmup, WHOLE),
    (
        "polynomial",
        {"lr_scheduler_power": 2.5, "lr_scheduler_args": ("lr_end=1e-5",)},
        oracle.get_polynomial_decay_schedule_with_warmup,
        {**WHOLE, "power": 2.5, "lr_end": 1e-5},
    ),
    ("inverse_sqrt", {}, oracle.get_inverse_sqrt_schedule, WARM),
    ("inverse_sqrt", {"lr_warmup_steps": 0}, oracle.get_inverse_sqrt_schedule, {"num_warmup_steps": 0}),
    (
        "inverse_sqrt",
        {"lr_scheduler_timescale": 33},
        oracle.get_inverse_sqrt_schedule,
        {**WARM, "timescale": 33},
    ),
    (
        "cosine_with_min_lr",
        {"lr_scheduler_min_lr_ratio": 0.2},
        oracle.get_cosine_with_min_lr_schedule_with_warmup,
        {**WHOLE, "num_cycles": 0.5, "min_lr_rate": 0.2},
    ),
    (
        "cosine_with_min_lr",
        {"lr_scheduler_args": ("min_lr=1e-4",), "lr_scheduler_num_cycles": 3},
        oracle.get_cosine_with_min_lr_schedule_with_warmup,
        {**WHOLE, "num_cycles": 1.5, "min_lr": 1e-4},
    ),
    (
        "warmup_stable_decay",
        {"lr_decay_steps": 20, "lr_scheduler_min_lr_ratio": 0.1},
        oracle.get_wsd_schedule,
        {**WARM, "num_decay_steps": 20, "num_stable_steps": 30, "min_lr_ratio": 0.1, "num_cycles": 0.5},
    ),
    (
        "warmup_stable_decay",
        {"lr_decay_steps": 0.25, "lr_scheduler_args": ("warmup_type='1-sqrt'", "decay_type='linear'")},
        oracle.get_wsd_schedule,
        {
            **WARM,
            "num_decay_steps": 15,
            "num_stable_steps": 35,
            "warmup_type": "1-sqrt",
            "decay_type": "linear",
        },
    ),
    (
        "piecewise_constant",
        {"lr_scheduler_args": ("step_rules='1:10,0.1:20,0.01:30,0.005'",)},
        get_piecewise_constant_schedule,
        {"step_rules": "1:10,0.1:20,0.01:30,0.005"},
    ),
]


@pytest.mark.parametrize(("name", "options", "theirs", "arguments"), CASES)
def test_rates_are_those_of_the_reference(name, options, theirs, arguments):
    warmup = {"lr_warmup_steps": 10} if LR_SCHEDULES[name].warms_up else {}
    assert problems(name, OptimizerOptions(learning_rate=RATE), **{**warmup, **options}) == []
    ours = run(make(name, **{**warmup, **options})[0])
    expected = run(reference(theirs, **arguments))
    for one, other in zip(ours, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-15)


def test_every_schedule_is_pinned():
    assert {name for name, *_ in CASES} | {"adafactor"} == set(LR_SCHEDULES)


def test_a_warm_up_may_begin_above_zero():
    """As the scripts of Stable Cascade want it: update k of n, from 1, has the share k/n."""
    schedule = CascadeScheduleOptions(lr_scheduler="constant_with_warmup", lr_warmup_steps=4)
    built = make("constant")[1]
    found = run(build_lr_schedule(schedule, OptimizerOptions(learning_rate=RATE), built, STEPS), 6)
    assert [rates[0] / RATE for rates in found] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert StageCTuneOptions.options()["lr_warmup_steps"].default == 0
    assert StageCTuneOptions().schedule.warmup_begins_at == 1


@pytest.mark.parametrize("warmup", [10, 10 / STEPS])
def test_warm_up_counts_updates_or_is_a_share_of_the_run(warmup):
    rates = run(make("constant_with_warmup", lr_warmup_steps=warmup)[0])
    assert [rate for rate, _ in rates[:11]] == pytest.approx([RATE * step / 10 for step in range(11)])


@pytest.mark.parametrize(("value", "expected"), [(5, 5), (0.05, 5), (0, 0), (0.0, 0), (1.0, 100), (7.0, 7), (1, 1)])
def test_fractions_are_shares_of_the_run(value, expected):
    assert updates_of(value, 100) == expected


def test_a_saved_schedule_continues():
    schedule, *_ = make("cosine", lr_warmup_steps=7)
    straight = run(schedule, 30)
    stopped, *_ = make("cosine", lr_warmup_steps=7)
    run(stopped, 12)
    resumed, built, _ = make("cosine", lr_warmup_steps=7)
    resumed.load_state_dict(stopped.state_dict())
    for group, rate in zip(built.optimizer.param_groups, straight[12], strict=True):
        group["lr"] = rate  # as loading the optimizer does
    assert run(resumed, 18) == straight[12:]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "Did you mean cosine?"),
        ("reduce_lr_on_plateau", {}, "there is no schedule"),
        ("constant", {"lr_warmup_steps": 10}, "no warm-up with --lr_scheduler constant. Use constant_with_warmup"),
        ("constant", {"lr_warmup_steps": 0.1}, "no warm-up"),
        ("piecewise_constant", {"lr_warmup_steps": 1, "lr_scheduler_args": ("step_rules='1:2,1'",)}, "no warm-up"),
        ("piecewise_constant", {}, "needs step_rules"),
        ("piecewise_constant", {"lr_scheduler_args": ("step_rules='1:x,1'",)}, "needs step_rules"),
        ("cosine_with_min_lr", {}, "one lowest learning rate"),
        (
            "cosine_with_min_lr",
            {"lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_args": ("min_lr=1e-9",)},
            "one lowest learning rate",
        ),
        ("polynomial", {"lr_scheduler_args": ("lr_end=1.0",)}, "not above its end"),
        ("polynomial", {"lr_scheduler_args": ("lr_end='x'",)}, "must be a number"),
        ("linear", {"lr_scheduler_args": ("power=3",)}, "linear has no argument power. It takes none"),
        ("linear", {"lr_scheduler_args": ("power",)}, "not of the form"),
        ("warmup_stable_decay", {"lr_scheduler_args": ("decay_type='fast'",)}, "linear, cosine, 1-sqrt"),
        ("warmup_stable_decay", {"lr_scheduler_args": ("decay_type=[]",)}, "linear, cosine, 1-sqrt"),
        ("constant", {"lr_scheduler_type": "CosineAnnealing"}, "Did you mean CosineAnnealingLR?"),
        ("constant", {"lr_scheduler_type": "StepLR"}, "the argument step_size is needed"),
        ("constant", {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=1", "gama=2")}, "mean gamma"),
        ("constant", {"lr_scheduler_type": "ReduceLROnPlateau"}, "validation loss"),
        ("constant", {"lr_scheduler_type": "nopackage.Thing"}, "nopackage is not installed"),
        (
            "constant",
            {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=1",), "lr_warmup_steps": 5},
            "no warm-up with --lr_scheduler_type StepLR",
        ),
    ],
)
def test_mistakes_are_named(name, options, message):
    found = problems(name, **options)
    assert len(found) == 1
    assert message in found[0]


def test_classes_of_torch_and_import_paths():
    options = {"lr_scheduler_args": ("step_size=3", "gamma=0.5")}
    for name in ("StepLR", "torch.optim.lr_scheduler.StepLR"):
        rates = run(make(lr_scheduler_type=name, **options)[0], 7)
        assert [rate for rate, _ in rates] == pytest.approx([RATE] * 3 + [RATE / 2] * 3 + [RATE / 4])
    with pytest.raises(UserError, match="OneCycleLR"):
        make(lr_scheduler_type="OneCycleLR", lr_scheduler_args=("max_lr=1e-3",))


def test_phases_longer_than_the_run_are_refused():
    with pytest.raises(UserError, match="longer than the run"):
        make("warmup_stable_decay", lr_warmup_steps=50, lr_decay_steps=20)


def test_a_warm_up_that_never_ends_is_pointed_out(caplog):
    make("cosine", lr_warmup_steps=100)
    assert "does not end before the run" in caplog.text


def test_adafactor_reports_the_rate_that_it_chooses():
    optimizer = OptimizerOptions(optimizer_type="Adafactor", learning_rate=RATE)
    schedule, built, params = make("adafactor", optimizer=optimizer)
    assert [group["lr"] for group in built.optimizer.param_groups] == [RATE, RATE]
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        built.optimizer.step()
        schedule.step()
    state = built.optimizer.state[params[0]]
    expected = float(built.optimizer._get_lr(built.optimizer.param_groups[0], state))
    assert schedule.get_last_lr()[0] == expected
    assert all(isinstance(rate, float) for rate in schedule.get_last_lr())


def test_adafactor_replaces_other_schedules(caplog):
    optimizer = OptimizerOptions(optimizer_type="Adafactor", learning_rate=RATE)
    make("cosine", optimizer=optimizer)
    assert "replaces the learning rate schedule" in caplog.text
    assert "relative_step" in problems("constant", optimizer, lr_warmup_steps=5)[0]
    manual = OptimizerOptions(optimizer_type="Adafactor", optimizer_args=("relative_step=False",), learning_rate=RATE)
    caplog.clear()
    assert run(make("constant_with_warmup", optimizer=manual, lr_warmup_steps=2)[0])[1] == [RATE / 2, RATE / 4]
    assert "constant_with_warmup" not in caplog.text
    make("cosine", optimizer=manual)
    assert "constant_with_warmup is recommended" in caplog.text
    with pytest.raises(UserError, match="relative_step=True"):
        make("adafactor", optimizer=manual)


def test_schedule_free_optimizers_have_no_schedule(caplog):
    optimizer = OptimizerOptions(optimizer_type="AdamWScheduleFree", learning_rate=RATE)
    with caplog.at_level(logging.WARNING):
        rates = run(make("constant", optimizer=optimizer)[0])
        assert caplog.text == ""
        assert run(make("cosine", optimizer=optimizer, lr_warmup_steps=10)[0]) == rates
    assert rates == [[RATE, RATE / 2]] * len(rates)
    assert "warmup_steps=" in caplog.text
    assert problems("cosine", optimizer, lr_warmup_steps=10) == []
