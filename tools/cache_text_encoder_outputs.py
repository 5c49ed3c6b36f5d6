"""Encode the captions of a data set by the text encoder and keep the outputs beside the pictures.

    accelerate launch tools/cache_text_encoder_outputs.py --pretrained_model_name_or_path=model.safetensors \
        --train_data_dir=photos --resolution=512 --mixed_precision=bf16

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
class Options(CachingOptions, changes={"cache_text_encoder_outputs": _ON, "cache_text_encoder_outputs_to_disk": _ON}):
    """Everything that cache_text_encoder_outputs.py accepts."""

    used_groups: ClassVar[frozenset[str]] = CachingOptions.used_groups | {"text"}
    ignored: ClassVar[frozenset[str]] = frozenset(
        ("cache_latents", "cache_latents_to_disk", "vae_batch_size", "vae", "no_half_vae")
    )


def cache_texts(opts: Options) -> None:
    """Write the outputs that are missing; several processes share the work."""
    from library.models.specs import stable_diffusion_spec
    from library.training.cache_tools import cache_text_files, run_cache_tool, texts_only

    spec = stable_diffusion_spec(opts.model)
    run_cache_tool(replace(opts, cache=texts_only(opts.cache)), spec, cache_text_files, unused=("unet",))


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, cache_texts, argv=argv)


if __name__ == "__main__":
    main()
