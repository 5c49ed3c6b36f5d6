"""Make pictures with a Stable Diffusion 1.x or 2.x model, with LoRAs and other networks.

    python gen_img.py --ckpt model.safetensors --outdir pictures --fp16 --W 512 --H 512 --sampler euler_a --steps 30 \
        --prompt "a photo of a cat --n blurry --d 42"

See docs/gen_img.md for a guide and docs/gen_img_options.md for every option.
"""

from __future__ import annotations

from library import cli
from library.inference.option_set import GenerationOptions


class Options(GenerationOptions, script="gen_img"):
    """Everything that gen_img.py accepts."""


def draw(opts: Options) -> None:
    """Load the model and what changes it, then draw prompt after prompt."""
    from library.inference.generation import generate

    generate(opts)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, draw, argv=argv)


if __name__ == "__main__":
    main()
