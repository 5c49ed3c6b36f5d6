"""Stable Cascade learns: a short training on four photographs brings the loss on them down, measured from files alone.

The measure is the reference's of `tests/parity`, at fixed times and with fixed noise: what was not trained, was frozen,
or was saved without its values leaves it where it was.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stable_cascade_train_c_network
from tests.cascade_runs import train_stage_b, train_stage_c, words
from tests.control_training import train_control_net
from tests.parity.cascade_reference import Recipe, Trainer, write_pictures
from tests.parity.cascade_reference_models import inject, make_stage, make_text
from tests.parity.cascade_reference_nets import ReferenceControlNet, attach_lora, attach_word, lora_layers
from tests.support import run_tool

pytestmark = pytest.mark.compat

FOUR = {"duck/00": "[zog] the duck", "bear/01": "a bear", "robot/02": "a robot by [zog]", "car/03": "a red car"}
NOT_TRAINED = Recipe(seed=0, rates={})
BLOCKS = (1, 2)
NOISY = (0.82, 0.85, 0.88)
"""Times at which the loss is measured: amid those that are trained."""
Times = tuple[float, ...]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "1_things"
    write_pictures(folder, FOUR, (128, 128))
    return folder.parent


def train_lora(*argv: object) -> int:
    network = ("--network_module=networks.lora", "--network_dim=8", "--network_alpha=4", "--network_train_unet_only")
    return run_tool(stable_cascade_train_c_network.main, *argv, *network, "--train_tokens", "[zog]=^snail")


def measured_stage(files, photos: Path, saved: Path | None, times: Times, which: str = "c") -> float:
    path = saved or (files.stage_c if which == "c" else files.stage_b)
    stage = make_stage(path, which, BLOCKS)
    return Trainer(files, photos, stage, make_text(files.text), NOT_TRAINED, {}).measure(times)


def measured_stage_b(files, photos: Path, saved: Path | None, times: Times) -> float:
    return measured_stage(files, photos, saved, times, "b")


def measured_lora(files, photos: Path, saved: Path | None, times: Times, *, network: bool = True) -> float:
    """Without `network` the word alone is used."""
    stage, text = make_stage(files.stage_c, blocks=BLOCKS), make_text(files.text)
    tensors = {} if saved is None else load_file(saved)
    if tensors and network:
        attach_lora(lora_layers(stage, None), tensors)
    attach_word(text, tensors.get("embeddings.embeddings", torch.zeros(1, 32)), files.text, "snail")
    return Trainer(files, photos, stage, text, NOT_TRAINED, {}, {"[zog]": 49408}).measure(times)


def measured_control_net(files, photos: Path, saved: Path | None, times: Times) -> float:
    stage, guide = make_stage(files.stage_c, blocks=BLOCKS), None
    if saved is not None:
        net = ReferenceControlNet(load_file(saved), (0, 1, 4, 5), edges_side=64)
        inject(stage, lambda: net.residuals)
        guide = net.look
    return Trainer(files, photos, stage, make_text(files.text), NOT_TRAINED, {}, guide=guide).measure(times)


def train(script, files, photos: Path, out: Path, *more: str) -> Path:
    stage = "b" if script is train_stage_b else "c"
    options = {
        f"stage_{stage}_checkpoint_path": files.stage_b if stage == "b" else files.stage_c,
        "stage_a_checkpoint_path": files.stage_a if stage == "b" else None,
        "effnet_checkpoint_path": files.effnet,
        "text_model_checkpoint_path": files.text,
        "train_data_dir": photos,
        "output_dir": out,
        "output_name": "things",
        "resolution": 128,
        "train_batch_size": 4,
        "max_data_loader_n_workers": 0,
        "save_precision": "float",
        "seed": 5,
    }
    extra = "--controlnet_filter=canny --controlnet_filter_params resize=64" if script is train_control_net else ""
    assert script(*words(options, *extra.split(), *more)) == 0
    return out / "things.safetensors"


LEARNERS = {
    "stage C": (train_stage_c, measured_stage, "--learning_rate=2e-2 --max_train_steps=30", 0.45),
    "stage B": (train_stage_b, measured_stage_b, "--learning_rate=1e-2 --max_train_steps=30", 0.55),
    "LoRA and a word": (train_lora, measured_lora, "--learning_rate=2e-2 --max_train_steps=30", 0.5),
    # It sees the picture but not the noise, which is to be predicted.
    "ControlNet": (train_control_net, measured_control_net, "--learning_rate=1e-2 --max_train_steps=20", 0.7),
}
"""Name -> script, measure, options, and the share of the loss that may be left."""


@pytest.mark.parametrize("name", LEARNERS)
def test_the_saved_file_brings_the_loss_down(control_cascade, photos, tmp_path, name):
    script, measured, argv, share = LEARNERS[name]
    noisy = ("--min_timestep=800", "--max_timestep=900")
    saved = train(script, control_cascade, photos, tmp_path / "a", *noisy, *argv.split())
    still = train(script, control_cascade, photos, tmp_path / "b", "--learning_rate=1e-9", "--max_train_steps=1")
    bare, trained, unmoved = (measured(control_cascade, photos, path, NOISY) for path in (None, saved, still))
    assert trained < share * bare, f"{bare:.3f} -> {trained:.3f}"
    assert unmoved == pytest.approx(bare, rel=1e-4)


def test_a_word_alone_brings_the_loss_down(control_cascade, photos, tmp_path):
    """A condition is the same all over a picture, and two of the four have the word: there is less to be had."""
    argv = "--unet_lr=1e-9 --embedding_lr=2e-2 --max_train_steps=12 --min_timestep=400 --max_timestep=402"
    saved = train(train_lora, control_cascade, photos, tmp_path, *argv.split())
    bare, trained = (measured_lora(control_cascade, photos, path, (0.4,), network=False) for path in (None, saved))
    assert trained < 0.99 * bare, f"{bare:.4f} -> {trained:.4f}"


@pytest.mark.parametrize("script", [train_stage_c, train_lora])
def test_the_average_of_the_models_after_every_update(control_cascade, photos, tmp_path, script):
    """Every second update counts; the first of those is copied."""
    argv = "--ema_decay=0.7 --ema_start_steps=4 --ema_every_n_steps=2 --save_every_n_steps=1 --learning_rate=1e-2"
    train(script, control_cascade, photos, tmp_path, *argv.split(), "--max_train_steps=6")
    saves = {
        int(match[1]): path
        for path in tmp_path.glob("*.safetensors")
        if (match := re.fullmatch(r"things-step(\d+)\.safetensors", path.name))
    }
    saves[6] = tmp_path / "things.safetensors"
    average = load_file(saves[2])
    for step in (4, 6):
        new = load_file(saves[step])
        average = {name: 0.7 * average[name] + 0.3 * new[name] if average[name].is_floating_point() else new[name]
                   for name in average}  # fmt: skip
        written = saves[step].with_name(f"{saves[step].stem}_ema.safetensors")
        found = load_file(written)
        assert found.keys() == average.keys()
        for name, value in average.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
        assert any(not torch.equal(found[name], new[name]) for name in found)
