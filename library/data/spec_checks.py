"""What cannot be had together in the data sets of a run, judged before anything is scanned."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from library.data.captions import CaptionPipeline
from library.data.dataset_schema import PATH_KEYS
from library.data.dataset_spec import DatasetSpec, SubsetSpec
from library.data.options import CacheOptions, DatasetOptions
from library.data.selection import selection_problems
from library.errors import Problem
from library.option_values import nearest

_log = logging.getLogger(__name__)

_LONG_RUN = 1 << 40
_LARGEST_SIDE = 16_384


def cache_problems(specs: Sequence[DatasetSpec], cache: CacheOptions) -> Iterator[Problem]:
    """Yield what cannot be had together with cached latents or cached outputs of the text encoder."""
    if cache.cache_text_encoder_outputs:
        for subset, name in varying_captions(specs):
            what = f"{name} makes captions vary, so the text encoder's outputs cannot be kept"
            yield Problem(subset.label, what, f"Drop {name} or --cache_text_encoder_outputs.")
    to_disk = cache.cache_latents_to_disk or cache.cache_text_encoder_outputs_to_disk
    if to_disk and cache.cache_dir is None and any(subset.webdataset_path for spec in specs for subset in spec.subsets):
        yield Problem("--cache_dir", "is needed: nothing can be kept beside images in tar files", "Name a folder.")
    if not (cache.cache_latents or cache.cache_latents_to_disk):
        return
    for subset in (subset for spec in specs for subset in spec.subsets):
        for name in ("color_aug", "random_crop"):
            if getattr(subset, name):
                yield Problem(subset.label, f"{name} needs the pictures at every visit", "Drop it or --cache_latents.")
        if subset.face_crop_aug_range is not None:
            _log.warning("%s: face_crop_aug_range has no effect on cached latents", subset.label)


def size_problems(specs: Sequence[DatasetSpec], smallest: int, config: str | None) -> Iterator[Problem]:
    """Yield sizes of pictures that no model of the family can be trained at.

    Args:
        specs: data sets, with sizes as pictures are trained.
        smallest: side of a picture in pixels that the family needs.
        config: data set file that the sizes are from; None: the command line.
    """
    for spec in specs:
        names = ("resolution", "min_bucket_reso") if config else ("--resolution", "--min_bucket_reso")
        where, least = (f"{config}: data set {spec.index + 1}: {name}" if config else name for name in names)
        if min(spec.resolution_wh) < smallest or max(spec.resolution_wh) > _LARGEST_SIDE:
            size = "{}x{}".format(*spec.resolution_wh)
            yield Problem(where, f"sides of pictures must have {smallest} to {_LARGEST_SIDE} pixels, not {size}")
        elif spec.enable_bucket and not spec.bucket_sizes and spec.min_bucket_reso < smallest:
            what = f"this model needs sides of at least {smallest} pixels, not {spec.min_bucket_reso}"
            yield Problem(least, what, f"Give {smallest} or more.")


def mask_problems(specs: Sequence[DatasetSpec], data: DatasetOptions) -> Iterator[Problem]:
    """Yield that `--masked_loss` has nothing to work with; where some subsets have masks, the rest counts fully."""
    subsets = [subset for spec in specs for subset in spec.subsets]
    if data.masked_loss and not any(subset.conditioning_data_dir or subset.alpha_mask for subset in subsets):
        hint = "Name a conditioning_data_dir in the subsets of a --dataset_config, or use --alpha_mask."
        yield Problem("--masked_loss", "there are no masks", hint)


def varying_captions(specs: Sequence[DatasetSpec]) -> Iterator[tuple[SubsetSpec, str]]:
    """Yield every setting that makes captions differ from visit to visit, apart from dropping them whole."""
    for subset in (subset for spec in specs for subset in spec.subsets):
        # A warm-up over a share of the run counts, however short the run is.
        for name in CaptionPipeline(subset, _LONG_RUN).varying_options():
            yield subset, name


def warn_of_unused_caches(cache: CacheOptions) -> None:
    """Say that batches of the user's own class are never cached."""
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if getattr(cache, name):
            _log.warning("--%s: has no effect on the batches of --dataset_class", name)


def path_problems(subset: SubsetSpec, where: str) -> Iterator[Problem]:
    """Yield folders and files that do not exist, with the resolved path and a near name, and unusable filters."""
    yield from selection_problems(subset.dataset_filter, subset.caption_field, f"{where}: ")
    for name in PATH_KEYS:
        value = getattr(subset, name)
        if value is None:
            continue
        path = Path(value)
        exists = path.is_file() if name == "metadata_file" else path.is_dir()
        if exists:
            continue
        what = "file" if name == "metadata_file" else "folder"
        hint = f"Looked for {path.absolute()}."
        near = _near_name(path)
        yield Problem(where, f"{name} {value!r}: {what} not found", f"{hint} Did you mean {near!r}?" if near else hint)


def _near_name(path: Path) -> str | None:
    try:
        return nearest(path.name, [entry.name for entry in path.absolute().parent.iterdir()])
    except (OSError, ValueError):
        return None
