"""What cannot be had together in the data sets of a run, judged before anything is scanned."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from library.data.captions import CaptionPipeline
from library.data.dataset_spec import DatasetSpec, SubsetSpec
from library.data.options import CacheOptions, DatasetOptions
from library.errors import Problem

_log = logging.getLogger(__name__)

_LONG_RUN = 1 << 40


def cache_problems(specs: Sequence[DatasetSpec], cache: CacheOptions) -> Iterator[Problem]:
    """Yield what cannot be had together with cached latents or cached outputs of the text encoder."""
    if cache.cache_text_encoder_outputs:
        for subset, name in varying_captions(specs):
            what = f"{name} makes captions vary, so the text encoder's outputs cannot be kept"
            yield Problem(subset.label, what, f"Drop {name} or --cache_text_encoder_outputs.")
    if not (cache.cache_latents or cache.cache_latents_to_disk):
        return
    for subset in (subset for spec in specs for subset in spec.subsets):
        for name in ("color_aug", "random_crop"):
            if getattr(subset, name):
                yield Problem(subset.label, f"{name} needs the pictures at every visit", "Drop it or --cache_latents.")
        if subset.face_crop_aug_range is not None:
            _log.warning("%s: face_crop_aug_range has no effect on cached latents", subset.label)


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
