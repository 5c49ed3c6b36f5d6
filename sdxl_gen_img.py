"""Make pictures with an SDXL model: the same as gen_img.py --sdxl, which says that this is for a later release."""

from __future__ import annotations

from library import cli
from library.inference.option_set import GenerationOptions


class Options(GenerationOptions, script="sdxl_gen_img", changes={"sdxl": {"default": True}}):
    """Everything that gen_img.py accepts."""


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    from library.inference.generation import generate

    cli.main(Options, generate, argv=argv)


if __name__ == "__main__":
    main()
