"""Extended textual inversion: a vector of its own for each layer of the U-Net. Not available.

The script stands here for its name, so that command lines for it end with an explanation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from library import cli
from library.errors import UserError
from library.option_groups import OptionSet


@dataclass(frozen=True, kw_only=True)
class _NoOptions(OptionSet):
    """Nothing is read of the command line."""


def explain(_: _NoOptions) -> NoReturn:
    """Say what to use in place of this script.

    Raises:
        UserError: always.
    """
    what = "training a vector of its own for each layer of the U-Net is not supported"
    hint = "Use train_textual_inversion.py, with a larger --num_vectors_per_token for more detail."
    raise UserError(what, hint, where="train_textual_inversion_XTI.py")


def main(argv: list[str] | None = None) -> None:
    """End with an explanation and status 2, whatever the options are."""
    cli.main(_NoOptions, explain, argv=[])


if __name__ == "__main__":
    main()
