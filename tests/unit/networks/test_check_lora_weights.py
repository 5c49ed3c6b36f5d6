"""networks/check_lora_weights.py: a line per tensor, and an exit status that tells whether the file can be used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_helpers import run
from safetensors.torch import save_file

from networks import check_lora_weights

ROOT = Path(__file__).resolve().parents[3]
NAME = "lora_unet_mid_block_attentions_0_proj_in"


def tensors_of():
    return {
        f"{NAME}.lora_down.weight": torch.tensor([[1.0, -2.0, 0.5]]),
        f"{NAME}.lora_up.weight": torch.tensor([[4.0], [-0.25]], dtype=torch.bfloat16),
        f"{NAME}.alpha": torch.tensor(1.0),
    }


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(tensors_of(), path)
    return path


def test_mean_least_and_most_of_the_absolute_values(path, capsys):
    assert run(check_lora_weights, path) == 0
    out = capsys.readouterr().out
    assert out.startswith("number of LoRA modules: 1 ")
    assert f"{NAME}.lora_down.weight, 1-3, 1.16667, 0.5, 2\n" in out
    assert f"{NAME}.lora_up.weight, 2-1, 2.125, 0.25, 4\n" in out
    assert ".alpha" not in out


@pytest.mark.parametrize("option", ["-s", "--show_all_keys"])
def test_all_keys_when_asked(path, capsys, option):
    assert run(check_lora_weights, option, path) == 0
    assert f"{NAME}.alpha, , 1, 1, 1\n" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["lora_up.weight", "alpha"])
def test_nan_is_flagged_after_the_whole_listing(path, capsys, key):
    tensors = tensors_of()
    tensors[f"{NAME}.{key}"].view(-1)[0] = float("nan")
    save_file(tensors, path)
    assert run(check_lora_weights, path) == 2
    captured = capsys.readouterr()
    assert "1 values are NaN" in captured.out
    assert f"{NAME}.lora_down.weight" in captured.out
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert f"{NAME}.{key}" in line


def test_unknown_keys_are_listed(path, capsys):
    save_file({**tensors_of(), "mystery.key": torch.ones(1)}, path)
    assert run(check_lora_weights, path) == 0
    assert "keys that nobody understands: mystery.key" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"junk" * 10, None])
def test_files_that_are_no_lora(tmp_path, capsys, content):
    path = tmp_path / "x.safetensors"
    if content is None:
        save_file({"some.weight": torch.ones(2)}, path)
    else:
        path.write_bytes(content)
    assert run(check_lora_weights, path) == 2
    assert "x.safetensors" in capsys.readouterr().err


def test_a_reader_that_stops_is_no_error(path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "networks.check_lora_weights", path, "-s"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
