"""What is written when a model is saved during training: the weights for use, and how they came about."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.checkpoints.metadata import modelspec_metadata
from library.checkpoints.save import is_folder_kind
from library.option_groups import metadata_values

if TYPE_CHECKING:
    from library.contracts import FamilySpec, RunLength
    from library.data.dataset import TrainingData
    from library.training.methods.base import Method
    from library.training.optimizers import BuiltOptimizer
    from library.training.options import SaveOptions, TrainingOptions
    from library.training.state import Identity

_PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunFacts:
    """What models say about the run that made them.

    Attributes:
        opts: of the script.
        spec: of the model family.
        data: what was trained on.
        built: the optimizer.
        length: of the run.
        identity: of the base model and the data.
        seed: of the run.
    """

    opts: TrainingOptions
    spec: FamilySpec
    data: TrainingData
    built: BuiltOptimizer
    length: RunLength
    identity: Identity
    seed: int


def described(
    opts: TrainingOptions, family: FamilySpec, resolution_wh: tuple[int, int], kind: str = ""
) -> dict[str, str]:
    """Return the `modelspec.*` entries of a model that a run saves; `kind` as in `modelspec_metadata`."""
    return modelspec_metadata(
        family,
        opts.metadata,
        output_name=opts.save.output_name,
        resolution_wh=resolution_wh,
        clip_skip=opts.text.clip_skip,
        timesteps=(opts.noise.min_timestep, opts.noise.max_timestep),
        kind=kind,
    )


def largest_resolution(data: TrainingData) -> tuple[int, int]:
    """Return the largest resolution (width, height) that is trained on."""
    return max((spec.resolution_wh for spec in data.specs), key=lambda wh: wh[0] * wh[1])


Describe = Callable[[int, int], dict[str, str]]
"""(epochs done, updates done) -> what a model that is saved now says about itself and its training."""


def model_metadata(facts: RunFacts, kind: str = "") -> Describe:
    """Return what describes the models of a run; `kind` as in `modelspec_metadata`. Names only, never paths."""
    base = facts.identity.base_model
    constant = {
        **metadata_values(facts.opts),
        "ss_training_started_at": str(time.time()),
        "ss_base_model_version": facts.spec.base_model_version,
        "ss_sd_model_name": str(base["name"]),
        "ss_sd_model_hash": str(base["hash"]),
        "ss_optimizer": facts.built.description,
        "ss_seed": str(facts.seed),
        "ss_max_train_steps": str(facts.length.total_steps),
        "ss_num_epochs": str(facts.length.epochs),
        **{f"ss_{name}": str(count) for name, count in facts.data.counts().items()},
    }
    resolution_wh = largest_resolution(facts.data)
    if facts.opts.data.encoded_share != 1:
        # The option is about pictures that are drawn; models tell what they were trained at.
        constant["ss_resolution"] = "{},{}".format(*resolution_wh)

    def describe(epoch: int, step: int) -> dict[str, str]:
        progress = {"ss_epoch": str(epoch), "ss_steps": str(step)}
        return {**constant, **progress, **described(facts.opts, facts.spec, resolution_wh, kind)}

    return describe


@dataclass(frozen=True, slots=True)
class ModelWriter:
    """Writes what a method trained.

    Attributes:
        method: knows what a model is, and writes it.
        save: precision of the values.
        describe: makes the metadata.
        observing: context in which the weights are those to be used.
        is_main: whether this process writes.
    """

    method: Method
    save: SaveOptions
    describe: Describe
    observing: Callable[[], AbstractContextManager[None]]
    is_main: bool

    @property
    def suffix(self) -> str:
        """Suffix of the saved files; empty for folders."""
        kind = self.method.kind
        return "" if is_folder_kind(kind) else f".{kind}"

    def __call__(self, target: Path, *, epoch: int, step: int) -> Path | None:
        """Write the model to `target` plus suffix; only the main process does."""
        if not self.is_main:
            return None
        chosen = self.save.save_precision
        precision = _PRECISIONS[chosen] if chosen else None
        metadata = self.describe(epoch, step)
        with self.observing():
            return self.method.save(target, self.method.kind, precision, metadata, epoch=epoch, step=step)

    def estimated_bytes(self) -> int:
        """Return about how large a saved model is."""
        size = {"fp16": 2, "bf16": 2}.get(self.save.save_precision or "float", 4)
        return size * self.method.parameter_count()
