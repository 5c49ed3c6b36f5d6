"""Stable Cascade in two processes: what one process does with accumulation, whether weights are cut up or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import stable_cascade_train_c_network as network_script
from library.training.state import load_pickle
from tests.cascade_runs import train_stage_b, train_stage_c
from tests.conftest import PHOTOS
from tests.control_training import FINAL, control_words, train_control_net
from tests.support import run_tool, tensor_digest
from tools import make_webdataset

STAGE_C, STAGE_B = "stable_cascade_train_stage_c.py", "stable_cascade_train_stage_b.py"
NETWORK, CONTROL = "stable_cascade_train_c_network.py", "stable_cascade_train_c_control_net.py"
STEADY = ("--optimizer_args", "eps=0.01")
"""Of gradients that are rounding errors AdamW makes whole steps, unless its epsilon is large."""
ACCUMULATED = "--gradient_accumulation_steps=2"
BY_SRUN = {
    **dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"), ""),
    **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_NODEID": "0"},
    **{"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"},
}
FINALS = ("duck.safetensors", "duck_ema.safetensors")
WITH_EVERYTHING = (*STEADY, "--adaptive_loss_weight", "--ema_decay=0.5", "--save_state", "--save_every_n_steps=2")


def apart(one: Path, other: Path, began: Path | None = None) -> float:
    """Return how far two models are apart, as a share of how far (from `began`) they moved."""
    left, right = load_file(one), load_file(other)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in left.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in right.items()
    }
    start = {name: torch.zeros(()) for name in left} if began is None else load_file(began)
    names = [name for name in left if left[name].is_floating_point()]
    moved = torch.cat([(left[name] - start[name]).flatten().float() for name in names]).norm()
    difference = torch.cat([(left[name] - right[name]).flatten().float() for name in names]).norm()
    assert moved > 0
    return float(difference / moved)


@pytest.fixture(scope="module")
def runs(tiny_cascade, fork_server, tmp_path_factory):
    """Stage C trained in one process, in two that share gradients, and in two that share weights too."""
    import shutil

    from tests.cascade_runs import command_maker

    place = tmp_path_factory.mktemp("two")
    photos = place / "photos" / "2_sks duck"
    photos.mkdir(parents=True)
    for path in sorted((PHOTOS / "duck").glob("*.*"))[:8]:
        shutil.copy(path, photos)
    command = command_maker(tiny_cascade, place / "photos")
    assert train_stage_c(*command(place / "one", *WITH_EVERYTHING, ACCUMULATED)) == 0
    prompts = place / "three.txt"
    prompts.write_text("".join(f"a duck --w 128 --h 96 --s 1 --d {seed}\n" for seed in range(3)))
    drawn = (f"--sample_prompts={prompts}", "--sample_every_n_steps=3")
    drawn = (*drawn, f"--previewer_checkpoint_path={tiny_cascade.previewer}")
    fork_server.run_ranks(STAGE_C, command(place / "ddp", *WITH_EVERYTHING, *drawn))
    fork_server.run_ranks(STAGE_C, command(place / "fsdp", *WITH_EVERYTHING, *drawn, "--fsdp"))
    return place, command


def pictures(folder: Path) -> dict[str, np.ndarray]:
    """Return levels of sample pictures by prompt and whose weights drew them."""
    found = {}
    for path in (folder / "sample").iterdir():
        number, _, seed, *ending = path.stem.removeprefix("duck_000003_").split("_")
        found["_".join([number, seed, *ending])] = np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)
    return found


def test_two_processes_do_what_accumulation_does(runs, tiny_cascade):
    place, _ = runs
    for name in FINALS:
        assert apart(place / "one" / name, place / "ddp" / name, tiny_cascade.stage_c) < 1e-4, name
    losses = [load_pickle(place / run / "duck-state" / "objective.bin")["bucket_losses"] for run in ("one", "ddp")]
    assert torch.allclose(*losses, rtol=1e-5)
    assert (losses[0] != 1).any()


def test_shared_weights_train_the_same_and_are_written_whole(runs, tiny_cascade):
    place, _ = runs
    for name in FINALS:
        assert apart(place / "ddp" / name, place / "fsdp" / name, tiny_cascade.stage_c) < 1e-5, name
    for name in ("model.safetensors", "ema.safetensors"):
        assert apart(place / "ddp" / "duck-state" / name, place / "fsdp" / "duck-state" / name) < 1e-5, name
    one, other = (load_pickle(place / run / "duck-state" / "optimizer.bin") for run in ("ddp", "fsdp"))
    assert one["state"].keys() == other["state"].keys()
    for number, values in one["state"].items():
        for name, value in values.items():
            assert torch.allclose(value, other["state"][number][name], rtol=1e-3, atol=1e-7), (number, name)


def test_shared_weights_draw_three_pictures_in_two_processes(runs):
    """One process draws two of them, the other one; then both those of the average."""
    place, _ = runs
    wanted, found = pictures(place / "ddp"), pictures(place / "fsdp")
    assert wanted.keys() == found.keys() == {f"0{i}_{i}{ending}" for i in range(3) for ending in ("", "_ema")}
    for name, picture in wanted.items():
        assert np.abs(picture - found[name]).max() <= 1, name
    assert any((picture != wanted[f"{name}_ema"]).any() for name, picture in wanted.items() if "ema" not in name)


def test_shared_weights_resume_with_the_same_bits(runs, fork_server):
    place, command = runs
    state = f"--resume={place / 'fsdp' / 'duck-step00000002-state'}"
    fork_server.run_ranks(STAGE_C, command(place / "again", *WITH_EVERYTHING, "--fsdp", state))
    for name in (*FINALS, "duck-state/model.safetensors", "duck-state/ema.safetensors"):
        assert tensor_digest(place / "again" / name) == tensor_digest(place / "fsdp" / name), name
    alone = command(place / "alone", *WITH_EVERYTHING, ACCUMULATED, state)
    assert train_stage_c(*alone) == 0
    for name in FINALS:
        assert apart(place / "alone" / name, place / "fsdp" / name) < 1e-5, name


def test_shared_weights_in_half_precision_with_samples_and_a_text_encoder(runs, fork_server, tiny_cascade):
    """One picture for two processes: only one of them draws. The other must not be waited for."""
    place, command = runs
    prompts = place / "prompts.txt"
    prompts.write_text("a duck --w 128 --h 96 --s 2 --d 5\n")
    more = (
        *STEADY,
        *("--mixed_precision=bf16", "--gradient_checkpointing", "--stage_c_dropout=0.1", ACCUMULATED),
        *("--train_text_encoder", "--learning_rate_te1=1e-3", "--max_grad_norm=0.1"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=1", "--sample_at_first"),
        f"--previewer_checkpoint_path={tiny_cascade.previewer}",
    )
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for name, env in (("half", {}), ("half_fsdp", asked)):
        out = command(place / name, *more, max_train_steps=2)
        written = fork_server.run_ranks(STAGE_C, out, env=env)
        assert ("understood as --fsdp" in written[0]) == bool(env)
        assert len(list((place / name / "sample").glob("*.png"))) == 3
    for name, began in (("duck.safetensors", tiny_cascade.stage_c), ("duck_text_model.safetensors", tiny_cascade.text)):
        assert apart(place / "half" / name, place / "half_fsdp" / name, began) < 0.02, name


def test_stage_b_on_tar_files(tiny_cascade, runs, fork_server, tmp_path):
    assert run_tool(make_webdataset.main, PHOTOS, tmp_path / "tars", "--recursive", "--shard_size=4") == 0
    _, command = runs
    more = (*STEADY, f"--webdataset_path={tmp_path / 'tars'}", "--adaptive_loss_weight", "--ema_decay=0.5")
    settings = {"stage": "b", "train_data_dir": None, "max_train_steps": 2}
    assert train_stage_b(*command(tmp_path / "one", *more, ACCUMULATED, **settings)) == 0
    fork_server.run_ranks(STAGE_B, command(tmp_path / "two", *more, **settings))
    for name in FINALS:
        assert apart(tmp_path / "one" / name, tmp_path / "two" / name, tiny_cascade.stage_b) < 1e-4, name


def test_a_network_and_new_words(runs, fork_server, tmp_path):
    _, command = runs
    more = (
        *(*STEADY, "--max_grad_norm=0", "--network_module=networks.lora", "--network_train_unet_only"),
        *("--train_tokens", "[sks]=^dog", "--adaptive_loss_weight", "--caption_prefix=[sks]", "--network_dim=2"),
        *("--learning_rate=1e-2", "--save_every_n_steps=1", "--flip_aug", "--shuffle_caption"),
    )
    assert run_tool(network_script.main, *command(tmp_path / "one", *more, ACCUMULATED, max_train_steps=2)) == 0
    fork_server.run_ranks(NETWORK, command(tmp_path / "two", *more, max_train_steps=2))
    for name in ("duck.safetensors", "duck_sks.safetensors"):
        began = tmp_path / "one" / name.replace("duck", "duck-step00000001")
        assert apart(tmp_path / "one" / name, tmp_path / "two" / name, began) < 1e-3, name


def test_a_control_net(control_cascade, photo_folders, fork_server, tmp_path):
    """Started by srun. What the original trainer's files say of shared weights does not stop it."""
    more = (*STEADY, "--controlnet_filter=inpaint", "--train_batch_size=1", "--max_train_steps=2", "--flip_aug")
    one = control_words(control_cascade, photo_folders, tmp_path / "one", *more, "--save_every_n_steps=1")
    assert train_control_net(*one, ACCUMULATED) == 0
    two = control_words(control_cascade, photo_folders, tmp_path / "two", *more, "--fsdp")
    assert "shares gradients only" in fork_server.run_ranks(CONTROL, two, env=BY_SRUN)[0]
    began = tmp_path / "one" / FINAL.replace("net.", "net-step00000001.")
    assert apart(tmp_path / "one" / FINAL, tmp_path / "two" / FINAL, began) < 1e-3


@pytest.mark.parametrize(
    ("script", "more", "expected"),
    [
        ("c", ("--fsdp", "--optimizer_type=Adafactor"), "cannot share Adafactor"),
        ("c", ("--fsdp", "--mixed_precision=bf16", "--torch_compile"), "--torch_compile"),
        ("c", ("--fsdp", "--mixed_precision=fp16"), "fp16"),
        ("network", ("--fsdp", "--network_module=networks.lora"), "needs the one that a network is attached to"),
    ],
)
def test_what_cannot_share_weights_is_refused(cascade_command, tmp_path, monkeypatch, script, more, expected):
    from importlib import import_module

    from library.errors import UserError
    from library.option_parser import parse

    monkeypatch.setenv("WORLD_SIZE", "2")
    options = import_module(STAGE_C[:-3] if script == "c" else NETWORK[:-3]).Options
    with pytest.raises(UserError, match=expected) as caught:
        parse(options, cascade_command(tmp_path / "out", *more))
    assert len(str(caught.value).splitlines()) == 1
