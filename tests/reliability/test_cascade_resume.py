"""A Stable Cascade run that is killed and resumed ends with the same bits as one that was not, averages included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cascade_runs import train_stage_b, train_stage_c
from tests.support import tensor_digest

ROOT = Path(__file__).resolve().parent.parent.parent
EVERYTHING = "--adaptive_loss_weight --ema_decay=0.8 --ema_start_steps=2 --save_state --caption_dropout_rate=0.3"
VARIANTS = {
    "c: adaptive weights, average, dropout": ("c", EVERYTHING),
    "c: text encoder too, accumulation": (
        "c",
        f"{EVERYTHING} --train_text_encoder --learning_rate_te1=1e-4 --gradient_accumulation_steps=2 "
        "--noise_offset=0.1",
    ),
    "c: bfloat16, fused backward pass, cached latents": (
        "c",
        f"{EVERYTHING} --full_bf16 --mixed_precision=bf16 --optimizer_type=Adafactor --fused_backward_pass "
        "--gradient_checkpointing --cache_latents --lr_scheduler=constant --optimizer_args relative_step=False",
    ),
    "b: pyramid noise, sizes and gaps of the condition": ("b", EVERYTHING),
}


@pytest.mark.parametrize(("stage", "more"), VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_ends_with_the_same_bits(cascade_command, tmp_path, stage, more):
    train = train_stage_c if stage == "c" else train_stage_b
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    usual = {"max_train_steps": 4, "lr_scheduler": "cosine", "stage": stage}
    assert train(*cascade_command(whole, *more.split(), **usual)) == 0
    assert train(*cascade_command(parts, *more.split(), "--save_every_n_steps=2", **usual)) == 0
    middle = parts / "duck-step00000002-state"
    for path in parts.glob("duck.safetensors"):
        path.unlink()
    assert train(*cascade_command(parts, *more.split(), f"--resume={middle}", "--overwrite", **usual)) == 0
    compared = [
        "duck.safetensors",
        "duck_ema.safetensors",
        "duck-state/model.safetensors",
        "duck-state/ema.safetensors",
    ]
    if "--train_text_encoder" in more:
        compared += ["duck_text_model.safetensors", "duck_ema_text_model.safetensors"]
    for name in compared:
        assert tensor_digest(whole / name) == tensor_digest(parts / name), name
    assert (whole / "duck-state" / "objective.bin").read_bytes() == (
        parts / "duck-state" / "objective.bin"
    ).read_bytes()


def test_a_killed_run_goes_on_from_its_last_state(cascade_command, tmp_path):
    more = ("--adaptive_loss_weight", "--ema_decay=0.8", "--save_state", "--save_every_n_steps=2")
    command = cascade_command(tmp_path / "killed", *more, max_train_steps=4)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SD_FAULT": "step.forward:kill9:4"}
    script = [sys.executable, str(ROOT / "stable_cascade_train_stage_c.py")]
    killed = subprocess.run([*script, *command], env=environment, capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-600:]
    assert train_stage_c(*command, "--resume=latest") == 0
    assert train_stage_c(*cascade_command(tmp_path / "whole", *more, max_train_steps=4)) == 0
    for name in ("duck.safetensors", "duck_ema.safetensors"):
        assert tensor_digest(tmp_path / "killed" / name) == tensor_digest(tmp_path / "whole" / name)
