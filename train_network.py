"""Train a network (LoRA and its relatives) on a Stable Diffusion 1.x or 2.x model, which itself stays as it is.

    accelerate launch train_network.py --pretrained_model_name_or_path=model.safetensors --train_data_dir=photos \
        --output_dir=trained --network_module=networks.lora --network_dim=16 --network_alpha=8 --learning_rate=1e-4

See docs/train_network.md for a guide and docs/options.md for every option.
"""

from __future__ import annotations

from dataclasses import dataclass

from library import cli
from library.training.options_network import NetworkTrainingOptions


@dataclass(frozen=True, kw_only=True)
class Options(NetworkTrainingOptions, leave_out=("use_safetensors",)):
    """Everything that train_network.py accepts."""


def train(opts: Options) -> None:
    """The network module, then data, then the model: what is cheap to check fails before anything expensive starts."""
    from library.models.specs import stable_diffusion_spec
    from library.training.methods.adapter import NetworkPlan
    from library.training.opening import open_training_data

    spec = stable_diffusion_spec(opts.model)
    plan = None if opts.data.debug_dataset else NetworkPlan.of(opts)
    data = open_training_data(opts, spec, kinds=("dreambooth", "finetuning", "controlnet"))
    if data is None or plan is None:
        return

    from library.models.sd import StableDiffusion
    from library.training.caching import fill_caches
    from library.training.loop import fit
    from library.training.methods.adapter import Adapter
    from library.training.run import Run

    with Run(opts, data) as run:
        family = StableDiffusion.load(opts.model, opts.text, opts.memory, spec=spec, weights=run.weight_plan(()))
        plan.prepare(family)
        fill_caches(run, family, data, frozen_text=not plan.text_changes)
        fit(run, family, Adapter(run, family, plan), data, opts)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, train, argv=argv)


if __name__ == "__main__":
    main()
