"""Metadata files of the wrong shape, for every script that reads them: refused in one line and left as they are."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from tests.caption_models import make_pictures
from tests.support import fine_tune, run_tool

SIZES = ("--min_bucket_reso=64", "--max_bucket_reso=128")
READERS = {
    "merging captions": ("finetune.merge_captions_to_metadata", "{pictures} {out} --in_json={src}"),
    "merging tags": ("finetune.merge_dd_tags_to_metadata", "{pictures} {out} --in_json={src}"),
    "cleaning": ("finetune.clean_captions_and_tags", "{src} {out}"),
    "preparing": ("finetune.prepare_buckets_latents", "{pictures} {src} {out} {model} --max_resolution=64,64"),
    "fine-tuning": ("fine_tune", ""),
}
WRONG = {
    "a list": (b"[1]", "the top level is a list"),
    "a number": (b"3", "the top level is int"),
    "nothing": (b"", "JSON error, line 1"),
    "cut": (b'{"0": {"caption": "x"', "JSON error, line 1"),
    "a web page": (b"<html>404</html>", "JSON error, line 1"),
    "text for an entry": (b'{"0": "x"}', "0: must be an object"),
    "a number for a caption": (b'{"0": {"caption": 5}}', "0.caption: must be text, not 5"),
    "a list for tags": (b'{"0": {"tags": ["a"]}}', "0.tags: must be text"),
    "text for a size": (b'{"0": {"caption": "x", "image_size": "big"}}', "0.image_size: must be [width, height]"),
    "a negative size": (b'{"0": {"caption": "x", "image_size": [-1, 5]}}', "0.image_size: must be [width, height]"),
    "three sides": (b'{"0": {"caption": "x", "train_resolution": [1, 2, 3]}}', "0.train_resolution: must be"),
    "a key twice": (b'{"0": {}, "0": {}}', "the key '0' occurs twice"),
    "NaN": (b'{"0": {"caption": "x", "image_size": [NaN, 1]}}', "NaN is not JSON"),
    "a zero byte in a name": (b'{"a\\u0000b": {"caption": "x"}}', "is no file name"),
    "endless brackets": (b"[" * 100_000, "nested too deeply"),
    "UTF-16": ('{"0": {}}'.encode("utf-16"), "not UTF-8 (looks like UTF-16)"),
    "Latin-1": ('{"0": {"caption": "Bär"}}'.encode("latin-1"), "not UTF-8 (line 1)"),
}


@pytest.fixture
def place(tmp_path, tiny_sd1, capsys):
    """Return what runs a script on metadata: (name, content) -> status, errors, everything that was said."""
    pictures = make_pictures(tmp_path / "pictures", 2)
    for path in list(pictures.iterdir()):
        path.with_suffix(".caption").write_text("a duck")
        path.with_suffix(".txt").write_text("duck")

    def run(name: str, content: bytes, *more: str) -> tuple[int, list[str], str]:
        source = tmp_path / "in.json"
        source.write_bytes(content)
        module, words = READERS[name]
        names = {"pictures": pictures, "src": source, "out": tmp_path / "out.json", "model": tiny_sd1}
        argv = [word.format(**names) for word in words.split()]
        capsys.readouterr()
        if name == "fine-tuning":
            argv = [f"--pretrained_model_name_or_path={tiny_sd1}", f"--train_data_dir={pictures}"]
            argv += [f"--in_json={source}", f"--output_dir={tmp_path / 'out'}", "--resolution=64", "--enable_bucket"]
            status = fine_tune(*argv, *SIZES, "--max_train_steps=1", "--max_data_loader_n_workers=0", *more)
        else:
            more = SIZES if name == "preparing" else more
            status = run_tool(importlib.import_module(module).main, *argv, *more)
        said = capsys.readouterr().err
        assert "Traceback" not in said, said
        assert source.read_bytes() == content
        return status, [line for line in said.splitlines() if line.startswith("error: ")], said

    return run


@pytest.mark.parametrize("content", WRONG)
@pytest.mark.parametrize("name", READERS)
def test_metadata_of_the_wrong_shape(place, no_loading, tmp_path, name, content):
    data, word = WRONG[content]
    status, errors, said = place(name, data)
    assert status == 2 and len(errors) == 1, said
    assert "in.json" in errors[0] and word in errors[0]
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("/gone/away/0.png", "/gone/away/0.png: no image and no cache of this name"),
        ("../../../etc/passwd", "leads out of image_dir"),
        ("n" * 5000, "no image"),
        ("unknown", "unknown: no image and no cache of this name"),
    ],
)
def test_pictures_that_are_elsewhere(place, no_loading, key, word):
    status, errors, said = place("fine-tuning", json.dumps({key: {"caption": "x"}}).encode())
    assert status == 2 and word in "\n".join(errors), said


def test_preparation_tells_what_it_did_not_find(place, tmp_path, caplog):
    content = json.dumps({"/gone/away/0.png": {"caption": "x"}, "0": {"caption": "y"}}).encode()
    status, _, said = place("preparing", content)
    assert status == 0, said
    assert "1 entries have no picture" in caplog.text and "1 pictures have no entry" in caplog.text
    assert json.loads((tmp_path / "out.json").read_text())["/gone/away/0.png"] == {"caption": "x"}


@pytest.mark.parametrize("name", ["merging captions", "cleaning", "preparing"])
def test_a_full_disk_keeps_the_old_metadata(place, tmp_path, name, monkeypatch):
    (tmp_path / "out.json").write_text('{"old": {"caption": "kept"}}')
    monkeypatch.setattr("library.faults._plan", None)
    monkeypatch.setenv("SD_FAULT", "save.before_replace:enospc:1+")
    status, errors, said = place(name, b'{"0": {"caption": "anime girl"}}')
    assert status == 4 and "cannot save" in errors[-1] and "out.json" in errors[-1], said
    assert (tmp_path / "out.json").read_text() == '{"old": {"caption": "kept"}}'
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["merging captions", "cleaning", "preparing"])
def test_results_that_cannot_be_written_are_known_at_once(place, no_loading, tmp_path, name):
    (tmp_path / "out.json").mkdir()
    status, errors, said = place(name, b'{"0": {"caption": "x"}}')
    assert status == 2 and len(errors) == 1 and "out.json" in errors[0] and "folder" in errors[0], said


def test_words_that_captions_cannot_hold(tmp_path, tiny_sd1, capsys, no_loading):
    from tests.support import train_textual_inversion

    pictures = make_pictures(tmp_path / "t" / "1_duck", 1)
    argv = [f"--pretrained_model_name_or_path={tiny_sd1}", f"--train_data_dir={Path(pictures).parent}"]
    argv += [f"--output_dir={tmp_path / 'out'}", "--resolution=64", "--token_string=zs\nhs", "--use_object_template"]
    assert train_textual_inversion(*argv) == 2
    assert "--token_string: has line ends or control characters" in capsys.readouterr().err
