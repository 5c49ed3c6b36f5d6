"""Which latents exist, which must be made, and where a worker finds them: on disk, or in one mapped file per node.

`plan_latents` looks at every image once and returns a `LatentPlan`; whoever owns a VAE works through its batches and
stores the results; `LatentSource` serves them to loader workers. Nothing here knows a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.data import cache_files, caches
from library.data.cache_files import IN_MEMORY, READ_ONLY_FOLDER, BrokenCache, look_at_all, setting_aside
from library.data.cache_names import LEGACY as OLD_NAME
from library.data.cache_names import CacheRules, LatentNeed, cache_path
from library.data.caches import CachedLatents
from library.data.mapped_file import MappedFile

NOWHERE, OWN, LEGACY, OTHER, MEMORY = range(5)
SHARED_NAME = "another image or resizing uses the same file, kept in memory"


@dataclass(frozen=True, slots=True)
class LatentPlan:
    """What caching has to do. Picklable, so that one rank can look and tell the others.

    Attributes:
        places: where each table row's latents are, or will be: OWN, LEGACY, OTHER file or MEMORY, uint8 [N].
        owners: the row whose latents each row uses (images may occur in several subsets), int64 [N].
        missing: owner rows to encode, sorted by bucket, int64 [M].
        buckets: number of each missing row's bucket and need of mirrored latents, int64 [M]; equal ones can be batched.
        files: number of the cache file of each missing row, int64 [M]; one rank handles all variants of a file.
        why: reason for each missing row.
        slots: bytes that each row takes in the mapped file, int64 [N]; 0 for rows on disk.
        unknown: number of entries in use that do not tell where they come from.
    """

    places: NDArray[np.uint8]
    owners: NDArray[np.int64]
    missing: NDArray[np.int64]
    buckets: NDArray[np.int64]
    files: NDArray[np.int64]
    why: tuple[str, ...]
    slots: NDArray[np.int64]
    unknown: int = 0

    @property
    def memory_bytes(self) -> int:
        """Size of the mapped file; 0 when everything is on disk."""
        return int(self.slots.sum())

    @property
    def total(self) -> int:
        """Number of different images and variants."""
        return int(np.count_nonzero(self.owners == np.arange(len(self.owners))))

    @property
    def reused(self) -> int:
        """Number of entries that need no encoding."""
        return self.total - len(self.missing)

    @property
    def reasons(self) -> dict[str, int]:
        """How many entries must be made, by reason, most frequent first."""
        return dict(Counter(self.why).most_common())

    def on_disk(self) -> LatentPlan:
        """Return the plan without what would be kept in memory."""
        kept = self.places[self.missing] != MEMORY
        return replace(
            self,
            missing=self.missing[kept],
            buckets=self.buckets[kept],
            files=self.files[kept],
            why=tuple(reason for reason, keep in zip(self.why, kept.tolist(), strict=True) if keep),
            slots=np.zeros_like(self.slots),
        )

    def describe(self) -> str:
        """Return one line: ``120 reused, 12 to encode (9 other resolution, 2 unreadable, 1 image changed)``."""
        detail = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        line = f"{self.reused} reused, {len(self.missing)} to encode" + (f" ({detail})" if detail else "")
        return line + (f"; {self.unknown} tell no origin and are taken as they are" if self.unknown else "")

    def batches(
        self, batch_size: int, *, rank: int = 0, world_size: int = 1, in_memory: bool = False
    ) -> Iterator[list[int]]:
        """Yield table rows to encode together: of one bucket, all or none mirrored too, full except for the last ones.

        File i of the sorted list belongs to rank i modulo `world_size`. Entries in memory exist once per node: for them
        (`in_memory=True`) give the rank and number of processes within the node.
        """
        chosen = (self.places[self.missing] == MEMORY) == in_memory
        if len(chosen) == 0:
            return
        # Count whole files among the chosen ones, in order of appearance.
        _, first, inverse = np.unique(self.files[chosen], return_index=True, return_inverse=True)
        turn = np.argsort(np.argsort(first))[inverse]
        mine = turn % world_size == rank
        rows, buckets = self.missing[chosen][mine], self.buckets[chosen][mine]
        for bucket in dict.fromkeys(buckets.tolist()):
            members = rows[buckets == bucket].tolist()
            for start in range(0, len(members), batch_size):
                yield members[start : start + batch_size]


class LatentMemory:
    """Latents of all rows in one mapped file: written by the ranks of a node, read by their loader workers.

    Rows lie one after the other, each `slots[row]` bytes long: latents float32, mirrored latents if needed, the mask as
    bytes if needed, and one byte that says that the row is filled.
    """

    def __init__(self, file: MappedFile, slots: NDArray[np.int64]) -> None:
        self._file = file
        self._slots = slots
        self._offsets = np.cumsum(slots) - slots

    @classmethod
    def create(cls, slots: NDArray[np.int64], folder: str | None = None) -> LatentMemory:
        """Reserve a temporary file for rows of `slots` bytes; it is removed when the object goes.

        Raises:
            UserError: there is not enough space.
        """
        file = MappedFile.create(int(slots.sum()), what="latents", option="--cache_latents", folder=folder)
        return cls(file, slots)

    @property
    def path(self) -> str:
        """Of the file."""
        return self._file.path

    def slot(self, row: int) -> NDArray[np.uint8]:
        """Return the bytes of a row, shared by all processes of the node."""
        return self._file.bytes(int(self._offsets[row]), int(self._slots[row]))

    def __reduce__(self) -> tuple[Any, ...]:
        return LatentMemory, (self._file, self._slots)


def slot_bytes(need: LatentNeed) -> int:
    """Return the size of a slot of `LatentMemory`, padded to whole float32 values."""
    size = 4 * prod(need.shape) * (2 if need.flip else 1) + 1 + (prod(need.mask_shape) if need.mask else 0)
    return -(-size // 4) * 4


@dataclass(frozen=True, slots=True)
class LatentSource:
    """Serves cached latents by table row; picklable, and small whatever it serves.

    `needs(row)` is a picklable callable that tells file name and shapes.
    """

    needs: Callable[[int], LatentNeed]
    rules: CacheRules
    places: NDArray[np.uint8]
    owners: NDArray[np.int64]
    memory: LatentMemory | None = None

    def read(self, row: int, *, flipped: bool, with_mask: bool) -> CachedLatents:
        """Return latents of a row and, if wanted, its mask.

        Raises:
            BrokenCache: there is nothing usable; a damaged file has been set aside.
        """
        owner = int(self.owners[row])
        need, place = self.needs(owner), int(self.places[owner])
        if place == MEMORY and self.memory is not None:
            return _read_slot(self.memory.slot(owner), need, flipped=flipped, with_mask=with_mask)
        path = cache_path(need.record, self.rules, self._suffix(place))
        with setting_aside(path):
            return caches.read_latents(
                path, need.shape, flipped=flipped, mask_shape=need.mask_shape if with_mask else None
            )

    def write(self, row: int, vae: str, arrays: dict[str, NDArray[Any] | None]) -> None:
        """Store `latents`, `latents_flipped` and `alpha_mask` (float, 0..1) of an owner row.

        Raises:
            UserError: values are not finite.
            CannotSave: a cache file could not be written.
        """
        need = self.needs(row)
        if self.places[row] == MEMORY and self.memory is not None:
            caches.require_finite(need.record.path, (arrays.get("latents"), arrays.get("latents_flipped")))
            _write_slot(self.memory.slot(row), need, arrays)
        else:
            caches.write_latents(cache_path(need.record, self.rules), need, self.rules, vae, arrays)

    def _suffix(self, place: int) -> str | None:
        return {LEGACY: OLD_NAME, OTHER: "_sdxl"}.get(place)


def _parts(
    slot: NDArray[np.uint8], need: LatentNeed
) -> tuple[list[NDArray[Any]], NDArray[np.uint8], NDArray[np.uint8]]:
    """Split a slot into its latents (plain, mirrored), mask bytes and the byte that marks it filled."""
    size = 4 * prod(need.shape)
    count = 2 if need.flip else 1
    latents = [slot[i * size : (i + 1) * size].view(np.float32).reshape(need.shape) for i in range(count)]
    rest = slot[count * size :]
    mask_size = prod(need.mask_shape) if need.mask else 0
    return latents, rest[:mask_size], rest[mask_size : mask_size + 1]


def _read_slot(slot: NDArray[np.uint8], need: LatentNeed, *, flipped: bool, with_mask: bool) -> CachedLatents:
    latents, mask_bytes, filled = _parts(slot, need)
    if not filled[0] or (flipped and not need.flip):
        raise BrokenCache(caches.MISSING)
    mask = None
    if with_mask and need.mask:
        mask = mask_bytes.reshape(need.mask_shape).astype(np.float32) / np.float32(255)
        mask = np.ascontiguousarray(mask[:, ::-1]) if flipped else mask
    return CachedLatents(np.array(latents[1 if flipped else 0]), mask)


def _write_slot(slot: NDArray[np.uint8], need: LatentNeed, arrays: dict[str, NDArray[Any] | None]) -> None:
    latents, mask_bytes, filled = _parts(slot, need)
    for target, name in zip(latents, ("latents", "latents_flipped"), strict=False):
        target[:] = arrays[name]
    mask = arrays.get("alpha_mask")
    if need.mask:
        mask_bytes[:] = 255 if mask is None else np.rint(np.asarray(mask) * 255).astype(np.uint8).ravel()
    filled[:] = 1


@dataclass(slots=True)
class _Finding:
    """What is known of one entry after looking at its cache."""

    row: int
    place: int
    reason: str | None
    path: str
    variant: str
    image: str
    bucket_wh: tuple[int, int]
    flip: bool
    slot: int
    known: bool


def plan_latents(
    needs: Callable[[int], LatentNeed], identities: Iterable[Any], rules: CacheRules, vae: str, *, to_disk: bool
) -> LatentPlan:
    """Look at the cache of every image and decide what must be encoded.

    Args:
        needs: what a row needs; rows of equal identity get equal needs.
        identities: for each row, what decides its latents; rows with equal values share an entry.
        rules: names and validity rules.
        vae: fingerprint of the VAE; empty to accept any.
        to_disk: read and write cache files; otherwise everything is encoded and kept in memory.
    """
    first: dict[Any, int] = {}
    owners = np.array([first.setdefault(key, row) for row, key in enumerate(identities)], np.int64)
    findings = _look(needs, list(first.values()), rules, vae, to_disk=to_disk)
    if to_disk:
        _settle(findings)
    places, slots = np.zeros(len(owners), np.uint8), np.zeros(len(owners), np.int64)
    for finding in findings:
        places[finding.row] = finding.place
        slots[finding.row] = finding.slot if finding.place == MEMORY else 0
    todo = [finding for finding in findings if finding.reason is not None]
    todo.sort(key=lambda finding: (prod(finding.bucket_wh), finding.bucket_wh, finding.flip, finding.row))
    return LatentPlan(
        places=places[owners],
        owners=owners,
        missing=np.array([finding.row for finding in todo], np.int64),
        buckets=_numbers((finding.bucket_wh, finding.flip) for finding in todo),
        files=_numbers(finding.image for finding in todo),
        why=tuple(str(finding.reason) for finding in todo),
        slots=slots,
        unknown=sum(not finding.known and finding.reason is None for finding in findings),
    )


def _numbers(values: Iterable[Any]) -> NDArray[np.int64]:
    """Number values in the order in which they first occur."""
    seen: dict[Any, int] = {}
    return np.array([seen.setdefault(value, len(seen)) for value in values], np.int64)


def _look(
    needs: Callable[[int], LatentNeed], rows: Sequence[int], rules: CacheRules, vae: str, *, to_disk: bool
) -> list[_Finding]:
    """Check the files of all rows with a few threads; each folder is listed once."""
    folders = cache_files.CacheFolders()

    def look(row: int) -> _Finding:
        need = needs(row)
        path, place, known = "", MEMORY, True
        reason: str | None = IN_MEMORY
        if to_disk:
            path = cache_path(need.record, rules)
            suffix, verdict = caches.find_valid(need, rules, vae, folders.names_beside(path))
            place = OWN if suffix is None else _place_of(suffix, rules)
            reason, known = verdict.reason, verdict.known
        return _Finding(
            row,
            place,
            reason,
            path,
            variant=need.variant,
            image=need.record.path,
            bucket_wh=need.placement.bucket_wh,
            flip=need.flip,
            slot=slot_bytes(need),
            known=known,
        )

    return look_at_all(rows, look)


def _place_of(suffix: str, rules: CacheRules) -> int:
    return OWN if suffix == rules.suffix else LEGACY if suffix == OLD_NAME else OTHER


def _settle(findings: Iterable[_Finding]) -> None:
    """Move entries to memory that cannot be written: read-only folders, and two resizings of one file and bucket."""
    folders = cache_files.CacheFolders()
    taken: set[tuple[str, str]] = set()
    for finding in findings:
        name = (finding.path, finding.variant)
        if name in taken:
            finding.place, finding.reason = MEMORY, SHARED_NAME
        taken.add(name)
        if finding.reason is None or finding.place == MEMORY:
            continue
        if not folders.can_write(finding.path):
            finding.place, finding.reason = MEMORY, READ_ONLY_FOLDER
