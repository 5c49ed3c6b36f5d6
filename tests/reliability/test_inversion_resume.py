"""Textual inversion that is stopped or killed and resumed ends with the same bits as a run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tensor_digest, train_textual_inversion

FINAL = "zshs.safetensors"
SCRIPT = "train_textual_inversion.py"


def options(model: Path, photos: Path, out: Path, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={photos}",
        f"--output_dir={out}",
        "--token_string=zshs",
        "--num_vectors_per_token=2",
        "--use_object_template",
        "--save_model_as=safetensors",
        "--resolution=64",
        "--train_batch_size=2",
        "--learning_rate=1e-2",
        "--lr_scheduler=cosine",
        "--max_train_steps=4",
        "--max_data_loader_n_workers=0",
        "--seed=7",
        *more,
    ]


VARIANTS = {
    "random start, flips, accumulation": "--flip_aug --gradient_accumulation_steps=2",
    "a word, cached latents, checkpointing": "--init_word=dog --cache_latents --gradient_checkpointing --clip_skip=2",
    "bfloat16": "--mixed_precision=bf16 --full_bf16",
    "schedule-free": "--optimizer_type=AdamWScheduleFree --lr_scheduler=constant",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_in_the_middle_of_an_epoch_ends_with_the_same_bits(tiny_sd1, photo_folders, tmp_path, variant):
    more = VARIANTS[variant].split()
    straight, again = tmp_path / "straight", tmp_path / "again"
    saving = ("--save_state", "--save_every_n_steps=2")
    assert train_textual_inversion(*options(tiny_sd1, photo_folders, straight, *more, *saving)) == 0
    state = straight / "zshs-step00000002-state"
    # What training began with matters no more.
    argv = options(tiny_sd1, photo_folders, again, *more, f"--resume={state}", "--init_word=cat")
    assert train_textual_inversion(*argv) == 0
    assert tensor_digest(again / FINAL) == tensor_digest(straight / FINAL)
    halfway = straight / "zshs-step00000002.safetensors"
    assert tensor_digest(again / FINAL) != tensor_digest(halfway)


def test_another_word_or_number_of_vectors_is_no_continuation(tiny_sd1, photo_folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert train_textual_inversion(*options(tiny_sd1, photo_folders, out, "--save_state", "--output_name=a")) == 0
    for change in ("--token_string=zother", "--num_vectors_per_token=3", "--use_style_template"):
        argv = options(tiny_sd1, photo_folders, out, "--output_name=a", "--resume=latest", change)
        assert train_textual_inversion(*argv) == 2
        assert change.removeprefix("--").partition("=")[0] in capsys.readouterr().err


def test_observers_leave_no_trace(tiny_sd1, photo_folders, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of zshs --w 64 --h 64 --s 1\n", encoding="utf-8")
    quiet, busy = tmp_path / "quiet", tmp_path / "busy"
    assert train_textual_inversion(*options(tiny_sd1, photo_folders, quiet)) == 0
    watching = ("--sample_every_n_steps=1", "--sample_at_first", "--save_every_n_steps=1", "--save_state")
    argv = options(tiny_sd1, photo_folders, busy, f"--sample_prompts={prompts}", *watching)
    assert train_textual_inversion(*argv) == 0
    assert tensor_digest(quiet / FINAL) == tensor_digest(busy / FINAL)


KILLS = ("step.optimizer_mid:kill9:2", "state.between_files:kill9:3")


def test_killed_again_and_again(fork_server, tiny_sd1, photo_folders, tmp_path):
    more = ("--save_state", "--save_every_n_steps=1", "--gradient_accumulation_steps=2")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train_textual_inversion(*options(tiny_sd1, photo_folders, straight, *more)) == 0
    argv = options(tiny_sd1, photo_folders, killed, *more)
    assert fork_server.run_killed(SCRIPT, argv, KILLS)
    assert tensor_digest(killed / FINAL) == tensor_digest(straight / FINAL)


def test_an_interrupt_saves_state_and_embedding(fork_server, tiny_sd1, photo_folders, tmp_path):
    out, straight = tmp_path / "out", tmp_path / "straight"
    argv = options(tiny_sd1, photo_folders, out)
    stopped = fork_server.run(SCRIPT, argv, env={"SD_FAULT": "step.forward:int:2"})
    assert stopped.returncode == 130, stopped.output()
    assert (out / "zshs-interrupted.safetensors").exists()
    assert train_textual_inversion(*argv, "--resume=latest") == 0
    assert train_textual_inversion(*options(tiny_sd1, photo_folders, straight)) == 0
    assert tensor_digest(out / FINAL) == tensor_digest(straight / FINAL)
