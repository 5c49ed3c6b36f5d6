"""`--dataset_class`: batches made by a class of the user's own, served like those of `TrainingData`.

The class is called as `Class(tokenizer, max_token_length, resolution, debug_dataset)`, as sd-scripts calls it (its
tokenizer argument is None there too). An object of it has a length, the number of batches, and gives batch i as a
dictionary: `images` [B,3,H,W] in [-1,1] or `latents` [B,4,h,w], `captions` or `input_ids_list`, and whatever else of
sd-scripts' batches it wants to set. `set_current_epoch`, `set_current_step` and `set_max_train_steps` are called where
they exist, before every batch, so that nothing depends on the number of workers.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from library.contracts import Batch, BatchKey, FamilySpec, Tokenizer
from library.data.options import DatasetOptions
from library.data.plan import EpochPlan, EpochPlanner
from library.errors import UserError
from library.option_values import resolution_wh

_log = logging.getLogger(__name__)
_OPTION = "--dataset_class"


@dataclass(frozen=True, slots=True)
class ForeignSpec:
    """What training asks of a data set's specification."""

    resolution_wh: tuple[int, int]
    validation_seed: int | None = None
    batch_size: int = 1
    network_multiplier: float = 1.0
    subsets: tuple[Any, ...] = ()


class ForeignData:
    """The user's object behind the interface of `library.data.dataset.TrainingData`; without caches and validation."""

    streamed = False
    uses_latent_cache = False
    reads_only_latents = False
    fixed_captions = False
    validation = None
    skipped: tuple[Any, ...] = ()

    def __init__(
        self, served: Any, name: str, family: FamilySpec, tokenizers: tuple[Tokenizer, ...], spec: ForeignSpec
    ) -> None:
        count = len(served)
        if count < 1:
            raise UserError(f"{name} has no batches: its len() is {count}", where=_OPTION)
        self.family, self.tokenizers, self.specs = family, tokenizers, (spec,)
        self.num_train_images = int(getattr(served, "num_train_images", count))
        self.num_reg_images = int(getattr(served, "num_reg_images", 0))
        self._served, self._name = served, name
        zeros = np.zeros(count, np.int64)
        # One "image" of the plan is one batch of the user's: the order of batches is ours.
        self.planner = EpochPlanner(zeros, zeros, zeros + 1, [1])

    def batch_count(self) -> int:
        """Number of batches in an epoch."""
        return self.planner.batches_per_epoch

    def plan(self, seed: int, epoch: int) -> EpochPlan:
        """Return the order of one epoch (0-based)."""
        return self.planner.epoch(seed, epoch)

    def dataset(self, seed: int, total_steps: int) -> ForeignBatches:
        """Return the object that loader workers serve batches from."""
        return ForeignBatches(self._served, self._name, self.tokenizers, total_steps)

    def counts(self) -> dict[str, int]:
        """Return how many images and batches an epoch has."""
        return {
            "num_train_images": self.num_train_images,
            "num_reg_images": self.num_reg_images,
            "num_batches_per_epoch": self.batch_count(),
        }

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells two states of the data apart, as far as we can know."""
        return {"data set class": self._name, "batches per epoch": self.batch_count()}


class ForeignBatches:
    """Turns the user's dictionaries into batches; picklable if the user's object is."""

    def __init__(self, served: Any, name: str, tokenizers: Sequence[Tokenizer], total_steps: int) -> None:
        self._served, self._name, self._tokenizers, self._total_steps = served, name, tokenizers, total_steps

    def __getitem__(self, key: BatchKey) -> Batch:
        (sample,) = key.samples
        told = (("max_train_steps", self._total_steps), ("current_epoch", key.epoch + 1), ("current_step", sample.step))
        for what, value in told:
            setter = getattr(self._served, f"set_{what}", None)
            if setter is not None:
                setter(value)
        found = self._served[sample.index]
        if not isinstance(found, Mapping):
            raise UserError(f"{self._name}[{sample.index}] is no dictionary", where=_OPTION)
        return self._batch(key, found)

    def _batch(self, key: BatchKey, found: Mapping[str, Any]) -> Batch:
        import torch

        visible = found.get("latents") if found.get("latents") is not None else found.get("images")
        if visible is None:
            raise UserError(f"a batch of {self._name} has neither images nor latents", where=_OPTION)
        count = len(visible)
        captions = tuple(found.get("captions") or [""] * count)
        weights = found.get("loss_weights")
        masks = found.get("alpha_masks")
        return Batch(
            key=key,
            captions=captions,
            record_keys=tuple(found.get("image_keys") or [f"batch {key.samples[0].index}"] * count),
            loss_weight=torch.ones(count) if weights is None else torch.as_tensor(weights, dtype=torch.float32),
            pixels=found.get("images"),
            latents=found.get("latents"),
            token_ids=self._token_ids(found.get("input_ids_list"), captions),
            mask=None if masks is None else masks[:, None],
            custom_attributes=tuple(found.get("custom_attributes") or ()),
        )

    def _token_ids(self, given: Sequence[Any] | None, captions: Sequence[str]) -> tuple[Any, ...]:
        import torch

        if given:
            return tuple(ids if ids.dim() == 3 else ids[:, None] for ids in given)
        rows = [[tokenizer.encode(caption)[0] for caption in captions] for tokenizer in self._tokenizers]
        return tuple(torch.from_numpy(np.stack(row)) for row in rows)


def open_foreign(data: DatasetOptions, family: FamilySpec, tokenizers: tuple[Tokenizer, ...]) -> ForeignData:
    """Import the class that `--dataset_class` names and make its data set.

    Raises:
        UserError: it cannot be imported or has no batches.
    """
    class_path = data.dataset_class or ""
    module_name, _, class_name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "Give package.module.Class, importable from the working folder or the Python path."
        raise UserError(f"{class_path} cannot be imported ({error})", hint, where=_OPTION) from error
    if data.debug_dataset:
        raise UserError("cannot be reported on: only the class knows its data", "Drop --debug_dataset.", where=_OPTION)
    _log.info("the data set is made by %s from %s", class_path, getattr(found, "__module__", module_name))
    size = None if data.resolution is None else resolution_wh(data.resolution)
    served = found(None, getattr(tokenizers[0], "max_token_length", None), size, False)
    return ForeignData(served, class_path, family, tokenizers, ForeignSpec(size or family.default_resolution_wh))
