"""What PNG files tell about their making, in this toolkit's own chunks and in the text of web interfaces."""

import io

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.errors import UserError
from library.inference.png_info import parameters_text, png_bytes, read_prompt, split_parameters
from library.inference.prompts import PromptRequest

REQUEST = PromptRequest(
    prompt="a cat, (red:1.2)", negative_prompt="blurry: much", seed=7, steps=20, scale=7.0, sampler="k_euler_a"
)


@pytest.fixture
def image():
    return Image.new("RGB", (16, 8))


def test_written_and_read_back(image, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(image, REQUEST, facts={"Model": "my, model", "Clip skip": None}))
    assert read_prompt(path) == ("a cat, (red:1.2)", "blurry: much")
    texts = Image.open(path).text
    assert {key: texts[key] for key in ("seed", "steps", "scale", "sampler")} == {
        "seed": "7",
        "steps": "20",
        "scale": "7.0",
        "sampler": "k_euler_a",
    }
    assert "raw-prompt" not in texts
    assert split_parameters(texts["parameters"]) == read_prompt(path)
    assert texts["parameters"].splitlines()[-1] == (
        'Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 7, Size: 16x8, Model: "my, model"'
    )


def test_umlauts_survive(image, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_bytes(image, PromptRequest(prompt="ein Bär 熊 🐻", seed=1)))
    assert read_prompt(path) == ("ein Bär 熊 🐻", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat\non a mat\nNegative prompt: blurry,\nugly\nSteps: 20, Seed: 1", ("a cat on a mat", "blurry, ugly")),
        ("a cat\nSteps: 20, Sampler: Euler a", ("a cat", "")),
        ("Negative prompt: ugly\nSteps: 3", ("", "ugly")),
        ("a cat", ("a cat", "")),
        ("", ("", "")),
    ],
)
def test_text_of_web_interfaces(image, tmp_path, text, expected):
    info = PngInfo()
    info.add_text("parameters", text)
    path = tmp_path / "a.png"
    image.save(path, pnginfo=info)
    assert read_prompt(path) == expected


def test_strength_is_told_where_there_is_one(image):
    assert "Denoising strength: 0.5" in parameters_text(PromptRequest(prompt="a", strength=0.5, seed=1), (8, 8), {})
    assert "Denoising" not in parameters_text(PromptRequest(prompt="a", seed=1), (8, 8), {})


def test_pictures_without_a_prompt_and_files_that_are_none(image, tmp_path):
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "plain.jpg")
    assert read_prompt(tmp_path / "plain.png") is None
    assert read_prompt(tmp_path / "plain.jpg") is None
    bomb = PngInfo()
    bomb.add_text("parameters", "a" * 200_000_000, zip=True)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=bomb)
    for name, content, reason in (
        ("none.png", b"no picture", "not an image"),
        ("bomb.png", buffer.getvalue(), "cannot be opened"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: {reason}"):
            read_prompt(tmp_path / name)
