"""The data of a run whose tar files are streamed: what training asks of its data, as far as it can be known."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from library.contracts import ConditionMaker, FamilySpec, Position, RunLength, Tokenizer
from library.data.dataset_spec import DatasetSpec, SubsetSpec
from library.data.options import CacheOptions, DatasetOptions
from library.data.records import empty_table
from library.data.serving import Catalogue, Placements, Reading
from library.data.shard_copies import shard_copy
from library.data.shard_scan import shard_key
from library.data.shards import expand_shards, is_pipe
from library.data.stream_source import SlotStream, StreamSettings, secure_webdataset
from library.data.summary import settings_digest
from library.errors import Problem, UserError, raise_problems

_log = logging.getLogger(__name__)

_LOOKED_AT = 1000
_OPTION = "--webdataset_streaming"


@dataclass
class StreamedData:
    """Behind the interface of `library.data.dataset.TrainingData`; without caches, validation and a table of images.

    Attributes:
        catalogue: how samples are served; its table is empty.
        settings: what is streamed.
        batches: of an epoch.
        whole_run: the epoch is as long as the run.
    """

    catalogue: Catalogue
    settings: StreamSettings
    batches: int
    whole_run: bool
    cache: CacheOptions = field(default_factory=CacheOptions)

    streamed = True
    uses_latent_cache = False
    reads_only_latents = False
    fixed_captions = False
    validation = None
    skipped: tuple[Problem, ...] = ()
    num_reg_images = 0

    @property
    def family(self) -> FamilySpec:
        """What the model family wants to know of data."""
        return self.catalogue.family

    @property
    def specs(self) -> tuple[DatasetSpec, ...]:
        """The data set."""
        return self.catalogue.specs

    @property
    def num_train_images(self) -> int:
        """Samples that count as an epoch."""
        return self.batches * self.specs[0].batch_size

    def batch_count(self) -> int:
        """Number of batches that count as an epoch."""
        return self.batches

    def use_conditions(self, conditions: ConditionMaker) -> None:
        """Serve what a ControlNet looks at from now on, `Batch.control`."""
        self.catalogue = replace(self.catalogue, conditions=conditions)

    def batches_before(self, length: RunLength, position: Position) -> int:
        """Return how many micro-batches each rank has had when the run is at `position`."""
        if self.whole_run:
            return position.step * length.accumulation
        last = -(-length.batches_in_update(length.updates_per_epoch - 1) // length.world_size)
        in_epoch = (length.updates_per_epoch - 1) * length.accumulation + last
        return position.epoch * in_epoch + position.update_in_epoch * length.accumulation

    def lanes(self, workers: int, world_size: int) -> int:
        """Return how many of a rank's `workers` have work: every loader process needs a tar file of its own."""
        return workers if self.settings.resampled else min(workers, len(self.settings.shards) // world_size)

    def counts(self) -> dict[str, int]:
        """Return how many images and batches an epoch has."""
        return {
            "num_train_images": self.num_train_images,
            "num_reg_images": 0,
            "num_batches_per_epoch": self.batches,
        }

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells two states of the data apart: the names of tar files, not what is in them."""
        names = "\n".join(map(shard_key, self.settings.shards))
        digest = blake2b(names.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        return {
            "tar files": f"{len(self.settings.shards)} {'drawn' if self.settings.resampled else 'streamed'}, {digest}",
            "data sets": settings_digest(self.specs),
            "shuffle buffer": self.settings.buffer,
            "batches per epoch": "as long as the run" if self.whole_run else self.batches,
        }


def open_stream(
    specs: tuple[DatasetSpec, ...],
    data: DatasetOptions,
    cache: CacheOptions,
    *,
    spec: FamilySpec,
    tokenizers: tuple[Tokenizer, ...],
    run_batches: int | None,
) -> StreamedData:
    """Look at the beginning of streamed tar files and decide how samples are served.

    Args:
        specs: of the data sets.
        data: where tar files are.
        cache: must ask for nothing.
        spec: of the model family.
        tokenizers: one per text encoder.
        run_batches: that the whole run takes; None when its length is counted in epochs.

    Raises:
        UserError: something asked for needs an index, or the first samples cannot be used.
    """
    raise_problems(list(_problems(specs, data, cache, run_batches)))
    secure_webdataset()
    subset = specs[0].subsets[0]
    settings = StreamSettings(
        shards=_shards_of(subset, data),
        buffer=data.webdataset_shuffle,
        max_pixels=data.max_image_pixels,
        exif=not data.no_exif_transpose,
        resampled=data.webdataset_resampled,
        copies=data.webdataset_cache_dir,
    )
    if subset.num_repeats != 1:
        _log.warning("%s: num_repeats has no effect on streamed tar files", subset.label)
    _look(settings, specs[0])
    catalogue = Catalogue(
        family=spec,
        specs=specs,
        table=empty_table(),
        placements=Placements.of([]),
        tokenizers=tokenizers,
        prior_loss_weight=data.prior_loss_weight,
        reading=Reading(exif_transpose=settings.exif, max_pixels=settings.max_pixels),
    )
    size = data.webdataset_epoch_size
    batches = run_batches if size is None else -(-size // specs[0].batch_size)
    return StreamedData(catalogue, settings, batches or 1, whole_run=size is None)


def _shards_of(subset: SubsetSpec, data: DatasetOptions) -> tuple[str, ...]:
    """Return the tar files; commands are run at once, since what they write has no size before."""
    shards = expand_shards(subset.webdataset_path, where="webdataset_path", pipes=data.allow_pipe_urls)
    copies = data.webdataset_cache_dir or ""
    return tuple(str(shard_copy(shard, copies)) if is_pipe(shard) else shard for shard in shards)


def _problems(
    specs: Sequence[DatasetSpec], data: DatasetOptions, cache: CacheOptions, run_batches: int | None
) -> Iterator[Problem]:
    subsets = [subset for spec in specs for subset in spec.subsets]
    if len(subsets) != 1 or not subsets[0].webdataset_path:
        yield Problem(_OPTION, "takes a single set of tar files, and nothing besides", "Leave the option out.")
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if getattr(cache, name):
            yield Problem(f"--{name}", "needs samples that are known beforehand", f"Drop it or {_OPTION}.")
    if any(subset.validation_split for subset in subsets):
        yield Problem("validation_split", "needs samples that are known beforehand", f"Drop it or {_OPTION}.")
    if any(subset.is_reg for subset in subsets):
        yield Problem("is_reg", "regularization images stand beside others, which are missing", "Remove it.")
    if data.debug_dataset:
        yield Problem("--debug_dataset", "needs samples that are known beforehand", f"Drop {_OPTION} for the report.")
    if run_batches is None and data.webdataset_epoch_size is None:
        hint = "Give --max_train_steps, or --webdataset_epoch_size."
        yield Problem("--max_train_epochs", "streamed tar files have no epochs of their own", hint)


def _look(settings: StreamSettings, spec: DatasetSpec) -> None:
    """Make sure that the first samples can be used.

    Raises:
        UserError: none of them can.
    """
    stream = SlotStream(settings, spec, seed=0, slot=0, slots=1)
    filters, subset = stream.selection.filters, spec.subsets[0]
    found = stream.first(_LOOKED_AT)
    if not found:
        filters.check(f"{subset.label}: dataset_filter")
        raise UserError(stream.why, "See what the tar files hold: tar tf FILE.", where=subset.label)
    if subset.class_tokens is None and not any(sample.caption for sample in found):
        hint = "Name where captions are with caption_field (txt, json:key), or give class_tokens ('' for none)."
        raise UserError(f"none of the first {len(found)} samples has a caption", hint, where=subset.label)
    _log.info("%s: streamed from %d tar files", subset.label, len(settings.shards))
    if filters.rules:
        _log.info("%s: of the first samples: %s", subset.label, stream.selection.report())
