"""Rows of a subset that is a set of tar files, from their indexes; and filters and getters on rows of other kinds."""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from library.data.bad_files import BadFile, printable
from library.data.dataset_file import parse_json
from library.data.dataset_spec import SubsetSpec
from library.data.folder_scan import FolderScan
from library.data.image_headers import BadHeader, too_many_pixels
from library.data.metadata_files import read_table
from library.data.metadata_scan import MetadataScan
from library.data.options import DatasetOptions
from library.data.records import RecordTable, TextColumn
from library.data.scan_notes import ScanNotes
from library.data.selection import Selection
from library.data.shard_copies import shard_copy
from library.data.shards import expand_shards, is_pipe
from library.data.storage import MARK, MAX_TEXT_BYTES, is_remote
from library.data.subset_rows import Source, SubsetRows, table_of
from library.data.tar_index import ShardIndex, TarSample, index_shards
from library.errors import UserError
from library.text_files import read_text

_log = logging.getLogger(__name__)

BAD = ("too large", "bad text", "bad picture", "damage")
HARMFUL = (
    "link",
    "device",
    "pipe",
    "sparse file",
    "entry of an unknown kind",
    "entry with an oversized header",
    "unsafe name",
    "pickled data",
)
"""Kinds of notes in the index of a tar file; others are about what is of no use here."""


def read_shards(subset: SubsetSpec, data: DatasetOptions, *, index_dir: str | None) -> list[ShardIndex]:
    """Index the tar files of a subset.

    Args:
        subset: its `webdataset_path`.
        data: where remote tar files are copied to, and whether commands may be run.
        index_dir: folder for indexes that cannot lie beside their tar file.

    Raises:
        UserError: holds every tar file that cannot be used.
    """
    shards = expand_shards(subset.webdataset_path, where="webdataset_path", pipes=data.allow_pipe_urls)
    copies = data.webdataset_cache_dir
    if copies is not None:
        shards = [str(shard_copy(shard, copies)) if is_remote(shard) or is_pipe(shard) else shard for shard in shards]
    progress = partial(_tell, len(shards)) if len(shards) > 1 else None
    return index_shards(shards, cache_dir=index_dir, progress=progress)


def _tell(count: int, done: int, _total: int) -> None:
    if count > 3 and done in (count // 4, count // 2, 3 * count // 4):
        _log.info("%d of %d tar files are indexed", done, count)


@dataclass(slots=True)
class _Columns:
    """What becomes rows, sample by sample."""

    names: list[str] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    headers: list[tuple[int, int, int]] = field(default_factory=list)
    stats: list[tuple[int, int, int]] = field(default_factory=list)
    folders: list[int] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)
    without_picture: list[str] = field(default_factory=list)
    harmful: list[str] = field(default_factory=list)


def rows_of_shards(
    subset: SubsetSpec, indexes: Sequence[ShardIndex], notes: ScanNotes, *, exif: bool, max_pixels: int
) -> SubsetRows:
    """Return the rows of a subset that is a set of tar files, in the order of the files.

    Raises:
        UserError: the filters leave nothing, or there is no picture or no caption at all.
    """
    selection = Selection(subset.dataset_filter, subset.caption_field, multiline=subset.enable_wildcard)
    columns = _Columns()
    for number, index in enumerate(indexes):
        _note_members(index, columns, notes)
        bad_keys = {sample_key(name) for kind, name, _reason in _noted(index) if kind in BAD and kind != "damage"}
        for sample in index:
            if sample.key not in bad_keys:
                _add(sample, number, index, columns, selection, max_pixels)
    _judge_selection(subset, columns, selection)
    notes.add("no_picture", len(columns.without_picture), columns.without_picture)
    if subset.class_tokens is None:
        notes.add("no_text_member", len(columns.without_caption), columns.without_caption)
    source = Source(
        names=TextColumn.of(columns.names),
        captions=TextColumn.of([text if text is not None else subset.class_tokens or "" for text in columns.captions]),
        headers=np.array(columns.headers, np.int32).reshape(-1, 3),
        stats=np.array(columns.stats, np.int64).reshape(-1, 3),
        folders=np.array(columns.folders, np.int32),
        folder_list=[(f"{index.shard}{MARK}", shard_key(index.shard)) for index in indexes],
    )
    total = len(columns.names) + len(columns.bad)
    return SubsetRows(subset, table_of(source, subset, exif), columns.bad, total)


def shard_key(shard: str) -> str:
    """Return the name that stands for a tar file in image keys: its own, without where it lies."""
    return shard.partition("?")[0].replace("\\", "/").rpartition("/")[2].removesuffix(".tar")


def sample_key(name: str) -> str:
    """Return the sample that a member belongs to."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _noted(index: ShardIndex) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, member, reason) of the notes of an index."""
    for kind, text in zip(index.kinds, index.notes, strict=True):
        name, _, reason = text.partition(": ")
        yield kind, name, reason


def _note_members(index: ShardIndex, columns: _Columns, notes: ScanNotes) -> None:
    """Tell what of a tar file was passed over, and which of its pictures and texts cannot be used."""
    shown: dict[str, list[str]] = {}
    for kind, name, reason in _noted(index):
        if kind == "damage":
            columns.bad.append(BadFile(index.shard, index.notes[0], "Fetch or make it again."))
        elif kind in BAD:
            columns.bad.append(BadFile(f"{index.shard}{MARK}{name}", reason))
        else:
            shown.setdefault("harmful" if kind in HARMFUL else "unused", []).append(f"{index.shard}: {name}: {reason}")
    for what, kinds in (("harmful", HARMFUL), ("unused", tuple(set(index.skipped) - {*HARMFUL, *BAD}))):
        kept = [kind for kind in kinds if index.skipped.get(kind)]
        examples = shown.get(what, [f"{index.shard}: {', '.join(sorted(kept))}"])
        notes.add(what, sum(index.skipped[kind] for kind in kept), examples)
        columns.harmful += examples if what == "harmful" and kept else []
    hidden = sum(index.skipped.get(kind, 0) for kind in BAD) - sum(kind in BAD for kind in index.kinds)
    if hidden > 0:
        columns.bad.append(BadFile(index.shard, f"{hidden} more members cannot be used"))


