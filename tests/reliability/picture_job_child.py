"""Writes a text beside every picture of a folder, slowly, as the captioning tools do; started to be stopped."""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from library import files  # noqa: E402
from library.cli import _guarded  # noqa: E402
from library.data.images import load_image  # noqa: E402
from library.data.jobs import PictureJob, find_pictures, run_pictures  # noqa: E402


def prepare(path: Path) -> int:
    return load_image(path).shape[1]


def work(paths: list[Path], widths: list[int]) -> list[str]:
    time.sleep(0.08 * len(paths))
    return [f"{path.name} is {width} wide\n" * 500 for path, width in zip(paths, widths, strict=True)]


def finish(path: Path, text: str) -> None:
    files.write_text(path.with_suffix(".txt"), text)


def main(folder: Path, workers: int) -> None:
    job = PictureJob("describing", prepare, work, finish)
    done = lambda path: path.with_suffix(".txt").exists()  # noqa: E731
    run_pictures(find_pictures(folder, recursive=False), job, batch_size=2, workers=workers, skip=done).close()


if __name__ == "__main__":
    sys.exit(_guarded(lambda: main(Path(sys.argv[1]), int(sys.argv[2]))))
