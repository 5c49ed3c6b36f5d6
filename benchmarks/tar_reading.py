"""Pictures read from tar shards in comparison with the same pictures in a folder.

The shards are made by tools/make_webdataset.py and indexed once. Then both are read in the same random order, as
training does, in rounds that take turns: bytes alone, and decoded. The ratio is pictures a second from the tar files
over pictures a second from the folder; 0.9 is the least that is accepted. Measured besides: indexing, with and without
the index of an earlier start.

    python benchmarks/tar_reading.py
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.disk_latents import run  # noqa: E402
from benchmarks.latent_caching import make_pictures  # noqa: E402
from benchmarks.report import report  # noqa: E402

LEAST = 0.9


def seconds(work: Callable[[str], object], paths: list[str]) -> float:
    begin = time.perf_counter()
    for path in paths:
        work(path)
    return time.perf_counter() - begin


def compare(
    work: Callable[[str], object], folder: list[str], tar: list[str], rounds: int
) -> tuple[float, float, float]:
    """Return pictures a second from the folder, from the tar files, and the median of the rounds' ratios."""
    seconds(work, folder), seconds(work, tar)
    times = [(seconds(work, folder), seconds(work, tar)) for _ in range(rounds)]
    rates = [len(folder) / median(each) for each in zip(*times, strict=True)]
    return rates[0], rates[1], median(plain / packed for plain, packed in times)


def read_bytes(path: str) -> bytes:
    from library.data.storage import locator_of

    locator = locator_of(path)
    return Path(path).read_bytes() if locator is None else locator.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--shard_size", default="50")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output")
    args = parser.parse_args()
    from library.data.images import load_image
    from library.data.tar_index import index_shards
    from tools import make_webdataset

    with tempfile.TemporaryDirectory() as name:
        photos, shards = Path(name) / "photos", Path(name) / "shards"
        make_pictures(photos, args.images)
        run(make_webdataset.main, [str(photos), str(shards), f"--shard_size={args.shard_size}"])
        tars = sorted(str(path) for path in shards.glob("*.tar"))
        time.sleep(2.5)  # a file that was changed just now gets no index
        begin = time.perf_counter()
        indexes = index_shards(tars)
        first = time.perf_counter() - begin
        begin = time.perf_counter()
        index_shards(tars)
        again = time.perf_counter() - begin
        packed = {sample.key: str(sample.picture) for index in indexes for sample in index}
        files = {path.stem: str(path) for path in photos.iterdir() if path.stem in packed and path.suffix != ".txt"}
        keys = sorted(packed)
        random.Random(1).shuffle(keys)
        rows = []
        for what, work in (("bytes", read_bytes), ("decoded", load_image)):
            folder, tar, ratio = compare(work, [files[key] for key in keys], [packed[key] for key in keys], args.rounds)
            row = {"what": f"{what}, pictures a second", "folder": folder, "tar": tar, "ratio": ratio, "limit": LEAST}
            rows.append(row)
        rows.append({"what": "indexing, ms", "folder": "", "tar": 1000 * first, "ratio": "", "limit": ""})
        rows.append({"what": "indexing again, ms", "folder": "", "tar": 1000 * again, "ratio": "", "limit": ""})
        rows.append({"what": "pictures", "folder": len(keys), "tar": len(keys), "ratio": "", "limit": ""})
    report("tar_reading", rows, args.output)


if __name__ == "__main__":
    main()
