"""What is told about the data: to model metadata, to the check of a resumed run, and to the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library.data.buckets import bucket_info
from library.data.captions import readable
from library.data.shards import is_pipe
from library.data.storage import is_remote
from library.log import counted

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.data.dataset_spec import DatasetSpec, SubsetSpec

_SUBSET_KEYS = (
    "num_repeats",
    "color_aug",
    "flip_aug",
    "random_crop",
    "shuffle_caption",
    "keep_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "caption_prefix",
    "caption_suffix",
    "resize_interpolation",
)


def count_images(data: TrainingData) -> dict[str, int]:
    """Return the numbers at the head of `summarise`, which cost no look at the captions."""
    reg_images = data.num_reg_images if data.reg_totals is None else sum(data.reg_totals)
    return {
        "num_train_images": data.num_train_images,
        "num_reg_images": reg_images,
        "num_batches_per_epoch": data.batch_count(),
    }


def summarise(data: TrainingData) -> dict[str, Any]:
    """Return JSON-able facts for model metadata, folder names only, never paths.

    Keys: `num_train_images`, `num_reg_images` (repeats included; regularization images before balancing),
    `num_batches_per_epoch`, `datasets` (one dictionary each, as in `ss_datasets`), `tag_frequency`
    {folder: {tag: count}}, `dataset_dirs` and `reg_dataset_dirs` {folder: {n_repeats, img_count}}, `bucket_info` (of
    the first data set; None without buckets).
    """
    datasets = [_dataset(data, spec) for spec in data.specs]
    frequency: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for folder, tags in dataset["tag_frequency"].items():
            frequency.setdefault(folder, tags)
    subsets = [subset for spec in data.specs for subset in spec.subsets]
    counts = np.bincount(data.table.subsets, minlength=max((subset.index for subset in subsets), default=-1) + 1)
    return {
        **count_images(data),
        "datasets": datasets,
        "tag_frequency": frequency,
        "dataset_dirs": _folders(subsets, counts, reg=False),
        "reg_dataset_dirs": _folders(subsets, counts, reg=True),
        "bucket_info": datasets[0]["bucket_info"] if datasets else None,
    }


def describe(data: TrainingData) -> Iterator[str]:
    """Yield lines for the log: images, batches and buckets of each data set."""
    table = data.table
    for spec in data.specs:
        here = table.datasets == spec.index
        reg = here & table.is_reg
        yield (
            f"data set {spec.index + 1}: {counted(int(here.sum()), 'image')} "
            f"({int(table.repeats[here].sum())} with repeats"
            + (f", {int(table.repeats[reg].sum())} of them regularization" if reg.any() else "")
            + f"), {counted(data.planner.batches_of_dataset(spec.index), 'batch')} of {spec.batch_size}, "
            + f"resolution {spec.resolution_wh[0]}x{spec.resolution_wh[1]}"
        )
        if spec.enable_bucket:
            info = buckets_of(data, spec)
            sizes = (f"{b['resolution'][0]}x{b['resolution'][1]}: {b['count']}" for b in info["buckets"].values())
            yield f"  buckets {', '.join(sizes)}; mean aspect ratio error {info['mean_img_ar_error']:.4f}"
    if data.validation is not None:
        yield f"validation: {counted(len(data.validation.table), 'image')}"


def folder_name(subset: SubsetSpec) -> str:
    """Return the base name of a subset's folder or metadata file, or of its first tar file.

    Models tell it, so it holds neither the query of an address, which may be a key to it, nor a command.
    """
    if subset.webdataset_path:
        first = subset.webdataset_path[0]
        return "pipe" if is_pipe(first) else Path(first.partition("?")[0] if is_remote(first) else first).name
    return Path(subset.metadata_file or subset.image_dir or "").name


def _folders(subsets: Iterable[SubsetSpec], counts: Any, *, reg: bool) -> dict[str, dict[str, int]]:
    folders: dict[str, dict[str, int]] = {}
    for subset in subsets:
        if subset.is_reg == reg:
            name, number = folder_name(subset), 2
            while name in folders:
                name, number = f"{folder_name(subset)} ({number})", number + 1
            folders[name] = {"n_repeats": subset.num_repeats, "img_count": int(counts[subset.index])}
    return folders


def _dataset(data: TrainingData, spec: DatasetSpec) -> dict[str, Any]:
    table = data.table
    here = table.datasets == spec.index
    totals = data.reg_totals
    reg = int(table.repeats[here & table.is_reg].sum()) if totals is None else totals[spec.index]
    return {
        "is_dreambooth": spec.kind != "finetuning",
        "batch_size_per_device": spec.batch_size,
        "num_train_images": int(table.repeats[here & ~table.is_reg].sum()),
        "num_reg_images": reg,
        "resolution": list(spec.resolution_wh),
        "enable_bucket": spec.enable_bucket,
        "min_bucket_reso": spec.min_bucket_reso if spec.enable_bucket else None,
        "max_bucket_reso": spec.max_bucket_reso if spec.enable_bucket else None,
        "tag_frequency": _tag_frequency(data, spec),
        "bucket_info": buckets_of(data, spec) if spec.enable_bucket else None,
        "resize_interpolation": spec.resize_interpolation,
        "subsets": [_subset(subset, int(np.count_nonzero(table.subsets == subset.index))) for subset in spec.subsets],
    }


def _subset(subset: SubsetSpec, count: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"img_count": count}
    facts.update((key, getattr(subset, key)) for key in _SUBSET_KEYS)
    if subset.metadata_file is not None:
        facts["metadata_file"] = Path(subset.metadata_file).name
    else:
        facts["image_dir"] = folder_name(subset)
        facts["class_tokens"] = subset.class_tokens
        facts["is_reg"] = subset.is_reg
    return facts


def _tag_frequency(data: TrainingData, spec: DatasetSpec) -> dict[str, dict[str, int]]:
    """Count tags per folder: raw captions split at commas, lower-cased, repeats not counted."""
    names = {subset.index: folder_name(subset) for subset in spec.subsets}
    counters: dict[str, Counter[str]] = {name: Counter() for name in names.values()}
    rows = zip(data.table.subsets.tolist(), data.table.captions(), strict=True)
    for subset, caption in rows:
        if subset in names:
            parts = readable(caption).split(",")
            counters[names[subset]].update(tag for part in parts if (tag := part.strip().lower()))
    return {name: dict(counter) for name, counter in counters.items()}


def buckets_of(data: TrainingData, spec: DatasetSpec) -> dict[str, Any]:
    """Return the buckets of one data set with their visits in an epoch, and the mean error of the aspect ratio."""
    table = data.table
    here = np.flatnonzero(table.datasets == spec.index)
    sizes = data.placements.bucket_wh[here].astype(np.float64)
    error = 0.0
    if len(here):
        error = float(np.abs(sizes[:, 0] / sizes[:, 1] - table.widths[here] / table.heights[here]).mean())
    pairs = zip(map(tuple, data.placements.bucket_wh[here].tolist()), table.repeats[here].tolist(), strict=True)
    return bucket_info(pairs, error)


def fingerprint(data: TrainingData) -> dict[str, Any]:
    """Return values that tell two states of the data apart, each short enough to be shown beside another."""
    table, placements = data.table, data.placements
    columns = table.columns
    return {
        "images": f"{len(table)} images, {_digest(table.keys())}",
        "sizes": _digest((table.widths.tobytes(), table.heights.tobytes(), columns.orientations.tobytes())),
        "files": _digest((table.file_sizes.tobytes(),)),
        "repeats": f"{int(table.repeats.sum())} visits, {_digest((table.repeats.tobytes(), table.is_reg.tobytes()))}",
        "captions": _digest(table.captions()),
        "buckets": _digest(getattr(placements, name).tobytes() for name in ("bucket_wh", "resized_wh", "crop_xy")),
        "data sets": settings_digest(data.specs),
        "batches per epoch": data.batch_count(),
        "validation images": 0 if data.validation is None else len(data.validation.table),
    }


def settings_digest(specs: Iterable[DatasetSpec]) -> str:
    """Return what changes when a setting of the data sets does that acts on training."""
    return _digest(repr(_without_paths(spec)) for spec in specs)


def _without_paths(spec: DatasetSpec) -> list[Any]:
    """Return the settings of a data set that act on training, without where the data lie."""
    outside = {"image_dir", "metadata_file", "webdataset_path", "conditioning_data_dir", "cache_info", "index"}
    facts: list[Any] = [spec.kind, spec.batch_size, spec.network_multiplier, spec.resize_interpolation]
    for subset in spec.subsets:
        values = {name: getattr(subset, name) for name in subset.__slots__ if name not in outside}
        facts.append(sorted((name, repr(value)) for name, value in values.items()))
    return facts


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
