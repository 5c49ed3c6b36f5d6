"""What ControlNets look at, served with the batches: the same view of a picture, the same chance at each visit."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from loading_helpers import bucketed, fill, picture, some_pictures, training_data

from library.contracts import BatchKey, SampleKey, StepKey
from library.data.options import CacheOptions
from library.errors import UserError
from library.new_file import CannotSave


@dataclass(frozen=True)
class Maker:
    """The picture itself in [0,1], and one number of the generator."""

    from_file: bool = False

    def prepare(self, picture, rng):
        levels = picture.transpose(2, 0, 1).astype(np.float32) / 255
        return np.concatenate([levels, np.full((1, *levels.shape[1:]), rng.random(), np.float32)])


def batch_of(data, rows, epoch=0):
    samples = tuple(SampleKey(row, epoch, position, 0) for position, row in enumerate(rows))
    return data.dataset(3, 1)[BatchKey(StepKey(0, 0), epoch, 0, True, False, 1.0, samples)]


def served(rows, folder, maker, *, cache=None, **subset):
    data = training_data(rows, [bucketed(folder, **subset)], cache=cache)
    data.use_conditions(maker)
    return data


def test_the_picture_as_it_is_trained(tmp_path):
    rows = some_pictures(tmp_path, 4, sizes=((96, 64),))
    data = served(rows, tmp_path, Maker(), flip_aug=True, random_crop=True, color_aug=True)
    flips = set()
    for epoch in range(4):
        batch = batch_of(data, range(4), epoch)
        assert np.allclose(batch.control[:, :3].numpy(), batch.pixels.numpy() / 2 + 0.5, atol=1e-6)
        again = batch_of(data, range(4), epoch)
        assert np.array_equal(batch.control.numpy(), again.control.numpy())
        flips |= set(batch.control[:, 3, 0, 0].tolist())
    assert len(flips) == 16


def test_cached_latents_are_of_the_same_view(tmp_path):
    rows = some_pictures(tmp_path, 4, sizes=((96, 64),))
    data = served(rows, tmp_path, Maker(), cache=CacheOptions(cache_latents=True), flip_aug=True)
    fill(data)
    assert not data.reads_only_latents
    for epoch in range(4):
        batch = batch_of(data, range(4), epoch)
        assert batch.pixels is None
        pixels = batch.control[:, :3].numpy() * 2 - 1
        blocks = pixels.reshape(4, 3, pixels.shape[2] // 8, 8, -1, 8).mean((3, 5))
        assert np.allclose(batch.latents[:, :3].numpy(), blocks, atol=1e-5)


@pytest.mark.parametrize("from_file", [True, False])
def test_paired_pictures_are_conditions_or_masks(tmp_path, from_file):
    rows = some_pictures(tmp_path, 2, sizes=((64, 64),))
    for number, row in enumerate(rows):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        row["mask_path"] = picture(tmp_path / "pairs" / f"{number:02d}.png", (64, 64), seed=50 + number)
    batch = batch_of(served(rows, tmp_path, Maker(from_file), flip_aug=True), range(2))
    same = np.allclose(batch.control[:, :3].numpy(), batch.pixels.numpy() / 2 + 0.5, atol=1e-6)
    assert same is not from_file
    assert (batch.mask is None) is from_file


def test_pictures_that_cannot_be_read_leave_a_blank_condition(tmp_path):
    rows = some_pictures(tmp_path, 1, sizes=((64, 64),))
    data = served(rows, tmp_path, Maker())
    rows[0]["path"].write_bytes(b"broken")
    batch = batch_of(data, [0])
    assert not batch.loss_weight.any()
    assert not batch.control[:, :3].any()
    assert batch.control.shape == (1, 4, 64, 64)


# What is found in pictures, kept in files --------------------------------------------------------------------------


@dataclass(frozen=True)
class Finder:
    """Finds the mean colour of a picture; paints it beside one number of the generator."""

    kept: str = "mean"
    from_file: bool = False
    calls = []

    def find(self, picture):
        self.calls.append(picture)
        return {"mean": picture.reshape(-1, 3).mean(0)}

    def accepts(self, found, size_hw):
        return "mean" in found and found["mean"].shape == (3,)

    def paint(self, found, size_hw, rng):
        mean = np.broadcast_to(found["mean"].astype(np.float32)[:, None, None], (3, *size_hw))
        return np.concatenate([mean, np.full((1, *size_hw), rng.random(), np.float32)])

    def prepare(self, picture, rng):
        return self.paint(self.find(picture), picture.shape[:2], rng)


@pytest.fixture
def finder():
    Finder.calls.clear()
    return Finder()


def keeping(rows, folder, finder, *, cache=None, **subset):
    data = training_data(rows, [bucketed(folder, **subset)], cache=cache)
    data.keep_conditions(finder, "_control")
    return data


def test_what_is_found_is_found_once_and_gives_the_same_bits(tmp_path, finder):
    rows = some_pictures(tmp_path, 4, sizes=((96, 64),))
    plain = served(rows, tmp_path, finder, flip_aug=True)
    wanted = [batch_of(plain, range(4), epoch).control.numpy() for epoch in range(6)]
    finder.calls.clear()
    for _ in range(2):
        data = keeping(rows, tmp_path, finder, flip_aug=True)
        for epoch, expected in enumerate(wanted):
            assert np.array_equal(batch_of(data, range(4), epoch).control.numpy(), expected)
    # Each picture as it is and mirrored.
    assert len(finder.calls) == len(list(tmp_path.glob("*_control*.npz"))) == 8


def test_with_cached_latents_no_picture_is_opened_any_more(tmp_path, finder, monkeypatch):
    rows = some_pictures(tmp_path, 2, sizes=((96, 64),))
    batch_of(keeping(rows, tmp_path, finder), range(2))
    data = keeping(rows, tmp_path, finder, cache=CacheOptions(cache_latents=True))
    fill(data)
    monkeypatch.setattr("library.data.serving.load_image", None)
    assert batch_of(data, range(2)).control.shape[:2] == (2, 4)


def test_stale_and_broken_files_are_made_anew(tmp_path, finder):
    rows = some_pictures(tmp_path, 1, sizes=((96, 64),))
    first = batch_of(keeping(rows, tmp_path, finder), [0]).control
    (path,) = tmp_path.glob("*_control.npz")
    whole = path.read_bytes()
    for broken in (whole[:100], b"", whole.replace(b"mean", b"MEAN")):
        path.write_bytes(broken)
        assert np.array_equal(batch_of(keeping(rows, tmp_path, finder), [0]).control.numpy(), first.numpy())
        assert path.read_bytes() == whole
    count = len(finder.calls)
    batch_of(keeping(rows, tmp_path, Finder(kept="other")), [0])
    assert len(finder.calls) == count + 1


def test_a_picture_in_two_sizes_has_two_files(tmp_path, finder):
    rows = some_pictures(tmp_path, 1, sizes=((96, 64),))
    for _ in range(2):
        for side in (64, 128):
            data = training_data(rows, [replace(bucketed(tmp_path), resolution_wh=(side, side))])
            data.keep_conditions(finder, "_control")
            assert batch_of(data, [0]).control.shape[-2:] == data.placements[0].bucket_wh[::-1]
    assert len(finder.calls) == len(list(tmp_path.glob("*_control.npz"))) == 2


def test_pictures_that_vary_are_refused(tmp_path, finder):
    rows = some_pictures(tmp_path, 1, sizes=((96, 64),))
    with pytest.raises(UserError, match="--cache_conditions_to_disk.*without random_crop"):
        keeping(rows, tmp_path, finder, random_crop=True)


def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path, finder, caplog, monkeypatch):
    def full(path, arrays):
        raise CannotSave("no space left")

    monkeypatch.setattr("library.data.condition_store.write_cache", full)
    rows = some_pictures(tmp_path, 2, sizes=((96, 64),))
    assert batch_of(keeping(rows, tmp_path, finder), range(2)).control.shape[0] == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"what the ControlNet looks at is not kept in {tmp_path}: no space left"
    ]
