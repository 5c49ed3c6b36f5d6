"""Bad files in data sets: every one is named with a reason and a cure before training, or skipped and counted."""

import hashlib
import os
import struct
from pathlib import Path

import pytest
from PIL import Image

from library.data.dataset_config import load_dataset_specs
from library.data.options import DatasetOptions, SubsetOptions
from library.data.scan import ScanContext, scan_datasets
from library.errors import UserError


def scan(folder, context=None, **options):
    options = {"resolution": "64", "train_data_dir": str(folder), **options}
    data = DatasetOptions(**options)
    subset = SubsetOptions(caption_extension=".txt")
    specs = load_dataset_specs(data, subset, kinds=("dreambooth",), bucket_step_multiple=64)
    return scan_datasets(specs, data, context or ScanContext())


def good(path, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 60)).save(path)
    return path


def png_that_claims(width, height):
    ihdr = struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + ihdr + b"\0" * 4 + b"\0\0\0\0IDAT"


def write(content):
    return lambda path: path.write_bytes(content)


def noise(size):
    return Image.frombytes("RGB", size, os.urandom(size[0] * size[1] * 3))


def truncated(path):
    noise((64, 64)).save(path, {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[path.suffix])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wrong_caption(path):
    good(path)
    path.with_suffix(".txt").write_bytes("青い空のひらがな".encode("cp932"))


def loop(path):
    path.symlink_to(path.name)


BAD = {
    "empty": ("x.png", write(b""), "empty file"),
    "html": ("x.png", write(b"<!DOCTYPE html><html></html>"), "looks like HTML"),
    "lfs": ("x.jpg", write(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "text": ("x.jpg", write(b"hello, this is no picture"), "not an image"),
    "postscript": ("x.png", write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "PostScript"),
    "pdf": ("x.png", write(b"%PDF-1.7\n"), "PDF"),
    "cut png": ("x.png", truncated, "x.png"),
    "cut jpeg": ("x.jpg", truncated, "x.jpg"),
    "cut webp": ("x.webp", truncated, "x.webp"),
    "bomb": ("x.png", write(png_that_claims(60_000, 60_000)), "3.6 Gpx, limit 179 Mpx (--max_image_pixels)"),
    "one pixel": ("x.png", lambda path: good(path, (1, 1)), "too small"),
    "line": ("x.png", lambda path: good(path, (5000, 1)), "too small"),
    "folder": ("x.png", lambda path: path.mkdir(), "is a folder"),
    "pipe": ("x.png", os.mkfifo if hasattr(os, "mkfifo") else None, "not a regular file"),
    "dangling": ("x.png", lambda path: path.symlink_to("nowhere"), "leads nowhere"),
    "loop": ("x.png", loop, "x.png"),
    "twin": ("good.jpg", good, "same name as good.JPEG"),
    "caption": ("x.png", wrong_caption, "looks like cp932"),
}


def digest(folder):
    parts = []
    for path in sorted(Path(folder).rglob("*")):
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        parts.append((str(path), hashlib.sha256(content).hexdigest()))
    return parts


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_stops_with_its_name_and_reason(tmp_path, kind):
    name, make, words = BAD[kind]
    if make is None:
        pytest.skip("not on this system")
    good(tmp_path / "1_x" / "good.JPEG")
    make(tmp_path / "1_x" / name)
    before = digest(tmp_path)
    with pytest.raises(UserError) as caught:
        scan(tmp_path)
    problems = [str(problem) for problem in caught.value.problems]
    assert len(problems) == 2, problems
    assert name in problems[0] or "x.txt" in problems[0]
    assert words in problems[0]
    assert "\n" not in problems[0]
    assert "1 of 2 files cannot be used" in problems[1]
    assert "--skip_bad_files" in problems[1]
    assert digest(tmp_path) == before


def test_all_bad_files_are_listed_together_and_in_order(tmp_path):
    good(tmp_path / "1_x" / "good.png")
    for index in range(3):
        (tmp_path / "1_x" / f"bad{index}.png").write_bytes(b"")
    (tmp_path / "2_y").mkdir()
    (tmp_path / "2_y" / "z.png").write_bytes(b"junk\x00")
    with pytest.raises(UserError) as caught:
        scan(tmp_path)
    assert [Path(problem.where).name for problem in caught.value.problems[:-1]] == [
        "bad0.png",
        "bad1.png",
        "bad2.png",
        "z.png",
    ]


def many(tmp_path, count):
    first = good(tmp_path / "1_x" / "0000.png").read_bytes()
    for index in range(1, count):
        (tmp_path / "1_x" / f"{index:04}.png").write_bytes(first)


def test_skipping_goes_on_without_up_to_one_percent(tmp_path, caplog):
    many(tmp_path, 198)
    (tmp_path / "1_x" / "bad.png").write_bytes(b"")
    (tmp_path / "1_x" / "tiny.png").write_bytes(good(tmp_path / "t.png", (2, 2)).read_bytes())
    result = scan(tmp_path, skip_bad_files=True)
    assert len(result.table) == 198
    assert [Path(problem.where).name for problem in result.skipped] == ["bad.png", "tiny.png"]
    assert "2 of 200 files skipped" in caplog.text
    assert "bad.png: empty file" in caplog.text
    (tmp_path / "1_x" / "bad2.png").write_bytes(b"")
    with pytest.raises(UserError, match="more than 1 %"):
        scan(tmp_path, skip_bad_files=True)


def test_long_lists_are_capped_and_written_out(tmp_path):
    good(tmp_path / "in" / "1_x" / "good.png")
    for index in range(30):
        (tmp_path / "in" / "1_x" / f"bad{index:02}.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        scan(tmp_path / "in", ScanContext(report_dir=str(tmp_path / "out")))
    assert len(caught.value.problems) == 21
    report = tmp_path / "out" / "bad_files.txt"
    assert str(report) in str(caught.value)
    assert len(report.read_text(encoding="utf-8").splitlines()) == 30


def test_small_images_are_refused_when_nothing_is_enlarged(tmp_path):
    good(tmp_path / "1_x" / "a.png", (63, 200))
    options = {"enable_bucket": True, "bucket_no_upscale": True, "min_bucket_reso": 64}
    with pytest.raises(UserError, match="63x200 is too small or too elongated"):
        scan(tmp_path, **options)
    assert len(scan(tmp_path).table) == 1


def test_pixel_limit_is_an_option(tmp_path):
    good(tmp_path / "1_x" / "a.png", (100, 100))
    with pytest.raises(UserError, match="--max_image_pixels"):
        scan(tmp_path, max_image_pixels=9_999)
    assert len(scan(tmp_path, max_image_pixels=10_000).table) == 1


def test_folder_without_images_says_what_it_holds(tmp_path):
    folder = tmp_path / "1_x"
    folder.mkdir()
    with pytest.raises(UserError, match="no images in this folder"):
        scan(tmp_path)
    for name in ("a.heic", "b.HEIC", "c.gif", "d.txt"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(UserError, match="found 2 .heic, 1 .gif"):
        scan(tmp_path)


def test_jpeg_named_png_is_used(tmp_path):
    Image.new("RGB", (64, 80)).save(tmp_path / "a.jpg")
    (tmp_path / "1_x").mkdir()
    (tmp_path / "a.jpg").rename(tmp_path / "1_x" / "a.png")
    assert scan(tmp_path).table.size_wh(0) == (64, 80)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = good(tmp_path / "1_x" / "a.png")
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        scan(tmp_path)
