"""Folders full of what people have: every tool that looks at pictures names the bad ones and makes the rest."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.caption_models import make_blip, make_git, make_pictures
from tests.conftest import ROOT
from tests.support import run_tool

sys.path.insert(0, str(ROOT / "tests" / "unit" / "finetune"))

from tagger_models import default_tagger  # noqa: E402

ODD_NAMES = (
    "a b.png",
    "-dash.png",
    "new\nline.png",
    "quote'\".png",
    "50%[x].png",
    "grün 😀.png",
    "undecodable\udcff.png",
)
posix = pytest.mark.skipif(os.name == "nt", reason="names and files that Windows does not have")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("helpers")
    return {
        "blip": make_blip(folder / "blip"),
        "git": make_git(folder / "git"),
        "tagger": default_tagger(folder / "tagger"),
    }


TOOLS = {
    "captions": ("finetune.make_captions", "{src} --local_model {blip} --max_length 8 --min_length 1"),
    "captions by GIT": ("finetune.make_captions_by_git", "{src} --local_model {git} --max_length 8"),
    "tags": ("finetune.tag_images_by_wd14_tagger", "{src} --local_model {tagger} --thresh 0"),
    "smaller": (
        "tools.resize_images_to_resolution",
        "{src} {out} --max_resolution 32x32 --max_data_loader_n_workers 0",
    ),
    "edges": ("tools.canny", "--input {src} --output {out} --max_data_loader_n_workers 0"),
    "page": ("tools.picture_page", "{src} --output {out}/page.html"),
    "check": ("tools.check_dataset", "{src} --report {out}/report.json --max_data_loader_n_workers 0"),
}
WRITERS = ("captions", "captions by GIT", "tags", "smaller", "edges")
FINDINGS = 3
"""Status of check_dataset.py when there is something to tell."""


@pytest.fixture
def run(models, tmp_path, capsys):
    """Run a tool on a folder; returns its status and what it said."""

    def start(name: str, source: Path, *more: str, out: Path | None = None) -> tuple[int, str]:
        module, words = TOOLS[name]
        names = {**models, "src": source, "out": out or tmp_path / "out"}
        capsys.readouterr()
        argv = [word.format(**names) for word in words.split()]
        status = run_tool(importlib.import_module(module).main, *argv, *more)
        said = capsys.readouterr()
        assert "Traceback" not in said.err, said.err
        return status, said.err + said.out

    return start


def bad_pictures(folder: Path) -> list[str]:
    """Add what is no picture though its name says so."""
    folder.mkdir(exist_ok=True)
    (folder / "zero.png").write_bytes(b"")
    (folder / "page.png").write_text("<html><body>404</body></html>")
    (folder / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    Image.new("RGB", (64, 64), "red").save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:60])
    names = ["zero.png", "page.png", "pointer.jpg", "cut.png"]
    if os.name != "nt":
        (folder / "gone.png").symlink_to("nowhere")
        os.mkfifo(folder / "pipe.png")
        names += ["gone.png", "pipe.png"]
    return names


def results(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if not path.name.startswith(".")} if folder.exists() else set()


@pytest.mark.parametrize("name", TOOLS)
def test_bad_pictures_are_named_and_the_others_done(run, tmp_path, name, caplog):
    source = make_pictures(tmp_path / "src", 2)
    bad = bad_pictures(source)
    status, said = run(name, source)
    assert status == (FINDINGS if name == "check" else 0), said
    for one in bad:
        if not (name == "page" and one == "cut.png"):  # its header is whole, and pages show no more than a link
            assert one in said + caplog.text
    made = results(source) | results(tmp_path / "out")
    if name in WRITERS:
        stems = {Path(one).stem.partition("+")[0] for one in made - set(bad) - {"src", "out"}}
        assert {"0", "1"} <= stems
        assert not any(path.stem.startswith(("zero", "cut")) for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_but_bad_pictures(run, tmp_path, name):
    source = tmp_path / "src"
    bad_pictures(source)
    before = results(source)
    status, said = run(name, source)
    assert status == 2
    assert said.splitlines()[-1].startswith("error: ") and "pictures could be used" in said.splitlines()[-1]
    assert results(source) == before and not results(tmp_path / "out")


@pytest.mark.parametrize("name", TOOLS)
def test_folders_without_pictures(run, tmp_path, name):
    (tmp_path / "empty").mkdir()
    status, said = run(name, tmp_path / "empty")
    assert status == 2 and "empty: holds no pictures" in said
    assert ("--recursive" in said) == (name not in ("smaller", "edges"))
    status, said = run(name, tmp_path / "missing")
    assert status == 2 and ("no such folder" in said or "not found" in said)


@posix
@pytest.mark.parametrize("name", TOOLS)
def test_names_of_any_kind(run, tmp_path, name):
    source = tmp_path / "src"
    picture = make_pictures(tmp_path / "one", 1) / "0.png"
    source.mkdir()
    for odd in ODD_NAMES:
        shutil.copy(picture, source / odd)
    status, said = run(name, source)
    assert status == (FINDINGS if name == "check" else 0), said
    if name in WRITERS:
        made = {Path(one).stem.partition("+")[0] for one in results(source) | results(tmp_path / "out")}
        assert made >= {Path(odd).stem for odd in ODD_NAMES}
        assert len(results(source) | results(tmp_path / "out")) >= 2 * len(ODD_NAMES) - (name == "edges") * len(
            ODD_NAMES
        )
    if name == "check":
        report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
        assert "undecodable\udcff.png" in json.dumps(report, ensure_ascii=False)


def test_a_page_holds_no_markup_of_names_and_prompts(run, tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    texts = PngInfo()
    for key in ("prompt", "negative-prompt", "seed", "sampler"):
        texts.add_text(key, "</h2><script>alert(1)</script>'\"")
    Image.new("RGB", (8, 8)).save(source / "'onerror='alert(1).png", pnginfo=texts)
    assert run("page", source)[0] == 0
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "'onerror='" not in page


@pytest.mark.parametrize("name", ["smaller", "edges"])
def test_a_file_in_the_place_of_the_results(run, tmp_path, name):
    source = make_pictures(tmp_path / "src", 1)
    (tmp_path / "file").write_text("mine")
    status, said = run(name, source, out=tmp_path / "file")
    assert status == 2 and "is a file, not a folder" in said
    assert (tmp_path / "file").read_text() == "mine"
    status, said = run(name, source, out=source)
    assert status == 2 and "is the folder that is read" in said


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_loses_nothing(run, tmp_path, name, monkeypatch):
    source = make_pictures(tmp_path / "src", 4)
    monkeypatch.setattr("library.faults._plan", None)
    monkeypatch.setenv("SD_FAULT", "save.before_replace:enospc:3+")
    status, said = run(name, source)
    assert status == 4
    assert "cannot save" in said.splitlines()[-1]
    folder = tmp_path / "out" if name in ("smaller", "edges") else source
    texts = [path for path in folder.iterdir() if path.suffix != ".png" or folder != source]
    assert len(texts) == 2 and not [path for path in folder.iterdir() if path.name.startswith(".")]
    before = {path: path.stat().st_mtime_ns for path in texts}
    monkeypatch.delenv("SD_FAULT")
    assert run(name, source, "--skip_existing")[0] == 0
    assert len(list(folder.iterdir())) == (4 if folder != source else 8)
    assert {path: path.stat().st_mtime_ns for path in texts} == before


@posix
@pytest.mark.parametrize("name", WRITERS)
def test_ctrl_c_ends_with_whole_files(run, tmp_path, name, monkeypatch):
    source = make_pictures(tmp_path / "src", 40)
    monkeypatch.setattr("library.faults._plan", None)
    monkeypatch.setenv("SD_FAULT", "save.open:int:2")
    status, said = run(name, source)
    assert status == 130
    assert "pictures are done" in said.splitlines()[-1] and "are left" in said.splitlines()[-1]
    folder = tmp_path / "out" if name in ("smaller", "edges") else source
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    monkeypatch.delenv("SD_FAULT")
    assert run(name, source, "--skip_existing")[0] == 0
    assert len(list(folder.iterdir())) == (40 if folder != source else 80)


def test_loader_processes_that_cannot_be_started(run, tmp_path, monkeypatch):
    def refuse(*_args, **_more):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("concurrent.futures.ThreadPoolExecutor.submit", refuse)
    monkeypatch.setattr("library.data.picture_loading.ProcessPoolExecutor", refuse)
    from library.data.picture_loading import PictureLoading
    from library.errors import UserError

    for workers in (0, 2):
        with pytest.raises(UserError, match="cannot be started"):
            list(PictureLoading(len, workers=workers, ahead=1).iterate([tmp_path]))
