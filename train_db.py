"""DreamBooth: train a Stable Diffusion 1.x or 2.x model on folders named <repeats>_<words>.

    accelerate launch train_db.py --pretrained_model_name_or_path=model.safetensors --train_data_dir=photos \
        --output_dir=trained --resolution=512 --learning_rate=1e-6 --max_train_steps=1600

See docs/train_db.md for a guide and docs/options.md for every option.
"""

from __future__ import annotations

from dataclasses import dataclass

from library import cli
from library.training.options import FullTuneOptions, TrainingOptions


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions, leave_out=("dataset_repeats",)):
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
        from library.data.report import write_report
        from library.training.run_length import resolve_length

        length = resolve_length(opts.length, batches_per_epoch=data.batch_count())
        write_report(data, opts.save.output_dir, length=length, seed=opts.length.seed or 0)
        return

    from library.models.sd import StableDiffusion
    from library.training.caching import fill_caches
    from library.training.loop import fit
    from library.training.methods.full import FullTune, trained_parts
    from library.training.run import Run

    with Run(opts, data) as run:
        weights = run.weight_plan(trained_parts(opts.tune))
        family = StableDiffusion.load(opts.model, opts.text, opts.memory, spec=spec, weights=weights)
        fill_caches(run, family, data)
        method = FullTune(family, opts.tune, opts.memory, learning_rate=opts.optimizer.learning_rate)
        fit(run, family, method, data, opts)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, train, argv=argv)


if __name__ == "__main__":
    main()
