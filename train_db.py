"""DreamBooth: train a Stable Diffusion 1.x or 2.x model on folders named <repeats>_<words>.

    accelerate launch train_db.py --pretrained_model_name_or_path=model.safetensors --train_data_dir=photos \
        --output_dir=trained --resolution=512 --learning_rate=1e-6 --max_train_steps=1600

See docs/train_db.md for a guide and docs/options.md for every option.
"""

from __future__ import annotations

from dataclasses import dataclass

from library import cli
from library.training.options_full import DreamBoothOptions, FullTrainingOptions

_TEXT_CACHES = ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size")


@dataclass(frozen=True, kw_only=True)
class Options(FullTrainingOptions, leave_out=("dataset_repeats", *_TEXT_CACHES)):
    """Everything that train_db.py accepts."""

    tune: DreamBoothOptions


def train(opts: Options) -> None:
    """Train on folders with captions and, with `--masked_loss`, on pictures with masks."""
    from library.training.full_training import train_full

    train_full(opts, kinds=("dreambooth", "controlnet"))


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, train, argv=argv)


if __name__ == "__main__":
    main()
