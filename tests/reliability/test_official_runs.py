"""A run of the original Stable Cascade trainer, of which there is its folder, goes on here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.training.state_files import OPTIMIZER, find_state, verify_state
from tests.cascade_runs import train_stage_b, train_stage_c
from tests.support import tensor_digest

MORE = ("--adaptive_loss_weight", "--ema_decay=0.8", "--lr_scheduler=cosine", "--max_train_steps=4")
FINALS = ("duck.safetensors", "duck_ema.safetensors")
PACKED = re.compile(r"(.*\.attention\.attn\.)to_([qkv])\.(weight|bias)$")


def packed(values: dict) -> dict:
    """Join what stands for queries, keys and values, as the modules of the original have them."""
    found: dict = {}
    for name, value in values.items():
        match = PACKED.match(name)
        key, place = (f"{match[1]}in_proj_{match[3]}", "qkv".index(match[2])) if match else (name, 0)
        found.setdefault(key, {})[place] = value
    return {name: joined([pieces[place] for place in sorted(pieces)]) for name, pieces in found.items()}


def joined(pieces: list):
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], dict):
        return {key: joined([piece[key] for piece in pieces]) for key in pieces[0]}
    return torch.cat(pieces) if pieces[0].dim() else pieces[0]


def named_parameters(stage: Path) -> list[str]:
    from library.checkpoints.load_cascade import load_stage
    from library.models.cascade.unet import CascadeUNet

    return [name for name, _ in CascadeUNet(load_stage(stage, "c").config).named_parameters()]


@pytest.fixture(scope="module")
def straight(tiny_cascade, tmp_path_factory):
    """Photographs, a run of four updates on them, and the folder that the original would have left after two."""
    from tests.cascade_runs import command_maker
    from tests.conftest import PHOTOS

    root = tmp_path_factory.mktemp("official")
    (root / "photos" / "1_duck").mkdir(parents=True)
    for path in sorted((PHOTOS / "duck").glob("*.jpg"))[:3]:
        shutil.copy(path, root / "photos" / "1_duck")
    command = command_maker(tiny_cascade, root / "photos")
    saving = ("--save_state", "--save_every_n_steps=2")
    assert train_stage_c(*command(root / "straight", *MORE, *saving, max_train_steps=None)) == 0
    state, folder = root / "straight" / "duck-step00000002-state", root / "folder"
    folder.mkdir()
    save_file(packed(load_file(state / "model.safetensors")), folder / "generator.safetensors")
    averages = {name.removeprefix("unet."): tensor for name, tensor in load_file(state / "ema.safetensors").items()}
    save_file(packed(averages), folder / "generator_ema.safetensors")
    numbered = torch.load(state / OPTIMIZER, weights_only=True)
    by_name = packed(dict(zip(named_parameters(tiny_cascade.stage_c), numbered["state"].values(), strict=True)))
    group = {**numbered["param_groups"][0], "params": list(range(len(by_name)))}
    torch.save({"state": dict(enumerate(by_name.values())), "param_groups": [group]}, folder / "generator_optim.pt")
    torch.save(
        {"state": by_name, "param_groups": [{**group, "params": list(by_name)}]}, root / "fsdp_generator_optim.pt"
    )
    losses = torch.load(state / "objective.bin", weights_only=True)["bucket_losses"].tolist()
    ranges = torch.linspace(-10, 10, 299).tolist()
    adaptive = {"bucket_ranges": ranges, "bucket_losses": losses}
    about = {"wandb_run_id": None, "total_steps": 2, "iter": 2, "ema_loss": 0.9, "adaptive_loss": adaptive}
    (folder / "info.json").write_text(json.dumps({**about, "train_tokens": None}))
    return root, folder, command


def test_it_goes_on_where_it_was(straight, tmp_path, capfd):
    root, folder, command = straight
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    assert train_stage_c(*command(out, *MORE, "--resume=auto", max_train_steps=None)) == 0
    assert "a run of the original trainer" in capfd.readouterr().err
    for name in FINALS:
        assert tensor_digest(out / name) == tensor_digest(root / "straight" / name), name


def test_optimizers_that_were_shared_between_gpus_know_names(straight, tmp_path):
    root, folder, _ = straight
    shutil.copytree(folder, tmp_path / "run")
    shutil.copy(root / "fsdp_generator_optim.pt", tmp_path / "run" / "generator_optim.pt")
    left, right = (verify_state(path).opened().pickle(OPTIMIZER) for path in (folder, tmp_path / "run"))
    assert left["state"].keys() == right["state"].keys() == set(range(len(left["param_groups"][0]["params"])))
    for number, values in left["state"].items():
        assert all(torch.equal(value, right["state"][number][name]) for name, value in values.items())


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit(77)",))


def spoilt(folder: Path, how: str) -> None:
    info = json.loads((folder / "info.json").read_text())
    optimizer = folder / "generator_optim.pt"
    if how == "lora":
        (folder / "generator.safetensors").rename(folder / "lora.safetensors")
    elif how == "no count":
        (folder / "info.json").write_text(json.dumps({**info, "total_steps": "many"}))
    elif how == "no optimizer":
        optimizer.unlink()
    elif how == "another optimizer":
        state = torch.load(optimizer, weights_only=True)
        state["param_groups"][0]["params"].pop()
        torch.save(state, optimizer)
    elif how == "other noise":
        info["adaptive_loss"]["bucket_ranges"][0] = -20.0
        (folder / "info.json").write_text(json.dumps(info))
    else:
        torch.save({"state": {0: Hostile()}, "param_groups": []}, optimizer)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("lora", "convert_stable_cascade_lora.py"),
        ("no count", "total_steps"),
        ("no optimizer", "has no generator_optim.pt"),
        ("another optimizer", "parameters, the model has"),
        ("other noise", "other levels of noise"),
        ("hostile", "exec"),
    ],
)
def test_what_does_not_fit_is_named(straight, tmp_path, how, expected):
    shutil.copytree(straight[1], tmp_path / "run")
    spoilt(tmp_path / "run", how)
    with pytest.raises(UserError, match=re.escape(expected)):
        content = verify_state(tmp_path / "run").opened()
        content.pickle("objective.bin")
        content.pickle(OPTIMIZER)


def test_what_cannot_go_on_does_not_stop_a_new_run(straight, tmp_path, caplog):
    shutil.copytree(straight[1], tmp_path / "run")
    spoilt(tmp_path / "run", "lora")
    assert find_state("auto", tmp_path / "run", "duck") is None
    assert "cannot be continued exactly" in caplog.text


def test_other_trainings_are_refused(straight, tmp_path, capfd):
    _, folder, command = straight
    optimizer = ("--optimizer_type=Adafactor", "--lr_scheduler=constant", "--optimizer_args", "relative_step=False")
    assert train_stage_c(*command(tmp_path, f"--resume={folder}", *optimizer, max_train_steps=4)) == 2
    assert "is of AdamW, and this run trains with Adafactor" in capfd.readouterr().err
    assert train_stage_b(*command(tmp_path, f"--resume={folder}", stage="b", max_train_steps=4)) == 2
    assert "is a state of another model" in capfd.readouterr().err
