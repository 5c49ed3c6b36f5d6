"""From what was read in folders and metadata files to the rows of one subset."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.data.bad_files import BadFile
from library.data.dataset_spec import SubsetSpec
from library.data.folder_scan import FolderScan
from library.data.metadata_scan import Located, MetadataScan
from library.data.records import Columns, RecordTable, TextColumn, empty_table
from library.data.scan_index import CLEANED, EMPTY_FILE, NO_CAPTION, FolderFacts
from library.data.scan_notes import ScanNotes


@dataclass(slots=True)
class SubsetRows:
    """Rows of one subset before splitting and balancing, and the files that kept others from being rows.

    `prepared` has the buckets that a preparation tool chose, by upright size of the image.
    """

    subset: SubsetSpec
    table: RecordTable = field(default_factory=empty_table)
    bad: list[BadFile] = field(default_factory=list)
    total: int = 0
    prepared: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)


def folder_key(folder: str) -> str:
    """Return the name that stands for a folder in image keys: its own name, without where it lies."""
    return Path(folder).absolute().name


def upright(headers: NDArray[np.int32], exif: bool) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
    """Return widths, heights and applied orientations of stored sizes [n, 3]."""
    widths, heights, orientations = headers[:, 0], headers[:, 1], headers[:, 2].astype(np.uint8)
    if not exif:
        return widths.copy(), heights.copy(), np.ones_like(orientations)
    turned = orientations >= 5
    return np.where(turned, heights, widths), np.where(turned, widths, heights), orientations


@dataclass(slots=True)
class Source:
    """Columns of a table that come from files; the others follow from the subset."""

    names: TextColumn
    captions: TextColumn
    headers: NDArray[np.int32]
    stats: NDArray[np.int64]
    folders: NDArray[np.int32]
    folder_list: list[tuple[str, str]]
    masks: tuple[int, TextColumn] | None = None


def table_of(source: Source, subset: SubsetSpec, exif: bool) -> RecordTable:
    """Return the rows of a subset."""
    count = len(source.headers)
    widths, heights, orientations = upright(source.headers, exif)
    mask_folder, mask_names = source.masks or (-1, TextColumn.of([""] * count))

    def full(value: Any, dtype: Any) -> NDArray[Any]:
        return np.full(count, value, dtype)

    columns = Columns(
        names=source.names,
        captions=source.captions,
        mask_names=mask_names,
        folders=source.folders,
        mask_folders=full(mask_folder, np.int32),
        widths=widths,
        heights=heights,
        repeats=full(subset.num_repeats, np.int32),
        datasets=full(subset.dataset, np.int16),
        subsets=full(subset.index, np.int32),
        is_reg=full(subset.is_reg, np.bool_),
        orientations=orientations,
        file_sizes=np.maximum(source.stats[:, 0], 0),
        mtimes_ns=np.maximum(source.stats[:, 1], 0),
    )
    return RecordTable(columns, source.folder_list)


def rows_of_folder(subset: SubsetSpec, scan: FolderScan, notes: ScanNotes, *, exif: bool) -> SubsetRows:
    """Return the rows of a subset that is a folder with caption files."""
    facts = scan.facts
    source = Source(
        names=TextColumn.of(facts.names),
        captions=_captions(facts, subset, notes),
        headers=facts.headers,
        stats=facts.stats,
        folders=np.zeros(len(facts), np.int32),
        folder_list=[(scan.folder, folder_key(scan.folder))],
    )
    _note_files(scan, subset.caption_extension, notes, exif)
    return SubsetRows(subset, table_of(source, subset, exif), list(scan.bad), scan.total)


def _captions(facts: FolderFacts, subset: SubsetSpec, notes: ScanNotes) -> TextColumn:
    """Use the class words where there is no caption file."""
    missing = facts.caption_states == NO_CAPTION
    for kind, state in (("empty_caption", EMPTY_FILE), ("cleaned", CLEANED)):
        rows = np.flatnonzero(facts.caption_states == state)
        notes.add(kind, len(rows), (facts.caption_names[row] for row in rows))
    if not missing.any():
        return facts.captions
    if not subset.class_tokens:
        rows = np.flatnonzero(missing)
        # Folder names without words (`10_`) ask for empty captions.
        if subset.class_tokens is None:
            notes.add("no_caption", len(rows), (facts.names[row] for row in rows))
        return facts.captions
    words = subset.class_tokens
    pairs = zip(facts.captions, missing.tolist(), strict=True)
    return TextColumn.of([words if is_missing else caption for caption, is_missing in pairs])


def _note_files(scan: FolderScan, extension: str | None, notes: ScanNotes, exif: bool) -> None:
    ignored = scan.listing.ignored_suffixes(extension)
    examples = (f"{count} {suffix or 'without suffix'}" for suffix, count in ignored.most_common())
    notes.add("ignored", ignored.total(), examples)
    if exif:
        turned = np.flatnonzero(scan.facts.headers[:, 2] > 1)
        notes.add("turned", len(turned), (scan.facts.names[row] for row in turned))


def rows_of_metadata(subset: SubsetSpec, scan: MetadataScan, notes: ScanNotes, *, exif: bool) -> SubsetRows:
    """Return the rows of a subset that is a metadata file, in the order of the file."""
    facts = {folder: _by_name(result.facts) for folder, result in scan.folders.items()}
    numbers = {folder: number for number, folder in enumerate(dict.fromkeys(place.folder for place in scan.located))}
    places: list[Located] = []
    found: list[tuple[list[int], list[int]]] = []
    for place in scan.located:
        if place.cached_wh is not None:
            fact = ([*place.cached_wh, 1], [0, 0, 0])
        else:
            fact = facts[place.folder].get(place.name, _NO_FACT)
            if fact is _NO_FACT:
                continue  # Its file is among the bad ones of the folder.
        found.append(fact)
        places.append(place)
    captions = [place.entry.full_caption(subset.caption_separator, subset.enable_wildcard) for place in places]
    source = Source(
        names=TextColumn.of([place.name for place in places]),
        captions=TextColumn.of(captions),
        headers=np.array([header for header, _stats in found], np.int32).reshape(-1, 3),
        stats=np.array([stats for _header, stats in found], np.int64).reshape(-1, 3),
        folders=np.fromiter((numbers[place.folder] for place in places), np.int32, len(places)),
        folder_list=[(folder, _nested_key(folder, subset.image_dir)) for folder in numbers],
    )
    _note_metadata(places, captions, source.headers, notes)
    bad = list(scan.bad)
    for result in scan.folders.values():
        bad += result.bad
        if exif:
            turned = np.flatnonzero(result.facts.headers[:, 2] > 1)
            notes.add("turned", len(turned), (result.facts.names[row] for row in turned))
    table = table_of(source, subset, exif)
    return SubsetRows(subset, table, bad, scan.total, _prepared(places, table) if scan.resolutions else {})


def _prepared(places: Sequence[Located], table: RecordTable) -> dict[tuple[int, int], tuple[int, int]]:
    """Return image size -> bucket of the preparation. Tools that made it did not turn images, so turned ones differ."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    columns = zip(table.widths.tolist(), table.heights.tolist(), table.columns.orientations.tolist(), strict=True)
    for place, (width, height, orientation) in zip(places, columns, strict=True):
        bucket = place.entry.train_resolution
        if bucket is not None and (orientation < 5 or (bucket[0] < bucket[1]) == (width < height)):
            found.setdefault((width, height), bucket)
    return found


