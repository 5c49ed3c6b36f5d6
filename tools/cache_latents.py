"""Encode the pictures of a data set by the VAE and keep the latents beside them, for training that begins at once.

    accelerate launch tools/cache_latents.py --pretrained_model_name_or_path=model.safetensors \
        --train_data_dir=photos --resolution=512 --enable_bucket --flip_aug

Give the options of the training that follows: its command line is understood as it is. See docs/data_tools.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.training.options_cache import CachingOptions  # noqa: E402

_ON = {"default": True}


@dataclass(frozen=True, kw_only=True)
class Options(CachingOptions, changes={"cache_latents": _ON, "cache_latents_to_disk": _ON}):
    """Everything that cache_latents.py accepts."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size")
    )


def cache_latents(opts: Options) -> None:
    """Write the latents that are missing; several processes share the work."""
    from library.models.specs import stable_diffusion_spec
    from library.training.cache_tools import cache_latent_files, latents_only, run_cache_tool

    spec = stable_diffusion_spec(opts.model)
    run_cache_tool(
        replace(opts, cache=latents_only(opts.cache)), spec, cache_latent_files, unused=("unet", "text_encoder")
    )


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, cache_latents, argv=argv)


if __name__ == "__main__":
    main()
