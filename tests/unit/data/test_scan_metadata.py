"""Metadata files: how keys are resolved, texts joined, and what is done without image files."""

import json
import os

import numpy as np
import pytest
from scan_helpers import config, image_bytes, scan, write_image

from library.data.metadata_files import MetadataEntry, read_metadata
from library.errors import UserError


def metadata(folder, entries, name="meta.json"):
    path = folder / name
    if name.endswith(".jsonl"):
        text = "\n\n".join(json.dumps({"image_path": key, **value}) for key, value in entries.items())
    else:
        text = json.dumps(entries)
    path.write_text(text, encoding="utf-8")
    return str(path)


def scan_meta(folder, entries, name="meta.json", extra="", **options):
    path = metadata(folder, entries, name)
    body = f"[[datasets]]\n[[datasets.subsets]]\nmetadata_file = '{path}'\nimage_dir = '{folder / 'i'}'\n{extra}"
    return scan(("finetuning",), dataset_config=config(folder, body), **options)


def test_ways_to_name_an_image(tmp_path, monkeypatch):
    write_image(tmp_path / "i" / "plain.png", (64, 64))
    write_image(tmp_path / "i" / "stem.JPG", (80, 64))
    write_image(tmp_path / "i" / "sub" / "deep.webp", (96, 64))
    write_image(tmp_path / "else" / "abs.png", (64, 80))
    write_image(tmp_path / "cwd" / "here.png", (64, 96))
    monkeypatch.chdir(tmp_path)
    keys = ["stem", "plain.png", "sub/deep", str(tmp_path / "else" / "abs.png"), "cwd/here.png"]
    result = scan_meta(tmp_path, {key: {"caption": key[-4:]} for key in keys})
    found = [(r.path, r.size_wh, r.caption, r.key) for r in result.table]
    assert found == [
        (str(tmp_path / "i" / "stem.JPG"), (80, 64), "stem", "i/stem.JPG"),
        (str(tmp_path / "i" / "plain.png"), (64, 64), ".png", "i/plain.png"),
        (str(tmp_path / "i" / "sub" / "deep.webp"), (96, 64), "deep", "i/sub/deep.webp"),
        (str(tmp_path / "else" / "abs.png"), (64, 80), ".png", "else/abs.png"),
        ("cwd/here.png", (64, 96), ".png", "cwd/here.png"),
    ]
    assert all(r.file_size > 0 and r.mtime_ns > 0 for r in result.table)


def test_a_path_to_another_folder_is_one_from_the_working_directory(tmp_path, monkeypatch):
    """As the merging tools write it with --full_path for a folder that is spelled ../i."""
    write_image(tmp_path / "i" / "a.png", (64, 64))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (found,) = scan_meta(tmp_path, {"../i/a.png": {"caption": "c"}}).table
    assert (found.path, found.size_wh, found.caption) == ("../i/a.png", (64, 64), "c")


def test_json_lines_with_blank_lines(tmp_path):
    write_image(tmp_path / "i" / "a.png")
    write_image(tmp_path / "i" / "b.png")
    result = scan_meta(tmp_path, {"b": {"caption": "B"}, "a": {"tags": "t"}}, "meta.jsonl")
    assert [r.caption for r in result.table] == ["B", "t"]


def test_unresolved_keys_are_all_named(tmp_path):
    write_image(tmp_path / "i" / "a.png")
    with pytest.raises(UserError) as caught:
        scan_meta(tmp_path, {"a": {}, "gone": {}, "../outside": {}, "/no/such.png": {}, "a.png": {}})
    text = str(caught.value)
    for key in ("gone", "../outside", "/no/such.png"):
        assert key in text
    assert "leads out of image_dir" in text
    assert "a.png: is the same image as 'a'" in text


def test_caches_stand_in_for_images_that_are_gone(tmp_path):
    folder = tmp_path / "i"
    write_image(folder / "img1.png", (64, 64))
    for name in ("img10_0900x0300_sd.npz", "old.npz", "sized.npz", "other_0512x0512_sdxl.npz"):
        (folder / name).write_bytes(b"npz")
    entries = {
        "img1.png": {},
        "img10.png": {},
        "sized": {"image_size": [200, 100]},
        "old": {"train_resolution": [64, 128]},
    }
    result = scan_meta(
        tmp_path,
        {key: {"caption": "x", **value} for key, value in entries.items()},
        enable_bucket=True,
        min_bucket_reso=64,
    )
    assert [r.size_wh for r in result.table] == [(64, 64), (900, 300), (200, 100), (64, 128)]
    assert [r.path.rpartition("/")[2].rpartition(".")[0] for r in result.table] == ["img1", "img10", "sized", "old"]
    assert [r.file_size > 0 for r in result.table] == [True, False, False, False]
    assert "3 image files are gone" in "\n".join(result.notes)
    with pytest.raises(UserError, match="other"):
        scan_meta(tmp_path, {"other": {}})
    (folder / "cut_0100x0100_0200x0300_sd.npz").write_bytes(b"npz")
    assert scan_meta(tmp_path, {"cut_0100x0100": {}}).table.size_wh(0) == (200, 300)


