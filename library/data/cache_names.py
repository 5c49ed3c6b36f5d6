"""Which file holds the latents of an image, and what its content depends on. Names only: nothing is opened here."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from library.contracts import ImageRecord, Placement
from library.data.storage import Locator, holds_members, is_remote, locator_of

LEGACY = ""
"""Suffix of the oldest names, `<stem>.npz`, which say neither size nor family."""

_MAX_NAME = 255


@dataclass(frozen=True, slots=True)
class CacheRules:
    """Options of the caches that decide names and validity; `sized` and `suffix` as in `FamilySpec`."""

    suffix: str = "_sd"
    sized: bool = True
    family: str = ""
    folder: str | None = None
    root: str = ""
    use_hash: bool = False
    trust_mtime: bool = False
    skip_check: bool = False

    @property
    def readable(self) -> tuple[str, ...]:
        """Suffixes of latent caches that may serve, the family's own first. Where names tell no size, no other may."""
        if not self.sized:
            return (self.suffix,)
        return (self.suffix, LEGACY, *(("_sdxl",) if self.suffix == "_sd" else ()))


@dataclass(frozen=True, slots=True)
class LatentNeed:
    """What one image needs from its cache file: its variant, and all that the arrays depend on.

    Attributes:
        record: of the image.
        placement: resize and crop into the bucket.
        shape: of the latents, (channels, height, width).
        interpolation: name of the resize filter, None for the default rule.
        flip: mirrored latents are needed too.
        mask: the alpha channel is needed too.
    """

    record: ImageRecord
    placement: Placement
    shape: tuple[int, int, int]
    interpolation: str | None = None
    flip: bool = False
    mask: bool = False

    @property
    def variant(self) -> str:
        """Latent size as in array names: height x width."""
        return f"{self.shape[1]}x{self.shape[2]}"

    @property
    def mask_shape(self) -> tuple[int, int]:
        """Shape of the mask: the bucket's (height, width)."""
        return self.placement.bucket_wh[1], self.placement.bucket_wh[0]

    def provenance(self, rules: CacheRules, vae: str) -> dict[str, Any]:
        """Return what is written beside the arrays, without the hash of the source."""
        return {
            "family": rules.family,
            "vae": vae,
            "source_size": self.record.file_size,
            "source_mtime_ns": self.record.mtime_ns,
            "orientation": self.record.orientation,
            "bucket_wh": list(self.placement.bucket_wh),
            "resized_wh": list(self.placement.resized_wh),
            "crop_xy": list(self.placement.crop_xy),
            "resize": self.interpolation or "auto",
            "dtype": "float32",
            "posterior": "sample",
        }


def cache_path(record: ImageRecord, rules: CacheRules, suffix: str | None = None) -> str:
    """Return the name of an image's cache file; `suffix=LEGACY` gives `<stem>.npz`, None the family's own name."""
    suffix = rules.suffix if suffix is None else suffix
    size = f"_{record.size_wh[0]:04d}x{record.size_wh[1]:04d}" if rules.sized and suffix != LEGACY else ""
    ending = f"{size}{suffix}.npz"
    return _beside(record.path, ending, rules)


def text_cache_path(path: str, rules: CacheRules) -> str:
    """Return the name of the file with the text encoder outputs for the image at `path`: `<stem><suffix>.npz`."""
    return _beside(path, f"{rules.suffix}.npz", rules)


def _beside(path: str, ending: str, rules: CacheRules) -> str:
    locator = locator_of(path)
    mirrored = _mirrored(path, rules) if locator is None else _of_member(locator, rules)
    stem, _ = os.path.splitext(mirrored)  # noqa: PTH122 - names may hold bytes that Path changes
    folder, name = os.path.split(stem)
    if len(os.fsencode(name)) + len(ending) > _MAX_NAME:
        mark = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
        name = os.fsencode(name)[: _MAX_NAME - len(ending) - 17].decode("utf-8", "ignore") + "-" + mark
    return os.path.join(folder, name + ending)  # noqa: PTH118


def _of_member(locator: Locator, rules: CacheRules) -> str:
    """Return what stands for a member of a tar file: a folder for each tar file, a name for each member.

    Both hold a digest of the whole name, so neither tar files of equal names nor members of different folders of one
    can get the same.
    """
    shard = locator.shard if is_remote(locator.shard) else os.path.abspath(locator.shard)  # noqa: PTH100
    base = shard.partition("?")[0].rstrip("/").rpartition("/")[2].removesuffix(".tar")
    folder = f"{_printable(base)}-{_mark(shard, 12)}"
    stem = locator.member.rpartition("/")[2].partition(".")[0]
    return os.path.join(rules.folder or "", folder, f"{_printable(stem)}-{_mark(locator.member, 8)}.tar")  # noqa: PTH118


def _mark(text: str, size: int) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


def _printable(text: str) -> str:
    """Return what of a name is harmless everywhere; its digest tells it apart."""
    return re.sub(r"[^\w-]", "_", text, flags=re.ASCII)[:80]


def mirror_root(folders: Iterable[str]) -> str:
    """Return the folder whose tree `--cache_dir` mirrors: the nearest one above all image folders."""
    plain = [folder for folder in folders if not holds_members(folder)]
    above = [os.path.dirname(os.path.abspath(folder)) for folder in plain]  # noqa: PTH100, PTH120
    try:
        return os.path.commonpath(above) if above else ""
    except ValueError:  # several drives
        return ""


def _mirrored(path: str, rules: CacheRules) -> str:
    if rules.folder is None:
        return path
    whole = os.path.abspath(path)  # noqa: PTH100
    drive, rest = os.path.splitdrive(whole)
    inside = drive.replace(":", "") + rest
    if rules.root:
        with suppress(ValueError):
            relative = os.path.relpath(whole, rules.root)
            inside = inside if relative.startswith("..") else relative
    return os.path.join(rules.folder, inside.lstrip("/\\"))  # noqa: PTH118
