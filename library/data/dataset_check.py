"""Findings about the pictures and captions of a data set: what they are, and the report that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from library.data.bad_files import BadFile, printable
from library.data.check_kinds import KINDS
from library.data.check_sources import Picture, Sources
from library.data.near_duplicates import near_groups
from library.data.picture_facts import PictureFacts

FORMAT = 1

_TURNS = {2: "mirrored", 3: "by 180 degrees", 4: "mirrored", 6: "by 90 degrees", 8: "by 90 degrees"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is too small, too large, too long or too much alike.

    Attributes:
        min_side: shortest side that is not tiny, in pixels.
        max_megapixels: pictures with more are oversized.
        max_tokens: longest caption, in tokens.
        near_distance: number of bits in which the hashes of near duplicates may differ; None: they are not looked for.
    """

    min_side: int = 256
    max_megapixels: float = 64.0
    max_tokens: int = 75
    near_distance: int | None = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to look at: the files that it is about, and more about it."""

    paths: tuple[str, ...]
    detail: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return what the report holds."""
        return {"paths": list(self.paths), "detail": self.detail, **self.values}

    def __str__(self) -> str:
        text = " = ".join(printable(path) for path in self.paths)
        return f"{text}: {printable(self.detail)}" if self.detail else text


Findings = dict[str, list[Finding]]


def find_all(
    sources: Sources,
    facts: Mapping[Path, PictureFacts],
    failed: Iterable[BadFile],
    limits: Limits,
    count_tokens: Callable[[str], int],
) -> Findings:
    """Return everything there is to say, by kind, with all kinds.

    Args:
        sources: pictures and captions.
        facts: of the pictures that could be decoded.
        failed: pictures that could not.
        limits: what is too much.
        count_tokens: number of tokens of a caption without limit.
    """
    found: Findings = {kind: [] for kind in KINDS}
    found["unreadable"] = [_of_bad(bad) for bad in failed]
    found["missing_picture"] = [_of_bad(bad) for bad in sources.missing]
    found["same_name"] = [_of_bad(bad) for bad in sources.twins]
    found["orphan_caption"] = [Finding((str(path),)) for path in sources.orphans]
    for path, known in facts.items():
        _judge_picture(found, str(path), known, limits)
    _find_copies(found, facts, limits)
    for picture in sources.pictures:
        _judge_caption(found, picture, limits, count_tokens)
    return found


def _of_bad(bad: BadFile) -> Finding:
    return Finding((bad.path,), f"{bad.reason}. {bad.hint}".strip(". ") if bad.hint else bad.reason)


def _judge_picture(found: Findings, path: str, facts: PictureFacts, limits: Limits) -> None:
    width, height = facts.size_wh
    size = {"width": width, "height": height}
    if min(width, height) < limits.min_side:
        found["tiny"].append(Finding((path,), f"{width}x{height}", size))
    if width * height > limits.max_megapixels * 1_000_000:
        found["oversized"].append(Finding((path,), f"{width}x{height}, {width * height / 1e6:.0f} megapixels", size))
    if facts.orientation > 1:
        turn = _TURNS.get(facts.orientation, "by 90 degrees, mirrored")
        found["rotated"].append(Finding((path,), f"shown turned {turn}", {"orientation": facts.orientation}))


def _find_copies(found: Findings, facts: Mapping[Path, PictureFacts], limits: Limits) -> None:
    """Find the same file twice, and what looks alike among the different ones."""
    by_digest: dict[str, list[str]] = {}
    for path, known in facts.items():
        by_digest.setdefault(known.digest, []).append(str(path))
    found["duplicate"] = [Finding(tuple(paths)) for paths in by_digest.values() if len(paths) > 1]
    if limits.near_distance is None or len(by_digest) < 2:
        return
    first = {paths[0] for paths in by_digest.values()}
    different = [(str(path), known) for path, known in facts.items() if str(path) in first]
    hashes = np.array([known.look for _, known in different], np.uint64)
    thumbnails = np.frombuffer(b"".join(known.thumbnail for _, known in different), np.uint8)
    for group in near_groups(hashes, thumbnails.reshape(len(different), -1), limits.near_distance):
        paths = tuple(different[member][0] for member in group.members)
        detail = f"differ in up to {group.distance} of 64 bits"
        found["near_duplicate"].append(Finding(paths, detail, {"distance": group.distance}))


def _judge_caption(found: Findings, picture: Picture, limits: Limits, count_tokens: Callable[[str], int]) -> None:
    path = str(picture.path)
    if picture.problem:
        values = {"caption_file": picture.where} if picture.where else {}
        detail = picture.detail or picture.where
        found[picture.problem].append(Finding((path,), detail, values))
    elif picture.caption:
        longest = max(map(count_tokens, picture.caption.split("\n")))
        if longest > limits.max_tokens:
            detail = f"{longest} tokens, {longest - limits.max_tokens} are cut off"
            found["long_caption"].append(Finding((path,), detail, {"tokens": longest, "caption_file": picture.where}))


def as_report(found: Findings, limits: Limits, *, pictures: int, ignored: Sequence[str]) -> dict[str, Any]:
    """Return the report as it is written: counts, and every finding of the kinds that count.

    Args:
        found: from `find_all`.
        limits: that were applied.
        pictures: number of pictures looked at.
        ignored: kinds that do not count.
    """
    counted = {kind: list_ for kind, list_ in found.items() if kind not in ignored}
    return {
        "format": FORMAT,
        "status": "problems" if any(counted.values()) else "clean",
        "pictures": pictures,
        "limits": {
            "min_side": limits.min_side,
            "max_megapixels": limits.max_megapixels,
            "max_tokens": limits.max_tokens,
            "near_distance": limits.near_distance,
        },
        "ignored": list(ignored),
        "counts": {kind: len(list_) for kind, list_ in counted.items()},
        "findings": {kind: [finding.as_json() for finding in list_] for kind, list_ in counted.items()},
    }


def summary_lines(found: Findings, *, pictures: int, ignored: Sequence[str], shown: int) -> list[str]:
    """Return the summary for people: every kind with its first findings."""
    lines = [f"{pictures} pictures looked at"]
    for kind, words in KINDS.items():
        findings = found[kind]
        if not findings or kind in ignored:
            continue
        lines.append("")
        lines.append(f"{kind}: {len(findings)} {words}")
        lines += [f"  {finding}" for finding in findings[:shown]]
        if len(findings) > shown:
            lines.append(f"  ... and {len(findings) - shown} more")
    if len(lines) == 1:
        lines.append("nothing to complain about")
    return lines
