"""merge_captions_to_metadata.py, merge_dd_tags_to_metadata.py: text files of a folder -> a file that training reads."""

import json
import shutil
import sys

import pytest

from finetune import merge_captions_to_metadata, merge_dd_tags_to_metadata
from library.data.metadata_files import read_metadata
from tests.conftest import PHOTOS


def run(module, *argv):
    with pytest.raises(SystemExit) as ended:
        module.main([str(item) for item in argv])
    return ended.value.code


def captions(*argv):
    return run(merge_captions_to_metadata, *argv)


def tags(*argv):
    return run(merge_dd_tags_to_metadata, *argv)


def loaded(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path):
    """Two photographs with captions and tags, and one in a sub-folder with a caption."""
    tree = tmp_path / "data set"
    (tree / "more").mkdir(parents=True)
    for source, target in (("00", "a"), ("01", "b"), ("02", "more/c")):
        shutil.copy(PHOTOS / "duck" / f"{source}.jpg", tree / f"{target}.jpg")
        (tree / f"{target}.caption").write_text(f"  caption of {target}\n", encoding="utf-8")
    (tree / "a.txt").write_text("1girl, smile", encoding="utf-8")
    (tree / "b.txt").write_text("\ufeffcafé\r\nsecond line\n", encoding="utf-8")
    return tree


def test_captions_then_tags(tmp_path, folder):
    first, second = tmp_path / "captions.json", tmp_path / "tags.json"
    assert captions(folder, first) == 0
    assert tags(folder, second, "--in_json", first) == 0
    assert loaded(second) == {
        "a": {"caption": "caption of a", "tags": "1girl, smile"},
        "b": {"caption": "caption of b", "tags": "café\nsecond line"},
    }
    text = second.read_text(encoding="ascii")  # escaped, so that it reads the same in every encoding
    assert text.startswith('{\n  "a": {\n    "caption"') and "caf\\u00e9" in text


def test_a_file_that_exists_is_added_to_and_keeps_what_it_holds(tmp_path, folder):
    target = tmp_path / "meta.json"
    target.write_text('{"b": {"caption": "old", "image_size": [4, 3], "mine": 1}, "z": {"tags": "t"}}', "utf-8")
    assert captions(folder, target) == 0
    entries = loaded(target)
    assert entries["b"] == {"caption": "caption of b", "image_size": [4, 3], "mine": 1}
    assert list(entries) == ["b", "z", "a"]


def test_kinds_of_keys(tmp_path, folder):
    target = tmp_path / "meta.json"
    assert captions(folder, target, "--full_path", "--recursive") == 0
    assert list(loaded(target)) == [str(folder / name) for name in ("a.jpg", "b.jpg", "more/c.jpg")]
    target.unlink()
    assert captions(folder, target, "--relative_path", "--recursive") == 0
    assert list(loaded(target)) == ["a.jpg", "b.jpg", "more/c.jpg"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recursive"], "--recursive: needs --full_path or --relative_path"),
        (["--full_path", "--relative_path"], "--full_path: cannot be combined with --relative_path"),
        (["--caption_extension", "x/y"], "is no suffix"),
        (["--caption_encoding", "utf-9"], "there is no encoding 'utf-9'"),
    ],
)
def test_wrong_options(tmp_path, folder, capsys, words, message):
    assert captions(folder, tmp_path / "meta.json", *words) == 2
    assert message in capsys.readouterr().err


def test_old_spelling_of_the_suffix(tmp_path, folder):
    assert tags(folder, tmp_path / "meta.json", "--caption_extention", ".caption") == 0
    assert loaded(tmp_path / "meta.json")["a"] == {"tags": "caption of a"}


