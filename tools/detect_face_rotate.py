"""Find faces in the pictures of a folder, turn them upright, and cut pictures of one size or shape around them.

python tools/detect_face_rotate.py --src_dir photos --dst_dir faces --model face_detection_yunet_2023mar.onnx --rotate
python tools/detect_face_rotate.py --src_dir photos --dst_dir faces --model yunet.onnx --crop_size 512,512 --resize_fit

The model is a file of the OpenCV model zoo, which is never downloaded by itself. Results end in the place and size of
the face, `_cx_cy_width_height`, as `--face_crop_aug_range` of the training scripts reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import Problem, UserError  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from library.option_values import BadValue  # noqa: E402
from networks.tool_parts import missing_options  # noqa: E402
from tools.picture_files import Made, WorkOptions, check_results, encode, make_files  # noqa: E402

if TYPE_CHECKING:
    from tools.face_parts import Cut, Face

_ZOO = "It is face_detection_yunet_2023mar.onnx (230 kB) in the OpenCV model zoo, github.com/opencv/opencv_zoo."


def size(value: Any) -> str:
    """Check a size such as `512,512`.

    Raises:
        BadValue: It is not two whole numbers above 0.
    """
    words = str(value).split(",")
    if len(words) != 2 or not all(word.strip().isdecimal() and int(word) for word in words):
        raise BadValue(f"{value!r} is not two whole numbers such as 512,512")
    return str(value)


def ratio(value: Any) -> str:
    """Check how many times a width and a height are taken, such as `2.5,3`.

    Raises:
        BadValue: It is not two numbers above 0.
    """
    try:
        numbers = [float(word) for word in str(value).split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 2 or not all(0 < number < 1000 for number in numbers):
        raise BadValue(f"{value!r} is not two numbers such as 2.5,3")
    return str(value)


@dataclass(frozen=True, kw_only=True)
class FaceOptions(OptionGroup, title="faces"):
    """Which faces, and what becomes of them."""

    src_dir: str | None = opt(None, path=True, help="Folder with pictures.")
    dst_dir: str | None = opt(None, path=True, help="Folder for the results (PNG).")
    model: str | None = opt(None, path=True, help="File of a YuNet face detector (ONNX), from the OpenCV model zoo.")
    score: float = opt(0.9, at_least=0, at_most=1, help="How sure the detector must be that something is a face.")
    rotate: bool = opt(False, help="Turn pictures until the eyes are level.")
    multiple_faces: bool = opt(False, help="A result for every face, not only for the largest one of a picture.")
    resize_fit: bool = opt(
        False,
        needs={"crop_size": ()},
        excludes={"resize_face_size": "both say how large the result is"},
        help="Shrink pictures until one side is that of --crop_size.",
    )
    resize_face_size: int | None = opt(
        None, at_least=1, help="Scale pictures until the face is so many pixels large (its larger side)."
    )
    crop_size: str | None = opt(None, convert=size, help="Cut out width,height around the face.")
    crop_ratio: str | None = opt(
        None,
        convert=ratio,
        excludes={
            "resize_face_size": "the size of the face would decide the size of the cut twice",
            "crop_size": "both say what is cut out",
        },
        help="Cut out so many times the size of the face, across and down: 2.5,3.",
    )
    min_size: int | None = opt(
        None, at_least=1, matters_when={"crop_ratio": ()}, help="Leave cuts out of which a side is shorter."
    )
    max_size: int | None = opt(
        None, at_least=1, matters_when={"crop_ratio": ()}, help="Shrink cuts of which a side is longer."
    )
    debug: bool = opt(False, help="Draw the box of the face into the results.")

    def check(self) -> Iterator[Problem]:
        """Name what is missing; the detector must be a file."""
        yield from missing_options(src_dir=self.src_dir, dst_dir=self.dst_dir)
        yield from check_results("--dst_dir", self.dst_dir, None)
        if not self.model:
            yield Problem("--model", "is required: the file of a face detector", _ZOO)
        elif not Path(self.model).is_file():
            yield Problem(f"--model {self.model}", "not found", _ZOO)
        if self.min_size and self.max_size and self.min_size > self.max_size:
            yield Problem("--min_size", f"{self.min_size} is above --max_size {self.max_size}")


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that detect_face_rotate.py accepts."""

    faces: FaceOptions
    work: WorkOptions


