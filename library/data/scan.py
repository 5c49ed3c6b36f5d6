"""From data set specs to the table of images: everything that can be known about the data without decoding pixels."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from library.data.bad_files import TOLERATED_SHARE, BadFile, apply_policy, printable
from library.data.buckets import BucketChooser, UnusableSize
from library.data.dataset_spec import CONTROLNET, FINETUNING, DatasetSpec, SubsetSpec
from library.data.decode_check import check_pictures
from library.data.folder_scan import FolderScan, FolderSettings, Known, scan_folder
from library.data.info_cache import read_info_cache, write_info_cache
from library.data.metadata_scan import MetadataScan, scan_metadata
from library.data.options import DatasetOptions
from library.data.records import RecordTable
from library.data.regularization import balanced_repeats
from library.data.scan_notes import ScanNotes
from library.data.selection import Selection
from library.data.shard_scan import FactsOf, facts_beside, facts_in_metadata, read_shards, rows_of_shards, select_rows
from library.data.split import validation_rows
from library.data.subset_rows import SubsetRows, add_masks, rows_of_folder, rows_of_metadata
from library.data.tar_index import ShardIndex
from library.errors import Problem, UserError, raise_problems

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScanResult:
    """The images of a run.

    Attributes:
        table: Training images, regularization images balanced, in the order of data sets, subsets and names.
        validation: Images kept apart, repeats 1, without regularization images; None when there are none.
        choosers: For each data set, what places its images.
        prepared: For each data set, whether its buckets are those that a preparation tool chose, and has latents for.
        reg_totals: For each data set, the visits that its regularization images ask for, before balancing.
        skipped: Files left out under `--skip_bad_files`.
        notes: What was logged, one line per kind.
    """

    table: RecordTable
    validation: RecordTable | None
    choosers: tuple[BucketChooser, ...]
    reg_totals: tuple[int, ...]
    skipped: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    prepared: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class ScanContext:
    """What a scan takes from other option groups.

    Attributes:
        seed: Seed of the run: chooses validation images where no validation seed is given.
        cache_dir: Where index files go when an image folder cannot be written.
        report_dir: Where the complete list of bad files goes when it is too long to be shown.
        latent_suffix: Ending of latent cache files of the model family.
        latent_sized: Their names tell the size of the image.
        tolerated_share: Of files that may be bad under `--skip_bad_files`.
        run_batches: That the whole run takes, over all ranks; None where its length is counted in epochs.
    """

    seed: int = 0
    cache_dir: str | None = None
    report_dir: str | None = None
    latent_suffix: str = "_sd"
    latent_sized: bool = True
    tolerated_share: float = TOLERATED_SHARE
    run_batches: int | None = None


def scan_datasets(specs: Sequence[DatasetSpec], data: DatasetOptions, context: ScanContext | None = None) -> ScanResult:
    """Find and examine all images.

    Raises:
        UserError: Folders without images, unusable metadata files, or bad files that may not be skipped: all of them.
    """
    result = _scan(specs, data, context or ScanContext())
    _give_back_memory()
    return result


def _scan(specs: Sequence[DatasetSpec], data: DatasetOptions, context: ScanContext) -> ScanResult:
    scanner = _Scanner(data, context)
    scanner.read(specs)
    notes = ScanNotes()
    parts = [[scanner.rows(spec, subset, notes) for subset in spec.subsets] for spec in specs]
    choosers = tuple(scanner.chooser(spec, rows) for spec, rows in zip(specs, parts, strict=True))
    for spec, chooser, rows in zip(specs, choosers, parts, strict=True):
        for part in rows:
            _drop_unplaceable(part, chooser, spec)
    bad = _judge(parts, data, context)
    lines = notes.lines()
    for line in lines:
        _log.warning("%s", line)
    training, validation, reg_totals = [], [], []
    for spec, rows in zip(specs, parts, strict=True):
        seed = context.seed if spec.validation_seed is None else spec.validation_seed
        kept, apart = _split(rows, seed)
        table, reg_total = _balance(kept)
        training.append(table)
        validation += apart
        reg_totals.append(reg_total)
    table = RecordTable.join(training)
    if not len(table):
        raise UserError("no training images are left", "Check validation_split and num_repeats.")
    apart_table = RecordTable.join(validation) if validation else None
    skipped = tuple(Problem(printable(one.path), one.reason, one.hint) for one in bad)
    return ScanResult(
        table,
        apart_table,
        choosers,
        tuple(reg_totals),
        skipped=skipped,
        notes=tuple(lines),
        prepared=tuple(chooser.prepared for chooser in choosers),
    )


class _Scanner:
    """Reads every folder and metadata file once, however many subsets use it."""

    def __init__(self, data: DatasetOptions, context: ScanContext) -> None:
        self._data = data
        self._context = context
        self._exif = not data.no_exif_transpose
        self._folders: dict[tuple[str, FolderSettings], FolderScan] = {}
        self._metadata: dict[tuple[str, str | None], MetadataScan] = {}
        self._info: dict[tuple[str, FolderSettings], dict[str, Known]] = {}
        self._shards: dict[tuple[str, ...], list[ShardIndex]] = {}
        self._told: set[int] = set()

    def read(self, specs: Sequence[DatasetSpec]) -> None:
        """Read everything, decode pictures when asked to, and write index files.

        Raises:
            UserError: Lists all folders and metadata files that cannot be used at all.
        """
        problems: list[Problem] = []
        for subset in (subset for spec in specs for subset in spec.subsets):
            try:
                self._read_subset(subset, problems)
            except UserError as error:
                problems.extend(error.problems)
            except OSError as error:
                problems.append(Problem(subset.label, error.strerror or str(error)))
        scans = [*self._folders.values()]
        scans += [scan for found in self._metadata.values() for scan in found.folders.values()]
        if not problems:
            data = self._data
            check_pictures(scans, data.check_images, exif=self._exif, max_pixels=data.max_image_pixels)
        for scan in scans:
            scan.save()
        for key, known in self._info.items():
            write_info_cache(self._folders[key], known)
        raise_problems(problems)

    def _settings(self, subset: SubsetSpec, *, captions: bool = True) -> FolderSettings:
        return FolderSettings(
            extension=subset.caption_extension if captions else None,
            multiline=subset.enable_wildcard and captions,
            encoding=self._data.caption_encoding,
            max_pixels=self._data.max_image_pixels,
            cache_dir=self._context.cache_dir,
        )

    def _read_subset(self, subset: SubsetSpec, problems: list[Problem]) -> None:
        if subset.webdataset_path:
            if subset.webdataset_path not in self._shards:
                indexes = read_shards(subset, self._data, index_dir=self._context.cache_dir)
                self._shards[subset.webdataset_path] = indexes
            return
        if subset.metadata_file is not None:
            key = (subset.metadata_file, subset.image_dir)
            if key not in self._metadata:
                settings = self._settings(subset, captions=False)
                context = self._context
                self._metadata[key] = scan_metadata(
                    subset,
                    settings,
                    trust_sizes=not self._exif,
                    latent_suffix=context.latent_suffix,
                    latent_sized=context.latent_sized,
                )
            return
        self._read_folder(subset.image_dir or "", self._settings(subset), subset.cache_info, problems)
        if subset.conditioning_data_dir is not None:
            self._read_folder(subset.conditioning_data_dir, self._settings(subset, captions=False), False, problems)

    def _read_folder(self, folder: str, settings: FolderSettings, info: bool, problems: list[Problem]) -> None:
        key = (folder, settings)
        if info and key not in self._info:
            self._info[key] = read_info_cache(folder, settings, exif=self._exif)
        if key in self._folders:
            return
        scan = self._folders[key] = scan_folder(folder, settings, known=self._info.get(key))
        if not scan.total:
            problems.append(_no_images(scan))

    def rows(self, spec: DatasetSpec, subset: SubsetSpec, notes: ScanNotes) -> SubsetRows:
        """Return the rows of a subset."""
        if subset.webdataset_path:
            indexes, pixels = self._shards[subset.webdataset_path], self._data.max_image_pixels
            return rows_of_shards(subset, indexes, self._once(notes, indexes), exif=self._exif, max_pixels=pixels)
        if spec.kind == FINETUNING:
            found = self._metadata[subset.metadata_file or "", subset.image_dir]
            rows = rows_of_metadata(subset, found, self._once(notes, found), exif=self._exif)
            return self._selected(rows, lambda: facts_in_metadata(subset.metadata_file or "", found))
        scan = self._folders[subset.image_dir or "", self._settings(subset)]
        rows = rows_of_folder(subset, scan, self._once(notes, scan), exif=self._exif)
        rows = self._selected(rows, lambda: facts_beside(scan))
        if spec.kind == CONTROLNET:
            masks = self._folders[subset.conditioning_data_dir or "", self._settings(subset, captions=False)]
            add_masks(rows, masks, exif=self._exif, same_size=spec.enable_bucket)
        return rows

    def _selected(self, rows: SubsetRows, facts: Callable[[], FactsOf]) -> SubsetRows:
        """Apply `dataset_filter` and `caption_field`; `facts()` gives what finds the JSON of an image."""
        subset = rows.subset
        selection = Selection(subset.dataset_filter, subset.caption_field, multiline=subset.enable_wildcard)
        return rows if selection.idle else select_rows(rows, selection, facts())

    def _once(self, notes: ScanNotes, source: FolderScan | MetadataScan | list[ShardIndex]) -> ScanNotes:
        """Return `notes` for the first use of a source, and a waste basket for further ones (other resolutions)."""
        first = id(source) not in self._told
        self._told.add(id(source))
        return notes if first else ScanNotes()

    def chooser(self, spec: DatasetSpec, rows: Sequence[SubsetRows]) -> BucketChooser:
        """Return what places the images of a data set: in the buckets that its metadata bring along, if all do.

        Caches of the oldest names were always used so. Of newer ones it is known what they hold; where buckets are
        asked for, those that the options describe count.
        """
        if spec.kind != FINETUNING or any(subset.webdataset_path for subset in spec.subsets):
            return BucketChooser(spec)
        found = [self._metadata[subset.metadata_file or "", subset.image_dir] for subset in spec.subsets]
        old = all(one.all_old for one in found)
        if any(one.resolutions is None for one in found) or (spec.enable_bucket and not old):
            return BucketChooser(spec)
        resolutions = {size for one in found for size in one.resolutions or ()}
        if spec.bucket_no_upscale:
            _log.warning("bucket_no_upscale has no effect: the metadata name the buckets (train_resolution)")
        _log.info(
            "data set %d: %d buckets of the metadata (train_resolution) are used", spec.index + 1, len(resolutions)
        )
        largest = max(resolutions, key=lambda size: size[0] * size[1])
        share = largest[0] * largest[1] / (spec.resolution_wh[0] * spec.resolution_wh[1])
        if not 0.5 <= share <= 2:
            given, used = (f"{width}x{height}" for width, height in (spec.resolution_wh, largest))
            _log.warning("resolution %s has no effect: the metadata name buckets of up to %s", given, used)
        assigned = {size: bucket for part in reversed(rows) for size, bucket in part.prepared.items()}
        return BucketChooser(spec, resolutions, assigned)


def _give_back_memory() -> None:
    """Let glibc return what the scan freed: it holds on to several times what the table of a large set takes."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _no_images(scan: FolderScan) -> Problem:
    listing = scan.listing
    folders = sum(os.path.isdir(listing.path(name)) for name in listing.others)  # noqa: PTH112
    others = listing.ignored_suffixes(scan.settings.extension)
    if folders:
        what = f"no images in this folder itself; it holds {folders} folders, which are not looked into"
    elif others:
        found = ", ".join(f"{count} {suffix or 'files without suffix'}" for suffix, count in others.most_common(8))
        what = f"no images in this folder; found {found}"
    else:
        what = "no images in this folder" + (f", {len(listing.others)} other files" if listing.others else "")
    return Problem(printable(scan.folder), what, "Images are .png, .jpg, .jpeg, .webp, .bmp (and .avif) files.")


