"""Fine-tuning: train a Stable Diffusion 1.x or 2.x model on pictures with captions and tags in a metadata file.

    accelerate launch fine_tune.py --pretrained_model_name_or_path=model.safetensors --train_data_dir=photos \
        --in_json=photos/metadata.json --output_dir=trained --resolution=512 --learning_rate=5e-6

See docs/fine_tune.md for a guide and docs/options.md for every option.
"""

from __future__ import annotations

from dataclasses import dataclass

from library import cli
from library.training.options_full import FineTuningOptions


@dataclass(frozen=True, kw_only=True)
class Options(FineTuningOptions):
    """Everything that fine_tune.py accepts."""


def train(opts: Options) -> None:
    """Train on metadata: the U-Net alone, or with `--train_text_encoder` the text encoder too."""
    from library.training.full_training import train_full

    train_full(opts, kinds=("finetuning",))


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, train, argv=argv)


if __name__ == "__main__":
    main()
