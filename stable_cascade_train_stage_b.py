"""Fine-tune stage B of Stable Cascade, which makes detailed latents of the small ones of stage C, or train it anew.

    accelerate launch stable_cascade_train_stage_b.py --stage_b_checkpoint_path=stage_b_bf16.safetensors \
        --effnet_checkpoint_path=effnet_encoder.safetensors --stage_a_checkpoint_path=stage_a.safetensors \
        --train_data_dir=photos --output_dir=trained --resolution=1024 --learning_rate=1e-5 --mixed_precision=bf16

See docs/stable_cascade.md for a guide. The YAML files of the original trainer are understood too: give one with
--config_file, or alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from library import cli
from library.training.options_cascade import StageBTuneOptions


@dataclass(frozen=True, kw_only=True)
class Options(StageBTuneOptions):
    """Everything that stable_cascade_train_stage_b.py accepts."""


def train(opts: Options) -> None:
    """Train stage B."""
    from library.models.cascade.specs import STAGE_B
    from library.models.cascade.stage_b import StageB
    from library.training.cascade_training import train_stage

    train_stage(opts, STAGE_B, StageB)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, train, argv=argv)


if __name__ == "__main__":
    main()
