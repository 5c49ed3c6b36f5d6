"""What tools share that turn pictures into other pictures: their options, and files made in loader processes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import Problem
from library.option_groups import OptionGroup, opt
from networks.tool_parts import check_output

if TYPE_CHECKING:
    from library.data.images import Pixels

Made = list[tuple[Path, bytes]]
"""Files to write for a picture: where to, and what."""


@dataclass(frozen=True, kw_only=True)
class WorkOptions(OptionGroup, title="work"):
    """How the pictures are worked through."""

    skip_existing: bool = opt(False, help="Leave out pictures whose results exist already.")
    max_data_loader_n_workers: int | None = opt(
        None, at_least=0, help="Processes that work at the same time. Default: one for each core."
    )


def check_results(option: str, folder: str | None, source: str | None) -> Iterator[Problem]:
    """Yield what is wrong with the folder of results that `option` names: a file, or the folder that is read."""
    if folder and Path(folder).is_file():
        yield Problem(f"{option} {folder}", "is a file, not a folder", "Choose another name.")
    elif folder and source and os.path.realpath(folder) == os.path.realpath(source):
        yield Problem(option, "is the folder that is read", "Choose another one.")
    else:
        yield from check_output(option, folder, ())


def encode(pixels: Pixels, *, png: bool, quality: int = 100) -> bytes:
    """Return pixels [H, W], [H, W, 3] or [H, W, 4] as a PNG, or as a JPEG, which keeps no transparency."""
    from PIL import Image

    buffer = io.BytesIO()
    if png:
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels if pixels.ndim == 2 else pixels[:, :, :3]).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def make_files(
    title: str,
    paths: list[Path],
    prepare: Callable[[Path], Made],
    options: WorkOptions,
    results: Callable[[Path], bool],
) -> None:
    """Make files from every picture, several at a time, and write each as a whole.

    Args:
        title: of the progress bar.
        paths: of the pictures.
        prepare: makes the files of a picture; runs in other processes.
        options: of the tool.
        results: tells whether the results of a picture exist.

    Raises:
        UserError: nothing could be made at all.
        StopTraining: a signal arrived.
    """
    from library.data.jobs import PictureJob, run_pictures
    from library.data.loader import available_cores
    from library.files import write_bytes

    def finish(path: Path, made: Made) -> None:
        for target, content in made:
            write_bytes(target, content)

    workers = options.max_data_loader_n_workers
    if workers is None:
        workers = min(available_cores(), len(paths)) if len(paths) > 1 else 0
    job = PictureJob(title, prepare, lambda paths, made: made, finish)
    run_pictures(
        paths,
        job,
        workers=workers,
        skip=results if options.skip_existing else None,
    ).close()
