"""Samples in tar files: found once, read in place, whatever wrote the file; what could harm is named and left alone."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_helpers import make_shard, picture, sample_files, write_tar

from library.data import tar_index, tar_samples
from library.data.array_file import pack_arrays, unpack_arrays
from library.data.images import BadImage, image_size, load_image
from library.data.shards import expand_braces, expand_shards
from library.data.storage import Locator, locator_of, read_part
from library.data.tar_headers import BLOCK, NotATar, TarWalk
from library.data.tar_index import index_paths, index_shard, index_shards
from library.errors import UserError


def settle(*paths: Path) -> None:
    """Make files look as if nobody had touched them for a while, so that their index is kept."""
    old = time.time_ns() - 10_000_000_000
    for path in paths:
        os.utime(path, ns=(old, old))


@pytest.fixture(autouse=True)
def _every_file_is_quiet(monkeypatch):
    # The time of status change cannot be set back.
    monkeypatch.setattr(tar_index, "RACY_NS", -(10**18))


def test_samples_of_a_shard(tmp_path):
    shard = make_shard(tmp_path / "a.tar", 3)
    samples = list(index_shard(str(shard)))
    assert [sample.key for sample in samples] == ["set/0000", "set/0001", "set/0002"]
    second = samples[1]
    assert second.caption == "caption 1"
    assert second.facts() == {"score": 1}
    assert second.header == (24, 16, 1) or second.header[:2] == (24, 16)
    assert second.picture.read() == picture(1)
    assert second.others == {}


def test_pictures_are_decoded_in_place_like_files(tmp_path):
    shard = make_shard(tmp_path / "a.tar", 2)
    path = str(index_shard(str(shard)).sample(1).picture)
    (tmp_path / "b.jpg").write_bytes(picture(1))
    assert np.array_equal(load_image(path), load_image(tmp_path / "b.jpg"))
    assert image_size(path) == (24, 16)
    assert locator_of(path) == pickle.loads(pickle.dumps(locator_of(path)))
    assert locator_of(tmp_path / "b.jpg") is None
    broken = Locator(str(shard), "set/0001.jpg", 3, 100)
    with pytest.raises(BadImage, match="set/0001.jpg"):
        load_image(str(broken))
    with pytest.raises(BadImage, match="shorter"):
        load_image(f"{shard}!/x.jpg@{shard.stat().st_size - 5}+100")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_is_read_as_tarfile_reads_it(tmp_path, format):
    deep = "/".join(["folder" * 3] * 8) if format != tarfile.USTAR_FORMAT else "long" * 20
    members = {f"{deep}/0001.jpg": picture(1), f"{deep}/0001.txt": b"x", "a.jpg": picture(2), "a.txt": b""}
    if format != tarfile.USTAR_FORMAT:
        members["kätzchen.jpg"] = picture(3)
    members["large.txt"] = b"y" * 10_000
    extra = [tarfile.TarInfo("folder"), tarfile.TarInfo("last.txt")]
    extra[0].type = tarfile.DIRTYPE
    path = write_tar(tmp_path / "a.tar", members, format=format, extra=extra)
    with tarfile.open(path) as tar:
        wanted = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    walk = TarWalk(lambda offset, size: read_part(str(path), offset, size), path.stat().st_size)
    assert [(m.name, m.offset, m.size) for m in walk if m.kind == "file"] == wanted
    assert walk.cut_at is None
    texts = {sample.key: sample.texts for sample in index_shard(str(path))}
    assert texts["large"] == {"txt": "y" * 10_000}


def test_the_guides_own_tar_command(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name, data in {**sample_files(2, folder=""), **sample_files(1, folder="")}.items():
        (folder / name).write_bytes(data)
    subprocess.run(["tar", "--sort=name", "-cf", "dataset.tar", "dataset/"], cwd=tmp_path, check=True)
    index = index_shard(str(tmp_path / "dataset.tar"))
    assert [sample.key for sample in index] == ["dataset/0001", "dataset/0002"]
    assert index.sample(0).facts() == {"score": 1}
    assert index.notes == ()


def test_grouping(tmp_path):
    members = {
        "./a/1.png": picture(1, kind="PNG"),
        "./a/2.jpg": picture(2),
        "b/1.txt": b"another folder",
        "./a/1.txt": "\ufeffbyte order mark".encode(),
        "a/1.mask.png": picture(3, kind="PNG"),
        "a/1.JPG": picture(4),
        "a/1.caption": b"not this one",
        "a/._1.jpg": b"AppleDouble",
        "a/__meta__.json": b"{}",
        "a/1.mp4": b"film",
    }
    index = index_shard(str(write_tar(tmp_path / "a.tar", members)))
    found = {sample.key: sample for sample in index}
    assert list(found) == ["a/1", "a/2", "b/1"]
    assert found["a/1"].picture.read() == picture(4)
    assert set(found["a/1"].others) == {"png", "mask.png"}
    assert found["a/1"].caption == "byte order mark"
    assert found["b/1"].picture is None
    assert index.skipped == {"hidden file": 2, "other file (.mp4)": 1}


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/executed_by_a_pickle",)


def test_members_that_could_harm_are_named_and_left_alone(tmp_path):
    pickled = pickle.dumps(Bomb())
    members = {
        **sample_files(1),
        "/etc/passwd.txt": b"absolute",
        "../../up.jpg": picture(1),
        "set/../../up.txt": b"up",
        "C:\\x.jpg": picture(1),
        "..\\x.jpg": picture(1),
        **{f"set/0001.{suffix}": pickled for suffix in ("pkl", "pyd", "pickle", "pth", "pt")},
        "set/\x1b[31mred\n.pkl": pickled,
    }
    links = [special("set/0002.jpg", tarfile.SYMTYPE, "/etc/passwd"), special("set/0003.jpg", tarfile.LNKTYPE, "a")]
    devices = [special("set/0004.jpg", tarfile.CHRTYPE), special("set/0005.jpg", tarfile.FIFOTYPE)]
    index = index_shard(str(write_tar(tmp_path / "a.tar", members, extra=[*links, *devices])))
    assert [sample.key for sample in index] == ["set/0001"]
    assert set(index.sample(0).texts) == {"txt", "json"}
    assert index.skipped == {"unsafe name": 5, "pickled data": 6, "link": 2, "device": 1, "pipe": 1}
    text = "\n".join(map(str, index.problems()))
    for name in ("/etc/passwd.txt", "set/0001.pkl", "set/0002.jpg: a link", "a.tar"):
        assert name in text
    assert "\x1b" not in text
    assert not Path("/tmp/executed_by_a_pickle").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.tar.index", "a.tar"]


def with_size(path: Path, size: int, at: int = 0) -> None:
    """Overwrite the size that the header at a byte declares, and mend its checksum."""
    data = bytearray(path.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(data[at : at + BLOCK]), "utf-8", "surrogateescape")
    header.size = size
    data[at : at + BLOCK] = header.tobuf(tarfile.GNU_FORMAT)[:BLOCK]
    path.write_bytes(data)


def test_huge_declared_sizes_cost_nothing(tmp_path):
    shard = make_shard(tmp_path / "a.tar", 2)
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-1].offset
    with_size(shard, 10 << 30, at=last)
    index = index_shard(str(shard))
    assert [sample.key for sample in index] == ["set/0000"]
    assert index.notes[0] == f"cut off at byte {last}, 1 samples used"
    with_size(shard, 1 << 60, at=0)
    index = index_shard(str(shard))
    assert len(index) == 0
    assert "cut off at byte 0" in index.notes[0]


def test_members_above_the_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_samples, "MAX_MEMBER_BYTES", 700)
    monkeypatch.setattr(tar_samples, "MAX_TEXT_BYTES", 10)
    members = {"a.jpg": b"\xff\xd8" + b"x" * 1000, "b.jpg": picture(1)[:650], "c.txt": b"short", "d.txt": b"y" * 11}
    index = index_shard(str(write_tar(tmp_path / "a.tar", members)))
    assert [sample.key for sample in index] == ["b", "c"]
    assert index.skipped["too large"] == 2
    with pytest.raises(OSError, match="limit"):
        Locator(str(tmp_path / "a.tar"), "a.jpg", 0, 100 << 20).read(limit=1 << 20)


def test_an_extended_header_cannot_be_a_bomb(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"comment": "x" * (3 << 20)}
    path = write_tar(tmp_path / "a.tar", {}, format=tarfile.PAX_FORMAT, extra=[info])
    index = index_shard(str(path))
    assert len(index) == 0
    assert "oversized header" in index.notes[0]


def test_duplicates_and_bad_members_are_reported(tmp_path):
    members = [("a.jpg", picture(1)), ("a.jpg", picture(2)), ("b.jpg", b"no picture"), ("c.jpg", b"")]
    members += [("d.txt", b"\xff\xfe\x00x"), ("d.jpg", picture(3))]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = index_shard(str(tmp_path / "a.tar"))
    found = {sample.key: sample for sample in index}
    assert found["a"].picture.read() == picture(1)
    assert found["b"].header == (0, 0, 0)
    assert found["d"].caption is None
    assert index.skipped == {"duplicate": 1, "bad picture": 2, "bad text": 1}


def test_damaged_json_belongs_to_its_sample(tmp_path):
    index = index_shard(str(write_tar(tmp_path / "a.tar", {"a.json": b"{", "b.json": b"[1]", "c.json": b'{"a": 1}'})))
    for number in (0, 1):
        with pytest.raises(UserError, match=r"\.json"):
            index.sample(number).facts()
    assert index.sample(2).facts() == {"a": 1}


@pytest.mark.parametrize("keep", [0, 100, 511, 512, 513, 700, 1024, 2000, 3000, 3600, 4200, 5000])
def test_a_cut_file_is_never_silently_short(tmp_path, keep):
    whole = make_shard(tmp_path / "whole.tar", 3)
    wanted = {sample.key: sample.picture.read() for sample in index_shard(str(whole))}
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[:keep])
    try:
        index = index_shard(str(path))
    except UserError as error:
        assert keep < 512
        assert "cut.tar" in str(error)
        return
    assert index.skipped["damage"] == 1
    assert f"{len(index)} samples used" in index.notes[0]
    for sample in index:
        assert sample.picture.read() == wanted[sample.key]
        assert {"txt", "json"} == set(sample.texts) or "end mark" in index.notes[0]


def test_joined_archives_are_noticed(tmp_path):
    one, two = make_shard(tmp_path / "1.tar", 1), make_shard(tmp_path / "2.tar", 1, start=1)
    (tmp_path / "both.tar").write_bytes(one.read_bytes() + two.read_bytes())
    index = index_shard(str(tmp_path / "both.tar"))
    assert "behind its end mark" in index.notes[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x1f\x8b" + bytes(1000), "compressed with gzip"),
        (b"<!DOCTYPE html>" + b"x" * 1000, "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 600, "git lfs pull"),
        (bytes(10240), "nothing but zeros"),
        (b"", "no tar file"),
        (b"x" * 5000, "no tar file"),
    ],
)
def test_what_is_no_tar_file(tmp_path, content, words):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="a.tar") as refused:
        index_shard(str(tmp_path / "a.tar"))
    assert words in str(refused.value)


def test_missing_files_are_named_together(tmp_path):
    good = make_shard(tmp_path / "good.tar", 1)
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(UserError) as refused:
        index_shards([str(good), str(tmp_path / "none.tar"), str(tmp_path / "pipe.tar")])
    assert len(refused.value.problems) == 2


def test_the_index_is_kept_and_renewed(tmp_path, monkeypatch):
    shard = make_shard(tmp_path / "a.tar", 2)
    reads: list[str] = []
    inner = tar_index.collect
    monkeypatch.setattr(tar_index, "collect", lambda *args: reads.append(args[0]) or inner(*args))
    first = index_shard(str(shard))
    again = index_shard(str(shard))
    assert len(reads) == 1
    assert list(first) == list(again)
    make_shard(shard, 3)
    settle(shard)
    assert len(index_shard(str(shard))) == 3
    assert len(reads) == 2
    [kept] = index_paths(str(shard), None)
    for damaged in (b"", b"junk", kept.read_bytes()[:-64], kept.read_bytes().replace(b"caption 1", b"caption 2")):
        kept.write_bytes(damaged)
        assert index_shard(str(shard)).sample(1).caption == "caption 1"
    assert len(reads) == 6


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("starts", lambda a: a[::-1].copy()),
        ("starts", lambda a: a.astype(np.float64)),
        ("spans", lambda a: a.reshape(-1)),
        ("spans", lambda a: -a),
        ("spans", lambda a: a + 10**9),
        ("headers", lambda a: a[:-1]),
        ("keys_offsets", lambda a: a + 1),
        ("texts_offsets", lambda a: a * 0),
        ("names_offsets", lambda a: a[:0]),
        ("texts", lambda a: a | 128),
    ],
)
def test_an_index_that_somebody_forged_is_not_used(tmp_path, column, change):
    shard = make_shard(tmp_path / "a.tar", 3)
    wanted = list(index_shard(str(shard)))
    [path] = index_paths(str(shard), None)
    header, arrays = unpack_arrays(path.read_bytes(), verify=True)
    arrays[column] = change(arrays[column])
    path.write_bytes(b"".join(pack_arrays(header, arrays.items())))
    assert list(index_shard(str(shard))) == wanted


def test_a_file_that_was_just_changed_gets_no_index(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "RACY_NS", 2_000_000_000)
    shard = make_shard(tmp_path / "a.tar", 1)
    index_shard(str(shard))
    assert not index_paths(str(shard), None)[0].exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    shard = make_shard(tmp_path / "data" / "a.tar", 1)
    inner = tar_index.files.write_bytes

    def write(path, data):
        if Path(path).parent == shard.parent:
            raise PermissionError(13, "read-only")
        inner(path, data)

    monkeypatch.setattr(tar_index.files, "write_bytes", write)
    assert len(index_shard(str(shard))) == 1
    assert len(index_shard(str(shard), cache_dir=str(tmp_path / "cache"))) == 1
    assert [p.name[:10] for p in (tmp_path / "cache").iterdir()] == ["tar_index-"]
    monkeypatch.setattr(tar_index, "collect", None)
    assert len(index_shard(str(shard), cache_dir=str(tmp_path / "cache"))) == 1


def test_many_shards_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    shards = [str(make_shard(tmp_path / f"{number}.tar", 2, start=10 * number)) for number in range(4)]
    inner, seen = tar_index.collect, []

    def stopping(shard, *rest):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(shard)
        return inner(shard, *rest)

    monkeypatch.setattr(tar_index, "collect", stopping)
    with pytest.raises(KeyboardInterrupt):
        index_shards(shards, workers=1)
    seen.clear()
    told = []
    monkeypatch.setattr(tar_index, "collect", lambda *args: seen.append(args[0]) or inner(*args))
    found = index_shards(shards, workers=2, progress=lambda done, total: told.append((done, total)))
    assert sorted(seen) == shards[2:]
    assert told[-1] == (4, 4)
    assert [sample.key for index in found for sample in index][::2] == [f"set/{10 * n:04d}" for n in range(4)]


def test_reading_from_many_threads_and_files(tmp_path, monkeypatch):
    from library.data import storage

    monkeypatch.setattr(storage, "_MOST_OPEN", 3)
    shards = [make_shard(tmp_path / f"{number}.tar", 4) for number in range(8)]
    locators = [sample.picture for shard in shards for sample in index_shard(str(shard))]
    wrong: list[str] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            number = rng.randrange(len(locators))
            if locators[number].read() != picture(number % 4):
                wrong.append(str(locators[number]))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(storage._open_files._files) <= 3
    child = os.fork()
    if not child:
        os._exit(0 if locators[0].read() == picture(0) else 1)
    assert os.waitpid(child, 0)[1] == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_damage_anywhere_never_escapes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(make_shard(folder / "a.tar", 2).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "b.tar"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        for sample in index_shard(str(path)):
            if sample.picture is not None:
                assert len(sample.picture.read()) == sample.picture.size
    except UserError as error:
        assert "b.tar" in str(error)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=3000))
def test_random_bytes_are_no_tar_file(content):
    walk = TarWalk(lambda offset, size: content[offset : offset + size], len(content))
    try:
        members = list(walk)
    except NotATar:
        return
    assert members == [] or walk.cut_at is not None


def test_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/a-0008.tar", "data/a-0009.tar", "data/a-0010.tar", "cat.tar", "dog.tar", "data/note.txt"):
        make_shard(tmp_path / name, 1)
    assert expand_shards("data/a-{0008..0010}.tar") == [f"data/a-{n}.tar" for n in ("0008", "0009", "0010")]
    assert expand_shards(["{cat,dog}.tar", "cat.tar"]) == ["cat.tar", "dog.tar"]
    assert expand_shards("data") == ["data/a-0008.tar", "data/a-0009.tar", "data/a-0010.tar"]
    assert expand_shards("data/*[89].tar") == ["data/a-0008.tar", "data/a-0009.tar"]
    assert expand_shards("file:cat.tar") == ["cat.tar"]
    assert expand_shards("https://host/{0..2}.tar") == [f"https://host/{n}.tar" for n in range(3)]
    assert expand_shards("s3://bucket/{a,b}.tar") == ["s3://bucket/a.tar", "s3://bucket/b.tar"]
    Path("list.yml").write_text("- cat.tar\n- data/a-{0008..0009}.tar\n", encoding="utf-8")
    assert expand_shards("list.yml") == ["cat.tar", "data/a-0008.tar", "data/a-0009.tar"]
    Path("list.txt").write_text("# mine\ncat.tar\n\n", encoding="utf-8")
    assert expand_shards("list.txt") == ["cat.tar"]
    assert list(expand_braces("{3..1}{a,b}")) == ["3a", "3b", "2a", "2b", "1a", "1b"]
    assert list(expand_braces("{x}")) == ["{x}"]


@pytest.mark.parametrize(
    "entry",
    ["pipe:aws s3 cp s3://a/b.tar -", "PIPE:touch /tmp/x", "ftp://host/a.tar", "file:none.tar", "none/*.tar", "", ".",
     "{0..999999999}.tar", "{0..9999}{0..9999}.tar", "none-{0..2}.tar", "gs://bucket/a.tar", "$HOME/a.tar", 3,
     "x!/y.tar"],
)  # fmt: skip
def test_entries_that_cannot_be_used(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--webdataset_path"):
        expand_shards([entry])


def test_all_wrong_entries_are_named_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        expand_shards(["pipe:ls", "a.tar", "b.tar"])
    assert len(refused.value.problems) == 3
