"""Every optimizer of the documentation steps; mistakes are named before anything heavy is imported."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.contracts import ParamGroup
from library.errors import UserError
from library.training import class_lookup
from library.training.optimizer_state import load_optimizer_state
from library.training.optimizers import OPTIMIZERS, build_optimizer, check_optimizer, find_row
from library.training.options import OptimizerOptions, ScheduleOptions

ROOT = Path(__file__).resolve().parents[3]
NAMES = [name for row in OPTIMIZERS for name in row.names]
ADAPTING = [row.names[0] for row in OPTIMIZERS if row.adapts_rate]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(80, 60), (60,), (4, 3, 3, 3)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def build(name="", *args, params=None, lr=1e-3, **options):
    params = parameters() if params is None else params
    options = OptimizerOptions(optimizer_type=name, optimizer_args=args, learning_rate=lr, **options)
    return build_optimizer(options, [ParamGroup("unet", tuple(params), lr)]), params


def give_gradients(params, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def problems(name="", *args, schedule=None, **options):
    options = OptimizerOptions(optimizer_type=name, optimizer_args=args, **options)
    return [str(problem) for problem in check_optimizer(options, schedule or ScheduleOptions())]


@pytest.mark.parametrize("name", NAMES)
def test_every_named_optimizer_moves_the_weights(name):
    assert problems(name) == []
    built, params = build(name.upper(), lr=1.0 if name in ADAPTING else 1e-3)
    before = [parameter.detach().clone() for parameter in params]
    for seed in range(8):  # RAdam begins with steps that only gather statistics
        give_gradients(params, seed)
        built.optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, params, strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in params)
    assert built.row.has_eval_mode == name.endswith("ScheduleFree")


@pytest.mark.parametrize(
    "name",
    ["SGD", "Adam", "RMSprop", "NAdam", "RAdam", "Adagrad", "torch.optim.AdamW", "bitsandbytes.optim.AdEMAMix8bit"],
)
def test_other_classes_work_by_name_or_path(name):
    assert problems(name) == []
    built, params = build(name)
    give_gradients(params)
    built.optimizer.step()
    assert type(built.optimizer).__name__ == name.rpartition(".")[2]


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("", (), "torch.optim.adamw.AdamW"),
        ("AdamW", ("weight_decay=0.1",), "torch.optim.adamw.AdamW(weight_decay=0.1)"),
        (
            "AdamW8bit",
            ("betas=0.9,0.95", "eps=1e-6"),
            "bitsandbytes.optim.adamw.AdamW8bit(betas=(0.9, 0.95),eps=1e-06)",
        ),
        ("SGDNesterov", (), "torch.optim.sgd.SGD(momentum=0.9)"),
        ("SGDNesterov", ("momentum=0.8",), "torch.optim.sgd.SGD(momentum=0.8)"),
        ("Adafactor", (), "transformers.optimization.Adafactor(relative_step=True)"),
        ("Lion", (), "lion_pytorch.lion_pytorch.Lion"),
    ],
)
def test_descriptions_for_metadata(name, args, expected):
    assert build(name, *args)[0].description == expected


def test_older_flags_name_optimizers():
    assert type(build(use_8bit_adam=True)[0].optimizer).__name__ == "AdamW8bit"
    assert type(build(use_lion_optimizer=True)[0].optimizer).__name__ == "Lion"
    assert "name two optimizers" in problems(use_8bit_adam=True, use_lion_optimizer=True)[0]
    assert "name two optimizers" in problems("Prodigy", use_8bit_adam=True)[0]


def test_arguments_reach_the_optimizer():
    built, _ = build("AdamW", "weight_decay=0.25", "betas=0.8,0.9", "amsgrad=True")
    group = built.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["amsgrad"]) == (0.25, (0.8, 0.9), True)
    assert group["lr"] == 1e-3


def test_groups_keep_their_order_and_rates():
    first, second = parameters(), parameters()
    groups = [ParamGroup("unet", tuple(first), 1e-3), ParamGroup("text_encoder1", tuple(second), 5e-4)]
    built = build_optimizer(OptimizerOptions(learning_rate=1e-3), groups)
    assert [group["lr"] for group in built.optimizer.param_groups] == [1e-3, 5e-4]
    assert built.optimizer.param_groups[1]["params"][0] is second[0]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("AdamX", (), "no class AdamX. Did you mean Adam"),
        ("adamax", (), "Did you mean Adamax?"),
        ("LBFGS", (), "several times"),
        ("SparseAdam", (), "sparse"),
        ("nosuchpackage.Thing", (), "nosuchpackage is not installed. Run: pip install nosuchpackage"),
        ("torch.nothing.Thing", (), "no module torch.nothing"),
        ("AdamW", ("weight_decay",), "'weight_decay' is not of the form name=value"),
        ("AdamW", ("weight_decay=a bc",), "not a Python literal"),
        ("AdamW", ("amsgrad=true",), "Write amsgrad=True."),
        ("AdamW", ("eps=1e-8", "eps=1e-7"), "eps is given twice"),
        ("AdamW", ("betas=" + "(" * 3000,), "longer than"),
        ("AdamW", ("betas=" + "(" * 900,), "not a Python literal"),
        ("AdamW", ("weight_decai=0.1",), "did you mean weight_decay?"),
        ("AdamW", ("lr=0.1",), "Use --learning_rate."),
        ("SGDNesterov", ("nesterov=False",), "nesterov is set by this program"),
    ],
)
def test_mistakes_are_named(name, args, message):
    found = problems(name, *args)
    assert len(found) == 1
    assert message in found[0]


def test_all_mistakes_are_listed_together():
    assert len(problems("AdamW", "weight_decay", "amsgrad=true", "bets=1")) == 3


@pytest.mark.parametrize(
    ("options", "package", "instead"),
    [({"use_8bit_adam": True}, "bitsandbytes", "AdamW"), ({"optimizer_type": "Prodigy"}, "prodigyopt", "AdamW")],
)
def test_a_missing_package_is_refused_with_an_alternative(monkeypatch, options, package, instead):
    real = class_lookup.importlib.util.find_spec
    monkeypatch.setattr(class_lookup.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    found = [str(problem) for problem in check_optimizer(OptimizerOptions(**options), ScheduleOptions())]
    assert len(found) == 1
    assert f"pip install {package}" in found[0]
    assert f"--optimizer_type {instead}" in found[0]


def test_checks_import_nothing_heavy():
    code = (
        "import sys\n"
        "from library.training.fused_checks import check_fused_backward\n"
        "from library.training.optimizers import check_optimizer\n"
        "from library.training.lr_schedules import check_lr_schedule\n"
        "from library.training.options import *\n"
        "o = OptimizerOptions(optimizer_type='AdamW8bit', optimizer_args=('weight_decay=0.1',))\n"
        "s = ScheduleOptions(lr_scheduler_type='StepLR', lr_scheduler_args=('step_size=3',))\n"
        "assert not list(check_optimizer(o, s)) and not list(check_lr_schedule(s, o))\n"
        "heavy = {'torch', 'numpy', 'bitsandbytes', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("name", ["Lion", "Muon"])
def test_refusals_of_the_class_itself_are_readable(name):
    with pytest.raises(UserError, match=name):
        build(name, lr=0.0 if name == "Lion" else 1e-3)


def test_adafactor_sets_its_rate_unless_told_otherwise(caplog):
    built, _ = build("Adafactor")
    assert built.is_relative_adafactor
    assert built.optimizer.param_groups[0]["lr"] is None
    assert "chooses the learning rate itself" in caplog.text
    caplog.clear()
    built, _ = build("Adafactor", "relative_step=False", "scale_parameter=False", max_grad_norm=1.0)
    assert not built.is_relative_adafactor
    assert built.optimizer.param_groups[0]["lr"] == 1e-3
    assert "--max_grad_norm 0 is recommended" in caplog.text
    assert build("Adafactor", "relative_step=False", "warmup_init=True")[0].is_relative_adafactor


def test_the_adafactor_schedule_needs_adafactor():
    schedule = ScheduleOptions(lr_scheduler="adafactor")
    assert "belongs to --optimizer_type Adafactor" in problems("AdamW", schedule=schedule)[0]
    assert "relative_step=False" in problems("Adafactor", "relative_step=False", schedule=schedule)[0]
    assert problems("Adafactor", schedule=schedule) == []


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam"])
def test_optimizers_that_find_the_rate_ask_for_one(name, caplog):
    with caplog.at_level(logging.WARNING):
        build(name, lr=1e-4)
    assert "use 1.0" in caplog.text
    groups = [ParamGroup("unet", tuple(parameters()), 1.0), ParamGroup("text_encoder1", tuple(parameters()), 0.5)]
    with pytest.raises(UserError, match="one learning rate"):
        build_optimizer(OptimizerOptions(optimizer_type=name, learning_rate=1.0), groups)


def test_adamw_is_one_kernel_unless_told_otherwise():
    built, _ = build("AdamW")
    assert built.optimizer.defaults["fused"]
    assert built.row.skips_on_device
    assert "fused" not in built.description
    for args in (("fused=False",), ("foreach=True",)):
        plain, _ = build("AdamW", *args)
        assert not plain.optimizer.defaults["fused"]
        assert not plain.row.skips_on_device
    assert not find_row("AdamW8bit").skips_on_device


def test_schedule_free_starts_in_training_mode():
    built, _ = build("AdamWScheduleFree")
    assert built.optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize("name", [*NAMES, "Adam", "SGD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_bit_for_bit(name, dtype):
    rate = 1.0 if name in ADAPTING else 1e-2
    straight, straight_params = build(name, params=parameters(dtype), lr=rate)
    for seed in range(2):
        give_gradients(straight_params, seed)
        straight.optimizer.step()
    saved = copy.deepcopy(straight.optimizer.state_dict())
    resumed_params = [torch.nn.Parameter(parameter.detach().clone()) for parameter in straight_params]
    resumed, _ = build(name, params=resumed_params, lr=rate)
    load_optimizer_state(resumed.optimizer, saved, where="a state")
    for seed in range(2, 5):
        for built, params in ((straight, straight_params), (resumed, resumed_params)):
            give_gradients(params, seed)
            built.optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(straight_params, resumed_params, strict=True))
