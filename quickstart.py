"""A first training, without any preparation.

python quickstart.py                                                      a tiny random model, pictures from examples/
python quickstart.py --model M --images DIR --prompt "sks dog"            your model and your pictures

Both train a LoRA; with `--method dreambooth` the whole model, with `--method textual_inversion` a word.
"""

from __future__ import annotations

from dataclasses import dataclass

from library import cli
from library.option_groups import OptionSet
from library.quickstart_options import QuickstartOptions


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that quickstart.py accepts."""

    quickstart: QuickstartOptions


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: _start(opts.quickstart), argv=argv)


def _start(options: QuickstartOptions) -> None:
    from library.quickstart import run

    run(options)


if __name__ == "__main__":
    main()
