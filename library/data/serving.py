"""What loader workers run: a `BatchKey` goes in, a `Batch` comes out, and nothing else decides what is in it.

Every random choice of a sample derives from (seed, epoch, position), so it does not matter which worker serves it. A
picture or cache entry that turns out bad is replaced by another of its bucket and named in `Batch.replaced`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from library.contracts import Batch, BatchKey, ConditionMaker, FamilySpec, Placement, Sample, SampleKey, Tokenizer
from library.data.augment import Augmentation, View, apply_view, choose_view, mask_of, normalise
from library.data.buckets import sdxl_crop_top_left
from library.data.cache_files import BrokenCache
from library.data.cache_names import LatentNeed
from library.data.captions import CaptionPipeline, Replacement
from library.data.collation import collate
from library.data.condition_store import KeptConditions
from library.data.dataset_spec import DatasetSpec, SubsetSpec
from library.data.images import MAX_IMAGE_PIXELS, BadImage, load_image
from library.data.latent_store import LatentSource
from library.data.records import RecordTable
from library.faults import fault_point
from library.randomness import derive, python_random, uniform

_log = logging.getLogger(__name__)

_TRIES = 32  # choices of another image before a sample is left blank


class TextSource(Protocol):
    """Cached outputs of text encoders, for families whose encoders can be left out of training."""

    def read(self, row: int, caption: str) -> Mapping[str, NDArray[Any]]:
        """Return the arrays that stand for `caption` (of table row `row`, or empty), without a batch axis.

        Raises:
            BrokenCache: they cannot be read; never for the empty caption.
        """


@dataclass(frozen=True, slots=True)
class Placements:
    """The placement of every table row in columns: int32 [N,2] each, as (width, height) or (left, top)."""

    bucket_wh: NDArray[np.int32]
    resized_wh: NDArray[np.int32]
    crop_xy: NDArray[np.int32]

    @classmethod
    def of(cls, placements: Sequence[Placement]) -> Placements:
        """Pack placements."""
        columns = [
            np.array([getattr(placement, name) for placement in placements], np.int32).reshape(-1, 2)
            for name in ("bucket_wh", "resized_wh", "crop_xy")
        ]
        return cls(*columns)

    def __len__(self) -> int:
        return len(self.bucket_wh)

    def __getitem__(self, row: int) -> Placement:
        bucket, resized, crop = (
            (int(column[row, 0]), int(column[row, 1])) for column in (self.bucket_wh, self.resized_wh, self.crop_xy)
        )
        return Placement(bucket, resized, crop)


@dataclass(frozen=True, slots=True)
class Reading:
    """How picture files are read."""

    exif_transpose: bool = True
    max_pixels: int = MAX_IMAGE_PIXELS


@dataclass(frozen=True, slots=True)
class SubsetServing:
    """What serving needs to know of one subset, worked out once.

    Attributes:
        subset: its settings.
        dataset: the data set it belongs to.
        augmentation: how its images are varied and resized.
        cached_flip: mirrored latents are cached: some subset with the same images wants them.
        cached_mask: alpha masks are cached, likewise.
    """

    subset: SubsetSpec
    dataset: DatasetSpec
    augmentation: Augmentation
    cached_flip: bool
    cached_mask: bool

    @classmethod
    def all_of(cls, specs: Sequence[DatasetSpec]) -> dict[int, SubsetServing]:
        """Return the subsets of all data sets by their index."""
        pairs = [(spec, subset) for spec in specs for subset in spec.subsets]
        found = {}
        for spec, subset in pairs:
            alike = [other for _, other in pairs if other.source == subset.source]
            augmentation = Augmentation(
                interpolation=subset.resize_interpolation or spec.resize_interpolation,
                random_crop=subset.random_crop,
                flip=subset.flip_aug,
                color=subset.color_aug,
                face_range=None if spec.enable_bucket else subset.face_crop_aug_range,
            )
            flip, mask = any(other.flip_aug for other in alike), any(other.alpha_mask for other in alike)
            found[subset.index] = cls(subset, spec, augmentation, flip, mask)
        return found


@dataclass(frozen=True)
class Catalogue:
    """All that samples are made of; picklable and small, since the table is shared by mapping."""

    family: FamilySpec
    specs: tuple[DatasetSpec, ...]
    table: RecordTable
    placements: Placements
    tokenizers: tuple[Tokenizer, ...]
    prior_loss_weight: float = 1.0
    reading: Reading = field(default_factory=Reading)
    latents: LatentSource | None = None
    texts: TextSource | None = None
    replacements: tuple[Replacement, ...] = ()
    """What is replaced in captions of training images, see `CaptionPipeline`."""
    conditions: ConditionMaker | None = None
    """What makes `Batch.control`, for methods that train on it."""
    kept_conditions: KeptConditions | None = None
    """The same, where what it finds in pictures is kept."""

    @cached_property
    def subsets(self) -> dict[int, SubsetServing]:
        """The subsets of all data sets by their index."""
        return SubsetServing.all_of(self.specs)

    def of(self, row: int) -> SubsetServing:
        """Return the subset of a table row."""
        return self.subsets[int(self.table.subsets[row])]

    def view(self, row: int, seed: int, key: SampleKey, *, fixed: bool = False) -> View:
        """Choose crop, colour and flip of one visit; `fixed` leaves the crop and the colours alone."""
        augmentation = self.of(row).augmentation
        flipped = augmentation.flip and uniform(seed, "sample", key.epoch, key.position, "flip") < 0.5
        placement = self.placements[row]
        if fixed or not augmentation.draws:
            return View(placement, flipped)
        return choose_view(
            placement,
            augmentation,
            flipped=flipped,
            rng=python_random(seed, "sample", key.epoch, key.position, "image"),
            name=self.table.path(row),
            size_wh=self.table.size_wh(row),
        )

    def pixels(
        self, row: int, view: View, *, alpha: bool | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """Return the picture in a view, uint8 [H,W,3], and its mask, float32 [H,W] in 0..1, or None.

        Args:
            row: of the table.
            view: crop, colour and flip.
            alpha: whether the alpha channel is the mask; None asks the subset.

        Raises:
            BadImage: the picture or its mask cannot be used.
        """
        served = self.of(row)
        record = self.table.record(row)
        pixels = load_image(
            record.path,
            size_wh=record.size_wh,
            orientation=record.orientation,
            alpha=served.subset.alpha_mask if alpha is None else alpha,
            enough_wh=view.placement.resized_wh,
            max_pixels=self.reading.max_pixels,
        )
        pixels = apply_view(pixels, view, served.augmentation.interpolation)
        mask = mask_of(pixels[:, :, 3]) if pixels.shape[2] == 4 else self.mask_image(row, view)
        return pixels[:, :, :3], mask

    def mask_image(self, row: int, view: View) -> NDArray[np.float32] | None:
        """Return the red channel of the row's mask picture, with the geometry of `view`; None without one.

        Raises:
            BadImage: the mask cannot be used.
        """
        if self.conditions is not None and self.conditions.from_file:
            return None
        pixels = self.paired_picture(row, view)
        return None if pixels is None else mask_of(pixels[:, :, 0])

    def picture(self, row: int, view: View, known: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Return the picture of a row in a view, uint8 [H,W,3]: `known`, or read now.

        Raises:
            BadImage: it cannot be used.
        """
        return np.ascontiguousarray(self.pixels(row, view)[0] if known is None else known)

    def paired_picture(self, row: int, view: View) -> NDArray[np.uint8] | None:
        """Return the mask or condition picture of a row, uint8 [H,W,3], with the geometry of `view`; None without one.

        Raises:
            BadImage: it cannot be used.
        """
        path = self.table.mask_path(row)
        if path is None:
            return None
        orientation = None if self.reading.exif_transpose else 1
        pixels = load_image(path, orientation=orientation, max_pixels=self.reading.max_pixels)
        plain = View(view.placement, view.flipped)
        return apply_view(pixels, plain, self.of(row).augmentation.interpolation)[:, :, :3]

    def latent_need(self, row: int) -> LatentNeed:
        """Return what the latent cache must hold for a table row."""
        placement, served = self.placements[row], self.of(row)
        scale = self.family.latent_downscale
        return LatentNeed(
            record=self.table.record(row),
            placement=placement,
            shape=(self.family.latent_channels, placement.bucket_wh[1] // scale, placement.bucket_wh[0] // scale),
            interpolation=served.augmentation.interpolation,
            flip=served.cached_flip,
            mask=served.cached_mask,
        )


class BatchDataset:
    """Map-style data set for torch's loader whose items are whole batches."""

    def __init__(self, catalogue: Catalogue, seed: int, total_steps: int) -> None:
        """Prepare to serve.

        Args:
            catalogue: what there is.
            seed: of the run.
            total_steps: length of the run in updates (captions may warm up over a share of it).
        """
        self.catalogue = catalogue
        self.seed = seed
        self._pipelines = {
            subset.index: CaptionPipeline(subset, total_steps, () if subset.is_reg else catalogue.replacements)
            for spec in catalogue.specs
            for subset in spec.subsets
        }

    def __getitem__(self, key: BatchKey) -> Batch:
        """Load one micro-batch; a bad entry is replaced, never raised."""
        fault_point("loader.worker")
        return collate(key, [self._sample(sample) for sample in key.samples])

    def caption(self, row: int, key: SampleKey) -> str:
        """Return the caption as it is served at this visit."""
        pipeline = self._pipelines[int(self.catalogue.table.subsets[row])]
        rng = python_random(self.seed, "sample", key.epoch, key.position, "caption")
        return pipeline.process(self.catalogue.table.caption(row), rng, epoch=key.epoch + 1, step=key.step)

    def _sample(self, key: SampleKey) -> Sample:
        tried: list[int] = []
        problem = ""
        for row in self._candidates(key):
            if row in tried:
                continue
            tried.append(row)
            try:
                sample = self._load(row, key)
            except (BadImage, BrokenCache) as error:
                reason = error.reason if isinstance(error, BadImage) else str(error)
                problem = problem or f"{self.catalogue.table.key(row)}: {reason}"
                _log.debug("replacing %s: %s", self.catalogue.table.path(row), reason)
                continue
            return replace(sample, replaced_because=problem) if problem else sample
        return self._blank(tried[0], key, problem)

    def _candidates(self, key: SampleKey) -> Any:
        """Yield the wanted row, then others of its bucket by derived choice."""
        yield key.index
        catalogue = self.catalogue
        same = np.all(catalogue.placements.bucket_wh == catalogue.placements.bucket_wh[key.index], axis=1)
        members = np.flatnonzero(same & (catalogue.table.datasets == catalogue.table.datasets[key.index]))
        for attempt in range(_TRIES):
            choice = derive(self.seed, "sample", key.epoch, key.position, "replacement", attempt)
            yield int(members[choice % len(members)])

    def _load(self, row: int, key: SampleKey) -> Sample:
        catalogue = self.catalogue
        pixels: NDArray[np.float32] | None = None
        latents: NDArray[np.float32] | None = None
        raw: NDArray[np.uint8] | None = None
        if catalogue.latents is None or catalogue.family.needs_pixels:
            view = catalogue.view(row, self.seed, key, fixed=catalogue.latents is not None)
            raw, mask = catalogue.pixels(row, view)
            pixels = normalise(raw)
        else:
            view = catalogue.view(row, self.seed, key, fixed=True)
        if catalogue.latents is not None:
            cached = catalogue.latents.read(row, flipped=view.flipped, with_mask=catalogue.of(row).subset.alpha_mask)
            latents = cached.latents
            mask = cached.mask if cached.mask is not None else catalogue.mask_image(row, view)
        sample = self._described(row, key, view, self.caption(row, key))
        control = self._condition(row, key, view, raw)
        return replace(sample, pixels=pixels, latents=latents, mask=mask, control=control)

    def _condition(
        self, row: int, key: SampleKey, view: View, picture: NDArray[np.uint8] | None
    ) -> NDArray[np.float32] | None:
        """Return what a ControlNet looks at; `picture` is the one that is trained, where it has been read already."""
        catalogue, maker = self.catalogue, self.catalogue.conditions
        if maker is None:
            return None
        rng = python_random(self.seed, "sample", key.epoch, key.position, "condition")
        if catalogue.kept_conditions is not None:
            need = catalogue.latent_need(row)
            return catalogue.kept_conditions.prepare(
                need, lambda: catalogue.picture(row, view, picture), rng, flipped=view.flipped
            )
        if maker.from_file:
            picture = catalogue.paired_picture(row, view)
        else:
            picture = catalogue.picture(row, view, picture)
        if picture is None:
            raise BadImage(catalogue.table.path(row), "has no condition image")
        made: NDArray[np.float32] = maker.prepare(np.ascontiguousarray(picture), rng)
        return made

    def _described(self, row: int, key: SampleKey, view: View, caption: str) -> Sample:
        """Return a sample with everything but arrays."""
        catalogue = self.catalogue
        served = catalogue.of(row)
        size, bucket = catalogue.table.size_wh(row), view.placement.bucket_wh
        top_left = sdxl_crop_top_left(size, bucket, flipped=view.flipped)
        sample = Sample(
            key=replace(key, index=row),
            record_key=catalogue.table.key(row),
            caption=caption,
            loss_weight=catalogue.prior_loss_weight if catalogue.table.is_reg[row] else 1.0,
            original_size_wh=size,
            crop_top_left=top_left,
            target_size_wh=bucket,
            flipped=view.flipped,
            network_multiplier=served.dataset.network_multiplier,
            custom_attributes=served.subset.custom_attributes,
        )
        if catalogue.texts is not None:
            return replace(sample, text_arrays=catalogue.texts.read(row, caption))
        encoded = [tokenizer.encode(caption) for tokenizer in catalogue.tokenizers]
        weights = tuple(weight for _, weight in encoded)
        return replace(
            sample,
            token_ids=tuple(ids for ids, _ in encoded),
            token_weights=None if any(weight is None for weight in weights) else weights,
        )

    def _blank(self, row: int, key: SampleKey, problem: str) -> Sample:
        """Return a sample that counts nothing: no image of this bucket can be read."""
        catalogue = self.catalogue
        view = View(catalogue.placements[row])
        # The empty caption: what stands for the real one may be what cannot be read.
        sample = replace(self._described(row, key, view, ""), loss_weight=0.0)
        sample.replaced_because = f"{problem} (left blank)"
        width, height = view.placement.bucket_wh
        if catalogue.latents is None or catalogue.family.needs_pixels:
            sample.pixels = np.zeros((3, height, width), np.float32)
        if catalogue.latents is not None:
            sample.latents = np.zeros(catalogue.latent_need(row).shape, np.float32)
        if catalogue.conditions is not None:
            rng = python_random(self.seed, "sample", key.epoch, key.position, "condition")
            sample.control = catalogue.conditions.prepare(np.zeros((height, width, 3), np.uint8), rng)
        return sample
