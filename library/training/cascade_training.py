"""One run that trains a stage of Stable Cascade, from options to saved models."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from library.contracts import FamilySpec
    from library.data.dataset import TrainingData
    from library.models.cascade.base import CascadeFamily
    from library.training.options_cascade import StageTuneOptions

logger = logging.getLogger(__name__)

KINDS = ("dreambooth", "finetuning", "controlnet")


def tell_drawn_size(data: TrainingData) -> None:
    """Log which size of pictures stage C learns to draw, for it is not the one that its encoder sees."""
    from library.models.cascade.specs import ENCODED_SHARE

    for trained in sorted({spec.resolution_wh for spec in data.specs}):
        drawn = tuple(round(side / ENCODED_SHARE) for side in trained)
        what = "training at %dx%d is for drawing at %dx%d: stage C is trained on pictures at 3/4 of their size"
        logger.info(what, *trained, *drawn)


def train_stage(
    opts: StageTuneOptions,
    spec: FamilySpec,
    family_class: type[CascadeFamily],
    tell: Callable[[TrainingData], None] = lambda data: None,
) -> None:
    """Files, then data, then models: what is cheap to check fails before anything expensive starts.

    Args:
        opts: of the script.
        spec: of the stage that is trained.
        family_class: of the stage.
        tell: says what is to be known about the data of this stage.

    Raises:
        UserError: something is wrong with options, data or models.
        StopTraining: the run cannot go on.
    """
    from library.models.cascade.specs import check_cascade_files
    from library.training.opening import open_training_data

    if not opts.data.debug_dataset:
        check_cascade_files(opts.model)
    data = open_training_data(opts, spec, KINDS)
    if data is None:
        return

    from library.training.caching import fill_caches
    from library.training.loop import fit
    from library.training.methods.full import FullTune
    from library.training.run import Run

    tell(data)
    with Run(opts, data) as run:
        weights = run.weight_plan(opts.tune.trained_parts)
        family = family_class.load(opts.model, opts.text, opts.memory, spec=spec, weights=weights, seed=run.seed)
        fill_caches(run, family, data, frozen_text=not opts.tune.trains_text_encoder)
        fit(run, family, FullTune(family, opts), data, opts)
