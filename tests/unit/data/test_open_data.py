import json
import logging

import numpy as np
import pytest
import torch
from loading_helpers import FAMILY, FakeTokenizer, fill, picture
from PIL import Image

from library.contracts import BatchKey, Position, RunLength, SampleKey, StepKey
from library.data.loader import PlannedBatches, validation_batches
from library.data.opening import open_data
from library.data.options import CacheOptions, DatasetOptions, LoaderOptions, SubsetOptions
from library.data.report import write_report
from library.data.scan import ScanContext
from library.errors import UserError

SIZES = ((96, 64), (64, 96), (64, 64))


def folder_of(root, name, count, caption=True):
    folder = root / name
    folder.mkdir(parents=True)
    for number in range(count):
        picture(folder / f"{number:02d}.png", SIZES[number % 3], seed=number)
        if caption:
            (folder / f"{number:02d}.caption").write_text(f"{name} {number}")
    return folder


def opened(cache=None, subset=None, kinds=("dreambooth",), seed=0, **options):
    options = {"resolution": "64", "enable_bucket": True, "bucket_reso_steps": 64, "min_bucket_reso": 64} | options
    return open_data(
        DatasetOptions(**options),
        subset or SubsetOptions(),
        cache or CacheOptions(),
        spec=FAMILY,
        kinds=kinds,
        tokenizers=(FakeTokenizer(),),
        context=ScanContext(seed=seed),
    )


def test_folders_with_regularization_images(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder_of(tmp_path / "train", "3_cat", 4)
    folder_of(tmp_path / "reg", "1_animal", 3, caption=False)
    data = opened(
        train_data_dir=str(tmp_path / "train"),
        reg_data_dir=str(tmp_path / "reg"),
        batch_size=2,
        prior_loss_weight=0.5,
    )
    assert (data.num_train_images, data.num_reg_images, len(data.table)) == (12, 12, 7)
    assert data.summary()["num_reg_images"] == 3
    length = RunLength(data.batch_count(), 1, data.batch_count(), 1, 1, 1)
    batches = list(
        PlannedBatches(data, length, rank=0, seed=0, loader=LoaderOptions(max_data_loader_n_workers=0)).iterate(
            Position()
        )
    )
    weights = {}
    for batch in batches:
        for caption, weight in zip(batch.captions, batch.loss_weight.tolist(), strict=True):
            weights.setdefault(caption, set()).add(weight)
    assert weights["animal"] == {0.5} and weights["3_cat 0"] == {1.0}
    assert sum(batch.size for batch in batches) == 24
    assert "7 images (24 with repeats, 12 of them regularization)" in caplog.text


def test_validation_images_are_served_without_chance(tmp_path):
    images = folder_of(tmp_path, "images", 9)
    config = tmp_path / "data.toml"
    config.write_text(
        f"""
        [[datasets]]
        resolution = 64
        batch_size = 2
        validation_split = 0.34
        [[datasets.subsets]]
        image_dir = {json.dumps(str(images))}
        num_repeats = 4
        flip_aug = true
        shuffle_caption = true
        caption_dropout_rate = 0.9
        """
    )
    data = opened(dataset_config=str(config), seed=3)
    assert len(data.table) == 6 and len(data.validation.table) == 3
    assert not set(data.table.keys()) & set(data.validation.table.keys())
    batches = list(validation_batches(data.validation, 0))
    assert all(caption for batch in batches for caption in batch.captions)
    again = list(validation_batches(data.validation, 1))
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(batches, again, strict=True))
    assert sum(batch.size for batch in batches) == 3
    assert {*data.table.keys()} == {*opened(dataset_config=str(config), seed=3).table.keys()}


def test_masks_of_a_conditioning_folder(tmp_path):
    images = folder_of(tmp_path, "images", 3)
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in range(3):
        size = SIZES[number]
        ramp = np.tile(np.linspace(0, 255, size[0]).astype(np.uint8)[None, :, None], (size[1], 1, 3))
        Image.fromarray(ramp).save(masks / f"{number:02d}.png")
    config = tmp_path / "data.json"
    subset = {"image_dir": str(images), "conditioning_data_dir": str(masks), "flip_aug": True}
    config.write_text(json.dumps({"datasets": [{"resolution": 64, "subsets": [subset]}]}))
    for cache in (CacheOptions(), CacheOptions(cache_latents=True)):
        data = opened(cache=cache, dataset_config=str(config), masked_loss=True)
        if data.uses_latent_cache:
            fill(data)
            assert not data.reads_only_latents
        dataset = data.dataset(0, 1)
        rising = set()
        for position in range(8):
            batch = dataset[BatchKey(StepKey(0, 0), 0, 0, True, True, 1.0, (SampleKey(0, 0, position, 0),))]
            assert batch.mask.shape == (1, 1, 64, 64)
            rising.add(bool(batch.mask[0, 0, 0, 0] < batch.mask[0, 0, 0, -1]))
        assert rising == {True, False}, "the mask is mirrored together with the image"


@pytest.mark.parametrize("option", ["color_aug", "random_crop"])
def test_cached_latents_exclude_what_changes_pictures(tmp_path, option):
    folder_of(tmp_path, "1_a", 1)
    folder_of(tmp_path, "1_b", 1)
    with pytest.raises(UserError, match=option) as caught:
        opened(CacheOptions(cache_latents=True), SubsetOptions(**{option: True}), train_data_dir=str(tmp_path))
    assert len(caught.value.problems) == 2
    opened(None, SubsetOptions(**{option: True}), train_data_dir=str(tmp_path))


def test_exif_orientation_reaches_pixels_and_caches(tmp_path):
    folder = tmp_path / "1_a"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)).save(folder / "a.png", exif=exif)
    cache = CacheOptions(cache_latents=True, cache_latents_to_disk=True)
    upright, stored = (
        opened(cache, train_data_dir=str(tmp_path), max_bucket_reso=128, no_exif_transpose=off, resolution="96")
        for off in (False, True)
    )
    assert upright.table.size_wh(0) == (64, 128) and stored.table.size_wh(0) == (128, 64)
    assert tuple(upright.placements.bucket_wh[0]) == tuple(stored.placements.bucket_wh[0])[::-1]
    fill(upright)
    assert stored.latent_plan("vae").reused == 0 and upright.latent_plan("vae").reused == 1
    assert upright.latent_input(0).pixels.shape[1] > upright.latent_input(0).pixels.shape[2]


def test_report_lists_every_bucket_of_the_options(tmp_path):
    folder_of(tmp_path, "2_cat", 3)
    data = opened(train_data_dir=str(tmp_path), resolution="128", max_bucket_reso=256)
    length = RunLength(6, 2, data.batch_count(), 1, 1, 1)
    path, _ = write_report(data, tmp_path / "out", length=length)
    [dataset] = json.loads(path.read_text())["datasets"]
    assert dataset["bucket_resolutions_wh"] == [[64, 192], [64, 256], [128, 128], [192, 64], [256, 64]]
    data = opened(train_data_dir=str(tmp_path), resolution="128", bucket_no_upscale=True, max_bucket_reso=256)
    path, _ = write_report(data, tmp_path / "out", length=length)
    assert json.loads(path.read_text())["datasets"][0]["bucket_resolutions_wh"] is None
