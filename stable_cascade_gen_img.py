"""Make pictures with Stable Cascade: stage C, then stages B and A, or the previewer.

    python stable_cascade_gen_img.py --stage_c_checkpoint_path stage_c.safetensors \
        --stage_b_checkpoint_path stage_b.safetensors --stage_a_checkpoint_path stage_a.safetensors \
        --bf16 --outdir pictures --prompt "a photo of a cat --n blurry --d 42"

Without prompts they are read from standard input. See docs/stable_cascade.md for a guide and docs/gen_img_options.md
for every option.
"""

from __future__ import annotations

from library import cli
from library.inference.options_cascade import CascadeGenerationOptions


class Options(CascadeGenerationOptions, script="stable_cascade_gen_img"):
    """Everything that stable_cascade_gen_img.py accepts."""


def draw(opts: Options) -> None:
    """Load the stages and what changes them, then draw prompt after prompt."""
    from library.inference.cascade_generation import generate

    generate(opts)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, draw, argv=argv)


if __name__ == "__main__":
    main()
