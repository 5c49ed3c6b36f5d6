"""Put the captions of a folder of images, one text file each, into a metadata file.

python finetune/merge_captions_to_metadata.py photos meta_captions.json
python finetune/merge_captions_to_metadata.py photos meta_captions.json --recursive --relative_path
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.metadata_parts import TEXT_FILES, MergeSet, run_merge  # noqa: E402
from library import cli  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Options(MergeSet, changes={"caption_extension": {"default": ".caption", **TEXT_FILES}}):
    """Everything that merge_captions_to_metadata.py accepts."""

    field: ClassVar[str] = "caption"


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, run_merge, argv=argv)


if __name__ == "__main__":
    main()
