"""A run that is stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tensor_digest, train_db

ROOT = Path(__file__).resolve().parent.parent.parent
FINAL = "duck.safetensors"


def options(model: Path, photos: Path, out: Path, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={photos}",
        f"--output_dir={out}",
        "--output_name=duck",
        "--resolution=64",
        "--enable_bucket",
        "--min_bucket_reso=64",
        "--max_bucket_reso=128",
        "--train_batch_size=2",
        "--flip_aug",
        "--shuffle_caption",
        "--learning_rate=1e-3",
        "--lr_scheduler=cosine",
        "--max_train_steps=6",
        "--max_data_loader_n_workers=0",
        "--seed=7",
        *more,
    ]


VARIANTS = {
    "plain": [],
    "two workers, random crop": ["--max_data_loader_n_workers=2", "--random_crop", "--color_aug"],
    "accumulation": ["--gradient_accumulation_steps=2"],
    "cached latents": ["--cache_latents"],
    "text encoder stops": ["--stop_text_encoder_training=4", "--learning_rate_te=5e-4"],
    "8 bit": ["--use_8bit_adam", "--mixed_precision=bf16", "--gradient_checkpointing"],
    "adafactor fused": [
        "--optimizer_type=Adafactor",
        "--optimizer_args",
        "relative_step=False",
        "scale_parameter=False",
        "--fused_backward_pass",
        "--lr_scheduler=constant",
    ],
    "schedule free": ["--optimizer_type=AdamWScheduleFree", "--lr_scheduler=constant"],
    "prodigy": ["--optimizer_type=Prodigy", "--learning_rate=1.0"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_from_every_state_ends_with_the_same_bits(tiny_sd1, photo_folders, tmp_path, variant):
    more = VARIANTS[variant]
    straight = tmp_path / "straight"
    run = options(tiny_sd1, photo_folders, straight, *more)
    assert train_db(*run, "--save_state", "--save_every_n_steps=1", "--save_precision=float") == 0
    expected = tensor_digest(straight / FINAL)
    for step in (2, 5):
        again = tmp_path / f"again{step}"
        state = straight / f"duck-step{step:08d}-state"
        assert train_db(*options(tiny_sd1, photo_folders, again, *more), f"--resume={state}") == 0
        assert tensor_digest(again / FINAL) == expected, f"resumed at step {step}"


def test_observers_leave_no_trace(tiny_sd1, photo_folders, tmp_path):
    """Samples, logs and saves on or off: the same bits."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a duck --w 64 --h 64 --s 2\n")
    quiet, busy = tmp_path / "quiet", tmp_path / "busy"
    assert train_db(*options(tiny_sd1, photo_folders, quiet)) == 0
    assert (
        train_db(
            *options(tiny_sd1, photo_folders, busy),
            f"--sample_prompts={prompts}",
            "--sample_every_n_steps=1",
            "--sample_at_first",
            "--save_every_n_steps=2",
            "--save_state",
            f"--logging_dir={tmp_path / 'logs'}",
        )
        == 0
    )
    assert tensor_digest(quiet / FINAL) == tensor_digest(busy / FINAL)


def test_workers_do_not_change_the_result(tiny_sd1, photo_folders, tmp_path):
    digests = set()
    for workers in (0, 1, 4):
        out = tmp_path / f"workers{workers}"
        more = ["--random_crop", "--color_aug", f"--max_data_loader_n_workers={workers}", "--max_train_steps=4"]
        assert train_db(*options(tiny_sd1, photo_folders, out, *more)) == 0
        digests.add(tensor_digest(out / FINAL))
    assert len(digests) == 1


FAULTS = (
    "step.backward:kill9:3",
    "step.optimizer_mid:kill9:2",
    "step.after:kill9:2",
    "save.mid:kill9:20",
    "save.before_replace:kill9:3",
    "state.between_files:kill9:5",
    "state.before_manifest:kill9:2",
    "loader.get:kill9:4",
)