def test_buckets_of_older_tools_are_used_when_complete(tmp_path):
    for name in ("a", "b"):
        write_image(tmp_path / "i" / f"{name}.png", (100, 100))
        (tmp_path / "i" / f"{name}.npz").write_bytes(b"npz")
    entries = {"a": {"train_resolution": [192, 64]}, "b": {"train_resolution": [128, 128]}}
    result = scan_meta(tmp_path, entries)
    assert result.choosers[0].resolutions == ((128, 128), (192, 64))
    (tmp_path / "i" / "b.npz").unlink()
    assert scan_meta(tmp_path, entries).choosers[0].resolutions == ((64, 64),)


@pytest.mark.parametrize(
    ("caption", "tags", "single", "wildcard"),
    [
        ("c", "t1, t2", "c,t1, t2", "c,t1, t2"),
        (None, "t1\nt2", "t1\nt2", "t1,t2"),
        ("", "t", "t", "t"),
        (" \n", "t", "t", "t"),
        ("c", None, "c", "c"),
        ("l1\n\nl2", "t", "l1\n\nl2,t", "l1,t\nl2,t"),
        (None, None, "", ""),
    ],
)
def test_caption_and_tags(caption, tags, single, wildcard):
    entry = MetadataEntry("k", caption, tags)
    assert entry.full_caption(",", False) == single
    assert entry.full_caption(",", True) == wildcard


def test_sizes_come_from_files_and_disagreement_is_noted(tmp_path):
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112] = 6
    write_image(tmp_path / "i" / "a.jpg", (96, 64), exif=turned)
    write_image(tmp_path / "i" / "b.png", (64, 64))
    entries = {"a.jpg": {"image_size": [96, 64]}, "b.png": {"image_size": [65, 64]}}
    result = scan_meta(tmp_path, entries)
    assert [r.size_wh for r in result.table] == [(64, 96), (64, 64)]
    assert any("image_size in the metadata differs" in note and "b.png" in note for note in result.notes)


def test_sizes_are_taken_unopened_when_orientation_does_not_matter(tmp_path, monkeypatch):
    write_image(tmp_path / "i" / "a.png", (64, 64))
    from library.data.folder_scan import FolderFiles

    monkeypatch.setattr(FolderFiles, "open", lambda *_: pytest.fail("opened"))
    result = scan_meta(tmp_path, {"a": {"image_size": [128, 64]}}, no_exif_transpose=True)
    assert result.table.size_wh(0) == (128, 64)


def test_validation_split_of_metadata(tmp_path):
    for index in range(10):
        write_image(tmp_path / "i" / f"{index}.png")
    entries = {str(index): {"caption": str(index)} for index in range(10)}
    result = scan_meta(tmp_path, entries, extra="validation_split = 0.3\nnum_repeats = 4\n")
    assert (len(result.table), len(result.validation)) == (7, 3)
    assert {r.caption for r in result.table} | {r.caption for r in result.validation} == set(entries)
    assert result.validation.repeats.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "the top level is a list"),
        ("{}", "no metadata"),
        ('{"a": 1}', "a: must be an object"),
        ('{"a": {"caption": 3, "image_size": [1]}}', "a.caption: must be text"),
        ('{"a": {}, "a": {}}', "'a' occurs twice"),
        ('{"a": {"caption": NaN}}', "NaN"),
        ('{"a": {"image_size": [0, 5]}}', "must be [width, height]"),
        ('{"": {}}', "no file name"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": {}', "line 1"),
    ],
)
def test_broken_metadata_is_one_message(tmp_path, text, words):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_metadata(str(path))
    assert words in str(caught.value)
    assert "m.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"image_path": "a"}\n{"caption": "x"}', "line 2: has no image_path"),
        ('{"image_path": "a"}\n{', "line 2"),
        ('{"image_path": "a"}\n{"image_path": "a"}', "line 2: image_path 'a' occurs twice"),
        ("\n\n", "no metadata"),
    ],
)
def test_broken_lines_are_named(tmp_path, text, words):
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_metadata(str(path))
    assert words in str(caught.value)


