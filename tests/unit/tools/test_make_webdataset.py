"""Folders become tar shards: deterministic, whole, resumable; and shards that exist are checked."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from library.data.tar_index import index_shard
from tests.support import run_tool
from tools import make_webdataset
from tools.make_webdataset import limits, shard_limit


def make_folder(folder: Path, count: int = 7) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(f"caption {number}", encoding="utf-8")
        (folder / f"{number:04d}.json").write_text(f'{{"score": {number}}}', encoding="utf-8")
    return folder


def pack(*argv) -> int:
    return run_tool(make_webdataset.main, *argv, "--max_data_loader_n_workers=0")


def members(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_shards(tmp_path, capsys):
    source = make_folder(tmp_path / "photos")
    assert pack(source, tmp_path / "out", "--shard_size=3") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"data-000{n}.tar" for n in range(3)]
    assert members(tmp_path / "out" / "data-0002.tar") == ["0006.json", "0006.png", "0006.txt"]
    with tarfile.open(tmp_path / "out" / "data-0001.tar") as tar:
        info = tar.getmember("0004.png")
        assert (info.mtime, info.uid, info.gid, info.uname, info.mode) == (0, 0, 0, "", 0o644)
        assert tar.extractfile(info).read() == (source / "0004.png").read_bytes()
    text = capsys.readouterr().out
    assert "3 tar files" in text and "7 pictures, 0 of them without a caption" in text
    assert "data-{0000..0002}.tar" in text
    found = [s for n in range(3) for s in index_shard(str(tmp_path / "out" / f"data-000{n}.tar"))]
    assert [(s.caption, s.facts()["score"], s.header[0]) for s in found] == [
        (f"caption {n}", n, 8 + n) for n in range(7)
    ]
    assert run_tool(make_webdataset.main, "--check", tmp_path / "out", "--decode") == 0


def test_the_same_bits_every_time(tmp_path):
    for name in ("one", "two"):
        assert pack(make_folder(tmp_path / name / "photos"), tmp_path / name / "out", "--shard_size=4kB") == 0
    one, two = (sorted((tmp_path / name / "out").glob("*.tar")) for name in ("one", "two"))
    assert len(one) > 2
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    assert all(p.stat().st_size % 10240 == 0 for p in one)


def test_what_was_written_is_looked_at(tmp_path, monkeypatch, capsys):
    from library import files

    inner = files.write_bytes
    monkeypatch.setattr(files, "write_bytes", lambda path, pieces: inner(path, list(pieces)[3:]))
    assert pack(make_folder(tmp_path / "photos"), tmp_path / "out") == 4
    assert "data-0000.tar does not hold what was written into it" in capsys.readouterr().err


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    source, target = make_folder(tmp_path / "photos"), tmp_path / "out"
    assert pack(source, target, "--shard_size=2") == 0
    (target / "data-0001.tar").write_bytes((target / "data-0001.tar").read_bytes()[:3000])
    (target / "data-0003.tar").unlink()
    (source / "0005.txt").write_text("CAPTION 5", encoding="utf-8")
    from library.data import tar_writing

    written = []
    inner = tar_writing.write_shard
    monkeypatch.setattr(tar_writing, "write_shard", lambda path, shard: written.append(path.name) or inner(path, shard))
    assert pack(source, target, "--shard_size=2", "--skip_existing") == 0
    assert written == ["data-0001.tar", "data-0002.tar", "data-0003.tar"]
    assert index_shard(str(target / "data-0002.tar")).sample(1).caption == "CAPTION 5"


def test_bad_files_are_named_and_the_rest_is_packed(tmp_path, caplog):
    source = make_folder(tmp_path / "photos", 4)
    (source / "0001.png").write_bytes(b"nothing")
    (source / "0002.json").write_text("{", encoding="utf-8")
    (source / "a.b.png").write_bytes((source / "0003.png").read_bytes())
    (source / "a_b.png").write_bytes((source / "0003.png").read_bytes())
    (source / "0003.txt").rename(source / "0003.caption")
    assert pack(source, tmp_path / "out") == 0
    names = members(tmp_path / "out" / "data-0000.tar")
    assert names == ["0000.json", "0000.png", "0000.txt", "0003.json", "0003.png", "0003.txt", "a_b.png"]
    for word in ("0001.png", "0002.json", "same name"):
        assert word in caplog.text
    assert pack(source, tmp_path / "none", "--caption_extension=none") == 0
    assert "0000.txt" not in members(tmp_path / "none" / "data-0000.tar")


def test_sub_folders_and_left_over_shards(tmp_path, capsys):
    make_folder(tmp_path / "photos" / "cats", 2)
    make_folder(tmp_path / "photos" / "dogs", 2)
    assert pack(tmp_path / "photos", tmp_path / "out", "--recursive", "--shard_size=1") == 0
    assert members(tmp_path / "out" / "data-0003.tar")[0] == "dogs/0001.json"
    assert pack(tmp_path / "photos", tmp_path / "out", "--recursive", "--shard_size=2") == 0
    assert "2 files of an earlier run are left" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [(), ("photos",), ("none", "out"), ("photos", "out", "--shard_size=0"), ("photos", "out", "--shard_size=x"),
             ("photos", "out", "--decode"), ("empty", "out"), ("--check", "none.tar"), ("--check", "pipe:ls"),
             ("photos", "out", "--check", "a.tar"), ("photos", "out", "--prefix=a/b")],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_a_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", 1)
    (tmp_path / "empty").mkdir()
    assert pack(*argv) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_check_finds_what_is_wrong(tmp_path, capsys):
    good = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(good, "JPEG")
    content = {
        "a.jpg": good.getvalue(),
        "b.jpg": good.getvalue()[:900],
        "b.txt": b"cut picture",
        "c.txt": b"no picture",
        "d.jpg": b"junk",
        "d.txt": b"no picture at all",
        "e.pkl": b"pickle",
        "f.jpg": good.getvalue(),
        "f.txt": b"fine",
        "f.json": b"{",
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert run_tool(make_webdataset.main, "--check", tmp_path / "a.tar", "--decode") == 3
    text = capsys.readouterr().out
    for words in ("e.pkl: may run code", "d.jpg: not an image", "a: has no caption", "c: has no picture", "f: JSON"):
        assert words in text
    assert "b: cannot be decoded" in text
    assert "f: has no" not in text


def test_sizes():
    assert limits("1000") == (1000, None)
    assert limits("500MB") == (None, 500_000_000)
    assert limits("1.5GiB") == (None, 3 << 29)
    assert shard_limit("2 kb") == "2 kb"
