"""Tar files as data sets: rows, filters, captions, buckets, caches, and batches like those of folders."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from loading_helpers import FAMILY, FakeTokenizer, fill
from scan_helpers import config
from tar_helpers import make_shard, picture, sample_files, write_tar

from library.contracts import Position, RunLength
from library.data.cache_names import CacheRules, cache_path, text_cache_path
from library.data.dataset_spec import SubsetSpec
from library.data.loader import PlannedBatches
from library.data.opening import open_data
from library.data.options import CacheOptions, DatasetOptions, LoaderOptions, SubsetOptions
from library.data.storage import holding
from library.data.summary import folder_name
from library.errors import UserError

START = Position()


def opened(*, kinds=("dreambooth",), subset=None, cache=None, family=FAMILY, **data):
    data.setdefault("resolution", "64")
    return open_data(
        DatasetOptions(**data),
        SubsetOptions(**(subset or {})),
        CacheOptions(**(cache or {})),
        spec=family,
        kinds=kinds,
        tokenizers=(FakeTokenizer(),),
    )


def batches(data, *, workers=0, steps=8, start=START):
    count = data.batch_count()
    length = RunLength(steps, -(-steps // count), count, 1, 1, 1)
    loader = PlannedBatches(
        data, length, rank=0, seed=3, loader=LoaderOptions(max_data_loader_n_workers=workers), start_method="fork"
    )
    return list(loader.iterate(start))


def seen(found):
    return [(batch.record_keys, batch.captions, batch.pixels.numpy().tobytes()) for batch in found]


@pytest.fixture
def shards(tmp_path):
    first, second = make_shard(tmp_path / "t" / "a.tar", 5), make_shard(tmp_path / "t" / "b.tar", 4, start=5)
    return [str(first), str(second)]


def test_rows_are_those_of_the_tar_files(shards):
    data = opened(webdataset_path=tuple(shards))
    assert list(data.table.keys()) == [f"a/set/{n:04d}.jpg" for n in range(5)] + [
        f"b/set/{n:04d}.jpg" for n in range(5, 9)
    ]
    assert [data.table.key(row) for row in range(9)] == list(data.table.keys())
    assert list(data.table.captions()) == [f"caption {n}" for n in range(9)]
    assert data.table.size_wh(0) == (24, 16)
    assert data.table.file_sizes[3] == len(picture(3))


def test_what_filters_find_is_kept_in_a_folder_that_is_named(tmp_path, shards):
    finder = SimpleNamespace(kept="edges", from_file=False)
    with pytest.raises(UserError, match="--cache_dir: is needed: nothing can be kept beside images in tar files"):
        opened(webdataset_path=tuple(shards)).keep_conditions(finder, "_control")
    opened(webdataset_path=tuple(shards), cache={"cache_dir": str(tmp_path)}).keep_conditions(finder, "_control")


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("https://host/photos/a.tar?signature=secret", "a.tar"),
        ("pipe:curl -H token:secret https://host/a.tar", "pipe"),
        ("photos/what?.tar", "what?.tar"),
    ],
)
def test_models_tell_no_keys_to_where_data_are(entry, told):
    assert folder_name(SubsetSpec(webdataset_path=(entry, "b.tar"))) == told


def test_batches_equal_those_of_a_folder_of_the_same_pictures(tmp_path, shards):
    folder = tmp_path / "photos" / "1_x"
    folder.mkdir(parents=True)
    for number in range(9):
        for name, content in sample_files(number, folder="").items():
            (folder / name).write_bytes(content)
    flags = {"enable_bucket": True, "min_bucket_reso": 64, "batch_size": 2}
    subset = {"caption_extension": ".txt"}
    of_folder = batches(opened(train_data_dir=str(folder.parent), subset=subset, **flags))
    of_tar = batches(opened(webdataset_path=tuple(shards), **flags))
    assert [one[1:] for one in seen(of_folder)] == [one[1:] for one in seen(of_tar)]


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_and_a_later_start_serve_the_same(shards, workers, monkeypatch):
    monkeypatch.setattr("library.data.loader.available_cores", lambda: 4)
    data = opened(webdataset_path=tuple(shards), batch_size=2)
    whole = seen(batches(data))
    assert seen(batches(data, workers=workers)) == whole
    assert seen(batches(data, workers=workers, start=Position(3, 0, 3))) == whole[3:]


def test_filters_choose_samples_and_are_counted(shards, caplog):
    with caplog.at_level("INFO"):
        data = opened(
            webdataset_path=tuple(shards), subset={"dataset_filter": ("score: lambda s: s > 2", "score: score < 7")}
        )
    assert list(data.table.captions()) == [f"caption {n}" for n in range(3, 7)]
    assert "4 of 9 samples are used, left out: 3 lambda s: s > 2; 2 score < 7" in caplog.text


def test_a_filter_that_rejects_everything_is_an_error(shards):
    with pytest.raises(UserError, match=r"dataset_filter: none of 9 samples is left: no 'points' \(9 times\)"):
        opened(webdataset_path=tuple(shards), subset={"dataset_filter": ("points: points > 2",)})


@pytest.mark.parametrize(
    "text", ["score: ().__class__", "score: __import__('os')", "score: 9**9**9", "score: " + "1+" * 5000 + "1"]
)
def test_hostile_filters_are_refused_with_their_column(text):
    (problem, *_) = SubsetOptions(dataset_filter=(text,)).check()
    assert "dataset_filter" in problem.where and "score" in problem.where


def test_captions_come_from_json(tmp_path):
    members = {}
    for number in range(4):
        members.update(sample_files(number, long=f"long {number}", short=f"short {number}"))
    del members["set/0000.json"]
    members["set/0000.json"] = json.dumps({"score": 0, "long": "only long"}).encode()
    path = write_tar(tmp_path / "c.tar", dict(sorted(members.items())))
    plain = opened(webdataset_path=(str(path),), subset={"caption_field": ("json", "json:long")})
    assert list(plain.table.captions()) == ["only long", "long 1", "long 2", "long 3"]
    mixed = opened(webdataset_path=(str(path),), subset={"caption_field": ("json", "alt(long:0.5, short:0.5)")})
    captions = [caption for batch in batches(mixed, steps=40) for caption in batch.captions]
    assert {"only long", "long 1", "short 1"} <= set(captions)
    assert all(caption != "" for caption in captions)
    assert not mixed.fixed_captions and plain.fixed_captions
    assert captions == [caption for batch in batches(mixed, steps=40) for caption in batch.captions]
    assert (
        "long 1" not in mixed.summary()["tag_frequency"]["c.tar"]
        or "short 1" in mixed.summary()["tag_frequency"]["c.tar"]
    )


def test_a_tar_without_captions_is_an_error_unless_they_are_given(tmp_path):
    members = {name: data for n in range(3) for name, data in sample_files(n).items() if not name.endswith(".txt")}
    path = write_tar(tmp_path / "c.tar", members)
    with pytest.raises(UserError, match=r"none of 3 samples has a caption \(txt\)"):
        opened(webdataset_path=(str(path),))
    toml = config(
        tmp_path, f"[[datasets]]\n[[datasets.subsets]]\nwebdataset_path = '{path}'\nclass_tokens = 'a frog'\n"
    )
    assert list(opened(dataset_config=toml).table.captions()) == ["a frog"] * 3


def test_dataset_files_know_tar_files(tmp_path, shards):
    text = f"""
