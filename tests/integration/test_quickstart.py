"""quickstart.py, as a newcomer types it: without arguments, and with a model and pictures of one's own."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

import quickstart
from tests.conftest import PHOTOS


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as end:
        quickstart.main([str(item) for item in argv])
    return int(end.value.code or 0)


def test_it_makes_a_model_pictures_and_curves_and_says_where(tmp_path, capfd):
    out = tmp_path / "out"
    assert run("--output", out, "--steps", 2, "--resolution", 64) == 0
    assert (out / "quickstart.safetensors").exists()
    pictures = sorted((out / "sample").glob("*.png"))
    assert len(pictures) == 8 and Image.open(pictures[0]).size == (64, 64)
    assert list(out.glob("logs/*/dreambooth/events*"))
    said = capfd.readouterr().out
    assert str(out / "quickstart.safetensors") in said and "--images my_photos" in said


def test_it_trains_a_model_and_pictures_of_ones_own(tiny_sd2_v, tmp_path, capfd):
    """The kind of model (2.x, velocity) is found out from the file."""
    pictures = tmp_path / "my pictures"
    pictures.mkdir()
    for path in sorted((PHOTOS / "robot").glob("*.jpg"))[:2]:
        shutil.copy(path, pictures / path.name)
    own = ("--model", tiny_sd2_v, "--images", pictures, "--prompt", 'sks "robot"')
    assert run(*own, "--steps", 1, "--resolution", 64, "--output", tmp_path / "out") == 0, capfd.readouterr().err
    assert (tmp_path / "out" / "quickstart.safetensors").exists()


def test_half_of_what_it_needs_is_an_error(tmp_path, capfd):
    assert run("--model", "x.safetensors") == 2
    assert "--images" in capfd.readouterr().err
