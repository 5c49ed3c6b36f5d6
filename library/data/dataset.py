"""The data of a run: `TrainingData`, the one object that training sees of it. `library.data.opening` makes it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library.contracts import ConditionFinder, ConditionMaker, FamilySpec
from library.data.augment import View, mask_of, normalise
from library.data.cache_names import CacheRules, LatentNeed, mirror_root
from library.data.condition_store import KeptConditions
from library.data.dataset_spec import DatasetSpec
from library.data.latent_store import LatentMemory, LatentPlan, LatentSource, plan_latents
from library.data.mapped_file import MappedFile
from library.data.options import CacheOptions
from library.data.plan import EpochPlan, EpochPlanner
from library.data.records import RecordTable
from library.data.serving import BatchDataset, Catalogue, Placements, TextSource
from library.data.spec_checks import varying_captions
from library.data.storage import holds_members
from library.data.summary import count_images, fingerprint, summarise
from library.errors import Problem, UserError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LatentInput:
    """What the VAE needs of one cache entry.

    Attributes:
        row: table row, to be handed back to `TrainingData.store_latents`.
        key: name of the image and its size, independent of where the data lie; seeds the posterior draw.
        flip: the mirrored picture must be encoded too.
        pixels: float32 [3,H,W] in [-1,1].
        mask: float32 [H,W] in 0..1 or None; stored beside the latents as it is.
    """

    row: int
    key: str
    flip: bool
    pixels: NDArray[np.float32]
    mask: NDArray[np.float32] | None = None

    @property
    def flipped(self) -> NDArray[np.float32]:
        """The mirrored picture, float32 [3,H,W]."""
        return np.ascontiguousarray(self.pixels[:, :, ::-1])

    def draw_name(self, *, flipped: bool) -> str:
        """Return the name that the posterior noise of a variant derives from."""
        return f"{self.key}|{'flipped' if flipped else 'plain'}"


class TrainingData:
    """Images, their placements and their order; also the entry to latent caches.

    Attributes:
        family: what the model family wants to know of data.
        specs: the data sets.
        table: the images, in columns.
        placements: resize and crop of each image.
        validation: images kept apart, served without anything random; None when there are none.
        skipped: files left out, with reasons (`--skip_bad_files`).
        reg_totals: visits that each data set's regularization images ask for, before balancing; None: as balanced.
        bucket_lists: resolutions that the buckets of each data set may have; None where they follow the images.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        cache: CacheOptions | None = None,
        *,
        validation: TrainingData | None = None,
        skipped: Sequence[Problem] = (),
        reg_totals: Sequence[int] | None = None,
        bucket_lists: Sequence[Sequence[tuple[int, int]] | None] | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.reg_totals = reg_totals
        self.bucket_lists = bucket_lists or [None] * len(catalogue.specs)
        self.cache = cache or CacheOptions()
        self.validation = validation
        self.skipped = tuple(skipped)
        self._bucket_numbers = _numbered(catalogue.placements.bucket_wh)
        table, specs = catalogue.table, catalogue.specs
        sizes = [spec.batch_size for spec in specs]
        self.planner = EpochPlanner(table.datasets, self._bucket_numbers, table.repeats, sizes)
        self._vae = ""

    @property
    def family(self) -> FamilySpec:
        """What the model family wants to know of data."""
        return self.catalogue.family

    @property
    def specs(self) -> tuple[DatasetSpec, ...]:
        """The data sets."""
        return self.catalogue.specs

    @property
    def table(self) -> RecordTable:
        """The images, in columns."""
        return self.catalogue.table

    @property
    def placements(self) -> Placements:
        """Resize and crop of each image."""
        return self.catalogue.placements

    @property
    def num_train_images(self) -> int:
        """Visits of training images in an epoch: images times repeats."""
        return int(self.table.repeats[~self.table.is_reg].sum())

    @property
    def num_reg_images(self) -> int:
        """Visits of regularization images in an epoch."""
        return int(self.table.repeats[self.table.is_reg].sum())

    def batch_count(self) -> int:
        """Number of batches in an epoch, over all data sets."""
        return self.planner.batches_per_epoch

    def plan(self, seed: int, epoch: int) -> EpochPlan:
        """Return the order of one epoch (0-based), a function of its arguments alone."""
        return self.planner.epoch(seed, epoch)

    def dataset(self, seed: int, total_steps: int) -> BatchDataset:
        """Return the object that loader workers serve batches from; later changes of caches do not reach it."""
        return BatchDataset(self.catalogue, seed, total_steps)

    streamed = False
    """Samples are known before they are served."""

    @property
    def uses_latent_cache(self) -> bool:
        """Whether the options ask for cached latents."""
        return self.cache.cache_latents or self.cache.cache_latents_to_disk

    @property
    def reads_only_latents(self) -> bool:
        """Whether loading a batch opens no pictures at all."""
        catalogue = self.catalogue
        masks = bool((catalogue.table.columns.mask_folders >= 0).any())
        plain = not catalogue.family.needs_pixels and catalogue.conditions is None
        return catalogue.latents is not None and plain and not masks

    @property
    def fixed_captions(self) -> bool:
        """Whether captions that are not dropped are always the same, so that what encoders make of them can be kept."""
        return not any(varying_captions(self.specs))

    def use_texts(self, texts: TextSource) -> None:
        """Serve cached outputs of text encoders from now on, in place of token ids."""
        self.catalogue = replace(self.catalogue, texts=texts)

    def use_conditions(self, conditions: ConditionMaker) -> None:
        """Serve what a ControlNet looks at from now on, `Batch.control`."""
        self.catalogue = replace(self.catalogue, conditions=conditions)

    def keep_conditions(self, finder: ConditionFinder, suffix: str) -> None:
        """Do so, and keep what is found in pictures in files beside them, whose names end with `suffix`.

        Raises:
            UserError: pictures are cropped or coloured at random, so nothing that is found stays true; or they are in
                tar files, and no folder for caches is named.
        """
        if any(served.augmentation.draws for served in self.catalogue.subsets.values()):
            what = "needs pictures that stay as they are, without random_crop, color_aug and face_crop_aug_range"
            raise UserError(what, "Drop one of them.", where="--cache_conditions_to_disk")
        if self.cache.cache_dir is None and any(holds_members(folder) for folder, _ in self.table.folders):
            what = "is needed: nothing can be kept beside images in tar files"
            raise UserError(what, "Name a folder.", where="--cache_dir")
        kept = KeptConditions(finder, finder.kept, self.cache_rules(suffix))
        self.catalogue = replace(self.catalogue, conditions=finder, kept_conditions=kept)

    def latent_plan(self, vae: str) -> LatentPlan:
        """Look at the latent cache of every image.

        Call it on one rank and hand the plan to the others: ranks that look while another already writes would see
        other plans.

        Args:
            vae: fingerprint of the VAE.
        """
        to_disk = self.cache.cache_latents_to_disk
        if to_disk and self.cache.skip_cache_check:
            _log.warning("--skip_cache_check: cache files are used without looking into them")
        return plan_latents(
            _Needs(self.catalogue),
            self._identities(),
            self.cache_rules(self.family.latent_cache_suffix),
            vae,
            to_disk=to_disk,
        )

    def create_latent_memory(self, plan: LatentPlan) -> LatentMemory | None:
        """Reserve the mapped file for what `plan` keeps in memory: once per node; None when all is on disk.

        Its `path` is what the other ranks of the node pass to `use_latents`. The file lives as long as the object.

        Raises:
            UserError: there is not enough space.
        """
        return LatentMemory.create(plan.slots) if plan.memory_bytes else None

    def use_latents(self, plan: LatentPlan, vae: str, memory: LatentMemory | str | None = None) -> None:
        """Serve latents from now on. Call on every rank before `store_latents`.

        Args:
            plan: from `latent_plan`.
            vae: fingerprint of the VAE.
            memory: from `create_latent_memory`, or its path on the other ranks of the node.
        """
        if memory is None:
            memory = self.create_latent_memory(plan)
        elif isinstance(memory, str):
            memory = LatentMemory(MappedFile(memory), plan.slots)
        source = LatentSource(
            _Needs(self.catalogue), self.cache_rules(self.family.latent_cache_suffix), plan.places, plan.owners, memory
        )
        self.catalogue = replace(self.catalogue, latents=source)
        self._vae = vae

    def latent_input(self, row: int) -> LatentInput:
        """Decode, resize and crop the picture of a row of the plan; safe to call from threads.

        Raises:
            BadImage: the picture cannot be used (a `UserError`).
        """
        catalogue = self.catalogue
        need = catalogue.latent_need(row)
        raw, mask = catalogue.pixels(row, View(need.placement), alpha=need.mask)
        if not need.mask:
            mask = None
        elif mask is None:
            mask = mask_of(np.full(need.mask_shape, 255, np.uint8))
        width, height = need.placement.bucket_wh
        return LatentInput(row, f"{need.record.key}|{width}x{height}", need.flip, normalise(raw), mask)

    def store_latents(
        self,
        row: int,
        latents: NDArray[Any],
        flipped: NDArray[Any] | None = None,
        mask: NDArray[Any] | None = None,
    ) -> None:
        """Store what the VAE made of `latent_input(row)`; safe to call from threads.

        Args:
            row: of the plan.
            latents: [C,h,w], a posterior sample, unscaled.
            flipped: the same of the mirrored picture when `flip` was set.
            mask: as it came with the input.

        Raises:
            UserError: values are not finite; the message names the image and the remedy.
            CannotSave: the cache file could not be written.
        """
        if self.catalogue.latents is None:
            raise ValueError("use_latents comes before store_latents")
        arrays = {"latents": latents, "latents_flipped": flipped, "alpha_mask": mask}
        self.catalogue.latents.write(row, self._vae, arrays)

    def counts(self) -> dict[str, int]:
        """Return how many images and batches an epoch has, as model metadata tell it."""
        return count_images(self)

    def summary(self) -> dict[str, Any]:
        """Return what model metadata tell about the data (see `library.data.summary`)."""
        return summarise(self)

    def fingerprint(self) -> dict[str, Any]:
        """Return short JSON-able values that change when anything that training sees of the data changes."""
        return fingerprint(self)

    def cache_rules(self, suffix: str) -> CacheRules:
        """Return what the options say of the names and the validity of cache files with this suffix."""
        cache = self.cache
        folders = {folder for folder, _ in self.table.folders}
        return CacheRules(
            suffix=suffix,
            sized=self.family.latent_cache_sized,
            family=self.family.name,
            folder=cache.cache_dir,
            root=mirror_root(sorted(folders)) if cache.cache_dir else "",
            use_hash=cache.cache_hash,
            trust_mtime=cache.cache_trust_mtime,
            skip_check=cache.skip_cache_check,
        )

    def _identities(self) -> Iterator[tuple[Any, ...]]:
        """Yield for each row what decides its latents."""
        decides = {
            index: (served.augmentation.interpolation, served.cached_flip, served.cached_mask)
            for index, served in self.catalogue.subsets.items()
        }
        columns = (
            self.table.columns.folders,
            self.placements.bucket_wh,
            self.placements.resized_wh,
            self.table.subsets,
        )
        folders = [path for path, _ in self.table.folders]
        lists = (column.tolist() for column in columns)
        for name, folder, bucket, resized, subset in zip(self.table.columns.names, *lists, strict=True):
            yield folders[folder], name, *bucket, *resized, *decides[subset]


@dataclass(frozen=True, slots=True)
class _Needs:
    """Picklable `row -> LatentNeed`."""

    catalogue: Catalogue

    def __call__(self, row: int) -> LatentNeed:
        return self.catalogue.latent_need(row)


def _numbered(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Number buckets in the order of (width, height)."""
    if len(sizes) == 0:
        return np.zeros(0, np.int64)
    return np.unique(sizes, axis=0, return_inverse=True)[1].reshape(-1)