def _drop_unplaceable(rows: SubsetRows, chooser: BucketChooser, spec: DatasetSpec) -> None:
    """Turn images that no bucket can take into bad files."""
    table = rows.table
    sizes = np.stack([table.widths, table.heights], axis=1)
    reasons = {}
    distinct, which = np.unique(sizes, axis=0, return_inverse=True)
    for number, (width, height) in enumerate(distinct.tolist()):
        try:
            chooser.place((width, height))
        except UnusableSize as error:
            reasons[number] = str(error)
    if not reasons:
        return
    of_row = which.reshape(-1)
    lost = np.isin(of_row, list(reasons))
    for row in np.flatnonzero(lost).tolist():
        rows.bad.append(BadFile(table.path(row), reasons[int(of_row[row])], "Leave it out or use a larger version."))
    rows.table = table.take(np.flatnonzero(~lost))


def _judge(parts: Sequence[Sequence[SubsetRows]], data: DatasetOptions, context: ScanContext) -> list[BadFile]:
    """Apply the policy for bad files to all of them together; a folder used several times counts once."""
    unique: dict[str, BadFile] = {}
    totals: dict[str, int] = {}
    for part in (part for rows in parts for part in rows):
        unique.update((one.path, one) for one in part.bad)
        totals[part.subset.label] = part.total
    bad = sorted(unique.values(), key=lambda one: one.path)
    apply_policy(bad, sum(totals.values()), data.skip_bad_files, context.report_dir, context.tolerated_share)
    return bad


