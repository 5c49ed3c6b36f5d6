"""Streamed tar files: what is served, by how many processes, and where a resumed run goes on."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
from loading_helpers import FAMILY, FakeTokenizer
from tar_helpers import make_shard, picture, sample_files, write_tar

from library.contracts import Position, RunLength
from library.data import stream_source
from library.data.opening import open_data
from library.data.options import CacheOptions, DatasetOptions, LoaderOptions, SubsetOptions
from library.data.scan import ScanContext
from library.data.stream import batches_of
from library.errors import UserError

pytest.importorskip("webdataset")


START = Position()


def opened(path, *, subset=None, cache=None, run_batches=12, **data):
    data = {"resolution": "64", "batch_size": 2, "webdataset_shuffle": 4, "webdataset_streaming": True, **data}
    return open_data(
        DatasetOptions(webdataset_path=path if isinstance(path, tuple) else (str(path),), **data),
        SubsetOptions(**(subset or {})),
        CacheOptions(**(cache or {})),
        spec=FAMILY,
        kinds=("dreambooth",),
        tokenizers=(FakeTokenizer(),),
        context=ScanContext(run_batches=run_batches),
    )


def serve(data, *, rank=0, world=1, workers=0, start=START, steps=12, seed=5):
    length = RunLength(steps, 1, data.batch_count(), world, 1, world)
    loader = LoaderOptions(max_data_loader_n_workers=workers)
    found = batches_of(data, length, rank=rank, seed=seed, loader=loader, start_method="fork")
    return list(found.iterate(start))


def seen(batches):
    return [(one.key.step_key.step, one.record_keys, one.captions, one.pixels.numpy().tobytes()) for one in batches]


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        make_shard(tmp_path / "t" / f"{number}.tar", 6, start=6 * number)
    return tmp_path / "t"


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch):
    monkeypatch.setattr("library.data.loader.available_cores", lambda: 4)


def test_a_pass_serves_every_sample_once(folder):
    found = serve(opened(folder))
    names = [key for batch in found for key in batch.record_keys]
    assert len(names) == len(set(names)) == 24
    assert names != sorted(names)
    assert all(
        caption == f"caption {int(key[-8:-4])}"
        for one in found
        for key, caption in zip(one.record_keys, one.captions, strict=True)
    )
    assert not any(one.replaced for one in found)


def test_streams_repeat_and_differ_from_pass_to_pass(folder):
    data = opened(folder, run_batches=24)
    names = [key for batch in serve(data, steps=24) for key in batch.record_keys]
    assert set(Counter(names).values()) <= {1, 2, 3} and len(set(names)) == 24
    assert names[:24] != names[24:]
    assert names == [key for batch in serve(data, steps=24) for key in batch.record_keys]
    assert names != [key for batch in serve(data, steps=24, seed=6) for key in batch.record_keys]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_stream_goes_on_with_the_same_batches(folder, workers):
    data = opened(folder, subset={"flip_aug": True})
    whole = seen(serve(data, workers=workers))
    for step in (1, 5, 11):
        assert seen(serve(data, workers=workers, start=Position(step, 0, step))) == whole[step:]


def test_passing_over_reads_no_pictures(folder, monkeypatch):
    data = opened(folder)
    read = []
    inner = stream_source.SlotStream._content
    monkeypatch.setattr(
        stream_source.SlotStream, "_content", lambda self, *args: read.append(inner(self, *args)) or read[-1]
    )
    serve(data, start=Position(10, 0, 10))
    assert sum(item is not None for item in read) <= 12


def test_ranks_and_workers_read_different_tar_files(folder):
    data = opened(folder, run_batches=12)
    of_rank = [
        {key for batch in serve(data, rank=rank, world=2, workers=2, steps=6) for key in batch.record_keys}
        for rank in range(2)
    ]
    assert not of_rank[0] & of_rank[1]
    assert len(of_rank[0] | of_rank[1]) == 24


def test_there_are_no_more_workers_than_tar_files(tmp_path):
    path = make_shard(tmp_path / "one.tar", 6)
    data = opened(path)
    length = RunLength(12, 1, 12, 1, 1, 1)
    assert batches_of(data, length, rank=0, seed=1, loader=LoaderOptions(max_data_loader_n_workers=4)).workers == 1
    with pytest.raises(UserError, match="1 tar files cannot be shared out to 2 processes"):
        serve(data, world=2)


def test_tar_files_may_be_drawn_at_random(folder, tmp_path):
    data = opened(folder, webdataset_resampled=True, run_batches=24)
    names = [key for batch in serve(data, steps=24) for key in batch.record_keys]
    assert len(set(names[:24])) < 24, "some come twice in what would be a pass"
    assert len(set(names)) > 12
    whole = seen(serve(data, workers=2))
    assert seen(serve(data, workers=2, start=Position(5, 0, 5))) == whole[5:]
    ranks = [
        {key for batch in serve(data, rank=rank, world=2, steps=6) for key in batch.record_keys} for rank in (0, 1)
    ]
    assert ranks[0] != ranks[1]
    alone = opened(make_shard(tmp_path / "one.tar", 6), webdataset_resampled=True)
    assert serve(alone, world=2, rank=1, steps=2)


def test_epochs_of_a_given_size(folder):
    data = opened(folder, webdataset_epoch_size=7, run_batches=None)
    assert data.batch_count() == 4
    length = RunLength(8, 2, 4, 1, 1, 1)
    found = list(
        batches_of(data, length, rank=0, seed=1, loader=LoaderOptions(max_data_loader_n_workers=0)).iterate(Position())
    )
    assert [batch.key.epoch for batch in found] == [0] * 4 + [1] * 4
    assert [batch.key.last_in_epoch for batch in found] == [False, False, False, True] * 2
    later = list(
        batches_of(data, length, rank=0, seed=1, loader=LoaderOptions(max_data_loader_n_workers=0)).iterate(
            Position(5, 1, 1)
        )
    )
    assert seen(later) == seen(found)[5:]


def test_batches_hold_one_bucket(tmp_path):
    members = {}
    for number in range(12):
        size = (64, 32) if number % 3 else (32, 64)
        members |= {f"{number:02d}.png": picture(number, size=size, kind="PNG"), f"{number:02d}.txt": b"c"}
    path = write_tar(tmp_path / "a.tar", members)
    data = opened(path, enable_bucket=True, min_bucket_reso=64, bucket_reso_steps=64)
    for batch in serve(data):
        assert len({tuple(row) for row in batch.sizes_hw[:, 4:].tolist()}) == 1


def test_random_buckets_are_those_of_indexed_tar_files(tmp_path):
    members = {}
    for number in range(24):
        members |= {f"{number:02d}.png": picture(number, size=(96, 96), kind="PNG"), f"{number:02d}.txt": b"c"}
    path = write_tar(tmp_path / "a.tar", members)
    options = {"multi_aspect_ratio": ("1/1", "1/2", "1/4"), "resolution": "128", "bucket_random_ratio": 0.5}
    found = {}
    for batch in serve(opened(path, enable_bucket=True, batch_size=1, **options), steps=24):
        found |= {key: tuple(row[4:]) for key, row in zip(batch.record_keys, batch.sizes_hw.tolist(), strict=True)}
    data = opened(path, enable_bucket=True, batch_size=1, webdataset_streaming=False, **options)
    indexed = {
        key: (height, width)
        for key, (width, height) in zip(data.table.keys(), data.placements.bucket_wh.tolist(), strict=True)
    }
    assert len(set(found.values())) > 2
    assert found.items() <= indexed.items()


def test_filters_choose_and_a_filter_that_rejects_everything_is_an_error(folder):
    data = opened(folder, subset={"dataset_filter": ("score: score < 6",)})
    found = serve(data)
    assert {caption for batch in found for caption in batch.captions} == {f"caption {n}" for n in range(6)}
    counted = sum(batch.left_out["dataset_filter"] for batch in found if batch.left_out)
    assert counted >= 18, "24 samples in the first of four passes, of which 6 are used"
    with pytest.raises(UserError, match=r"dataset_filter: none of 24 samples is left: no 'points'"):
        opened(folder, subset={"dataset_filter": ("points: points < 6",)})


def test_looking_at_the_beginning_ends(folder, monkeypatch):
    monkeypatch.setattr("library.data.stream_data._LOOKED_AT", 9)
    with pytest.raises(UserError, match="none of 9 samples is left"):
        opened(folder, subset={"dataset_filter": ("points: points < 6",)})


def test_what_needs_an_index_is_refused(folder):
    with pytest.raises(UserError) as caught:
        opened(folder, cache={"cache_latents": True}, debug_dataset=True, run_batches=None)
    lines = "\n".join(map(str, caught.value.problems))
    assert all(name in lines for name in ("--cache_latents", "--debug_dataset", "--max_train_epochs"))


def test_bad_pictures_are_replaced_and_damage_is_told(tmp_path, caplog):
    members = {name: data for n in range(8) for name, data in sample_files(n).items()}
    members["set/0003.jpg"] = members["set/0003.jpg"][:200] + bytes(100)
    good = write_tar(tmp_path / "t" / "a.tar", members)
    cut = make_shard(tmp_path / "t" / "b.tar", 8, start=8)
    cut.write_bytes(cut.read_bytes()[:13_312])
    found = serve(opened(good.parent))
    assert any("0003.jpg" in text for batch in found for text in batch.replaced)
    assert "b.tar: has no end mark; it is probably cut off at byte 13312" in caplog.text
    left_out = sum((Counter(batch.left_out) for batch in found), Counter())
    assert left_out["tar file damaged or out of reach, counted as one"] >= 1
    assert "b/set/0011.jpg" not in {key for batch in found for key in batch.record_keys}


def test_tar_files_that_vanish_end_the_run_with_a_message(folder, caplog):
    data = opened(folder, run_batches=60)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="20 batches in a row could not be read"):
        serve(data, steps=60)
    # A tar file's name comes first, and only once.
    assert ".tar: No such file or directory" in caplog.text and "directory: '" not in caplog.text


def test_hostile_members_are_never_unpickled(tmp_path):
    members = {
        **sample_files(0),
        **sample_files(1),
        "set/0000.pkl": b"cos\nsystem\n(S'false'\ntR.",
        "../x.jpg": picture(4),
    }
    found = serve(opened(write_tar(tmp_path / "h.tar", members)))
    assert {key for batch in found for key in batch.record_keys} == {"h/set/0000.jpg", "h/set/0001.jpg"}
    import webdataset

    assert webdataset.utils.enforce_security


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match="needs the package webdataset"):
        opened(folder)
