"""Encode the captions of a data set by CLIP bigG and keep its outputs beside the pictures, for training stage C.

    accelerate launch tools/stable_cascade_cache_text_encoder_outputs.py \
        --text_model_checkpoint_path=text_model.safetensors --train_data_dir=photos --resolution=768 --enable_bucket

Give the options of the training that follows: its command line is understood as it is. See docs/stable_cascade.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.training.options_cascade_cache import TextCachingOptions  # noqa: E402

_ON = {"default": True}


@dataclass(frozen=True, kw_only=True)
class Options(
    TextCachingOptions, changes={"cache_text_encoder_outputs": _ON, "cache_text_encoder_outputs_to_disk": _ON}
):
    """Everything that stable_cascade_cache_text_encoder_outputs.py accepts."""

    used_groups: ClassVar[frozenset[str]] = TextCachingOptions.used_groups | {"text"}
    ignored: ClassVar[frozenset[str]] = frozenset(
        ("cache_latents", "cache_latents_to_disk", "vae_batch_size", "no_half_vae")
    )


def cache_texts(opts: Options) -> None:
    """Write the outputs that are missing; several processes share the work."""
    from library.models.cascade.specs import STAGE_C
    from library.models.cascade.stage_c import StageC
    from library.training.cache_tools import cache_text_files, run_cache_tool, texts_only

    run_cache_tool(
        replace(opts, cache=texts_only(opts.cache)), STAGE_C, cache_text_files, unused=("unet",), family_class=StageC
    )


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, cache_texts, argv=argv)


if __name__ == "__main__":
    main()
