"""Merge LoRA files into an SDXL checkpoint, or into one LoRA file: merge_lora.py for SDXL alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from networks import merge_lora  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Options(merge_lora.Options, leave_out=("v2",)):
    """Everything that sdxl_merge_lora.py accepts."""


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda options: merge_lora.merge(options, family="sdxl"), argv=argv)


if __name__ == "__main__":
    main()
