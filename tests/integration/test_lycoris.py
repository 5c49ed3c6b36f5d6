"""LyCORIS plugs in: its networks train, save under names that loaders know, load again, and show in sample pictures."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from library.checkpoints.lora_file import read_lora
from tests.compat.test_saved_folders import LIBRARIES, ROOT
from tests.support import train_network

pytest.importorskip("lycoris")

ALGORITHMS = {
    "locon": {"lora_down.weight", "lora_up.weight", "alpha"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    "lokr": {"lokr_w1", "lokr_w2", "alpha"},
    "diag-oft": {"oft_blocks", "alpha"},
    "boft": {"oft_blocks", "alpha"},
    "dylora": {"lora_down.weight", "lora_up.weight", "alpha"},
    "glora": {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"},
}
"""Algorithm -> suffixes of the tensors of a linear layer of the U-Net."""

TEXT_LAYERS = {
    f"lora_te_text_model_encoder_layers_{number}_{layer}"
    for number in (0, 1)
    for layer in (*(f"self_attn_{side}_proj" for side in ("q", "k", "v", "out")), "mlp_fc1", "mlp_fc2")
}
SOME_LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def train(tiny_sd1, photo_folders, tmp_path):
    """Train with an algorithm; returns the output folder."""

    def run(algo: str, *argv: str):
        out = tmp_path / algo
        options = {
            "pretrained_model_name_or_path": tiny_sd1,
            "train_data_dir": photo_folders,
            "output_dir": out,
            "output_name": "duck",
            "resolution": 64,
            "learning_rate": 1e-2,
            "max_train_steps": 2,
            "max_data_loader_n_workers": 0,
            "seed": 7,
            "network_module": "lycoris.kohya",
            "network_dim": 4,
        }
        arguments = ("--network_args", f"algo={algo}", "block_size=2")
        assert train_network(*(f"--{name}={value}" for name, value in options.items()), *arguments, *argv) == 0
        return out

    return run


def modules_of(path) -> dict[str, set[str]]:
    """Module name -> suffixes of its tensors."""
    found: dict[str, set[str]] = {}
    for key in load_file(path):
        name, _, suffix = key.partition(".")
        found.setdefault(name, set()).add(suffix)
    return found


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_trains_saves_and_draws(train, tmp_path, algo):
    (tmp_path / "prompts.txt").write_text("a duck --w 64 --h 64 --s 1\n")
    out = train(algo, f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=2", "--sample_at_first")
    first, last = sorted(out.glob("sample/*.png"), key=lambda path: path.name)
    assert first.read_bytes() != last.read_bytes()
    saved = out / "duck.safetensors"
    modules = modules_of(saved)
    assert {name for name in modules if name.startswith("lora_te")} == TEXT_LAYERS
    assert modules[SOME_LAYER] == ALGORITHMS[algo]
    file = read_lora(saved)
    assert not file.unknown and file.base == "sd1" and file.modules.keys() == modules.keys()
    assert file.places[SOME_LAYER] == ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")


def test_a_network_starts_from_the_file_of_another(train):
    """Without an update to speak of the new file is the old one."""
    first = train("loha") / "duck.safetensors"
    again = train("loha", f"--network_weights={first}", "--learning_rate=1e-12", "--output_name=again")
    before, after = load_file(first), load_file(again / "again.safetensors")
    assert all(torch.allclose(value, after[name], atol=1e-6) for name, value in before.items())
    before = {name for name, value in before.items() if name.endswith("hada_w1_b") and not value.any()}
    assert not before


def test_names_are_the_same_with_the_oldest_libraries():
    oldest = LIBRARIES["oldest"]
    if not oldest.is_dir():
        pytest.skip(f"the oldest supported libraries are not at {oldest} (SD_LOWSET names their folder)")
    test = "tests/integration/test_lycoris.py::test_every_algorithm_trains_saves_and_draws[locon]"
    environment = {**os.environ, "PYTHONPATH": str(oldest)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", test]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