def test_missing_and_unreadable_texts_are_named_and_the_others_merged(tmp_path, folder, capsys):
    shutil.copy(folder / "a.jpg", folder / "d.jpg")
    (folder / "b.caption").write_bytes("桜の木の下で".encode("cp932"))
    assert captions(folder, tmp_path / "meta.json") == 0
    assert loaded(tmp_path / "meta.json") == {"a": {"caption": "caption of a"}}
    output = capsys.readouterr().err
    assert "1 of 3 images have no caption file: " in output and "d.caption" in output
    bad = [line for line in output.splitlines() if "b.caption: caption is not UTF-8 (looks like cp932)" in line]
    assert len(bad) == 1 and "--caption_encoding cp932" in bad[0]
    assert captions(folder, tmp_path / "meta.json", "--caption_encoding", "cp932") == 0
    assert loaded(tmp_path / "meta.json")["b"] == {"caption": "桜の木の下で"}


def test_without_any_text_nothing_is_written(tmp_path, folder, capsys):
    assert tags(folder, tmp_path / "meta.json", "--caption_extension", ".tags") == 2
    assert "none of 2 images has a .tags file" in capsys.readouterr().err
    assert not (tmp_path / "meta.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "the top level is a list"),
        ('{"a": "x"}', 'a: must be an object, not "x"'),
        ('{"a": {"tags": 1}}', "a.tags: must be text, not 1"),
        ('{"a": ', "JSON error, line 1"),
        ('{"a": {}, "a": {}}', "the key 'a' occurs twice"),
    ],
)
def test_damaged_metadata_stays_as_it_is(tmp_path, folder, capsys, content, message):
    target = tmp_path / "meta.json"
    target.write_text(content, encoding="utf-8")
    assert captions(folder, target) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: {target}") and message in last
    assert target.read_text(encoding="utf-8") == content


def test_wrong_names(tmp_path, folder, capsys):
    assert captions(folder, tmp_path / "meta.txt") == 2
    assert captions(folder, tmp_path) == 2
    assert captions(tmp_path / "nowhere", tmp_path / "meta.json") == 2
    assert captions(folder, tmp_path / "meta.json", "--in_json", tmp_path / "gone.json") == 2
    errors = capsys.readouterr().err
    assert all(text in errors for text in ("End it with .json or .jsonl", "is a folder", "no such folder", "not found"))


def test_json_lines(tmp_path, folder):
    target = tmp_path / "meta.jsonl"
    assert captions(folder, target, "--relative_path") == 0
    assert tags(folder, target, "--relative_path") == 0
    assert json.loads(target.read_text(encoding="utf-8").splitlines()[0]) == {
        "image_path": "a.jpg",
        "caption": "caption of a",
        "tags": "1girl, smile",
    }
    assert [(entry.key, entry.caption) for entry in read_metadata(str(target))][1] == ("b.jpg", "caption of b")


@pytest.mark.parametrize("words", [[], ["--full_path", "--recursive"], ["--relative_path", "--recursive"]])
def test_training_finds_the_images(tmp_path, folder, words):
    from library.data.dataset_config import load_dataset_specs
    from library.data.options import DatasetOptions, SubsetOptions
    from library.data.scan import scan_datasets

    target = tmp_path / "meta.json"
    assert captions(folder, target, *words) == 0
    data = DatasetOptions(train_data_dir=str(folder), resolution="64", enable_bucket=True, min_bucket_reso=64)
    specs = load_dataset_specs(
        data, SubsetOptions(), kinds=("finetuning",), bucket_step_multiple=64, in_json=str(target)
    )
    assert len(scan_datasets(specs, data).table) == (3 if words else 2)


@pytest.mark.skipif(sys.platform != "linux", reason="names of other systems are text")
def test_names_that_are_no_text(tmp_path, folder, capfd):
    import os

    strange = os.fsdecode(b"caf\xe9.jpg")
    (folder / "a.jpg").rename(folder / strange)
    (folder / "a.caption").rename(folder / strange.replace(".jpg", ".caption"))
    assert captions(folder, tmp_path / "meta.json", "--relative_path", "--debug") == 0
    assert strange in [entry.key for entry in read_metadata(str(tmp_path / "meta.json"))]
    assert "caf\\udce9.jpg" in capfd.readouterr().out
