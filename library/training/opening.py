"""Opening the data of a training run, or reporting on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from library.data.bad_files import TOLERATED_SHARE
from library.data.opening import open_data
from library.data.scan import ScanContext
from library.models.tokenizer import tokenizers_for
from library.training.fsdp_checks import processes
from library.training.run_length import report_data

if TYPE_CHECKING:
    from library.contracts import FamilySpec
    from library.data.captions import Replacement
    from library.data.dataset import TrainingData
    from library.models.tokenizer import ClipTokenizer
    from library.training.options import LengthOptions, TrainingOptions


def _batches_of_run(length: LengthOptions) -> int | None:
    """Return how many batches all processes together take, None when epochs are counted."""
    if length.max_train_epochs:
        return None
    return length.max_train_steps * length.gradient_accumulation_steps * processes()


def open_training_data(
    opts: TrainingOptions,
    spec: FamilySpec,
    kinds: tuple[str, ...],
    tokenizers: tuple[ClipTokenizer, ...] | None = None,
    *,
    replacements: Sequence[Replacement] = (),
    tolerated_share: float = TOLERATED_SHARE,
    conditions: bool = False,
) -> TrainingData | None:
    """Find the images of a run; with `--debug_dataset` write the report instead and return None. No model is needed.

    Args:
        opts: of the script.
        spec: of the model family.
        kinds: of data set that the script takes; `controlnet` (masks in files) counts with `--masked_loss` only.
        tokenizers: one per text encoder; None: those of the family.
        replacements: what is replaced in the captions of all images but regularization images.
        tolerated_share: of files that may be bad under `--skip_bad_files`.
        conditions: pictures of `controlnet` data sets are what a ControlNet looks at, not masks.

    Raises:
        UserError: holds every problem of the stage that found some.
    """
    data = open_data(
        opts.data,
        opts.subset,
        opts.cache,
        spec=spec,
        kinds=tuple(kind for kind in kinds if kind != "controlnet" or conditions or opts.data.masked_loss),
        tokenizers=tokenizers or tokenizers_for(spec, opts.text),
        context=ScanContext(
            opts.length.seed or 0,
            report_dir=opts.save.output_dir,
            tolerated_share=tolerated_share,
            run_batches=_batches_of_run(opts.length),
        ),
    )
    for part in (data, data.validation) if replacements else ():
        if part is not None:
            part.catalogue = replace(part.catalogue, replacements=tuple(replacements))
    if not opts.data.debug_dataset:
        return data
    report_data(data, opts)
    return None
