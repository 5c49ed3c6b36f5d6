"""Shrink the pictures of a folder to one or several areas, keeping their shape.

python tools/resize_images_to_resolution.py photos smaller --max_resolution 512x512
python tools/resize_images_to_resolution.py photos smaller --max_resolution 768x768,512x512 --copy_associated_files

`768x768` stands for an area: wider pictures become wider and less high. Pictures that are small enough keep their size.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from library.option_values import BadValue  # noqa: E402
from tools.picture_files import Made, WorkOptions, check_results, encode, make_files  # noqa: E402

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


def areas(value: Any) -> str:
    """Check `--max_resolution`.

    Raises:
        BadValue: It is not a list of sizes such as 512x512,384x384.
    """
    if not all(_SIZE.fullmatch(word) and 0 not in _sides(word) for word in str(value).split(",")):
        raise BadValue(f"{value!r} is no list of sizes such as 512x512,384x384")
    return str(value)


def _sides(word: str) -> tuple[int, int]:
    width, height = word.split("x")
    return int(width), int(height)


@dataclass(frozen=True, kw_only=True)
class ResizeOptions(OptionGroup, title="sizes"):
    """Which pictures become how large."""

    src_img_folder: str = opt("", positional=True, path=True, help="Folder with pictures.")
    dst_img_folder: str = opt("", positional=True, path=True, help="Folder for the smaller ones.")
    max_resolution: str = opt(
        "512x512,384x384,256x256,128x128", convert=areas, help="Largest areas, as widthxheight; one result for each."
    )
    divisible_by: int = opt(1, at_least=1, help="Cut both sides to a multiple of this, in the middle.")
    interpolation: str | None = opt(
        None,
        choices=("area", "cubic", "lanczos4", "nearest", "linear", "box"),
        help="How pictures are shrunk. Default: area.",
    )
    save_as_png: bool = opt(False, help="Write PNG files, which keep transparency, instead of JPEG of quality 100.")
    copy_associated_files: bool = opt(
        False, help="Copy files of the same name (captions) for every result, under its name."
    )

    def check(self) -> Iterator[Problem]:
        """Refuse to write into the folder that is read, or where nothing can be written."""
        yield from check_results("dst_img_folder", self.dst_img_folder, self.src_img_folder)


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that resize_images_to_resolution.py accepts."""

    sizes: ResizeOptions
    work: WorkOptions


def fitted(size_wh: tuple[int, int], area_wh: tuple[int, int]) -> tuple[int, int]:
    """Return the size of the same shape whose area is at most that of `area_wh`; never larger than the picture."""
    width, height = size_wh
    factor = math.sqrt(area_wh[0] * area_wh[1] / (width * height))
    if factor >= 1:
        return size_wh
    return max(1, int(width * factor)), max(1, int(height * factor))


@dataclass(frozen=True)
class Shrinking:
    """Makes the smaller versions of one picture; runs in loader processes."""

    options: ResizeOptions

    def targets(self, path: Path) -> list[tuple[str, Path]]:
        """Return each area as written, and the file that its result goes to."""
        suffix = ".png" if self.options.save_as_png else ".jpg"
        folder = Path(self.options.dst_img_folder)
        return [(word, folder / f"{path.stem}+{word}{suffix}") for word in self.options.max_resolution.split(",")]

    def __call__(self, path: Path) -> Made:
        """Return the results of a picture, and what belongs to them.

        Raises:
            BadImage: it cannot be read, or is smaller than `--divisible_by`.
        """
        from library.data.augment import resize
        from library.data.images import BadImage, load_image

        pixels = load_image(path, alpha=self.options.save_as_png)
        full = (pixels.shape[1], pixels.shape[0])
        made: Made = []
        for word, target in self.targets(path):
            # Always from the picture itself: shrinking what was shrunk before would soften it.
            small = resize(pixels, fitted(full, _sides(word)), self.options.interpolation or "area")
            height, width = (side - side % self.options.divisible_by for side in small.shape[:2])
            if not (width and height):
                size = f"{small.shape[1]}x{small.shape[0]}"
                raise BadImage(path, f"would be {size}, less than --divisible_by {self.options.divisible_by}")
            top, left = (small.shape[0] - height) // 2, (small.shape[1] - width) // 2
            made.append((target, encode(small[top : top + height, left : left + width], png=self.options.save_as_png)))
            made += [(target.with_suffix(other.suffix), other.read_bytes()) for other in self._companions(path)]
        return made

    def _companions(self, path: Path) -> list[Path]:
        from library.data.folder_listing import image_suffixes

        if not self.options.copy_associated_files:
            return []
        beside = (other for other in path.parent.iterdir() if other.stem == path.stem and other.is_file())
        return sorted(other for other in beside if other.suffix.lower() not in image_suffixes())


def run(options: Options) -> None:
    """Shrink all pictures; other files are copied."""
    from library.data.jobs import find_pictures
    from library.files import write_bytes

    source, target = Path(options.sizes.src_img_folder), Path(options.sizes.dst_img_folder)
    pictures = find_pictures(source, recursive=None)
    make = Shrinking(options.sizes)
    make_files(
        "resizing", pictures, make, options.work, lambda path: all(file.is_file() for _, file in make.targets(path))
    )
    stems = {path.stem for path in pictures} if options.sizes.copy_associated_files else set()
    for other in sorted(set(source.iterdir()) - set(pictures)):
        if other.is_file() and not other.name.startswith(".") and other.stem not in stems:
            write_bytes(target / other.name, other.read_bytes())


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, run, argv=argv)


if __name__ == "__main__":
    main()
