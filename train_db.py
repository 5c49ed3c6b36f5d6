"""DreamBooth: train a Stable Diffusion 1.x or 2.x model on folders named <repeats>_<words>.

    accelerate launch train_db.py --pretrained_model_name_or_path=model.safetensors --train_data_dir=photos \
        --output_dir=trained --resolution=512 --learning_rate=1e-6 --max_train_steps=1600

See docs/train_db.md for a guide and docs/options.md for every option.
"""

from __future__ import annotations

from dataclasses import dataclass

from library import cli
from library.training.options import FullTuneOptions, TrainingOptions

_TEXT_CACHES = ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size")


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions, leave_out=("dataset_repeats", *_TEXT_CACHES)):
    """Everything that train_db.py accepts."""

    tune: FullTuneOptions


def train(opts: Options) -> None:
    """Data, then model, then the loop: what is cheap to check fails before anything expensive starts."""
    from library.data.dataset import open_data
    from library.data.scan import ScanContext
    from library.models.specs import stable_diffusion_spec
    from library.models.tokenizer import tokenizers_for

    spec = stable_diffusion_spec(opts.model)
    kinds = ("dreambooth", "controlnet") if opts.data.masked_loss else ("dreambooth",)
    data = open_data(
        opts.data,
        opts.subset,
        opts.cache,
        spec=spec,
        kinds=kinds,
        tokenizers=tokenizers_for(spec, opts.text),
        context=ScanContext(opts.length.seed or 0, report_dir=opts.save.output_dir),
    )
    if opts.data.debug_dataset:
        from library.training.run_length import report_data

        report_data(data, opts)
        return

    from library.models.sd import StableDiffusion
    from library.training.caching import fill_caches
    from library.training.loop import fit
    from library.training.methods.full import FullTune, trained_parts
    from library.training.run import Run

    with Run(opts, data) as run:
        weights = run.weight_plan(trained_parts(opts.tune))
        family = StableDiffusion.load(opts.model, opts.text, opts.memory, spec=spec, weights=weights)
        fill_caches(run, family, data, frozen_text="text_encoder" not in weights.trained)
        method = FullTune(family, opts.tune, opts)
        fit(run, family, method, data, opts)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, train, argv=argv)


if __name__ == "__main__":
    main()
