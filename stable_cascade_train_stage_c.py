"""Fine-tune stage C of Stable Cascade, or train it from fresh weights, on pictures with captions.

    accelerate launch stable_cascade_train_stage_c.py --stage_c_checkpoint_path=stage_c_bf16.safetensors \
        --effnet_checkpoint_path=effnet_encoder.safetensors --train_data_dir=photos --output_dir=trained \
        --resolution=768 --learning_rate=1e-5 --mixed_precision=bf16

See docs/stable_cascade.md for a guide. The YAML files of the original trainer are understood too: give one with
--config_file, or alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from library import cli
from library.training.options_cascade import StageCTuneOptions


@dataclass(frozen=True, kw_only=True)
class Options(StageCTuneOptions):
    """Everything that stable_cascade_train_stage_c.py accepts."""


def train(opts: Options) -> None:
    """Train stage C, the text encoder, or both."""
    from library.models.cascade.specs import STAGE_C
    from library.models.cascade.stage_c import StageC
    from library.training.cascade_training import tell_drawn_size, train_stage

    train_stage(opts, STAGE_C, StageC, tell_drawn_size)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, train, argv=argv)


if __name__ == "__main__":
    main()
