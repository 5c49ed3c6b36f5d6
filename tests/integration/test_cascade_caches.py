"""Caches of Stable Cascade: what is stored, what is used again, and latents that were prepared with metadata."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest

from finetune import prepare_buckets_latents
from tests.cascade_runs import train_stage_c
from tests.support import run_tool
from tools import stable_cascade_cache_latents, stable_cascade_cache_text_encoder_outputs

FOLDER = "2_sks duck"


@pytest.fixture
def folder(photo_folders):
    return photo_folders / FOLDER


def test_texts_are_kept_in_half_the_size_and_their_mask_counts(cascade_command, folder, tmp_path, caplog):
    command = cascade_command(tmp_path / "out", "--mixed_precision=bf16")
    with caplog.at_level(logging.INFO):
        assert run_tool(stable_cascade_cache_text_encoder_outputs.main, *command, "--no_text_mask") == 0
        first = {path.name: path.read_bytes() for path in folder.glob("*_sc_te_outputs.npz")}
        assert run_tool(stable_cascade_cache_text_encoder_outputs.main, *command) == 0
        assert "5 to encode (5 other settings of captions)" in caplog.text
        caplog.clear()
        assert run_tool(stable_cascade_cache_text_encoder_outputs.main, *command, "--skip_existing") == 0
        assert "5 reused, 0 to encode" in caplog.text
    assert len(first) == 3
    for path in folder.glob("*_sc_te_outputs.npz"):
        assert path.read_bytes() != first[path.name]
        with np.load(path) as arrays:
            assert arrays["hidden_state1"].dtype == arrays["pool2"].dtype == np.float16
            assert arrays["hidden_state1"].shape[0] == 77 and arrays["pool2"].ndim == 1


def test_files_of_sd_scripts_are_taken_and_doubted(cascade_command, folder, tmp_path, caplog):
    """Their arrays have no size in their names, and nothing tells what made them."""
    command = cascade_command(tmp_path / "out", "--flip_aug", max_train_steps=1)
    assert run_tool(stable_cascade_cache_latents.main, *command) == 0
    before = {}
    for path in folder.glob("*_sc_latents.npz"):
        with np.load(path) as arrays:
            plain = {name.rpartition("_")[0]: arrays[name] for name in arrays.files if name != "meta_json"}
        assert plain["latents"].shape == plain["latents_flipped"].shape and plain["latents"].shape[0] == 16
        np.savez(path, **plain)
        before[path] = path.read_bytes()
    caplog.clear()
    caches = ("--cache_latents", "--cache_latents_to_disk")
    with caplog.at_level(logging.INFO):
        assert train_stage_c(*command, *caches, f"--train_data_dir={folder.parent}") == 0
    assert "3 files of cached latents tell no origin: sd-scripts wrote wrong latents" in caplog.text
    assert all(path.read_bytes() == data for path, data in before.items())


def test_prepared_metadata_train_stage_c_without_the_pictures(tiny_cascade, folder, cascade_command, tmp_path):
    names = sorted(path.stem for path in folder.glob("*.jpg"))
    metadata = tmp_path / "meta.json"
    metadata.write_text(json.dumps({name: {"caption": "a duck"} for name in names}))
    sizes = ("--max_resolution=128,128", "--min_bucket_reso=64", "--max_bucket_reso=256", "--bucket_reso_steps=32")
    argv = (folder, metadata, metadata, tiny_cascade.effnet, "--stable_cascade", *sizes)
    assert run_tool(prepare_buckets_latents.main, *argv) == 0
    prepared = json.loads(metadata.read_text())
    for name in names:
        width, height = prepared[name]["train_resolution"]
        with np.load(folder / f"{name}_sc_latents.npz") as arrays:
            assert arrays[f"latents_{height // 32}x{width // 32}"].shape == (16, height // 32, width // 32)
    for name in names:
        (folder / f"{name}.jpg").unlink()
    shutil.rmtree(folder.parent / "1_sks bear")
    command = cascade_command(tmp_path / "out", train_data_dir=folder, in_json=metadata, resolution=128)
    assert train_stage_c(*command) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--v2",), "--v2: belongs to Stable Diffusion"),
        (("--bucket_reso_steps=48",), "multiple of 32"),
    ],
)
def test_preparing_refuses_what_does_not_fit(tiny_cascade, folder, tmp_path, capsys, more, message):
    metadata = tmp_path / "meta.json"
    metadata.write_text("{}")
    argv = (folder, metadata, metadata, tiny_cascade.effnet, "--stable_cascade", *more)
    assert run_tool(prepare_buckets_latents.main, *argv) == 2
    assert message in capsys.readouterr().err


def test_preparing_refuses_another_model(tiny_cascade, folder, tmp_path, capsys):
    metadata = tmp_path / "meta.json"
    metadata.write_text("{}")
    argv = (folder, metadata, metadata, tiny_cascade.stage_c, "--stable_cascade")
    assert run_tool(prepare_buckets_latents.main, *argv) == 2
    assert "stage C" in capsys.readouterr().err
