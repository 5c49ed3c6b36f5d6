"""tools/check_dataset.py: every kind of finding, the report, and what is not looked at twice."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from library.data import picture_facts
from tools.check_dataset import main

PHOTOS = sorted((Path(__file__).parents[3] / "examples" / "photos").glob("*/*.jpg"))
ONE_THREAD = ("--max_data_loader_n_workers", "0")


def run(*argv):
    with pytest.raises(SystemExit) as ended:
        main([str(item) for item in (*argv, *ONE_THREAD)])
    return ended.value.code


def add(folder, name, number, *, caption="a photo", size=None, **save):
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.open(PHOTOS[number]).convert("RGB")
    (picture.resize(size) if size else picture).save(folder / name, **save)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder / name


def findings(report):
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["counts"] == {kind: len(found) for kind, found in content["findings"].items()}
    return {
        kind: [sorted(Path(path).name for path in one["paths"]) for one in found]
        for kind, found in content["findings"].items()
        if found
    }


@pytest.fixture
def messy(tmp_path):
    """A folder with one of everything."""
    folder = tmp_path / "data"
    add(folder, "good.jpg", 0)
    shutil.copy(add(folder, "twice.jpg", 1), folder / "again.jpg")
    add(folder, "smaller.png", 2, size=(300, 300))
    add(folder, "larger.jpg", 2, size=(500, 500), quality=60)
    add(folder, "tiny.png", 3, size=(300, 100))
    turned = Image.Exif()
    turned[0x0112] = 6
    add(folder / "inside", "turned.jpg", 4, exif=turned)
    add(folder / "inside", "large.png", 5, size=(1200, 1000), caption="word " * 80)
    (folder / "cut.jpg").write_bytes((folder / "good.jpg").read_bytes()[:4000])
    (folder / "cut.txt").write_text("cut")
    (folder / "no picture at all.png").write_text("<html>")
    (folder / "no picture at all.txt").write_text("x")
    add(folder, "latin.jpg", 6).with_suffix(".txt").write_bytes("caf\xe9 cr\xe8me".encode("latin-1"))
    add(folder, "empty.jpg", 7, caption="")
    add(folder, "same.jpg", 8)
    add(folder, "same.png", 9, caption=None)
    (folder / "gone.txt").write_text("no such picture")
    return folder


EXPECTED = {
    "unreadable": [["cut.jpg"], ["no picture at all.png"]],
    "same_name": [["same.png"]],
    "duplicate": [["again.jpg", "twice.jpg"]],
    "near_duplicate": [["larger.jpg", "smaller.png"]],
    "tiny": [["tiny.png"]],
    "oversized": [["large.png"]],
    "rotated": [["turned.jpg"]],
    "no_caption": [["again.jpg"]],
    "empty_caption": [["empty.jpg"]],
    "bad_caption": [["latin.jpg"]],
    "long_caption": [["large.png"]],
    "orphan_caption": [["gone.txt"]],
}


def test_every_kind_of_finding(messy, tmp_path, capsys):
    report = tmp_path / "report.json"
    options = ("--recursive", "--caption_extension", "txt", "--max_megapixels", "1", "--report", report)
    assert run(messy, *options) == 3
    assert findings(report) == EXPECTED
    shown = capsys.readouterr()
    for kind in EXPECTED:
        assert f"{kind}: {len(EXPECTED[kind])} " in shown.out
    assert "80 tokens, 5 are cut off" in shown.out
    assert "iconv" in shown.out
    assert "14 pictures (2 unreadable, 1 same_name, 1 duplicate" in shown.err.splitlines()[-1]
    assert run(messy, *options, "--max_token_length", "150", "--ignore", *EXPECTED.keys() - {"long_caption"}) == 0
    assert json.loads(report.read_text())["status"] == "clean"


def test_sound_data_and_folders_alone(tmp_path, capsys):
    add(tmp_path / "a", "1.jpg", 0)
    add(tmp_path / "a" / "b", "2.jpg", 1, caption=None)
    assert run(tmp_path / "a", "--caption_extension", ".txt") == 0
    assert "nothing to complain about" in capsys.readouterr().out
    assert run(tmp_path / "a", "--recursive", "--caption_extension", ".txt") == 3
    assert run(tmp_path / "a", "--recursive", "--caption_extension", "none") == 0
    assert run(tmp_path / "a" / "b", "--caption_extension", "none", "--min_side", "100000") == 3


def test_unchanged_pictures_are_not_decoded_again(tmp_path, monkeypatch):
    folder, report = tmp_path / "a", tmp_path / "report.json"
    paths = [add(folder, f"{number}.jpg", number, caption=None) for number in range(3)]
    options = (folder, "--caption_extension", "none", "--report", report)
    decoded = []
    look = picture_facts.PictureLook.__call__
    monkeypatch.setattr(
        picture_facts.PictureLook, "__call__", lambda self, path: decoded.append(path) or look(self, path)
    )
    assert run(*options) == 0 and len(decoded) == 3
    os.utime(paths[1], (1, 1))
    assert run(*options, "--skip_existing") == 0 and decoded[3:] == [paths[1]]
    assert run(*options) == 0 and len(decoded) == 7
    (tmp_path / "report.facts.json").write_text('{"format": 1, "pictures": {"x": [1]}}')
    assert run(*options, "--skip_existing") == 0 and len(decoded) == 10
    (tmp_path / "report.facts.json").write_text("[")
    assert run(*options, "--skip_existing") == 0 and len(decoded) == 13


def test_configurations_know_which_captions_are_wanted(tmp_path):
    add(tmp_path / "words", "a.jpg", 0, caption=None)
    add(tmp_path / "files", "b.jpg", 1, caption="ok")
    add(tmp_path / "files", "c.jpg", 2, caption=None)
    for number, name in enumerate("def", 3):
        add(tmp_path / "meta", f"{name}.jpg", number, caption=None)
    entries = {"d": {"caption": "one"}, "e": {"tags": ""}, "f": {}, "nowhere": {"caption": "x"}}
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    config, report = tmp_path / "data.toml", tmp_path / "report.json"
    config.write_text(f"""
