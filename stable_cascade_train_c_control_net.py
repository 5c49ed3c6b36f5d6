"""Train a ControlNet for stage C of Stable Cascade: pictures are steered by edges, masks, faces, small pictures.

    accelerate launch stable_cascade_train_c_control_net.py --stage_c_checkpoint_path=stage_c_bf16.safetensors \
        --effnet_checkpoint_path=effnet_encoder.safetensors --train_data_dir=photos --output_dir=trained \
        --controlnet_filter=canny --resolution=768 --learning_rate=1e-4 --mixed_precision=bf16

See docs/stable_cascade.md for a guide. The YAML files of the original trainer are understood too: give one with
--config_file, or alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from library import cli
from library.training.options_control_net import ControlNetTrainingOptions


@dataclass(frozen=True, kw_only=True)
class Options(ControlNetTrainingOptions):
    """Everything that stable_cascade_train_c_control_net.py accepts."""


def train(opts: Options) -> None:
    """The ControlNet's sizes, then data, then models: what is cheap to check fails before anything expensive starts."""
    from library.models.cascade.specs import STAGE_C, check_cascade_files
    from library.training.cascade_training import KINDS, tell_drawn_size
    from library.training.control_cascade import ControlPlan
    from library.training.opening import open_training_data

    folder = opts.control_net.uses_folder
    plan = None
    if not opts.data.debug_dataset:
        check_cascade_files(opts.model)
        plan = ControlPlan.of(opts)
    kinds = ("controlnet",) if folder else KINDS
    data = open_training_data(opts, STAGE_C, kinds, conditions=folder)
    if data is None or plan is None:
        return
    tell_drawn_size(data)
    plan.serve(data)

    from library.models.cascade.stage_c import StageC
    from library.training.caching import fill_caches
    from library.training.loop import fit
    from library.training.methods.control_net import ControlNetTraining
    from library.training.run import Run

    with Run(opts, data) as run:
        weights = run.weight_plan(())
        family = StageC.load(opts.model, opts.text, opts.memory, spec=STAGE_C, weights=weights, seed=run.seed)
        fill_caches(run, family, data, frozen_text=True)
        method = ControlNetTraining(family, plan.build(run, family), opts, drops_out=opts.drops_out)
        fit(run, family, method, data, opts)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, train, argv=argv)


if __name__ == "__main__":
    main()