_NO_FACT: tuple[list[int], list[int]] = ([], [])


def _by_name(facts: FolderFacts) -> dict[str, tuple[list[int], list[int]]]:
    """Return (header, stats) of every image of a folder by its name."""
    pairs = zip(facts.headers.tolist(), facts.stats.tolist(), strict=True)
    return dict(zip(facts.names, pairs, strict=True))


def _nested_key(folder: str, image_dir: str | None) -> str:
    """Return `image_dir/sub-folder` by its last names, for keys that name folders inside `image_dir`."""
    if image_dir is not None:
        inside = os.path.relpath(folder or ".", image_dir).replace(os.sep, "/")
        if inside == ".":
            return folder_key(image_dir)
        if not inside.startswith(".."):
            return f"{folder_key(image_dir)}/{inside}"
    return folder_key(folder)


def _note_metadata(
    places: Sequence[Located], captions: Sequence[str], headers: NDArray[np.int32], notes: ScanNotes
) -> None:
    empty = [place.entry.key for place, caption in zip(places, captions, strict=True) if not caption]
    notes.add("no_text", len(empty), empty)
    gone = [place.entry.key for place in places if place.cached_wh is not None]
    notes.add("only_cache", len(gone), gone)
    sizes = headers[:, :2].tolist()
    differ = [
        place.entry.key
        for place, (width, height) in zip(places, sizes, strict=True)
        if place.entry.image_size not in (None, (width, height), (height, width))
    ]
    notes.add("other_size", len(differ), differ)


def add_masks(rows: SubsetRows, masks: FolderScan, *, exif: bool, same_size: bool) -> None:
    """Pair every image with the mask or conditioning image of the same stem; images without one become bad files.

    Args:
        rows: Images of the subset; its table is replaced.
        masks: The scanned `conditioning_data_dir`.
        exif: Orientation counts.
        same_size: A partner of another size than its image is a bad file.
    """
    table = rows.table
    partner = {name[: name.rfind(".")]: row for row, name in enumerate(masks.facts.names)}
    rows.bad += masks.bad
    broken = {os.path.basename(one.path) for one in masks.bad}  # noqa: PTH119
    broken_stems = {name[: name.rfind(".")] for name in broken}
    widths, heights, _ = upright(masks.facts.headers, exif)
    sizes = list(zip(widths.tolist(), heights.tolist(), strict=True))
    kept, names = [], []
    for row, name in enumerate(table.columns.names):
        stem = name[: name.rfind(".")]
        other = partner.pop(stem, None)
        if other is None:
            if stem not in broken_stems:
                reason = f"has no partner of the same name in {masks.folder}"
                rows.bad.append(BadFile(table.path(row), reason, "Add the mask or conditioning image."))
        elif same_size and sizes[other] != table.size_wh(row):
            (width, height), size = table.size_wh(row), sizes[other]
            reason = f"is {size[0]}x{size[1]}, but its image {name} is {width}x{height}"
            rows.bad.append(BadFile(masks.listing.path(masks.facts.names[other]), reason, "Give both the same size."))
        else:
            kept.append(row)
            names.append(masks.facts.names[other])
    for other in partner.values():
        reason = f"has no image of the same name in {rows.subset.image_dir}"
        rows.bad.append(BadFile(masks.listing.path(masks.facts.names[other]), reason, "Remove it or add the image."))
    rows.table = _with_masks(table.take(np.array(kept, np.int64)), masks.folder, names)


def _with_masks(table: RecordTable, folder: str, names: Sequence[str]) -> RecordTable:
    columns = table.columns
    values = {name: getattr(columns, name) for name in Columns.__slots__}
    values["mask_names"] = TextColumn.of(names)
    values["mask_folders"] = np.full(len(table), len(table.folders), np.int32)
    return RecordTable(Columns(**values), [*table.folders, (folder, folder_key(folder))])
