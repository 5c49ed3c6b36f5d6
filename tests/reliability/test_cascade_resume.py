"""A Stable Cascade run that is stopped, killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests.cascade_runs import train_stage_b, train_stage_c
from tests.support import tensor_digest

EVERYTHING = "--adaptive_loss_weight --ema_decay=0.8 --ema_start_steps=2 --save_state --caption_dropout_rate=0.3"
TARS = (
    "--train_batch_size=2 --multi_aspect_ratio 1/1 1/2 --bucket_random_ratio=0.3 --gradient_accumulation_steps=2 "
    "--flip_aug"
)
VARIANTS = {
    "c: adaptive weights, average, dropout": ("c", f"{EVERYTHING} --clip_image_cond_rate=0.5"),
    "c: text encoder too, accumulation, tar files": (
        "c",
        f"{EVERYTHING} {TARS} --train_text_encoder --learning_rate_te1=1e-4 --noise_offset=0.1 --ema_every_n_steps=2",
    ),
    "c: streamed": ("c", f"{EVERYTHING} --webdataset_streaming --webdataset_shuffle=3 --train_text_encoder_only"),
    "c: bfloat16, fused backward pass, cached latents": (
        "c",
        f"{EVERYTHING} --full_bf16 --mixed_precision=bf16 --optimizer_type=Adafactor --fused_backward_pass "
        "--gradient_checkpointing --cache_latents --lr_scheduler=constant --optimizer_args relative_step=False",
    ),
    "b: pyramid noise, sizes and gaps of the condition": ("b", f"{EVERYTHING} --cache_latents"),
    "b: tar files, text encoder too": ("b", f"{EVERYTHING} {TARS} --train_text_encoder --ema_device=cpu"),
}


@pytest.mark.parametrize(("stage", "more"), VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_ends_with_the_same_bits(cascade_command, caption_shards, tiny_cascade, tmp_path, stage, more):
    train = train_stage_c if stage == "c" else train_stage_b
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    usual = {"max_train_steps": 4, "lr_scheduler": "cosine", "stage": stage}
    if "multi_aspect" in more or "streaming" in more:
        # Of the narrower pictures stage B would have nothing left on its coarsest level.
        usual |= {"train_data_dir": None, "webdataset_path": caption_shards, "resolution": 128 if stage == "b" else 64}
    if "clip_image" in more:
        usual |= {"image_model_checkpoint_path": tiny_cascade.vision}
    assert train(*cascade_command(whole, *more.split(), **usual)) == 0
    assert train(*cascade_command(parts, *more.split(), "--save_every_n_steps=2", **usual)) == 0
    middle = parts / "duck-step00000002-state"
    for path in parts.glob("duck.safetensors"):
        path.unlink()
    assert train(*cascade_command(parts, *more.split(), f"--resume={middle}", "--overwrite", **usual)) == 0
    states = sorted(path.relative_to(whole) for path in (whole / "duck-state").glob("*.safetensors"))
    models = sorted(path.relative_to(whole) for path in whole.glob("*.safetensors"))
    assert (len(models), len(states)) == (
        (4, 3) if "--train_text_encoder " in more else (4 if "only" in more else 2, 2)
    )
    for name in (*models, *states):
        assert tensor_digest(whole / name) == tensor_digest(parts / name), name
    objectives = [(folder / "duck-state" / "objective.bin").read_bytes() for folder in (whole, parts)]
    assert objectives[0] == objectives[1]


FAULTS = {
    "c": ("state.between_files:kill9:9", "step.optimizer_mid:kill9:2"),
    "b": ("save.mid:kill9:9",),
}


@pytest.mark.parametrize("stage", FAULTS)
def test_a_killed_run_goes_on_from_its_last_state(fork_server, cascade_command, tmp_path, stage):
    more = (*EVERYTHING.split(), "--save_every_n_steps=1", "--save_last_n_steps=1")
    command, straight = (
        cascade_command(tmp_path / name, *more, max_train_steps=4, stage=stage) for name in ("killed", "straight")
    )
    deaths = fork_server.run_killed(f"stable_cascade_train_stage_{stage}.py", command, FAULTS[stage])
    assert deaths == len(FAULTS[stage])
    assert (train_stage_c if stage == "c" else train_stage_b)(*straight) == 0
    for name in ("duck.safetensors", "duck_ema.safetensors", "duck-step00000004_ema.safetensors"):
        assert tensor_digest(tmp_path / "killed" / name) == tensor_digest(tmp_path / "straight" / name), name
    assert not (tmp_path / "killed" / "duck-step00000002_ema.safetensors").exists()


def test_a_signal_saves_a_state_with_everything(cascade_command, tmp_path, monkeypatch):
    more = EVERYTHING.replace("--save_state ", "").split()
    command, straight = (
        cascade_command(tmp_path / name, *more, "--gradient_accumulation_steps=2", max_train_steps=3)
        for name in ("stopped", "straight")
    )
    with monkeypatch.context() as patch:
        patch.setenv("SD_FAULT", "step.forward:int:3")
        assert train_stage_c(*command) == 130
    summary = json.loads((tmp_path / "stopped" / "run_summary.json").read_text())
    assert (summary["exit_code"], summary["step"]) == (130, 2)
    assert train_stage_c(*command, f"--resume={summary['last_state']}") == train_stage_c(*straight) == 0
    for name in ("duck.safetensors", "duck_ema.safetensors"):
        assert tensor_digest(tmp_path / "stopped" / name) == tensor_digest(tmp_path / "straight" / name), name


def test_an_average_may_begin_late(cascade_command, tmp_path, capfd):
    """Where the state has none it begins with the weights of the state, and everything else goes on exactly."""
    command = cascade_command(tmp_path, "--save_state", "--save_every_n_steps=2", max_train_steps=4)
    assert train_stage_c(*command) == 0
    end = tensor_digest(tmp_path / "duck.safetensors")
    late = (f"--resume={tmp_path / 'duck-step00000002-state'}", "--ema_decay=0.5", "--overwrite")
    assert train_stage_c(*command, *late) == 2
    assert "--ema_decay" in capfd.readouterr().err
    assert train_stage_c(*command, *late, "--resume_override", "ema_decay") == 0
    assert "the average begins with the weights" in capfd.readouterr().err
    first, last, average = (
        load_file(tmp_path / name)["clf.1.weight"]
        for name in ("duck-step00000002.safetensors", "duck.safetensors", "duck_ema.safetensors")
    )
    assert tensor_digest(tmp_path / "duck.safetensors") == end
    assert 0 < (average - first).norm() < (last - first).norm()
