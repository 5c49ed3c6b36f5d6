"""Names of generated pictures: where they go, and that nothing is overwritten."""

from pathlib import Path

import pytest
from PIL import Image

from library.inference.options import PictureFileOptions
from library.inference.outputs import PictureFolder, safe_name
from library.inference.prompts import PromptRequest

IMAGE = Image.new("RGB", (8, 8))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", "cat"),
        ("cat.png", "cat"),
        ("cat.JPG", "cat"),
        ("v1.5 cat", "v1.5 cat"),
        ("../../etc/cat.png", "etc/cat"),
        ("/etc/passwd", "etc/passwd"),
        ("C:\\cat", "C_/cat"),
        ("..", "picture"),
        ("a\x00b\n", "a_b_"),
        ("x" * 400, "x" * 200),
    ],
)
def test_safe_names(name, expected):
    assert safe_name(name) == expected


def test_numbers_go_on_behind_what_is_there(tmp_path):
    for name in ("im_000007.png", "im_1000009.png", "im_20240101000000_000_5.png", "other.png"):
        (tmp_path / name).touch()
    folder = PictureFolder(PictureFileOptions(outdir=str(tmp_path), sequential_file_name=True), {})
    request = PromptRequest(prompt="a", seed=1)
    names = [folder.write(IMAGE, request, stage=stage).name for stage in ("", "0", "1", "")]
    assert names == ["im_000010.png", "im_0000011.png", "im_1000011.png", "im_000012.png"]
    assert [path.name for path in folder.written] == names


def test_the_picture_it_was_made_from_gives_its_name(tmp_path):
    folder = PictureFolder(PictureFileOptions(outdir=str(tmp_path), use_original_file_name=True), {})
    request = PromptRequest(prompt="a", seed=1)
    origin = Path("photos") / "v1.jpeg.png"
    assert [folder.write(IMAGE, request, origin=origin).name for _ in range(2)] == ["v1.jpeg.png", "v1.jpeg_1.png"]
    assert folder.write(IMAGE, PromptRequest(prompt="a", seed=1, file_name="b"), origin=origin).name == "b.png"
