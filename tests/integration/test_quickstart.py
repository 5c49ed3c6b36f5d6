"""quickstart.py, as a newcomer types it: without arguments, with a model and pictures, and for other methods."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

import quickstart
from library.checkpoints.embedding_file import read_embedding
from library.checkpoints.lora_file import inspect_lora
from tests.conftest import PHOTOS


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as end:
        quickstart.main([str(item) for item in argv])
    return int(end.value.code or 0)


@pytest.fixture
def own_pictures(tmp_path):
    pictures = tmp_path / "my pictures"
    pictures.mkdir()
    for path in sorted((PHOTOS / "robot").glob("*.jpg"))[:2]:
        shutil.copy(path, pictures / path.name)
    return pictures


def test_it_makes_a_lora_pictures_and_curves_and_says_how_to_use_them(tmp_path, capfd):
    out = tmp_path / "out"
    assert run("--output", out, "--steps", 2, "--resolution", 64) == 0
    made = inspect_lora(out / "quickstart.safetensors")
    assert made.base == "sd1" and set(made.ranks) == {16} and not made.has_text_encoder
    pictures = sorted((out / "sample").glob("*.png"))
    assert len(pictures) == 8 and Image.open(pictures[0]).size == (64, 64)
    assert list(out.glob("logs/*/network_train/events*"))
    said = capfd.readouterr().out
    assert str(out / "quickstart.safetensors") in said and "--images my_photos" in said
    assert f'load_lora_weights("{out.as_posix()}", weight_name="quickstart.safetensors")' in said
    assert "models/loras" in said and "<lora:quickstart:1>" in said


def test_it_trains_on_a_model_and_pictures_of_ones_own(tiny_sd2_v, own_pictures, tmp_path, capfd):
    """The kind of model (2.x, velocity) is found out from the file."""
    own = ("--model", tiny_sd2_v, "--images", own_pictures, "--prompt", 'sks "robot"')
    assert run(*own, "--steps", 1, "--resolution", 64, "--output", tmp_path / "out") == 0, capfd.readouterr().err
    assert inspect_lora(tmp_path / "out" / "quickstart.safetensors").base == "sd2"
    assert f'from_single_file("{tiny_sd2_v.as_posix()}")' in capfd.readouterr().out


def test_it_trains_a_whole_model_when_asked(tiny_sd1, own_pictures, tmp_path, capfd):
    own = ("--model", tiny_sd1, "--images", own_pictures, "--prompt", "sks robot", "--method", "dreambooth")
    out = tmp_path / "out"
    assert run(*own, "--steps", 1, "--resolution", 64, "--output", out) == 0, capfd.readouterr().err
    assert (out / "quickstart.safetensors").stat().st_size > 0.9 * tiny_sd1.stat().st_size
    said = capfd.readouterr().out
    assert "models/checkpoints" in said and "load_lora_weights" not in said


def test_it_teaches_a_word_when_asked(tiny_sd1, own_pictures, tmp_path, capfd):
    own = ("--model", tiny_sd1, "--images", own_pictures, "--prompt", "zbot robot", "--method", "textual_inversion")
    out = tmp_path / "out"
    assert run(*own, "--steps", 1, "--resolution", 64, "--output", out) == 0, capfd.readouterr().err
    assert read_embedding(out / "quickstart.safetensors").rows["clip_l"].shape == (4, 64)
    said = capfd.readouterr().out
    assert "load_textual_inversion" in said and 'token="zbot"' in said and "models/embeddings" in said
    assert run("--method", "textual_inversion", "--steps", 1, "--resolution", 64, "--output", out) == 0
    assert run(*own[:-4], "--prompt", "zbot", *own[-2:]) == 2
    assert "--prompt" in capfd.readouterr().err


def test_half_of_what_it_needs_is_an_error(tmp_path, capfd):
    assert run("--model", "x.safetensors") == 2
    assert "--images" in capfd.readouterr().err


def test_a_folder_of_folders_is_an_error(own_pictures, tmp_path, capfd):
    assert run("--model", "x.safetensors", "--images", own_pictures.parent, "--prompt", "sks robot") == 2
    assert "folder that holds the pictures" in capfd.readouterr().err
