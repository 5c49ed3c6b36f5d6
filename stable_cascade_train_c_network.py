"""Train a network (LoRA and its relatives) on stage C of Stable Cascade, and with it new words.

    accelerate launch stable_cascade_train_c_network.py --stage_c_checkpoint_path=stage_c_bf16.safetensors \
        --effnet_checkpoint_path=effnet_encoder.safetensors --train_data_dir=photos --output_dir=trained \
        --resolution=768 --network_module=networks.lora --network_dim=4 --network_train_unet_only \
        --train_tokens '[fernando]=^dog</w>' --learning_rate=1e-4 --mixed_precision=bf16

See docs/stable_cascade.md for a guide. The YAML files of the original trainer are understood too: give one with
--config_file, or alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from library import cli
from library.training.options_cascade_network import StageCNetworkOptions


@dataclass(frozen=True, kw_only=True)
class Options(StageCNetworkOptions):
    """Everything that stable_cascade_train_c_network.py accepts."""


def train(opts: Options) -> None:
    """Files, tokens and network module, then data, then models: what is cheap to check comes first."""
    from library.models.cascade.sources import bare_stage
    from library.models.cascade.specs import STAGE_C, check_cascade_files
    from library.models.network_module import check_layers
    from library.training.cascade_training import KINDS, tell_drawn_size
    from library.training.methods.adapter import NetworkPlan
    from library.training.opening import open_training_data
    from library.training.train_tokens import TokenPlan, TrainedTokens

    tokens = TokenPlan.of(opts.tokens, opts.text, STAGE_C)
    plan = None
    if not opts.data.debug_dataset:
        check_cascade_files(opts.model)
        plan = NetworkPlan.of(opts, None if tokens is None else TrainedTokens(tokens))
        check_layers(plan.module, bare_stage(opts.model), opts.network.arguments)
    data = open_training_data(opts, STAGE_C, KINDS, None if tokens is None else tokens.tokenizers)
    if data is None or plan is None:
        return
    tell_drawn_size(data)
    if tokens is not None:
        tokens.check_data(data)

    from library.models.cascade.stage_c import StageC
    from library.training.caching import fill_caches
    from library.training.loop import fit
    from library.training.methods.adapter import Adapter
    from library.training.run import Run

    with Run(opts, data) as run:
        weights = run.weight_plan(())
        family = StageC.load(opts.model, opts.text, opts.memory, spec=STAGE_C, weights=weights)
        plan.prepare(family)
        fill_caches(run, family, data, frozen_text=not plan.text_changes)
        fit(run, family, Adapter(run, family, plan), data, opts)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, train, argv=argv)


if __name__ == "__main__":
    main()
