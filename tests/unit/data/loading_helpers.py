"""Data sets built by hand for the tests of loading: pictures on disk, a record table, a tokenizer without a model."""

from pathlib import Path

import numpy as np
from PIL import Image

from library.contracts import FamilySpec, TokenizerSpec
from library.data.buckets import BucketChooser
from library.data.dataset import TrainingData
from library.data.dataset_spec import DatasetSpec, SubsetSpec
from library.data.opening import place_all
from library.data.options import CacheOptions
from library.data.records import Columns, RecordTable, TextColumn
from library.data.serving import Catalogue

FAMILY = FamilySpec(name="sd1", prediction_type="epsilon", tokenizers=(TokenizerSpec("clip", 49407),))


class FakeTokenizer:
    """One id per character, in chunks of 77."""

    spec = TokenizerSpec("fake", 0)

    def __init__(self, chunks=1, weighted=False):
        self.chunks, self.weighted = chunks, weighted

    def encode(self, text):
        ids = np.zeros(77 * self.chunks, np.int64)
        codes = [ord(character) for character in text][: len(ids)]
        ids[: len(codes)] = codes
        weights = np.ones((self.chunks, 77), np.float32) if self.weighted else None
        return ids.reshape(self.chunks, 77), weights


def picture(path, size_wh, seed=0, mode="RGB"):
    channels = len(mode)
    shape = (size_wh[1], size_wh[0], channels)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def table_of(rows):
    """Rows are dictionaries: path, size_wh, and optionally caption, repeats, dataset, subset, is_reg, mask_path."""
    folders, numbers = [], {}

    def folder(path):
        parent = str(Path(path).parent)
        if parent not in numbers:
            numbers[parent] = len(folders)
            folders.append((parent, Path(parent).name))
        return numbers[parent]

    def column(name, default, dtype):
        return np.array([row.get(name, default) for row in rows], dtype)

    stats = [Path(row["path"]).stat() if Path(row["path"]).exists() else None for row in rows]
    masks = [row.get("mask_path") for row in rows]
    columns = Columns(
        names=TextColumn.of([Path(row["path"]).name for row in rows]),
        captions=TextColumn.of([row.get("caption", "a photo") for row in rows]),
        mask_names=TextColumn.of([Path(mask).name if mask else "" for mask in masks]),
        folders=np.array([folder(row["path"]) for row in rows], np.int32),
        mask_folders=np.array([folder(mask) if mask else -1 for mask in masks], np.int32),
        widths=np.array([row["size_wh"][0] for row in rows], np.int32),
        heights=np.array([row["size_wh"][1] for row in rows], np.int32),
        repeats=column("repeats", 1, np.int32),
        datasets=column("dataset", 0, np.int16),
        subsets=column("subset", 0, np.int32),
        is_reg=column("is_reg", False, np.bool_),
        orientations=column("orientation", 1, np.uint8),
        file_sizes=np.array([stat.st_size if stat else 0 for stat in stats], np.int64),
        mtimes_ns=np.array([stat.st_mtime_ns if stat else 0 for stat in stats], np.int64),
    )
    return RecordTable(columns, folders)


def training_data(rows, specs, *, cache=None, tokenizers=None, family=FAMILY, **catalogue):
    table = table_of(rows)
    choosers = [BucketChooser(spec).place for spec in specs]
    made = Catalogue(
        family=family,
        specs=tuple(specs),
        table=table,
        placements=place_all(table, choosers),
        tokenizers=(FakeTokenizer(),) if tokenizers is None else tokenizers,
        **catalogue,
    )
    return TrainingData(made, cache or CacheOptions())


def bucketed(folder, *, batch_size=2, index=0, resolution=(64, 64), **subset):
    """One data set of one subset, buckets of 64 pixels area side with step 16."""
    return DatasetSpec(
        index=index,
        resolution_wh=resolution,
        batch_size=batch_size,
        enable_bucket=True,
        min_bucket_reso=16,
        max_bucket_reso=256,
        bucket_reso_steps=16,
        subsets=(SubsetSpec(index=subset.pop("subset", 0), dataset=index, image_dir=str(folder), **subset),),
    )


def some_pictures(folder, count=6, sizes=((96, 64), (64, 96), (64, 64)), **row):
    rows = []
    for number in range(count):
        size = sizes[number % len(sizes)]
        path = picture(folder / f"{number:02d}.png", size, seed=number)
        rows.append({"path": path, "size_wh": size, "caption": f"picture {number}, red, blue", **row})
    return rows


def fill(data, vae="vae"):
    """Encode by averaging blocks of 8x8 pixels: a linear stand-in for a VAE."""
    plan = data.latent_plan(vae)
    data.use_latents(plan, vae)
    for in_memory in (False, True):
        for rows in plan.batches(2, in_memory=in_memory):
            for row in rows:
                given = data.latent_input(row)
                data.store_latents(row, encode(given.pixels), encode(given.flipped) if given.flip else None, given.mask)
    return plan


def encode(pixels):
    channels, height, width = pixels.shape
    blocks = pixels.reshape(channels, height // 8, 8, width // 8, 8).mean((2, 4))
    return np.concatenate([blocks, blocks[:1]]).astype(np.float32)
