"""Samples of tar files from front to end: shards in a derived order, a shuffle buffer, then batches of one bucket.

A stream belongs to one slot, that is one loader process of one rank; slots share the shards out between them anew in
every pass. Everything in it follows from (seed, slot, number of slots), so going on in the middle is reading again what
was read before, headers and captions only. Members are chosen and limited as for indexed tar files; grouping into
samples and the shuffle buffer are those of the webdataset package, which gets no addresses and decodes nothing.
"""

from __future__ import annotations

import importlib
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from library.contracts import Placement
from library.data.bad_files import BadFile, printable
from library.data.buckets import BucketChooser, UnusableSize, random_bucket
from library.data.dataset_spec import DatasetSpec, SubsetSpec
from library.data.image_headers import ReadAt
from library.data.remote_files import read_ahead, remote_facts
from library.data.selection import Selection
from library.data.shard_copies import shard_copy
from library.data.shard_scan import judged, shard_key
from library.data.storage import Locator, is_remote, reader_of
from library.data.subset_rows import upright
from library.data.tar_headers import NotATar, TarWalk
from library.data.tar_index import TarSample
from library.data.tar_samples import PICTURE_SUFFIXES, Found, UsedMember, place_of, used_member
from library.errors import UserError
from library.files import CannotSave
from library.randomness import derive, python_random

_log = logging.getLogger(__name__)

