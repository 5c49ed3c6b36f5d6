"""From options to the data of a run: `open_data`, for tools that know their data sets `open_specs`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import cast

from library.contracts import FamilySpec, Placement, Tokenizer
from library.data.buckets import UnusableSize, random_bucket
from library.data.dataset import TrainingData
from library.data.dataset_config import load_dataset_specs
from library.data.dataset_spec import DatasetSpec
from library.data.foreign import open_foreign
from library.data.metadata_files import prepared_resolution
from library.data.options import CacheOptions, DatasetOptions, SubsetOptions
from library.data.records import RecordTable
from library.data.scan import ScanContext, ScanResult, scan_datasets
from library.data.serving import Catalogue, Placements, Reading
from library.data.spec_checks import cache_problems, mask_problems, size_problems, warn_of_unused_caches
from library.data.summary import describe
from library.errors import Problem, raise_problems

_log = logging.getLogger(__name__)


def open_data(
    data: DatasetOptions,
    subset: SubsetOptions,
    cache: CacheOptions,
    *,
    spec: FamilySpec,
    kinds: tuple[str, ...],
    tokenizers: tuple[Tokenizer, ...],
    context: ScanContext | None = None,
) -> TrainingData:
    """Find the images of a run and decide how each is served. No model is needed.

    Args:
        data: where images are, and their buckets.
        subset: captions and augmentation, where a data set configuration does not say.
        cache: latent caches.
        spec: of the model family.
        kinds: of data set that the script takes.
        tokenizers: one per text encoder.
        context: seed of the run, which chooses validation images where no validation seed is given, and a folder for
            the full list of bad files.

    Raises:
        UserError: holds every problem of the stage that found some.
    """
    if data.dataset_class is not None:
        warn_of_unused_caches(cache)
        # It offers what training uses of `TrainingData`.
        return cast(TrainingData, open_foreign(data, spec, tokenizers))
    if data.in_json and not (data.resolution or data.dataset_config):
        data = replace(data, resolution=prepared_resolution(data.in_json))
        if data.resolution:
            _log.info("no --resolution: %s, the largest bucket of --in_json", data.resolution.replace(",", "x"))
    specs = load_dataset_specs(
        data,
        subset,
        kinds=kinds,
        bucket_step_multiple=spec.bucket_step_multiple,
        in_json=data.in_json,
        side_multiple=spec.side_multiple,
    )
    raise_problems(size_problems(specs, spec.smallest_side, data.dataset_config))
    if data.webdataset_streaming:
        from library.data.stream_data import open_stream

        batches = None if context is None else context.run_batches
        stream = open_stream(specs, data, cache, spec=spec, tokenizers=tokenizers, run_batches=batches)
        return cast(TrainingData, stream)
    return open_specs(specs, data, cache, spec=spec, tokenizers=tokenizers, context=context)


def open_specs(
    specs: tuple[DatasetSpec, ...],
    data: DatasetOptions,
    cache: CacheOptions,
    *,
    spec: FamilySpec,
    tokenizers: tuple[Tokenizer, ...],
    context: ScanContext | None = None,
) -> TrainingData:
    """Find the images of data sets that are known already; see `open_data`.

    Raises:
        UserError: holds every problem of the stage that found some.
    """
    raise_problems([*cache_problems(specs, cache), *mask_problems(specs, data)])
    context = replace(
        context or ScanContext(),
        cache_dir=cache.cache_dir,
        latent_suffix=spec.latent_cache_suffix,
        latent_sized=spec.latent_cache_sized,
    )
    found = scan_datasets(specs, data, context)
    cache = _with_existing_latents(specs, found, cache)
    catalogue = Catalogue(
        family=spec,
        specs=specs,
        table=found.table,
        placements=_varied(found, place_all(found.table, [chooser.place for chooser in found.choosers]), specs),
        tokenizers=tokenizers,
        prior_loss_weight=data.prior_loss_weight,
        reading=Reading(exif_transpose=not data.no_exif_transpose, max_pixels=data.max_image_pixels),
    )
    opened = TrainingData(
        catalogue,
        cache,
        validation=_validation_part(catalogue, found, cache),
        skipped=found.skipped,
        reg_totals=found.reg_totals,
        bucket_lists=[
            chooser.resolutions if one.enable_bucket else None
            for one, chooser in zip(specs, found.choosers, strict=True)
        ],
    )
    for line in describe(opened):
        _log.info("%s", line)
    return opened


def _varied(found: ScanResult, placements: Placements, specs: Sequence[DatasetSpec]) -> Placements:
    """Send some images to buckets of any aspect ratio (`bucket_random_ratio`): always the same, by their names."""
    if not any(spec.bucket_random_ratio for spec in specs):
        return placements
    table, varied = found.table, [placements[row] for row in range(len(placements))]
    for row, (key, dataset) in enumerate(zip(table.keys(), table.datasets.tolist(), strict=True)):
        bucket = random_bucket(specs[dataset], key)
        if bucket is not None:
            with suppress(UnusableSize):
                varied[row] = found.choosers[dataset].place_in(table.size_wh(row), bucket)
    return Placements.of(varied)


def _with_existing_latents(specs: tuple[DatasetSpec, ...], found: ScanResult, cache: CacheOptions) -> CacheOptions:
    """Return options that read latents from disk where there is nothing else: images are gone, or buckets prepared.

    Raises:
        UserError: something needs the pictures at every visit.
    """
    gone = bool((found.table.file_sizes == 0).any())
    if cache.cache_latents_to_disk or not (gone or any(found.prepared)):
        return cache
    why = "some images are gone" if gone else "the metadata name buckets, and there are caches"
    _log.info("%s: latents are read from disk, as with --cache_latents_to_disk", why)
    cache = replace(cache, cache_latents=True, cache_latents_to_disk=True)
    raise_problems(cache_problems(specs, cache))
    return cache


def _validation_part(catalogue: Catalogue, found: ScanResult, cache: CacheOptions) -> TrainingData | None:
    """Return the images kept apart, with settings that leave nothing to chance."""
    table = found.validation
    if table is None:
        return None
    specs = tuple(
        replace(spec, subsets=tuple(subset.for_validation() for subset in spec.subsets)) for spec in catalogue.specs
    )
    placements = place_all(table, [chooser.place for chooser in found.choosers])
    return TrainingData(replace(catalogue, specs=specs, table=table, placements=placements), cache)


def place_all(table: RecordTable, choosers: Sequence[Callable[[tuple[int, int]], Placement]]) -> Placements:
    """Place every image of `table`; `choosers` has one function per data set.

    Raises:
        UserError: names all images that no bucket can take.
    """
    placements, problems = [], []
    sizes = zip(table.widths.tolist(), table.heights.tolist(), table.datasets.tolist(), strict=True)
    for row, (width, height, dataset) in enumerate(sizes):
        try:
            placements.append(choosers[dataset]((width, height)))
        except UnusableSize as error:
            problems.append(Problem(table.path(row), str(error), "Leave it out or enlarge it."))
    raise_problems(problems)
    return Placements.of(placements)