def test_only_named_images_matter(tmp_path):
    write_image(tmp_path / "i" / "a.png")
    (tmp_path / "i" / "broken.png").write_bytes(b"")
    (tmp_path / "i" / "folder.png").mkdir()
    result = scan_meta(tmp_path, {"a": {"caption": "x"}})
    assert len(result.table) == 1
    with pytest.raises(UserError, match="broken.png: empty file"):
        scan_meta(tmp_path, {"a": {}, "broken": {}})


def test_partial_scan_keeps_the_rest_of_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr("library.data.folder_scan.KEEP_FROM", 1)
    monkeypatch.setattr("library.data.scan_index.RACY_NS", -(10**15))
    from library.data.scan_index import load_index

    for name in "abc":
        write_image(tmp_path / "i" / f"{name}.png")
    scan_meta(tmp_path, {"a": {}, "b": {}})
    scan_meta(tmp_path, {"b": {}, "c": {}})
    assert sorted(load_index(str(tmp_path / "i"), "").names) == ["a.png", "b.png", "c.png"]


def info_scan(tmp_path, **options):
    body = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'i'}'\ncache_info = true\n"
    return scan(dataset_config=config(tmp_path, body), **options).table


def test_info_cache_of_the_reference_is_read(tmp_path):
    write_image(tmp_path / "i" / "a.png", (64, 64), "from the file")
    cache = tmp_path / "i" / "metadata_cache.json"
    entry = {"caption": "from the cache", "resolution": [128, 64]}
    cache.write_text(json.dumps({"C:\\elsewhere\\a.png": entry}), encoding="utf-8")
    record = info_scan(tmp_path).record(0)
    assert (record.caption, record.size_wh) == ("from the cache", (64, 64))
    cache.write_text(json.dumps({"some/where/a.png": entry}), encoding="utf-8")
    record = info_scan(tmp_path, no_exif_transpose=True).record(0)
    assert (record.caption, record.size_wh) == ("from the cache", (128, 64))
    table = json.loads(cache.read_text(encoding="utf-8"))
    assert set(table) == {str(tmp_path / "i" / "a.png")}


def test_info_cache_follows_edits(tmp_path):
    write_image(tmp_path / "i" / "a.png", (64, 64), "before")
    assert info_scan(tmp_path).caption(0) == "before"
    table = json.loads((tmp_path / "i" / "metadata_cache.json").read_text(encoding="utf-8"))
    assert table[str(tmp_path / "i" / "a.png")]["caption"] == "before"
    assert table[str(tmp_path / "i" / "a.png")]["resolution"] == [64, 64]
    write_image(tmp_path / "i" / "a.png", (128, 64), "afterwards")
    record = info_scan(tmp_path).record(0)
    assert (record.caption, record.size_wh) == ("afterwards", (128, 64))
    # Replaced by something older than the file: only the recorded time and size can tell.
    write_image(tmp_path / "i" / "a.png", (64, 128), "long ago")
    for path in (tmp_path / "i").glob("a.*"):
        os.utime(path, ns=(10**18, 10**18))
    record = info_scan(tmp_path).record(0)
    assert (record.caption, record.size_wh) == ("long ago", (64, 128))


def test_broken_info_cache_is_passed_over(tmp_path, caplog):
    write_image(tmp_path / "i" / "a.png", (64, 64), "x")
    for text in ("{", "[]", '{"a.png": 3, "b.png": {"resolution": "x"}}'):
        (tmp_path / "i" / "metadata_cache.json").write_text(text)
        assert info_scan(tmp_path).caption(0) == "x"
    assert "is passed over" in caplog.text


def test_many_entries_are_resolved_in_linear_time(tmp_path):
    import time

    (tmp_path / "i").mkdir()
    data = image_bytes((64, 64))
    times = []
    for count in (500, 4000):
        entries = {}
        for index in range(count):
            name = f"{index:05}"
            (tmp_path / "i" / f"{name}.png").write_bytes(data)
            (tmp_path / "i" / f"{name}_0064x0064_sd.npz").write_bytes(b"")
            entries[name] = {"caption": "x", "image_size": [64, 64]}
        begin = time.thread_time()
        table = scan_meta(tmp_path, entries).table
        times.append(time.thread_time() - begin)
        assert len(table) == count
        assert np.all(table.widths == 64)
        (tmp_path / "i" / ".image_index").unlink(missing_ok=True)
    assert times[1] < 8 * 4 * times[0] + 0.5
