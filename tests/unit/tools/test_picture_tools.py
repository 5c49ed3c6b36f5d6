"""Resizing, edges and faces: sizes, names, what is cut out, and bad pictures that do not stop the others."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from library.data.augment import face_in_name
from tests.support import run_tool
from tools import canny, detect_face_rotate, resize_images_to_resolution
from tools.face_parts import Cut, Face, upright


def save(path: Path, size_wh: tuple[int, int], color=(200, 30, 60), **more) -> Path:
    Image.new("RGB", size_wh, color).save(path, **more)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    return source


def resize(*argv) -> int:
    return run_tool(resize_images_to_resolution.main, *argv, "--max_data_loader_n_workers=0")


def sizes(target: Path) -> dict[str, tuple[int, int]]:
    return {path.name: Image.open(path).size for path in target.iterdir() if path.suffix in (".jpg", ".png")}


def test_pictures_keep_their_shape_and_get_the_area(folder, tmp_path):
    save(folder / "wide.PNG", (1200, 400))
    save(folder / "small.jpg", (100, 60))
    assert resize(folder, tmp_path / "out", "--max_resolution=512x512,128x128") == 0
    assert sizes(tmp_path / "out") == {
        "wide+512x512.jpg": (886, 295),
        "wide+128x128.jpg": (221, 73),
        "small+512x512.jpg": (100, 60),
        "small+128x128.jpg": (100, 60),
    }


def test_sides_are_cut_to_multiples_in_the_middle(folder, tmp_path):
    pixels = np.zeros((70, 100, 3), np.uint8)
    pixels[3:67, 2:98] = 255
    Image.fromarray(pixels).save(folder / "a.png")
    assert resize(folder, tmp_path / "out", "--divisible_by=32", "--save_as_png", "--max_resolution=512x512") == 0
    made = np.asarray(Image.open(tmp_path / "out" / "a+512x512.png"))
    assert made.shape == (64, 96, 3)
    assert made.min() == 255


def test_captions_go_with_every_result_and_other_files_are_copied(folder, tmp_path):
    save(folder / "a.jpg", (64, 64))
    (folder / "a.txt").write_text("a duck", encoding="utf-8")
    (folder / "notes.md").write_text("notes", encoding="utf-8")
    assert resize(folder, tmp_path / "out", "--max_resolution=32x32,16x16", "--copy_associated_files") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"a+32x32.jpg", "a+32x32.txt", "a+16x16.jpg", "a+16x16.txt", "notes.md"}
    assert (tmp_path / "out" / "a+16x16.txt").read_text(encoding="utf-8") == "a duck"


def test_transparency_and_orientation_are_kept(folder, tmp_path):
    Image.new("RGBA", (40, 40), (10, 20, 30, 128)).save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder / "turned.jpg", (40, 20), exif=exif)
    assert resize(folder, tmp_path / "out", "--max_resolution=20x20", "--save_as_png") == 0
    clear = Image.open(tmp_path / "out" / "clear+20x20.png")
    assert (clear.mode, clear.getpixel((5, 5))) == ("RGBA", (10, 20, 30, 128))
    assert Image.open(tmp_path / "out" / "turned+20x20.png").size == (14, 28)


def test_bad_pictures_are_named_and_the_others_are_made(folder, tmp_path, caplog):
    save(folder / "good.jpg", (64, 64))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    assert resize(folder, tmp_path / "out", "--max_resolution=32x32") == 0
    assert "broken.jpg" in caplog.text
    assert set(sizes(tmp_path / "out")) == {"good+32x32.jpg"}
    (folder / "good.jpg").unlink()
    assert resize(folder, tmp_path / "out", "--max_resolution=32x32") == 2


def test_existing_results_are_left_out_on_request(folder, tmp_path):
    save(folder / "a.jpg", (64, 64))
    options = (folder, tmp_path / "out", "--max_resolution=32x32")
    assert resize(*options) == 0
    (tmp_path / "out" / "a+32x32.jpg").write_bytes(b"mine")
    assert resize(*options, "--skip_existing") == 0
    assert (tmp_path / "out" / "a+32x32.jpg").read_bytes() == b"mine"
    assert resize(*options) == 0
    assert sizes(tmp_path / "out")["a+32x32.jpg"] == (32, 32)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{source}", "{source}"], "dst_img_folder"),
        (["{source}", "{out}", "--max_resolution=512"], "--max_resolution"),
        (["{source}", "{out}", "--max_resolution=0x5"], "--max_resolution"),
        (["{nowhere}", "{out}"], "nowhere"),
    ],
)
def test_wrong_options_are_named(folder, tmp_path, capsys, argv, words):
    names = {"source": folder, "out": tmp_path / "out", "nowhere": tmp_path / "nowhere"}
    assert resize(*(word.format(**names) for word in argv)) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_edges_are_those_of_opencv(folder, tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[10:30, 10:30] = (40, 200, 90)
    Image.fromarray(pixels).save(folder / "square.png")
    options = ("--thres1=50", "--thres2=150", "--max_data_loader_n_workers=0")
    assert run_tool(canny.main, f"--input={folder}", f"--output={tmp_path / 'edges'}", *options) == 0
    edges = np.asarray(Image.open(tmp_path / "edges" / "square.png"))
    assert edges.ndim == 2
    assert np.array_equal(edges, cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 50, 150))
    one = tmp_path / "one.png"
    assert run_tool(canny.main, f"--input={folder / 'square.png'}", f"--output={one}", *options) == 0
    assert np.array_equal(np.asarray(Image.open(one)), edges)


# Faces

SIDE = 64


def yunet(path: Path, faces: list[tuple[float, float, float, float]]) -> Path:
    """Write a model of YuNet's structure that finds given faces (x, y, side, degrees) in every picture of 64x64.

    Its outputs are what the anchors of strides 8, 16 and 32 say: a class, an objectness, a box and five points each.
    """
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2, 3], keepdims=0)]
    nodes.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    weights = [numpy_helper.from_array(np.zeros(1, np.float32), "zero")]
    outputs = []
    for stride in (8, 16, 32):
        cells = (SIDE // stride) ** 2
        tables = {
            name: np.zeros((1, cells, n), np.float32) for name, n in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10))
        }
        if stride == 8:
            for x, y, side, degrees in faces:
                column, row = int(x // stride), int(y // stride)
                cell = row * (SIDE // stride) + column
                tables["cls"][0, cell] = tables["obj"][0, cell] = 0.99
                log_side = math.log(side / stride)
                tables["bbox"][0, cell] = (x / stride - column, y / stride - row, log_side, log_side)
                across, down = (side / 4 * turn(math.radians(degrees)) for turn in (math.cos, math.sin))
                eyes = ((x - across) / stride - column, (y - down) / stride - row)
                other = ((x + across) / stride - column, (y + down) / stride - row)
                tables["kps"][0, cell] = (*eyes, *other, 0, 0, 0, 0, 0, 0)
        for name, table in tables.items():
            full = f"{name}_{stride}"
            weights.append(numpy_helper.from_array(table, f"{full}_values"))
            nodes.append(helper.make_node("Add", [f"{full}_values", "nothing"], [full]))
            outputs.append(helper.make_tensor_value_info(full, TensorProto.FLOAT, table.shape))
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, (1, 3, SIDE, SIDE))
    graph = helper.make_graph(nodes, "faces", [picture], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8), path)
    return path


def cut_faces(folder: Path, out: Path, model: Path, *more: str) -> int:
    options = (f"--src_dir={folder}", f"--dst_dir={out}", f"--model={model}", "--max_data_loader_n_workers=0")
    return run_tool(detect_face_rotate.main, *options, *more)


def test_the_largest_face_gives_the_name(folder, tmp_path):
    save(folder / "a.png", (SIDE, SIDE))
    model = yunet(tmp_path / "m.onnx", [(20, 20, 10, 0), (44, 40, 24, 0)])
    assert cut_faces(folder, tmp_path / "one", model) == 0
    (made,) = (tmp_path / "one").iterdir()
    assert made.name == "a_0044_0040_0024_0024.png"
    assert face_in_name(made.name) == (44, 40, 24, 24)
    assert cut_faces(folder, tmp_path / "all", model, "--multiple_faces") == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        "a_01_0044_0040_0024_0024.png",
        "a_02_0020_0020_0010_0010.png",
    ]
    assert cut_faces(folder, tmp_path / "one", tmp_path / "m.onnx", "--skip_existing", "--debug") == 0
    assert Image.open(made).getpixel((32, 28)) == (200, 30, 60)


@pytest.mark.parametrize(
    ("more", "size", "face"),
    [
        (["--crop_size=32,48"], (32, 48), (16, 24, 16, 16)),
        (["--crop_size=32,32", "--resize_fit"], (32, 32), (16, 16, 8, 8)),
        (["--crop_size=128,96"], (128, 96), (64, 48, 32, 32)),
        (["--resize_face_size=32"], (128, 128), (64, 64, 32, 32)),
        (["--resize_face_size=32", "--crop_size=64,64"], (64, 64), (32, 32, 32, 32)),
        (["--crop_ratio=3,2"], (48, 32), (24, 16, 16, 16)),
        (["--crop_ratio=3,2", "--max_size=24"], (24, 16), (12, 8, 8, 8)),
    ],
)
def test_cuts_have_their_size_with_the_face_in_the_middle(folder, tmp_path, more, size, face):
    save(folder / "a.png", (SIDE, SIDE))
    assert cut_faces(folder, tmp_path / "out", yunet(tmp_path / "m.onnx", [(32, 32, 16, 0)]), *more) == 0
    (made,) = (tmp_path / "out").iterdir()
    assert Image.open(made).size == size
    assert face_in_name(made.name) == face


def test_heads_are_turned_upright():
    """A line through both eyes, drawn into the picture, is level afterwards, whichever way the head leaned."""
    for degrees in (-30.0, 25.0):
        pixels = np.zeros((101, 101, 3), np.uint8)
        turn = math.radians(degrees)
        ends = [(round(50 + side * 30 * math.cos(turn)), round(50 + side * 30 * math.sin(turn))) for side in (-1, 1)]
        cv2.line(pixels, ends[0], ends[1], (255, 255, 255), 3)
        face = Face((50, 50), (60, 60), (ends[0], ends[1]), 1.0)
        turned = upright(pixels, face)
        rows = np.nonzero(turned[:, 20:80, 0].max(axis=1) > 128)[0]
        assert rows.min() >= 47 and rows.max() <= 53


def test_small_pictures_are_not_cut_beyond_their_edges():
    cut = Cut(np.zeros((20, 30, 3), np.uint8), (2.0, 18.0), (8.0, 8.0)).cropped(16, 64)
    assert cut.pixels.shape == (20, 16, 3)
    assert cut.center == (2.0, 18.0)


def test_pictures_without_a_face_are_named(folder, tmp_path, caplog, capsys):
    save(folder / "a.png", (SIDE, SIDE))
    save(folder / "large.png", (SIDE, SIDE))
    assert cut_faces(folder, tmp_path / "out", yunet(tmp_path / "none.onnx", [])) == 2
    assert "no face found" in capsys.readouterr().err
    model = yunet(tmp_path / "m.onnx", [(32, 32, 16, 0)])
    assert cut_faces(folder, tmp_path / "out", model, "--crop_ratio=2,2", "--min_size=40") == 2
    assert "--min_size 40" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model=nowhere.onnx"], "not found"),
        (["--resize_fit"], "--resize_fit"),
        (["--crop_size=5"], "--crop_size"),
        (["--crop_ratio=0,1"], "--crop_ratio"),
        (["--crop_ratio=2,2", "--resize_face_size=9"], "cannot be combined"),
    ],
)
def test_wrong_options_of_faces_are_named(folder, tmp_path, capsys, more, words):
    save(folder / "a.png", (SIDE, SIDE))
    (tmp_path / "m.onnx").write_bytes(b"no model")
    assert cut_faces(folder, tmp_path / "out", tmp_path / "m.onnx", *more) == 2
    assert words in capsys.readouterr().err
    assert cut_faces(folder, tmp_path / "out", tmp_path / "m.onnx") == 2
    assert "no face detector" in capsys.readouterr().err
