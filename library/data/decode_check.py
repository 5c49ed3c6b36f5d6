"""Decoding pictures once at the start, so that a broken one is found before it is met after hours."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from library.data.bad_files import BadFile
from library.data.folder_scan import FolderScan
from library.randomness import uniform

_log = logging.getLogger(__name__)

ALL_BELOW = 20_000
SAMPLED = 256

Checker = Callable[..., "str | None"]


def check_pictures(scans: Sequence[FolderScan], which: str, *, exif: bool, max_pixels: int) -> None:
    """Decode images that no index remembers as decoded; bad ones move from the facts of their scan to its bad files.

    Args:
        scans: Folders to check.
        which: "all", "none", or "auto": all up to 20,000 images, a sample above.
        exif: Sizes are those after EXIF orientation.
        max_pixels: Limit of the decoder.
    """
    checker = _checker() if which != "none" else None
    if checker is None:
        return
    todo = _sample(scans) if which == "auto" else _unchecked(scans)
    if not todo:
        return
    if len(todo) > 1000:
        _log.info("decoding %d images to find broken ones (--check_images none skips this)", len(todo))

    def check(item: tuple[FolderScan, int]) -> str | None:
        scan, row = item
        width, height, orientation = scan.facts.headers[row].tolist()
        turn = orientation if exif else 1
        size = (height, width) if turn >= 5 else (width, height)
        path = scan.listing.path(scan.facts.names[row])
        return checker(path, size, orientation=turn, max_pixels=max_pixels)

    broken: dict[int, dict[int, str]] = {}
    for (scan, row), reason in zip(todo, _in_threads(check, todo), strict=True):
        if reason is None:
            scan.facts.checked[row] = True
            scan.changed = True
        else:
            broken.setdefault(id(scan), {})[row] = reason
    for scan in scans:
        if id(scan) in broken:
            _move_bad(scan, broken[id(scan)])


def _unchecked(scans: Sequence[FolderScan]) -> list[tuple[FolderScan, int]]:
    return [(scan, row) for scan in scans for row in np.flatnonzero(~scan.facts.checked).tolist()]


def _sample(scans: Sequence[FolderScan]) -> list[tuple[FolderScan, int]]:
    """Return what "auto" decodes: of many images a few, and none once that many are known to be whole."""
    total = sum(len(scan.facts) for scan in scans)
    if total <= ALL_BELOW:
        return _unchecked(scans)
    if sum(int(scan.facts.checked.sum()) for scan in scans) >= SAMPLED:
        return []
    step = total / SAMPLED
    todo = _unchecked(scans)
    picked = {int((number + uniform(0, "decode_check", number)) * step) for number in range(SAMPLED)}
    return [todo[number] for number in sorted(picked) if number < len(todo)]


def _checker() -> Checker | None:
    try:
        from library.data.images import check_decodable
    except ImportError:
        _log.debug("no decode check in this installation")
        return None
    return check_decodable


def _in_threads(
    check: Callable[[tuple[FolderScan, int]], str | None], todo: Sequence[tuple[FolderScan, int]]
) -> list[str | None]:
    """Apply `check` to all items; an interrupt does not wait for those that have not begun."""
    threads = min(8, os.cpu_count() or 1)
    if threads == 1 or len(todo) < 8:
        return [check(item) for item in todo]
    pool = ThreadPoolExecutor(threads)
    try:
        return list(pool.map(check, todo))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _move_bad(scan: FolderScan, reasons: dict[int, str]) -> None:
    facts = scan.facts
    scan.bad += [BadFile(scan.listing.path(facts.names[row]), reason) for row, reason in reasons.items()]
    scan.bad.sort(key=lambda one: one.path)
    keep = np.ones(len(facts), np.bool_)
    keep[list(reasons)] = False
    scan.facts = facts.take(np.flatnonzero(keep))
    scan.changed = True
