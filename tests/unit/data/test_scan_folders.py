"""Scanning folders of images with caption files."""

import os
from pathlib import Path

import numpy as np
import pytest
from scan_helpers import config, image_bytes, load, scan, write_image

from library.contracts import ImageRecord
from library.data.bad_files import printable
from library.data.options import DatasetOptions
from library.data.scan import scan_datasets
from library.errors import UserError


def captions_of(result):
    return {record.key.rpartition("/")[2]: record.caption for record in result.table}


def test_a_folder_becomes_records(tmp_path):
    folder = tmp_path / "3_sks dog"
    write_image(folder / "b.PNG", (80, 64), "a dog\nsecond line")
    write_image(folder / "A.Jpg", (64, 96), " tags, more ")
    write_image(folder / "c.webp", (64, 64))
    (folder / ".hidden.png").write_bytes(b"junk")
    (folder / "._b.png").write_bytes(b"junk")
    result = scan(train_data_dir=str(tmp_path))
    assert [record.key for record in result.table] == ["3_sks dog/A.Jpg", "3_sks dog/b.PNG", "3_sks dog/c.webp"]
    first = result.table.record(0)
    info = (folder / "A.Jpg").stat()
    assert first == ImageRecord(
        index=0,
        path=str(folder / "A.Jpg"),
        key="3_sks dog/A.Jpg",
        size_wh=(64, 96),
        caption="tags, more",
        repeats=3,
        dataset=0,
        subset=0,
        file_size=info.st_size,
        mtime_ns=info.st_mtime_ns,
    )
    assert captions_of(result) == {"A.Jpg": "tags, more", "b.PNG": "a dog", "c.webp": "sks dog"}
    assert result.validation is None


def test_order_is_by_code_point_whatever_the_file_system(tmp_path):
    names = ["b.png", "B.png", "a10.png", "a2.png", "é.png", "ａ.png", "𝒜.png"]
    for name in names:
        write_image(tmp_path / "1_x" / name)
    result = scan(train_data_dir=str(tmp_path))
    assert [record.key[4:] for record in result.table] == sorted(names)


def test_orientation_swaps_sizes_unless_told_not_to(tmp_path):
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112] = 6
    write_image(tmp_path / "1_x" / "a.jpg", (96, 64), exif=turned)
    record = scan(train_data_dir=str(tmp_path)).table.record(0)
    assert (record.size_wh, record.orientation) == ((64, 96), 6)
    record = scan(train_data_dir=str(tmp_path), no_exif_transpose=True).table.record(0)
    assert (record.size_wh, record.orientation) == ((96, 64), 1)