@dataclass(frozen=True)
class Cutting:
    """Makes the results of one picture; runs in loader processes."""

    options: FaceOptions

    def __call__(self, path: Path) -> Made:
        """Return the results of a picture, one for each face that counts.

        Raises:
            BadImage: it cannot be read, shows no face, or only some that are too small.
        """
        from library.data.images import BadImage, load_image
        from tools.face_parts import draw, find_faces

        options = self.options
        pixels = load_image(path)
        faces = find_faces(pixels, str(options.model), options.score)
        if not faces:
            raise BadImage(path, f"no face found with a score of {options.score:g}")
        cuts = [self._cut(pixels, face) for face in (faces if options.multiple_faces else faces[:1])]
        wanted = [cut for cut in cuts if cut is not None]
        if not wanted:
            raise BadImage(path, f"would give less than --min_size {options.min_size}")
        made: Made = []
        for number, cut in enumerate(wanted, start=1):
            which = f"_{number:02d}" if len(wanted) > 1 else ""
            target = Path(str(options.dst_dir)) / f"{path.stem}{which}{cut.description}.png"
            made.append((target, encode(draw(cut) if options.debug else cut.pixels, png=True)))
        return made

    def _cut(self, pixels: Any, face: Face) -> Cut | None:
        """Turn, scale and cut as the options say; None when the result would be too small."""
        from tools.face_parts import Cut, upright

        options = self.options
        cut = Cut(upright(pixels, face) if options.rotate else pixels, face.center, face.size)
        if options.resize_face_size:
            cut = cut.scaled(options.resize_face_size / max(face.size))
        if options.crop_size:
            width, height = (int(word) for word in options.crop_size.split(","))
            needed = max(width / cut.pixels.shape[1], height / cut.pixels.shape[0])
            # What is cut out must fit in, even if the picture has to be enlarged for it.
            return cut.scaled(needed if options.resize_fit else max(needed, 1.0)).cropped(width, height)
        if options.crop_ratio:
            across, down = (float(word) for word in options.crop_ratio.split(","))
            longer = max(cut.size)
            cut = cut.cropped(round(longer * across), round(longer * down))
            if options.min_size and min(cut.pixels.shape[:2]) < options.min_size:
                return None
            if options.max_size and max(cut.pixels.shape[:2]) > options.max_size:
                cut = cut.scaled(options.max_size / max(cut.pixels.shape[:2]))
        return cut

    def exists(self, path: Path) -> bool:
        """Tell whether a picture has results."""
        folder = Path(str(self.options.dst_dir))
        parts = (file.stem[len(path.stem) :].split("_") for file in folder.glob(f"{_literal(path.stem)}_*.png"))
        return any(len(words) in (5, 6) and all(word.isdecimal() for word in words[1:]) for words in parts)


def _literal(text: str) -> str:
    import glob

    return glob.escape(text)


def run(options: Options) -> None:
    """Cut out the faces of all pictures.

    Raises:
        UserError: the detector cannot be used, or no picture can.
    """
    import cv2

    from library.data.jobs import find_pictures
    from tools.face_parts import load_detector

    faces = options.faces
    try:
        load_detector(str(faces.model), faces.score)
    except cv2.error as error:
        raise UserError("is no face detector that OpenCV can read", _ZOO, where=f"--model {faces.model}") from error
    make = Cutting(faces)
    pictures = find_pictures(Path(str(faces.src_dir)), recursive=None)
    make_files("cutting out faces", pictures, make, options.work, make.exists)


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, run, argv=argv)


if __name__ == "__main__":
    main()
