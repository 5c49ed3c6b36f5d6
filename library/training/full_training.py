"""One run of full fine-tuning, from options to saved models: what the scripts that train whole models do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.training.options_full import FullTrainingOptions


def train_full(opts: FullTrainingOptions, kinds: tuple[str, ...]) -> None:
    """Data, then model, then the loop: what is cheap to check fails before anything expensive starts.

    Args:
        opts: of the script.
        kinds: of data set that the script takes.

    Raises:
        UserError: something is wrong with options, data or model.
        StopTraining: the run cannot go on.
    """
    from library.models.specs import stable_diffusion_spec
    from library.training.opening import open_training_data

    spec = stable_diffusion_spec(opts.model)
    data = open_training_data(opts, spec, kinds)
    if data is None:
        return

    from library.models.sd import StableDiffusion
    from library.training.caching import fill_caches
    from library.training.loop import fit
    from library.training.methods.full import FullTune
    from library.training.run import Run

    with Run(opts, data) as run:
        weights = run.weight_plan(opts.tune.trained_parts)
        family = StableDiffusion.load(opts.model, opts.text, opts.memory, spec=spec, weights=weights)
        fill_caches(run, family, data, frozen_text=not opts.tune.trains_text_encoder)
        fit(run, family, FullTune(family, opts), data, opts)
