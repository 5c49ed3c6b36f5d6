"""Where generated pictures go and what they are called: nothing that is there is ever overwritten."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from library import files
from library.inference.png_info import png_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

    from library.inference.options import PictureFileOptions
    from library.inference.prompts import PromptRequest

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"im_[01]?(\d{6,})\.png")
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')
_OTHER_FORMAT = re.compile(r"\.(jpe?g|webp|bmp|gif|tiff?|avif|jxl)$", re.IGNORECASE)
_LONGEST = 200


class PictureFolder:
    """The folder of one run, which hands out names and writes pictures.

    Args:
        options: where to, and by which names.
        facts: what every picture tells about the run, for web interfaces.
    """

    def __init__(self, options: PictureFileOptions, facts: Mapping[str, object]) -> None:
        self._options = options
        self._facts = dict(facts)
        self.path = Path(options.outdir)
        files.clean_litter(self.path)
        self._next = 1 + self._highest() if options.sequential_file_name else 0
        self.written: list[Path] = []

    def _highest(self) -> int:
        found = (_NUMBERED.fullmatch(entry.name) for entry in self.path.iterdir())
        return max((int(match[1]) for match in found if match), default=0)

    def write(self, image: Image, request: PromptRequest, *, stage: str = "", origin: Path | None = None) -> Path:
        """Write a picture and return its path.

        Args:
            image: the picture.
            request: what it was made from, with its seed; a `file_name` in it wins over all other names.
            stage: `0` for the first picture of a highres fix, `1` for the second one.
            origin: the picture that it was made from.

        Raises:
            CannotSave: the disk is full, or the folder cannot be written to.
        """
        path = self._name(request, stage, origin)
        files.write_bytes(path, png_bytes(image, request, facts=self._facts))
        self.written.append(path)
        return path

    def _name(self, request: PromptRequest, stage: str, origin: Path | None) -> Path:
        if request.file_name:
            return _unused(self.path / f"{safe_name(request.file_name)}{'_first' if stage == '0' else ''}")
        if self._options.use_original_file_name and origin is not None:
            return _unused(self.path / f"{safe_name(origin.name)}{'_first' if stage == '0' else ''}")
        if self._options.sequential_file_name:
            while (path := self.path / f"im_{stage}{self._next:06d}.png").exists():
                self._next += 1  # another run writes into the folder at the same time
        else:
            now = time.strftime("%Y%m%d%H%M%S")
            path = _unused(self.path / f"im_{now}_{stage}{self._next:03d}_{request.seed}")
        if stage != "0":
            self._next += 1  # the first picture of a highres fix shares the number of the second
        return path


def safe_name(name: str) -> str:
    """Return a file name as a path below the folder, without suffix: no way out of it, no characters that files lack.

    >>> safe_name("../../etc/cat.png")
    'etc/cat'
    """
    name = _FORBIDDEN.sub("_", name.replace("\\", "/"))
    name = name[: -len(".png")] if name.lower().endswith(".png") else _OTHER_FORMAT.sub("", name)
    parts = [part.strip(" ") for part in name.split("/")]
    kept = [part[:_LONGEST].rstrip(". ") for part in parts if part.strip(". ")]
    return "/".join(part for part in kept if part) or "picture"


def _unused(stem: Path) -> Path:
    """Return the PNG of this name, or the first of `name_1`, `name_2`... that is not there yet."""
    path, count = stem.with_name(f"{stem.name}.png"), 0
    while path.exists():
        count += 1
        path = stem.with_name(f"{stem.name}_{count}.png")
    return path
