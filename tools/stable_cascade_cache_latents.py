"""Encode the pictures of a data set by EfficientNet and keep the latents beside them, for training stage C.

    accelerate launch tools/stable_cascade_cache_latents.py --effnet_checkpoint_path=effnet_encoder.safetensors \
        --train_data_dir=photos --resolution=768 --enable_bucket

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
from library.training.options_cascade_cache import LatentCachingOptions  # noqa: E402

_ON = {"default": True}


@dataclass(frozen=True, kw_only=True)
class Options(LatentCachingOptions, changes={"cache_latents": _ON, "cache_latents_to_disk": _ON}):
    """Everything that stable_cascade_cache_latents.py accepts."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size")
    )


def cache_latents(opts: Options) -> None:
    """Write the latents that are missing; several processes share the work."""
    from library.models.cascade.specs import STAGE_C
    from library.models.cascade.stage_c import StageC
    from library.training.cache_tools import cache_latent_files, latents_only, run_cache_tool

    run_cache_tool(
        replace(opts, cache=latents_only(opts.cache)),
        STAGE_C,
        cache_latent_files,
        unused=("unet", "text_encoder"),
        family_class=StageC,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, cache_latents, argv=argv)


if __name__ == "__main__":
    main()