def _add(
    sample: TarSample, number: int, index: ShardIndex, columns: _Columns, selection: Selection, max_pixels: int
) -> None:
    if sample.picture is None:
        columns.without_picture.append(f"{index.shard}: {sample.key}")
        return
    accepted, caption = judged(sample, selection, max_pixels)
    if isinstance(accepted, BadFile):
        columns.bad.append(accepted)
    if accepted is not True:
        return
    if caption is None:
        columns.without_caption.append(f"{index.shard}: {sample.key}")
    columns.names.append(str(sample.picture).removeprefix(f"{index.shard}{MARK}"))
    columns.captions.append(caption)
    columns.headers.append(sample.header)
    columns.stats.append((sample.picture.size, index.mtime_ns, 0))
    columns.folders.append(number)


def judged(sample: TarSample, selection: Selection, max_pixels: int) -> tuple[bool | BadFile, str | None]:
    """Return whether a sample with a picture is used (or what is wrong with it), and its caption."""
    if sample.picture is None:
        return False, None
    place = f"{sample.picture.shard}{MARK}"
    try:
        facts = sample.facts() if selection.needs_facts else None
        if not selection.accepts(facts):
            return False, None
        width, height, _ = sample.header
        if width * height > max_pixels:
            raise too_many_pixels(width * height, max_pixels)
    except UserError as error:
        return BadFile(f"{place}{sample.key}.json", error.problems[0].what), None
    except BadHeader as error:
        return BadFile(f"{place}{sample.picture.member}", error.reason, error.hint), None
    return True, selection.caption({**sample.texts, "json": facts})


def _judge_selection(subset: SubsetSpec, columns: _Columns, selection: Selection) -> None:
    """Refuse a subset of which nothing is left, or which says nothing about its pictures.

    Raises:
        UserError: says what there is instead.
    """
    label = printable(subset.label)
    if selection.filters.rules:
        selection.filters.check(f"{label}: dataset_filter")
        _log.info("%s: %s", label, selection.report())
    if not columns.names and not columns.bad:
        hint = "A sample is 0001.jpg, 0001.txt and perhaps 0001.json; other kinds of pictures: png, webp, bmp, avif."
        what = f"no pictures in these tar files, {len(columns.without_picture)} samples without one"
        if columns.harmful:
            what += f"; entries that could do harm are passed over, such as {columns.harmful[0]}"
        raise UserError(what, hint, where=label)
    if columns.names and len(columns.without_caption) == len(columns.names) and subset.class_tokens is None:
        field_name = subset.caption_field[1] if subset.caption_field else "txt"
        hint = "Name where captions are with caption_field (txt, json:key), or give class_tokens ('' for none)."
        raise UserError(f"none of {len(columns.names)} samples has a caption ({field_name})", hint, where=label)


FactsOf = Callable[[RecordTable, int], Mapping[str, Any] | None]
"""(table, row) -> the JSON object that says more about an image."""


def facts_beside(scan: FolderScan) -> FactsOf:
    """Return what reads `<stem>.json` beside each image of a folder."""

    def facts_of(table: RecordTable, row: int) -> Mapping[str, Any] | None:
        name = table.columns.names[row]
        other = f"{name[: name.rfind('.')]}.json"
        if other not in scan.listing.others:
            return None
        path = scan.listing.path(other)
        found = parse_json(read_text(path, limit=MAX_TEXT_BYTES), path)
        if not isinstance(found, dict):
            raise UserError(f"{other} is no JSON object", where=path)
        return found

    return facts_of


def facts_in_metadata(path: str, scan: MetadataScan) -> FactsOf:
    """Return what finds the entry of each image in its metadata file."""
    entries = read_table(path)
    by_place = {os.path.join(place.folder, place.name): place.entry.key for place in scan.located}  # noqa: PTH118
    return lambda table, row: entries.get(by_place[table.path(row)])


def select_rows(rows: SubsetRows, selection: Selection, facts_of: FactsOf) -> SubsetRows:
    """Apply filters and the source of captions to a subset that is a folder or a metadata file.

    Args:
        rows: of the subset; its table is replaced.
        selection: of the subset.
        facts_of: finds the JSON of an image.

    Raises:
        UserError: the filters leave nothing.
    """
    kept, captions = [], []
    table = rows.table
    for row in range(len(table)):
        try:
            facts = facts_of(table, row) if selection.needs_facts else None
        except UserError as error:
            rows.bad.append(BadFile(table.path(row), error.problems[0].what))
            continue
        if selection.accepts(facts):
            text = selection.caption({"txt": table.caption(row), "json": facts})
            kept.append(row)
            captions.append(table.caption(row) if text is None else text)
    if selection.filters.rules:
        selection.filters.check(f"{rows.subset.label}: dataset_filter")
        _log.info("%s: %s", printable(rows.subset.label), selection.report())
    chosen = table.take(np.array(kept, np.int64))
    values = {name: getattr(chosen.columns, name) for name in type(chosen.columns).__slots__}
    values["captions"] = TextColumn.of(captions)
    rows.table = RecordTable(type(chosen.columns)(**values), chosen.folders)
    return rows