_AHEAD = 4 << 20
_TOLD = 20


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What is streamed, and how.

    Attributes:
        shards: paths and addresses.
        buffer: samples among which the next one is chosen.
        max_pixels: larger pictures are passed over.
        exif: pictures are turned upright.
        resampled: shards are drawn with replacement.
        copies: folder that remote shards are copied into before they are read.
    """

    shards: tuple[str, ...]
    buffer: int
    max_pixels: int
    exif: bool
    resampled: bool = False
    copies: str | None = None


@dataclass(frozen=True, slots=True)
class StreamedSample:
    """One sample, placed.

    Attributes:
        picture: where it lies.
        data: its bytes, None while earlier batches are passed over.
        header: stored width and height, and EXIF orientation.
        caption: as the subset makes it.
        placement: resize and crop.
    """

    picture: Locator
    data: bytes | None
    header: tuple[int, int, int]
    caption: str
    placement: Placement


class StreamBroken(Exception):
    """A whole pass gave no sample; the text says why."""


class SlotStream:
    """The batches of one slot, one after the other.

    Args:
        settings: what is streamed.
        spec: the data set; its only subset counts.
        seed: of the run.
        slot: number of this loader process among all of all ranks.
        slots: how many there are.
    """

    def __init__(self, settings: StreamSettings, spec: DatasetSpec, *, seed: int, slot: int, slots: int) -> None:
        self._settings, self._spec, self._seed = settings, spec, seed
        self._slot, self._slots = slot, slots
        self._subset: SubsetSpec = spec.subsets[0]
        self.selection = selection_of(self._subset)
        self._chooser = BucketChooser(spec)
        self._passing_over = False
        self._told: set[str] = set()
        self._left_out: Counter[str] = Counter()
        self._broken = ""
        self._cut = self._empty = False
        self._batches = self._make_batches()
        self._given = 0
        self._looked_at, self._limit = 0, 0
        self.why = "the tar files hold no pictures that can be used"

    def batch(self, number: int) -> list[StreamedSample]:
        """Return batch `number` (from 0); numbers may only rise.

        Raises:
            StreamBroken: nothing can be read any more.
        """
        if self._broken:
            raise StreamBroken(self._broken)
        if number < self._given:
            raise ValueError(f"batch {number} was given already")
        while self._given < number:
            self._passing_over = True
            next(self._batches)
            self._given += 1
        self._passing_over = False
        self._given += 1
        return next(self._batches)

    def take_left_out(self) -> dict[str, int]:
        """Return how many samples were passed over since the last call, by reason."""
        found, self._left_out = dict(self._left_out), Counter()
        return found

    def first(self, limit: int) -> list[StreamedSample]:
        """Return those of the first `limit` samples that are used, without their pictures' bytes."""
        self._passing_over, self._limit = True, limit
        return [sample for shard in self._settings.shards for sample in self._of_shard(shard)]

    def _samples(self) -> Iterator[StreamedSample]:
        """Yield samples pass after pass; the shuffle buffer is emptied in between, so each comes once in a pass."""
        webdataset = secure_webdataset()
        size = self._settings.buffer
        rng = random.Random(derive(self._seed, "stream", "shuffle", self._slot))
        shuffle = webdataset.shuffle(size, initial=-(-size // 4), rng=rng)
        for number in count():
            empty = True
            for sample in shuffle(self._pass(number)):
                empty = False
                yield sample
            if empty:
                self._broken = self.why
                raise StreamBroken(self.why)

    def _pass(self, number: int) -> Iterator[StreamedSample]:
        """Yield the samples of one pass in the order of the tar files."""
        for shard in self._shards_of(number):
            yield from self._of_shard(shard)

    def _shards_of(self, number: int) -> list[str]:
        """Return the shards of this slot in one pass."""
        shards = list(self._settings.shards)
        if self._settings.resampled:
            return python_random(self._seed, "stream", "resampled", self._slot, number).choices(shards, k=len(shards))
        python_random(self._seed, "stream", number).shuffle(shards)
        return shards[self._slot :: self._slots]

    def _make_batches(self) -> Iterator[list[StreamedSample]]:
        waiting: dict[tuple[int, int], list[StreamedSample]] = {}
        for sample in self._samples():
            together = waiting.setdefault(sample.placement.bucket_wh, [])
            together.append(sample)
            if len(together) == self._spec.batch_size:
                yield waiting.pop(sample.placement.bucket_wh)

    def _of_shard(self, shard: str) -> Iterator[StreamedSample]:
        if self._limit and self._looked_at >= self._limit:
            return
        webdataset = secure_webdataset()
        self._cut = False
        groups = webdataset.tariterators.group_by_keys(self._members(shard))
        for group, last in _with_end(groups):
            if last and self._cut:
                return  # What is behind the cut may belong to it.
            self._looked_at += 1
            key = group.pop("__key__")
            group.pop("__url__", None)
            sample = self._sample(shard, key, group)
            if isinstance(sample, StreamedSample):
                yield sample
            elif not self._passing_over:
                self._left_out[sample] += 1
            if self._looked_at == self._limit:
                return

    def _members(self, shard: str) -> Iterator[dict[str, Any]]:
        """Yield what the webdataset package groups: members with name and content, `(UsedMember, bytes or None)`."""
        found = Found()
        try:
            read_at, size = _opened(shard, self._settings.copies)
            walk = TarWalk(read_at, size)
            seen: set[str] = set()
            for member in walk:
                place = place_of(member, found)
                if place is None:
                    continue
                name = ".".join(place)
                used = used_member(shard, member, place[1].rpartition(".")[2], read_at, found)
                if used is None or name in seen:
                    continue
                seen.add(name)
                yield {"fname": name, "data": (used, self._content(used, read_at)), "__url__": shard}
            if walk.cut_at is not None:
                self._cut = not walk.why.startswith("has more")
                self._count_damage()
                found.note("damage", f"{walk.why} at byte {walk.cut_at}")
        except (OSError, NotATar, UserError) as error:
            self._cut = True
            self._count_damage()
            found.note("damage", _reason(error))
        self._tell(shard, found)

    def _count_damage(self) -> None:
        if not self._passing_over:
            self._left_out["tar file damaged or out of reach, counted as one"] += 1

    def _content(self, used: UsedMember, read_at: ReadAt) -> bytes | None:
        if self._passing_over or not used.header[0]:
            return None
        data = read_at(used.offset, used.size)
        return data if len(data) == used.size else None

    def _tell(self, shard: str, found: Found) -> None:
        """Say once of each tar file what of it is passed over."""
        if not found.notes:
            return
        self.why = f"{shard}: {found.notes[-1]}"
        if shard not in self._told and len(self._told) < _TOLD:
            more = f" (and {len(found.notes) - 1} more)" if len(found.notes) > 1 else ""
            _log.warning("%s: %s%s", shard, printable(found.notes[-1]), more)
        self._told.add(shard)

    def _sample(self, shard: str, key: str, group: dict[str, tuple[UsedMember, bytes | None]]) -> StreamedSample | str:
        """Return a sample that the filters let through, in its bucket; or why there is none, in a few words."""
        name = next((suffix for suffix in PICTURE_SUFFIXES if suffix in group), None)
        if name is None:
            return "no picture"
        used, data = group[name]
        if not used.header[0]:
            return "bad picture"
        picture = Locator(shard, used.name, used.offset, used.size)
        texts = {field: member.text for field, (member, _) in group.items() if not member.header[0]}
        accepted, caption = judged(
            TarSample(key, picture, used.header, texts, {}), self.selection, self._settings.max_pixels
        )
        if accepted is not True:
            if isinstance(accepted, BadFile):
                self.why = str(accepted)
                return "picture or JSON cannot be used"
            return "dataset_filter"
        if caption is None:
            caption = self._subset.class_tokens or ""
            if self._subset.class_tokens is None and not self._empty:
                self._empty = True
                _log.warning("%s: %s has no caption: it and others like it get an empty one", shard, printable(key))
        widths, heights, _ = upright(np.array([used.header], np.int32), self._settings.exif)
        try:
            placement = self._place(picture, (int(widths[0]), int(heights[0])))
        except UnusableSize as error:
            self.why = f"{picture.shard}: {picture.member}: {error}"
            return "too small or too long for any bucket"
        return StreamedSample(picture, data, used.header, caption, placement)

    def _place(self, picture: Locator, size_wh: tuple[int, int]) -> Placement:
        """Return resize and crop into the bucket of a picture.

        Raises:
            UnusableSize: no bucket can take it.
        """
        bucket = random_bucket(self._spec, f"{shard_key(picture.shard)}/{picture.member}")
        if bucket is not None:
            with suppress(UnusableSize):
                return self._chooser.place_in(size_wh, bucket)
        return self._chooser.place(size_wh)


def _with_end(items: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
    """Yield every item, and whether it is the last one."""
    before: list[Any] = []
    for item in items:
        if before:
            yield before.pop(), False
        before.append(item)
    for item in before:
        yield item, True


def selection_of(subset: SubsetSpec) -> Selection:
    """Return the filters and the source of captions of a subset."""
    return Selection(subset.dataset_filter, subset.caption_field, multiline=subset.enable_wildcard)


def secure_webdataset() -> Any:
    """Return the webdataset package, told never to unpickle and never to run commands.

    Raises:
        UserError: it is not installed.
    """
    os.environ["WDS_SECURE"] = "1"
    try:
        webdataset = importlib.import_module("webdataset")
    except ImportError as error:
        hint = "Run: pip install webdataset"
        raise UserError("needs the package webdataset", hint, where="--webdataset_streaming") from error
    # Somebody may have imported it before.
    webdataset.utils.enforce_security = True
    return webdataset


def _opened(shard: str, copies: str | None) -> tuple[ReadAt, int]:
    """Return what reads a tar file from front to end, and its size.

    Raises:
        OSError: it cannot be read.
        UserError: it cannot be reached.
    """
    if is_remote(shard) and copies is not None:
        try:
            shard = str(shard_copy(shard, copies))
        except CannotSave as error:
            _log.warning("%s; %s is read from its server", error, shard)
    if is_remote(shard):
        size = remote_facts(shard)[0]
        return read_ahead(reader_of(shard), size, _AHEAD), size
    return reader_of(shard), Path(shard).stat().st_size


def _reason(error: OSError | NotATar | UserError) -> str:
    """Return what is wrong with a tar file, without its name."""
    if isinstance(error, UserError):
        return error.problems[0].what
    return str((isinstance(error, OSError) and error.strerror) or error)