[[datasets]]
resolution = 512
  [[datasets.subsets]]
  image_dir = '{tmp_path}/words'
  class_tokens = 'a duck'
  [[datasets.subsets]]
  image_dir = '{tmp_path}/files'
  caption_extension = '.txt'
[[datasets]]
resolution = 768
  [[datasets.subsets]]
  image_dir = '{tmp_path}/files'
  caption_extension = '.txt'
[[datasets]]
resolution = 512
  [[datasets.subsets]]
  image_dir = '{tmp_path}/meta'
  metadata_file = '{tmp_path}/meta.json'
""")
    assert run("--dataset_config", config, "--report", report) == 3
    assert findings(report) == {
        "missing_picture": [["nowhere"]],
        "no_caption": [["c.jpg"], ["f.jpg"]],
        "empty_caption": [["e.jpg"]],
    }
    assert json.loads(report.read_text())["pictures"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "is required"),
        (("{folder}", "--dataset_config", "x.toml"), "give one of them"),
        (("{folder}/none",), "no such folder"),
        (("{folder}", "--ignore", "blurred"), "is no kind of finding"),
        (("{folder}", "--skip_existing"), "needs --report"),
        (("--dataset_config", "{folder}/none.toml"), "not found"),
    ],
)
def test_bad_options(tmp_path, capsys, options, message):
    assert run(*(option.format(folder=tmp_path) for option in options)) == 2
    assert message in capsys.readouterr().err


def test_tar_files_are_refused_in_a_line(tmp_path, capsys):
    tarfile.open(tmp_path / "a.tar", "w").close()
    config = tmp_path / "data.toml"
    config.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nwebdataset_path = '{tmp_path / 'a.tar'}'\n"
    )
    assert run("--dataset_config", config) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "pictures in tar files are not checked by this tool" in line
