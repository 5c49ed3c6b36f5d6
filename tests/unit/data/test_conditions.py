"""What ControlNets look at, served with the batches: the same view of a picture, the same chance at each visit."""

from dataclasses import dataclass

import numpy as np
import pytest
from loading_helpers import bucketed, fill, picture, some_pictures, training_data

from library.contracts import BatchKey, SampleKey, StepKey
from library.data.options import CacheOptions


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
