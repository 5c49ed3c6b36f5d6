"""Networks on stage C, trained with words, average and adaptive weights: stopped and resumed, the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import stable_cascade_train_c_network as script
from tests.conftest import PHOTOS
from tests.support import run_tool, tensor_digest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = "stable_cascade_train_c_network.py"
FINALS = ("duck.safetensors", "duck_fernando.safetensors")
WITH_EVERYTHING = (
    *("--train_tokens", "[fernando]=^dog", "^duck</w>", "--embedding_lr=3e-2", "--network_dropout=0.2"),
    *("--adaptive_loss_weight", "--ema_decay=0.5", "--ema_start_steps=1", "--stage_c_dropout=0.1"),
    "--gradient_accumulation_steps=2",
)


@pytest.fixture(scope="module")
def models(tiny_cascade):
    return tiny_cascade


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "1_things"
    folder.mkdir()
    for path in sorted((PHOTOS / "duck").glob("*.jpg"))[:4]:
        shutil.copy(path, folder / path.name)
        (folder / path.name).with_suffix(".caption").write_text("[fernando] the duck, yellow, on water")
    return folder.parent


def options(models, photos, out, *more):
    return [
        f"--stage_c_checkpoint_path={models.stage_c}",
        f"--effnet_checkpoint_path={models.effnet}",
        f"--text_model_checkpoint_path={models.text}",
        f"--{'webdataset_path' if any(photos.glob('*.tar')) else 'train_data_dir'}={photos}",
        f"--output_dir={out}",
        "--output_name=duck",
        "--resolution=64",
        "--train_batch_size=2",
        "--flip_aug",
        "--shuffle_caption",
        "--network_module=networks.lora",
        "--network_dim=4",
        "--learning_rate=1e-2",
        "--lr_scheduler=cosine",
        "--max_train_steps=4",
        "--max_data_loader_n_workers=0",
        "--seed=7",
        *more,
    ]


def digests(folder, names):
    return {name: tensor_digest(folder / name) for name in names}


KILLS = ("step.backward:kill9:2", "step.optimizer_mid:kill9:2", "state.between_files:kill9:3", "save.mid:kill9:3")


def test_killed_again_and_again(fork_server, models, caption_shards, tmp_path):
    more = (*WITH_EVERYTHING, "--save_state", "--save_every_n_steps=1", "--save_last_n_steps=1")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run_tool(script.main, *options(models, caption_shards, straight, *more)) == 0
    assert fork_server.run_killed(SCRIPT, options(models, caption_shards, killed, *more), KILLS) == len(KILLS)
    names = (*FINALS, "duck_ema.safetensors", "duck_ema_fernando.safetensors")
    assert digests(killed, names) == digests(straight, names)
    assert len(set(digests(straight, names).values())) == len(names)
    # Vectors of words go with the networks that they belong to.
    kept = {path.name for path in straight.glob("duck-step*_fernando.safetensors")}
    assert kept == {path.stem + "_fernando.safetensors" for path in straight.glob("duck-step*[0-9].safetensors")} | {
        path.stem + "_fernando.safetensors" for path in straight.glob("duck-step*_ema.safetensors")
    }


def test_changed_words_stop_a_resume(models, photos, tmp_path, capfd):
    words = ("--train_tokens", "[fernando]=^dog", "--save_state", "--save_every_n_steps=2")
    assert run_tool(script.main, *options(models, photos, tmp_path, *words)) == 0
    state = tmp_path / "duck-step00000002-state"
    other = ("--train_tokens", "[fernando]=^cat", f"--resume={state}")
    assert run_tool(script.main, *options(models, photos, tmp_path, *other)) == 2
    assert "train_tokens" in capfd.readouterr().err
