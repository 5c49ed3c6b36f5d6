"""Draw the edges of a picture, or of every picture of a folder: white lines on black, as ControlNet models read them.

python tools/canny.py --input photo.jpg --output edges.png
python tools/canny.py --input photos --output edges --thres1 100 --thres2 200
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import check_output, missing_options  # noqa: E402
from tools.picture_files import Made, WorkOptions, check_results, encode, make_files  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class CannyOptions(OptionGroup, title="edges"):
    """Which picture, and which edges."""

    input: str | None = opt(None, path=True, help="Picture, or folder with pictures.")
    output: str | None = opt(None, path=True, help="Picture to write (.png or .jpg), or folder, when a folder is read.")
    thres1: int = opt(32, at_least=0, help="Edges weaker than this are not drawn.")
    thres2: int = opt(224, at_least=0, help="Edges stronger than this are drawn, and what is joined to them.")

    def check(self) -> Iterator[Problem]:
        """Name what is missing, and refuse to write over what is read."""
        yield from missing_options(input=self.input, output=self.output)
        if self.input and Path(self.input).is_dir():
            yield from check_results("--output", self.output, self.input)
        else:
            yield from check_output("--output", self.output, [self.input])


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that canny.py accepts."""

    edges: CannyOptions
    work: WorkOptions


@dataclass(frozen=True)
class Drawing:
    """Draws the edges of one picture; runs in loader processes."""

    options: CannyOptions
    folder: bool

    def target(self, path: Path) -> Path:
        """Return where the edges of a picture go."""
        output = Path(str(self.options.output))
        return output / f"{path.stem}.png" if self.folder else output

    def __call__(self, path: Path) -> Made:
        """Return the file of edges.

        Raises:
            BadImage: the picture cannot be read.
        """
        import cv2
        import numpy as np

        from library.data.images import load_image

        grey = cv2.cvtColor(load_image(path), cv2.COLOR_RGB2GRAY)
        target = self.target(path)
        edges = np.asarray(cv2.Canny(grey, self.options.thres1, self.options.thres2), np.uint8)
        return [(target, encode(edges, png=target.suffix.lower() == ".png"))]


def run(options: Options) -> None:
    """Draw the edges of all pictures."""
    from library.data.jobs import find_pictures

    source = Path(str(options.edges.input))
    if not source.exists():
        raise UserError("not found", where=f"--input {source}")
    make = Drawing(options.edges, folder=source.is_dir())
    if not make.folder and Path(str(options.edges.output)).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError("must end in .png or .jpg", where=f"--output {options.edges.output}")
    pictures = find_pictures(source, recursive=None) if make.folder else [source]
    make_files("drawing edges", pictures, make, options.work, lambda path: make.target(path).is_file())


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, run, argv=argv)


if __name__ == "__main__":
    main()
