"""Teach a Stable Diffusion 1.x or 2.x model a new word (textual inversion): only the vectors of the word are trained.

    accelerate launch train_textual_inversion.py --pretrained_model_name_or_path=model.safetensors \
        --train_data_dir=photos --output_dir=trained --resolution=512 --token_string=shs4712 --init_word=dog \
        --num_vectors_per_token=4 --learning_rate=5e-3 --max_train_steps=1600 --use_object_template

See docs/train_textual_inversion.md for a guide and docs/options.md for every option.
"""

from __future__ import annotations

from dataclasses import dataclass

from library import cli
from library.training.options_inversion import InversionTrainingOptions


@dataclass(frozen=True, kw_only=True)
class Options(InversionTrainingOptions):
    """Everything that train_textual_inversion.py accepts."""


def train(opts: Options) -> None:
    """The word, then data, then the model: what is cheap to check fails before anything expensive starts."""
    from library.models.specs import stable_diffusion_spec
    from library.training.methods.textual_inversion import InversionPlan
    from library.training.opening import open_training_data

    spec = stable_diffusion_spec(opts.model)
    plan = InversionPlan.of(opts, spec)
    kinds = ("dreambooth", "finetuning", "controlnet")
    data = open_training_data(opts, spec, kinds, plan.tokenizers, replacements=plan.replacements)
    if data is None:
        return
    plan.check_data(data)

    from library.models.sd import StableDiffusion
    from library.training.caching import fill_caches
    from library.training.loop import fit
    from library.training.methods.textual_inversion import TextualInversion
    from library.training.run import Run

    with Run(opts, data) as run:
        family = StableDiffusion.load(opts.model, opts.text, opts.memory, spec=spec, weights=run.weight_plan(()))
        method = TextualInversion(run, family, plan)
        fill_caches(run, family, data)
        fit(run, family, method, data, opts)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, train, argv=argv)


if __name__ == "__main__":
    main()
