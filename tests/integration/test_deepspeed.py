"""--deepspeed: what its engine is told, what is refused, and that it trains what plain training trains."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.models.options import MemoryOptions
from library.training.deepspeed_checks import deepspeed_problems, deepspeed_warnings
from library.training.deepspeed_plugin import engine_backend, make_plugin, uses_engine
from library.training.options import (
    DistributedOptions,
    LengthOptions,
    OptimizerOptions,
    PrecisionOptions,
    StateOptions,
    TrainingOptions,
)
from library.training.options_full import DreamBoothOptions
from tests.support import tensor_digest
from train_db import Options

ROOT = Path(__file__).resolve().parents[2]
FINAL = "duck.safetensors"
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="the package deepspeed, an optional one, is not installed"
)


def options(**distributed) -> TrainingOptions:
    groups = {name: distributed.pop(name) for name in ("length", "optimizer", "precision") if name in distributed}
    return TrainingOptions(distributed=DistributedOptions(deepspeed=True, **distributed), **groups)


def config(micro_batch=3, world_size=2, **distributed):
    return make_plugin(options(**distributed), micro_batch=micro_batch, world_size=world_size).deepspeed_config


class TestPlugin:
    def test_batches_accumulation_and_clipping(self):
        told = config(
            length=LengthOptions(gradient_accumulation_steps=4), optimizer=OptimizerOptions(max_grad_norm=0.5)
        )
        assert told["train_micro_batch_size_per_gpu"] == 3
        assert told["gradient_accumulation_steps"] == 4
        assert told["train_batch_size"] == 24
        assert told["gradient_clipping"] == 0.5
        assert told["zero_optimization"]["stage"] == 2

    def test_no_clipping_without_a_norm(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "7")
        assert not config(optimizer=OptimizerOptions(max_grad_norm=0)).get("gradient_clipping")

    def test_offloading(self):
        told = config(
            zero_stage=3,
            offload_optimizer_device="nvme",
            offload_optimizer_nvme_path="/fast/a",
            offload_param_device="cpu",
        )["zero_optimization"]
        assert told["offload_optimizer"] == {"device": "nvme", "nvme_path": "/fast/a"}
        assert told["offload_param"]["device"] == "cpu"

    @pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
    def test_precision(self, precision):
        told = config(precision=PrecisionOptions(mixed_precision=precision))
        assert (told["bf16"]["enabled"], told["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")
        assert told["bf16"]["check_grad_overflow"]

    def test_float16_starts_unscaled_and_may_keep_master_weights(self):
        half = PrecisionOptions(mixed_precision="fp16")
        told = config(precision=half, offload_optimizer_device="cpu", fp16_master_weights_and_gradients=True)
        assert told["fp16"]["initial_scale_power"] == 0
        assert told["fp16"]["fp16_master_weights_and_grads"]

    def test_flags_of_stage_3(self):
        plugin = make_plugin(
            options(zero_stage=3, zero3_init_flag=True, zero3_save_16bit_model=True), micro_batch=1, world_size=1
        )
        assert plugin.zero3_init_flag
        assert plugin.deepspeed_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]

    def test_stage_0_is_plain_training(self):
        assert not uses_engine(DistributedOptions(deepspeed=True, zero_stage=0))
        assert uses_engine(DistributedOptions(deepspeed=True))
        assert not uses_engine(DistributedOptions())

    def test_accelerate_on_the_cpu_would_leave_it_out(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        with pytest.raises(Exception, match="ACCELERATE_USE_CPU"):
            engine_backend()


STAGE3 = {"zero_stage": 3}
ON_CPU = {"offload_optimizer_device": "cpu"}


@pytest.mark.parametrize(
    ("distributed", "others", "named"),
    [
        ({}, {"tune": DreamBoothOptions(stop_text_encoder_training=3)}, "stop_text_encoder_training"),
        ({}, {"optimizer": OptimizerOptions(optimizer_type="AdamWScheduleFree")}, "AdamWScheduleFree"),
        ({}, {"optimizer": OptimizerOptions(optimizer_type="DAdaptAdam")}, "DAdaptAdam"),
        ({}, {"optimizer": OptimizerOptions(optimizer_type="Adafactor")}, "Adafactor"),
        (ON_CPU, {"optimizer": OptimizerOptions(use_8bit_adam=True)}, "AdamW8bit"),
        (ON_CPU, {"optimizer": OptimizerOptions(optimizer_args=("amsgrad=True",))}, "amsgrad"),
        (ON_CPU | {"zero_stage": 0}, {}, "offload_optimizer_device"),
        ({"offload_optimizer_device": "nvme", "offload_optimizer_nvme_path": "/a"}, {}, "zero_stage 3"),
        ({"offload_param_device": "cpu"}, {}, "offload_param_device"),
        (STAGE3, {"memory": MemoryOptions(torch_compile=True)}, "torch_compile"),
        (
            STAGE3 | {"offload_optimizer_device": "nvme", "offload_optimizer_nvme_path": "/a"},
            {"state": StateOptions(save_state=True)},
            "nvme",
        ),
        ({}, {"precision": PrecisionOptions(mixed_precision="bf16", full_bf16=True)}, "full_bf16"),
        ({}, {"precision": PrecisionOptions(mixed_precision="fp16", full_fp16=True)}, "full_fp16"),
        (ON_CPU | {"fp16_master_weights_and_gradients": True}, {}, "fp16_master_weights_and_gradients"),
    ],
)
def test_refusals(distributed, others, named):
    others = {"tune": DreamBoothOptions(), **others}
    given = Options(distributed=DistributedOptions(deepspeed=True, **distributed), **others)
    assert any(named in str(problem) for problem in deepspeed_problems(given))
    plain = Options(distributed=DistributedOptions(), **others)
    assert not list(deepspeed_problems(plain))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"offload_optimizer_device": "nvme"}, "offload_optimizer_nvme_path"),
        ({"zero_stage": 3, "offload_param_device": "nvme"}, "offload_param_nvme_path"),
        ({"zero_stage": 3, "fp16_master_weights_and_gradients": True}, "zero_stage 2"),
    ],
)
def test_refusals_of_the_group(given, named):
    assert any(named in str(problem) for problem in DistributedOptions(deepspeed=True, **given).check())


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    (problem,) = DistributedOptions(deepspeed=True).check()
    assert "deepspeed" in str(problem) and "pip install deepspeed" in str(problem)


def test_common_settings_are_accepted():
    for distributed in ({}, STAGE3, ON_CPU, STAGE3 | ON_CPU | {"offload_param_device": "cpu"}):
        assert not list(deepspeed_problems(options(**distributed)))
    assert not list(deepspeed_problems(options(optimizer=OptimizerOptions(use_8bit_adam=True))))


def test_options_without_effect_are_pointed_out():
    assert "zero_stage 0" in str(*deepspeed_warnings(options(zero_stage=0)))
    assert "zero3_init_flag" in str(*deepspeed_warnings(options(zero3_init_flag=True)))
    assert "ddp_static_graph" in str(*deepspeed_warnings(options(ddp_static_graph=True)))


def start(processes: int, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run train_db.py on the CPU, where DeepSpeed works with gloo; the first start compiles for a minute."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("ACCELERATE_USE_CPU", None)
    command += [str(ROOT / "train_db.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=500, check=False, cwd=ROOT)


def run(processes: int, out: Path, *argv: str) -> Path:
    done = start(processes, *argv, f"--output_dir={out}", "--deepspeed")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return out / FINAL


def assert_close(one: Path, other: Path, began: Path) -> None:
    left, right, start = load_file(one), load_file(other), load_file(began)
    assert left.keys() == right.keys()
    assert {name: tensor.dtype for name, tensor in left.items()} == {name: t.dtype for name, t in right.items()}
    for part in ("model.diffusion_model.", "cond_stage_model."):
        names = [name for name in left if name.startswith(part) and left[name].is_floating_point()]
        moved = torch.cat([(left[name] - start[name]).flatten() for name in names]).norm()
        apart = torch.cat([(left[name] - right[name]).flatten() for name in names]).norm()
        assert moved > 0 and apart < 5e-3 * moved, (part, moved, apart)


@pytest.fixture
def argv(base_options):
    return (*base_options, "--optimizer_type=SGDNesterov", "--learning_rate=1e-2", "--clip_skip=2")


@needs_deepspeed
def test_zero_2_trains_what_plain_training_trains(train_db, argv, tiny_sd1, tmp_path):
    assert train_db(*argv, "--max_train_steps=2") == 0
    made = run(1, tmp_path / "zero", *argv, "--max_train_steps=2")
    assert_close(tmp_path / "out" / FINAL, made, tiny_sd1)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_accumulate_save_states_and_resume_exactly(train_db, argv, tiny_sd1, tmp_path, stage):
    """8 batches make one update of 6 and one of 2, so the engine must step at the end of the epoch."""
    argv = (*argv, "--save_every_n_steps=2")
    assert train_db(*argv, "--gradient_accumulation_steps=6") == 0
    more = (f"--zero_stage={stage}", "--gradient_accumulation_steps=3")
    whole = run(2, tmp_path / "zero", *argv, *more, "--save_state")
    short = "duck-step00000002.safetensors"
    assert_close(tmp_path / "out" / short, whole.with_name(short), tiny_sd1)
    state = tmp_path / "zero" / "duck-step00000002-state"
    names = {path.name for path in state.iterdir()}
    assert {"resume.json", "model.safetensors", "optimizer_shard_0.bin", "optimizer_shard_1.bin"} <= names
    resumed = run(2, tmp_path / "again", *argv, *more, f"--resume={state}")
    assert tensor_digest(resumed) == tensor_digest(whole)
    fewer = start(1, *argv, *more, f"--resume={state}", f"--output_dir={tmp_path / 'few'}", "--deepspeed")
    assert fewer.returncode == 2


@needs_deepspeed
def test_half_precision_saves_exact_weights(argv, tiny_sd1, tmp_path):
    """With a learning rate of 0 a float32 model comes out as it went in, though the engine holds it in bfloat16."""
    argv = (*argv, "--learning_rate=0", "--mixed_precision=bf16", "--max_train_steps=1")
    for stage in ("2", "3"):
        made = run(1, tmp_path / stage, *argv, f"--zero_stage={stage}", "--zero3_init_flag")
        before, after = load_file(tiny_sd1), load_file(made)
        assert all(before[name].equal(tensor) for name, tensor in after.items())
    half = run(1, tmp_path / "half", *argv, "--zero_stage=3", "--zero3_save_16bit_model")
    assert not all(before[name].equal(tensor) for name, tensor in load_file(half).items())