def _split(rows: Sequence[SubsetRows], seed: int) -> tuple[list[RecordTable], list[RecordTable]]:
    """Return (training tables, validation tables) of a data set's subsets; regularization images are not split."""
    training, validation = [], []
    for part in rows:
        table, share = part.table, part.subset.validation_split
        if share <= 0 or part.subset.is_reg or not len(table):
            training.append(table)
            continue
        apart = validation_rows(list(table.keys()), share, seed)
        training.append(table.take(np.flatnonzero(~apart)))
        if apart.any():
            chosen = table.take(np.flatnonzero(apart))
            validation.append(chosen.with_repeats(np.ones(len(chosen), np.int32)))
    return training, validation


def _balance(tables: Sequence[RecordTable]) -> tuple[RecordTable, int]:
    """Join a data set's tables with balanced regularization images; also return what those asked for before."""
    table = RecordTable.join(tables)
    reg = np.flatnonzero(table.is_reg)
    reg_total = int(table.repeats[reg].sum())
    if not len(reg):
        return table, reg_total
    visits = int(table.repeats[~table.is_reg].sum())
    repeats = table.repeats.copy()
    repeats[reg] = balanced_repeats(visits, table.repeats[reg])
    if reg_total > visits:
        _log.warning(
            "some of the regularization images are not used: %d visits, %d of training images", reg_total, visits
        )
    balanced = table.with_repeats(repeats)
    return (balanced if (repeats > 0).all() else balanced.take(np.flatnonzero(repeats > 0))), reg_total