[[datasets]]
resolution = 64
multi_aspect_ratio = ["1/1", "1/2"]
[[datasets.subsets]]
webdataset_path = ['{shards[0]}']
dataset_filter = [["score", "lambda s: s > 1"], [["score"], "score < 4"]]
num_repeats = 3
[[datasets.subsets]]
webdataset_path = '{shards[1]}'
is_reg = true
"""
    data = opened(dataset_config=config(tmp_path, text), family=replace(FAMILY, bucket_step_multiple=16))
    assert data.table.repeats[~data.table.is_reg].tolist() == [3, 3]
    assert data.num_reg_images == data.num_train_images == 6
    assert data.bucket_lists[0] == ((32, 80), (64, 64), (80, 32))
    assert set(map(tuple, data.placements.bucket_wh.tolist())) == {(64, 64)}


def test_wrong_dataset_files_end_with_one_line_each(tmp_path, shards):
    text = f"""
[[datasets]]
[[datasets.subsets]]
webdataset_path = '{shards[0]}'
image_dir = '{tmp_path}'
[[datasets.subsets]]
webdataset_path = 5
[[datasets.subsets]]
webdataset_path = '{shards[1]}'
dataset_filter = [["score", "score.__class__"]]
"""
    with pytest.raises(UserError) as caught:
        opened(dataset_config=config(tmp_path, text))
    lines = [str(problem) for problem in caught.value.problems]
    assert any("webdataset_path and image_dir" in line for line in lines)
    assert any("must be a path or a list of paths" in line for line in lines)
    assert any("dataset_filter" in line and "score" in line for line in lines)


def test_scripts_for_metadata_take_tar_files(shards):
    data = opened(kinds=("finetuning",), webdataset_path=tuple(shards))
    assert data.specs[0].kind == "finetuning" and len(data.table) == 9


def test_regularization_folders_stand_beside_tar_files(tmp_path, shards):
    folder = tmp_path / "reg" / "1_frog"
    folder.mkdir(parents=True)
    (folder / "r.jpg").write_bytes(picture(99))
    data = opened(
        webdataset_path=tuple(shards), reg_data_dir=str(folder.parent), subset={"dataset_filter": ("score: score > 1",)}
    )
    assert data.num_train_images == data.num_reg_images == 7


def test_filters_read_json_beside_pictures_and_in_metadata(tmp_path):
    folder = tmp_path / "photos" / "1_x"
    folder.mkdir(parents=True)
    for number in range(4):
        for name, content in sample_files(number, folder="", deep={"text": f"deep {number}"}).items():
            (folder / name).write_bytes(content)
    chosen = {"dataset_filter": ("score: score > 1",), "caption_field": ("json", "json:deep.text")}
    data = opened(train_data_dir=str(folder.parent), subset=chosen)
    assert list(data.table.captions()) == ["deep 2", "deep 3"]
    meta = tmp_path / "m.json"
    meta.write_text(json.dumps({f"{n:04d}": {"caption": f"c {n}", "score": n} for n in range(4)}))
    data = opened(
        kinds=("finetuning",),
        in_json=str(meta),
        train_data_dir=str(folder),
        subset={"dataset_filter": ("score: score < 2",)},
    )
    assert list(data.table.captions()) == ["c 0", "c 1"]


def test_caches_lie_in_the_cache_folder_and_are_used_again(tmp_path, shards):
    with pytest.raises(UserError, match="--cache_dir: is needed"):
        opened(webdataset_path=tuple(shards), cache={"cache_latents_to_disk": True})
    cache = {"cache_latents_to_disk": True, "cache_latents": True, "cache_dir": str(tmp_path / "cache")}
    first = opened(webdataset_path=tuple(shards), cache=cache)
    assert len(fill(first).missing) == 9
    assert len(list((tmp_path / "cache").rglob("*_0024x0016_sd.npz"))) == 9
    again = opened(webdataset_path=tuple(shards), cache=cache)
    assert again.latent_plan("vae").reused == 9
    again.use_latents(again.latent_plan("vae"), "vae")
    assert batches(again)[0].latents.shape == (1, 4, 8, 8)
    make_shard(Path(shards[0]), 5, start=100)
    assert opened(webdataset_path=tuple(shards), cache=cache).latent_plan("vae").reused <= 4


def test_names_of_caches_cannot_collide(tmp_path):
    members = {}
    for name in ("x/a/0.jpg", "x/b/0.jpg", "x_a/0.jpg", "x/a_0.jpg", "x/ä/0.jpg", "x/ö/0.jpg"):
        members |= {name: picture(len(members)), f"{name[:-4]}.txt": b"c"}
    one, two = write_tar(tmp_path / "p" / "s.tar", members), write_tar(tmp_path / "q" / "s.tar", members)
    data = opened(webdataset_path=(str(one), str(two)))
    rules = CacheRules(folder=str(tmp_path / "cache"))
    paths = [cache_path(record, rules) for record in data.table]
    texts = [text_cache_path(record.path, replace(rules, suffix="_te_outputs")) for record in data.table]
    assert len({*paths, *texts}) == 24
    assert all(Path(path).resolve().is_relative_to(tmp_path / "cache") for path in (*paths, *texts))


def test_stable_cascade_names_tell_no_size(tmp_path):
    from library.models.cascade.specs import STAGE_C

    write = tmp_path / "photos" / "1_x"
    write.mkdir(parents=True)
    (write / "a.jpg").write_bytes(picture(1))
    (write / "a.npz").write_bytes(b"latents of something else")
    cache = {"cache_latents": True, "cache_latents_to_disk": True}
    data = opened(train_data_dir=str(write.parent), cache=cache, family=STAGE_C, resolution="64")
    plan = data.latent_plan("effnet")
    assert plan.reasons == {"not cached yet": 1}
    data.use_latents(plan, "effnet")
    data.store_latents(0, np.ones((16, 2, 2), np.float32))
    assert (write / "a_sc_latents.npz").is_file()
    assert (
        opened(train_data_dir=str(write.parent), cache=cache, family=STAGE_C, resolution="64")
        .latent_plan("effnet")
        .reused
        == 1
    )
    assert text_cache_path(str(write / "a.jpg"), data.cache_rules(STAGE_C.text_cache_suffix)).endswith(
        "a_sc_te_outputs.npz"
    )


def test_lists_of_aspect_ratios_make_buckets(tmp_path):
    members = {f"{n}.jpg": picture(n, size=size) for n, size in enumerate([(90, 60), (60, 90), (64, 64), (200, 50)])}
    members |= {f"{n}.txt": b"c" for n in range(4)}
    path = str(write_tar(tmp_path / "a.tar", dict(sorted(members.items()))))
    flags = {
        "webdataset_path": (path,),
        "family": replace(FAMILY, bucket_step_multiple=8),
        "multi_aspect_ratio": ("1/1", "2/3"),
    }
    data = opened(**flags)
    assert data.placements.bucket_wh.tolist() == [[72, 48], [48, 72], [64, 64], [72, 48]]
    assert data.specs[0].enable_bucket
    everywhere = opened(**flags, bucket_random_ratio=1.0)
    assert everywhere.fingerprint() == opened(**flags, bucket_random_ratio=1.0).fingerprint()
    assert everywhere.placements.bucket_wh.tolist() != data.placements.bucket_wh.tolist()
    for row in range(4):
        placement = everywhere.placements[row]
        assert all(have >= want for have, want in zip(placement.resized_wh, placement.bucket_wh, strict=True))


def test_hostile_tars_are_told_in_one_line_each(tmp_path, caplog):
    members = {
        **sample_files(1),
        "/etc/0002.jpg": picture(2),
        "../0003.jpg": picture(3),
        "set/0004.pkl": b"cposix\nsystem",
    }
    link = tarfile.TarInfo("set/0005.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = write_tar(tmp_path / "h.tar", members, extra=[link])
    data = opened(webdataset_path=(str(path),))
    assert list(data.table.keys()) == ["h/set/0001.jpg"]
    lines = [line for line in caplog.text.splitlines() if "could do harm" in line]
    assert len(lines) == 1 and "4 entries" in lines[0] and "h.tar" in lines[0]


def test_commands_run_only_where_they_are_allowed(tmp_path, shards, monkeypatch):
    entry, copies = f"pipe:cat {shards[0][:-5]}{{a,b}}.tar", tmp_path / "copies"
    allowed = {"allow_pipe_urls": True, "webdataset_cache_dir": str(copies)}
    assert len(opened(webdataset_path=(entry,), **allowed).table) == 9
    assert len(list(copies.iterdir())) >= 2
    monkeypatch.setattr("library.data.shard_copies.subprocess", None)
    assert len(opened(webdataset_path=(entry,), **allowed).table) == 9, "copies are made once"
    with pytest.raises(UserError, match="pipe: would run a command.*--allow_pipe_urls"):
        opened(webdataset_path=(entry,))
    with pytest.raises(UserError, match="the address itself: s3://a/b.tar"):
        opened(webdataset_path=("pipe:aws s3 cp s3://a/b.tar -",))


@pytest.mark.parametrize(("command", "message"), [("exit 3", "ended with status 3"), ("true", "wrote nothing")])
def test_commands_that_fail_leave_no_copy(tmp_path, command, message):
    copies = tmp_path / "copies"
    with pytest.raises(UserError, match=message):
        opened(webdataset_path=(f"pipe:{command}",), allow_pipe_urls=True, webdataset_cache_dir=str(copies))
    assert not list(copies.glob("*.tar"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("pipe:touch pwned", "pipe: would run a command"),
        ("ftp://x/a.tar", "ftp: is not supported"),
        ("nowhere.tar", "no such file"),
        ("data-{0..2000000}.tar", "more than 1000000"),
    ],
)
def test_wrong_addresses(entry, message):
    with pytest.raises(UserError, match=message) as caught:
        opened(webdataset_path=(entry,))
    assert len(caught.value.problems) == 1


def test_members_that_cannot_be_used_are_bad_files(tmp_path):
    members = {**sample_files(0), **sample_files(1), **sample_files(2)}
    members["set/0001.jpg"] = b"no picture at all"
    members["set/0002.txt"] = "ünlesbar".encode("latin-1")
    path = write_tar(tmp_path / "b.tar", members)
    with pytest.raises(UserError) as caught:
        opened(webdataset_path=(str(path),))
    text = "\n".join(map(str, caught.value.problems))
    assert "b.tar!/set/0001.jpg" in text and "b.tar!/set/0002.txt" in text and "2 of 3" in text


def test_a_cut_off_tar_is_a_bad_file(tmp_path):
    path = make_shard(tmp_path / "cut.tar", 6)
    path.write_bytes(path.read_bytes()[:-16_000])
    with pytest.raises(UserError, match="cut off at byte"):
        opened(webdataset_path=(str(path),))


def test_held_members_are_read_from_memory(shards):
    data = opened(webdataset_path=tuple(shards))
    path = data.table.path(0)
    from library.data.images import load_image

    with holding({path: picture(8)}):
        held = load_image(path)
    assert not np.array_equal(held, load_image(path))