def test_killed_at_every_fault_point_and_resumed(fork_server, tiny_sd1, photo_folders, tmp_path):
    """SIGKILL between saves, inside a save and inside a step; `--resume latest` finds the newest whole state."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    saving = ["--save_state", "--save_every_n_steps=1"]
    assert train_db(*options(tiny_sd1, photo_folders, straight, *saving)) == 0
    for fault in FAULTS:
        out = killed / fault.replace(":", "_")
        argv = options(tiny_sd1, photo_folders, out, *saving)
        fork_server.run_killed("train_db.py", argv, [fault])
        assert tensor_digest(out / FINAL) == tensor_digest(straight / FINAL), fault


def test_killed_again_and_again_with_workers_and_caches(fork_server, tiny_sd1, photo_folders, tmp_path):
    more = ["--save_state", "--save_every_n_steps=1", "--max_data_loader_n_workers=2", "--cache_latents_to_disk"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    argv = options(tiny_sd1, photo_folders, killed, *more)
    fork_server.run_killed("train_db.py", argv, ["cache.mid:kill9:2", "step.forward:kill9:3", "step.after:kill9:2"])
    child = fork_server.run("train_db.py", options(tiny_sd1, photo_folders, straight, *more))
    assert child.returncode == 0, child.output()
    assert tensor_digest(killed / FINAL) == tensor_digest(straight / FINAL)


@pytest.mark.parametrize(("action", "status"), [("int", 130), ("term", 143)])
def test_signals_finish_the_step_save_a_state_and_say_how_to_go_on(
    fork_server, tiny_sd1, photo_folders, tmp_path, action, status
):
    out, straight = tmp_path / "out", tmp_path / "straight"
    argv = options(tiny_sd1, photo_folders, out)
    stopped = fork_server.run("train_db.py", argv, env={"SD_FAULT": f"step.forward:{action}:3"})
    assert stopped.returncode == status, stopped.output()
    assert "--resume" in stopped.output().strip().splitlines()[-1]
    summary = json.loads((out / "run_summary.json").read_text())
    assert summary["exit_code"] == status and summary["last_state"]
    resumed = fork_server.run("train_db.py", [*argv, "--resume=latest"])
    assert resumed.returncode == 0, resumed.output()
    assert train_db(*options(tiny_sd1, photo_folders, straight)) == 0
    assert tensor_digest(out / FINAL) == tensor_digest(straight / FINAL)


def test_an_error_in_the_loop_saves_the_last_whole_update(fork_server, tiny_sd1, photo_folders, tmp_path):
    out, straight = tmp_path / "out", tmp_path / "straight"
    argv = options(tiny_sd1, photo_folders, out)
    failed = fork_server.run("train_db.py", argv, env={"SD_FAULT": "step.backward:raise:4"})
    assert failed.returncode == 1 and (out / "duck-step00000003-state" / "resume.json").exists(), failed.output()
    assert fork_server.run("train_db.py", [*argv, "--resume=latest"]).returncode == 0
    assert train_db(*options(tiny_sd1, photo_folders, straight)) == 0
    assert tensor_digest(out / FINAL) == tensor_digest(straight / FINAL)


def test_changed_options_stop_a_resume_unless_overridden(tiny_sd1, photo_folders, tmp_path, capsys):
    out = tmp_path / "out"
    argv = options(tiny_sd1, photo_folders, out, "--max_train_steps=2", "--save_state")
    assert train_db(*argv) == 0
    changed = [item for item in argv if "learning_rate" not in item] + ["--learning_rate=5e-4", "--max_train_steps=4"]
    capsys.readouterr()
    assert train_db(*changed, "--resume=latest") == 2
    message = capsys.readouterr().err
    assert "learning_rate" in message and "0.001" in message and "0.0005" in message and "--resume_override" in message
    assert train_db(*changed, "--resume=latest", "--resume_override", "lr", "steps") == 0


def test_two_processes_do_what_accumulation_does_and_resume_exactly(tiny_sd1, photo_folders, tmp_path):
    def torchrun(out: Path, *more: str) -> None:
        argv = options(tiny_sd1, photo_folders, out, "--cache_latents", *more)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
        command += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(ROOT / "train_db.py"), *argv]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    two, again, one = tmp_path / "two", tmp_path / "again", tmp_path / "one"
    torchrun(two, "--save_state", "--save_every_n_steps=2")
    torchrun(again, f"--resume={two / 'duck-step00000002-state'}")
    assert tensor_digest(again / FINAL) == tensor_digest(two / FINAL)
    argv = options(tiny_sd1, photo_folders, one, "--cache_latents", "--gradient_accumulation_steps=2")
    assert train_db(*argv) == 0
    from safetensors.torch import load_file

    left, right = load_file(one / FINAL), load_file(two / FINAL)
    start = load_file(tiny_sd1)
    for name, tensor in left.items():
        if tensor.is_floating_point():
            moved = (tensor - start[name]).abs().max().item()
            assert (tensor - right[name]).abs().max().item() <= 0.02 * moved + 1e-7, name
