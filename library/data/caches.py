"""Latent caches on disk: names, layout, validity, reading and writing. Knows no model.

A cache file stands beside its image, `<stem>_<width>x<height>_sd.npz` (source size, four digits each), and may hold
several variants (bucket sizes, mirrored, mask). Array names end in the latent size, `latents_56x72`; names without it
are read when the shape fits. `meta_json` records where the arrays come from. Files of other programs have none and are
accepted on names and shapes alone. Nothing is ever unpickled, and a broken file is an answer, never a crash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.data.cache_files import (
    META,
    MISSING,
    OTHER_FAMILY,
    UNREADABLE,
    BrokenCache,
    Verdict,
    fits,
    meta_array,
    opened,
    read_array,
    read_meta,
    write_cache,
)
from library.data.cache_names import LEGACY, CacheRules, LatentNeed, cache_path
from library.data.npz import BrokenNpz, NpzFile
from library.data.storage import locator_of
from library.errors import UserError

OTHER_RESOLUTION = "other resolution"
IMAGE_CHANGED = "image changed"
OTHER_VAE = "other VAE"
OTHER_RESIZE = "other resizing or cropping"
NO_MASK = "mask missing"
NO_MIRROR = "mirrored latents missing"

_ARRAYS = ("latents", "latents_flipped", "alpha_mask", "original_size", "crop_ltrb")
_MAX_KEPT = 1 << 26


@dataclass(frozen=True, slots=True)
class CachedLatents:
    """Arrays of one variant: latents float32 [C,h,w], mask float32 [H,W] in 0..1 or None."""

    latents: NDArray[np.float32]
    mask: NDArray[np.float32] | None = None


def find_valid(
    need: LatentNeed, rules: CacheRules, vae: str, present: frozenset[str] | None = None
) -> tuple[str | None, Verdict]:
    """Look for a cache file that serves `need`.

    Args:
        need: image and variant.
        rules: names and validity rules.
        vae: fingerprint of the VAE; empty to accept any.
        present: names of the files in the folder, when the caller has listed it.

    Returns:
        (suffix of the valid file, or None; what was found).
    """
    reason: str | None = None
    for suffix in rules.readable:
        path = cache_path(need.record, rules, suffix)
        if present is not None and os.path.basename(path) not in present:  # noqa: PTH119
            continue
        found = check_file(path, need, rules, vae, foreign=suffix not in (rules.suffix, LEGACY))
        if found.reason is None:
            return suffix, found
        if reason is None or reason == MISSING:
            reason = found.reason
    return None, Verdict(reason or MISSING)


def check_file(path: str, need: LatentNeed, rules: CacheRules, vae: str, *, foreign: bool = False) -> Verdict:
    """Return whether a cache file can serve `need`; reads directory and headers, but no pixels or latents.

    Args:
        path: of the cache file.
        need: image and variant.
        rules: names and validity rules.
        vae: fingerprint of the VAE; empty to accept any.
        foreign: the name belongs to another model family, so that a matching record of origin is required.
    """
    try:
        if rules.skip_check:
            return Verdict(None if Path(path).is_file() and not foreign else MISSING)
        with opened(path) as file:
            ending = _ending(file, need.shape)
            reason = _missing_array(file, need, ending)
            origin = _origin(file, need.variant) if ending else None
    except BrokenCache as error:
        return Verdict(error.reason)
    if reason is not None:
        return Verdict(reason)
    if origin is None:
        return Verdict(OTHER_FAMILY if foreign else None, known=False)
    return Verdict(_origin_problem(origin, need, rules, vae))


def _ending(file: NpzFile, shape: tuple[int, int, int]) -> str:
    """Return the ending of the array names that hold latents of `shape`: `_<h>x<w>`, or nothing for the old names."""
    sized = f"_{shape[1]}x{shape[2]}"
    if f"latents{sized}" in file:
        return sized
    if "latents" in file and file.header("latents").shape[-2:] == shape[1:]:
        return ""
    raise BrokenCache(OTHER_RESOLUTION if any(name.startswith("latents") for name in file.names) else UNREADABLE)


def _missing_array(file: NpzFile, need: LatentNeed, ending: str) -> str | None:
    if not fits(file, f"latents{ending}", need.shape):
        return OTHER_RESOLUTION
    if need.flip and not fits(file, f"latents_flipped{ending}", need.shape):
        return NO_MIRROR
    if need.mask and not fits(file, f"alpha_mask{ending}", need.mask_shape):
        return NO_MASK
    return None


def _origin(file: NpzFile, variant: str) -> dict[str, Any] | None:
    found = read_meta(file, "variants").get(variant)
    if found is not None and not isinstance(found, dict):
        raise BrokenNpz("meta_json has another form")
    return found


def _origin_problem(origin: Mapping[str, Any], need: LatentNeed, rules: CacheRules, vae: str) -> str | None:
    expected = need.provenance(rules, vae)
    if vae and origin.get("vae") != vae:
        return OTHER_VAE
    for key in ("bucket_wh", "resized_wh", "crop_xy", "resize"):
        if origin.get(key) != expected[key]:
            return OTHER_RESIZE
    if need.record.file_size == 0:
        return None  # the image itself is gone; the cache stands in for it
    if origin.get("orientation") != expected["orientation"] or origin.get("source_size") != expected["source_size"]:
        return IMAGE_CHANGED
    if origin.get("source_mtime_ns") == expected["source_mtime_ns"] or rules.trust_mtime:
        return None
    stored = origin.get("source_sha256")
    return None if stored and stored == file_sha256(need.record.path) else IMAGE_CHANGED


def stored_size(path: str) -> tuple[int, int] | None:
    """Return the size (width, height) of the image that a cache file was made of; None when it does not tell."""
    with suppress(BrokenCache), opened(path) as file:
        for name in file.names:
            if name.startswith("original_size") and fits(file, name, (2,), "iuf"):
                width, height = file.read(name, 64).tolist()
                return (int(width), int(height)) if 0 < min(width, height) <= max(width, height) < 1 << 20 else None
    return None


def file_sha256(path: str) -> str | None:
    """Return the SHA-256 of a file in hexadecimal, or None when it cannot be read."""
    try:
        locator = locator_of(path)
        with Path(path).open("rb") if locator is None else locator.open() as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
            return digest.hexdigest()
    except OSError:
        return None


def read_latents(
    path: str, shape: tuple[int, int, int], *, flipped: bool = False, mask_shape: tuple[int, int] | None = None
) -> CachedLatents:
    """Read one variant; CRC, shape and finiteness are checked.

    Args:
        path: of the cache file.
        shape: of the latents, (channels, height, width).
        flipped: read the mirrored latents; the mask is mirrored here too.
        mask_shape: (height, width) of the mask when one is wanted.

    Raises:
        BrokenCache: whatever is wrong with the file.
    """
    with opened(path) as file:
        ending = _ending(file, shape)
        name = f"latents_flipped{ending}" if flipped else f"latents{ending}"
        latents = _array(file, name, shape)
        mask = None if mask_shape is None else _array(file, f"alpha_mask{ending}", mask_shape)
    if mask is not None and flipped:
        mask = np.ascontiguousarray(mask[:, ::-1])
    return CachedLatents(latents, mask)


def _array(file: NpzFile, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if not fits(file, name, shape):
        raise BrokenCache(f"{OTHER_RESOLUTION}: no fitting {name}")
    return read_array(file, name, shape)


def require_finite(path: str, arrays: Iterable[NDArray[Any] | None]) -> None:
    """Refuse latents with NaN or infinite values.

    Raises:
        UserError: names the image and the usual remedy.
    """
    if not all(array is None or np.isfinite(array).all() for array in arrays):
        raise UserError(
            "the VAE made NaN or infinite latents of this image",
            "Use --no_half_vae, or a VAE repaired for half precision.",
            where=path,
        )


def write_latents(
    path: str,
    need: LatentNeed,
    rules: CacheRules,
    vae: str,
    arrays: Mapping[str, NDArray[Any] | None],
) -> None:
    """Write one variant into a cache file; other variants in it stay.

    Args:
        path: of the cache file.
        need: image and variant.
        rules: names and validity rules.
        vae: fingerprint of the VAE.
        arrays: `latents`, and where needed `latents_flipped` and `alpha_mask`; None is left out.

    Raises:
        UserError: values are not finite.
        CannotSave: the file could not be written.
    """
    from library.data.buckets import sdxl_crop_ltrb

    require_finite(need.record.path, (arrays.get("latents"), arrays.get("latents_flipped")))
    ending = f"_{need.variant}"
    values: dict[str, NDArray[Any]] = {
        f"{name}{ending}": np.asarray(array, np.float32) for name, array in arrays.items() if array is not None
    }
    size = need.record.size_wh
    values[f"original_size{ending}"] = np.array(size, np.int64)
    values[f"crop_ltrb{ending}"] = np.array(sdxl_crop_ltrb(size, need.placement.bucket_wh), np.float64)
    variants, kept = _what_stays(path, need)
    origin = need.provenance(rules, vae)
    if rules.use_hash:
        origin["source_sha256"] = file_sha256(need.record.path)
    variants[need.variant] = origin
    values[META] = meta_array("variants", variants)
    write_cache(path, values, kept)


def _what_stays(path: str, need: LatentNeed) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """Return origins and raw arrays of the other variants in an existing file; broken ones are dropped."""
    try:
        with NpzFile(path) as file:
            kept = list(_other_members(file, need))
            try:
                variants = dict(read_meta(file, "variants"))
            except BrokenNpz:
                variants = {}
    except (BrokenNpz, OSError):
        return {}, []
    return variants, kept


def _other_members(file: NpzFile, need: LatentNeed) -> Iterator[tuple[str, bytes]]:
    replaced = {f"{name}_{need.variant}" for name in _ARRAYS} | {META}
    with suppress(BrokenNpz):
        # Old names of the same size would go stale unnoticed by programs that know only them.
        if "latents" in file and file.header("latents").shape[-2:] == need.shape[1:]:
            replaced.update(_ARRAYS)
    for name in file.names:
        if name not in replaced:
            with suppress(BrokenNpz):
                yield name, file.raw(name, _MAX_KEPT)