def test_caption_rules(tmp_path, caplog):
    folder = tmp_path / "images"
    contents = {
        "bom": b"\xef\xbb\xbfwith mark",
        "blank_first": b"\nsecond",
        "empty": b"",
        "spaces": b"\n  \n",
        "crlf": b"one\r\ntwo\r\n",
        "control": b"a\x00b\x1b[31mc\ttab",
    }
    for name, content in contents.items():
        write_image(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(content)
    write_image(folder / "none.png")
    write_image(folder / "photo_10_20_30_40.png")
    (folder / "photo.txt").write_text("of the whole picture", encoding="utf-8")
    body = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\n"
    result = scan(dataset_config=config(tmp_path, body))
    assert captions_of(result) == {
        "bom.png": "with mark",
        "blank_first.png": "",
        "empty.png": "",
        "spaces.png": "",
        "crlf.png": "one",
        "control.png": "ab[31mc\ttab",
        "none.png": "",
        "photo_10_20_30_40.png": "of the whole picture",
    }
    notes = "\n".join(result.notes)
    assert "1 images have no caption file and no class words" in notes
    assert "none.png" in notes
    assert "1 caption files are empty" in notes
    assert "control characters removed from 1 captions" in notes
    lines = captions_of(scan(dataset_config=config(tmp_path, body + "enable_wildcard = true\n")))
    assert lines["crlf.png"] == "one\ntwo"
    assert lines["blank_first.png"] == "second"


def test_caption_extension_without_dot(tmp_path):
    write_image(tmp_path / "1_x" / "a.png", caption="x y", extension=".tags")
    result = scan(train_data_dir=str(tmp_path), subset={"caption_extension": "tags"})
    assert result.table.caption(0) == "x y"


@pytest.mark.parametrize(
    ("text", "encoding", "guess"),
    [
        ("青い空と白い雲、ひらがな", "cp932", "cp932"),
        ("蓝天白云，一只猫在草地上", "gbk", "gbk"),
        ("한국어 설명 글", "euc_kr", "euc_kr"),
        ("un café à la crème près de l'église", "latin-1", "latin-1"),
        ("plain words", "utf-16", "utf-16"),
    ],
)
def test_other_encodings_are_named_and_can_be_chosen(tmp_path, text, encoding, guess):
    write_image(tmp_path / "1_x" / "a.png")
    (tmp_path / "1_x" / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(UserError) as caught:
        scan(train_data_dir=str(tmp_path))
    assert f"looks like {guess}" in str(caught.value)
    assert "a.txt" in str(caught.value)
    result = scan(train_data_dir=str(tmp_path), caption_encoding=encoding)
    assert result.table.caption(0) == text


def test_strange_names(tmp_path):
    names = ["two\nlines.png", "q'u\"o[te]%20.png", "😀.png", "e\u0301.png", "\u00e9.png", "a.b.c.png"]
    for name in names:
        write_image(tmp_path / "1_x" / name, caption=f"caption of {name!r}")
    raw = os.fsencode(tmp_path / "1_x") + b"/\xff\xfe.png"
    Path(os.fsdecode(raw)).write_bytes(image_bytes())
    result = scan(train_data_dir=str(tmp_path))
    paths = {record.path for record in result.table}
    assert paths == {str(tmp_path / "1_x" / name) for name in names} | {os.fsdecode(raw)}
    assert all(Path(path).exists() for path in paths)
    assert captions_of(result)["😀.png"] == "caption of '😀.png'"
    assert printable(os.fsdecode(b"\xff.png")) == "\\xff.png"
    assert printable("a\nb") == "a\\nb"


def test_multi_resolution_reads_a_folder_once(tmp_path, monkeypatch):
    write_image(tmp_path / "a" / "1.png", caption="x")
    entry = f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'a'}'\n"
    body = f"[[datasets]]\nresolution = 64\n{entry}[[datasets]]\nresolution = 128\n{entry}"
    import library.data.scan as scan_module

    calls = []
    original = scan_module.scan_folder
    monkeypatch.setattr(scan_module, "scan_folder", lambda *a, **k: calls.append(a) or original(*a, **k))
    result = scan(dataset_config=config(tmp_path, body))
    assert len(calls) == 1
    assert result.table.datasets.tolist() == [0, 1]
    assert result.table.record(0).path == result.table.record(1).path


def test_regularization_images_are_balanced_after_the_split(tmp_path):
    for index in range(4):
        write_image(tmp_path / "train" / "10_x" / f"{index}.png")
    for index in range(3):
        write_image(tmp_path / "reg" / "1_y" / f"{index}.png")
    result = scan(train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"))
    assert result.table.repeats[result.table.is_reg].tolist() == [14, 13, 13]
    assert result.reg_totals == (3,)
    for index in range(3, 20):
        write_image(tmp_path / "reg" / "1_y" / f"{index:02}.png")
    options = {"train_data_dir": str(tmp_path / "train"), "reg_data_dir": str(tmp_path / "reg")}
    result = scan(**options, validation_split=0.5)
    assert result.table.repeats[~result.table.is_reg].tolist() == [10, 10]
    assert result.table.is_reg.sum() == 20
    assert len(result.validation) == 2
    assert not result.validation.is_reg.any()
    assert result.validation.repeats.tolist() == [1, 1]


def test_validation_per_subset_and_the_same_at_every_resolution(tmp_path):
    for name in ("a", "b"):
        for index in range(10):
            write_image(tmp_path / name / f"{index}.png", caption=f"{name}{index}")
    subsets = (
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'a'}'\nvalidation_split = 0.2\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'b'}'\n"
    )
    body = f"[general]\nvalidation_split = 0.5\n[[datasets]]\n{subsets}[[datasets]]\nresolution = 128\n{subsets}"
    result = scan(dataset_config=config(tmp_path, body))
    kept = {(r.dataset, r.path) for r in result.table}
    apart = {(r.dataset, r.path) for r in result.validation}
    assert not kept & apart
    assert len(kept | apart) == 40
    assert np.bincount(result.validation.subsets).tolist() == [2, 5, 2, 5]
    assert {path for dataset, path in apart if dataset == 0} == {path for dataset, path in apart if dataset == 1}
    assert all(r.caption == r.path[-len("a/0.png") :].replace("/", "").removesuffix(".png") for r in result.table)
    from library.data.scan import ScanContext

    other = scan(dataset_config=config(tmp_path, body), context=ScanContext(seed=1))
    assert {r.path for r in other.validation} != {r.path for r in result.validation}
    again = scan(dataset_config=config(tmp_path, "[general]\nvalidation_seed = 0\n" + body.replace("[general]\n", "")))
    assert {r.path for r in again.validation} == {r.path for r in result.validation}


def masked(tmp_path, **options):
    images, masks = tmp_path / "i", tmp_path / "m"
    body = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{images}'\nconditioning_data_dir = '{masks}'\n"
    return scan(dataset_config=config(tmp_path, body), masked_loss=True, min_bucket_reso=64, **options)


def test_masks_are_paired_by_stem(tmp_path):
    write_image(tmp_path / "i" / "a.jpg", (64, 96), "x")
    write_image(tmp_path / "m" / "a.png", (64, 96))
    result = masked(tmp_path, enable_bucket=True)
    assert result.table.mask_path(0) == str(tmp_path / "m" / "a.png")
    assert result.table.record(0).mask_path == str(tmp_path / "m" / "a.png")


def test_missing_surplus_and_misfit_masks_are_listed_together(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / "i" / f"{name}.png", (64, 64))
    write_image(tmp_path / "m" / "a.png", (64, 32))
    write_image(tmp_path / "m" / "c.png", (64, 64))
    write_image(tmp_path / "m" / "d.png", (64, 64))
    with pytest.raises(UserError) as caught:
        masked(tmp_path, enable_bucket=True)
    text = str(caught.value)
    assert "b.png: has no partner" in text
    assert "is 64x32, but its image a.png is 64x64" in text
    assert "d.png: has no image of the same name" in text


def test_specs_built_by_hand_work_too(tmp_path):
    write_image(tmp_path / "1_x" / "a.png")
    specs = load(train_data_dir=str(tmp_path))
    result = scan_datasets(specs, DatasetOptions(resolution="64", check_images="none"))
    assert result.choosers[0].place(result.table.size_wh(0)).bucket_wh == (64, 64)
