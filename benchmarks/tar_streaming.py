"""Streamed tar files in comparison with the same pictures in a folder and with indexed tar files: batches a second.

Four shards made by tools/make_webdataset.py are read by two loader processes, as a training would, for one pass after a
warm-up of some batches, in rounds that take turns. The ratio is pictures a second over pictures a second from the
folder; streaming keeps up from 0.9 on.

    python benchmarks/tar_streaming.py
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.disk_latents import run  # noqa: E402
from benchmarks.latent_caching import make_pictures  # noqa: E402
from benchmarks.report import report  # noqa: E402

LEAST = 0.9
SHARDS, WORKERS, BATCH = 4, 2, 4


def open_all(photos: Path, shards: Path, batches: int) -> dict[str, Any]:
    """Return the data of each way."""
    from library.data.opening import open_data
    from library.data.options import CacheOptions, DatasetOptions, SubsetOptions
    from library.data.scan import ScanContext
    from library.models.specs import SD1

    ways: dict[str, dict[str, Any]] = {
        "folder": {"train_data_dir": str(photos.parent)},
        "indexed": {"webdataset_path": (str(shards),)},
        "streamed": {"webdataset_path": (str(shards),), "webdataset_streaming": True, "webdataset_shuffle": 100},
    }
    return {
        name: open_data(
            DatasetOptions(resolution="512", enable_bucket=True, batch_size=BATCH, check_images="none", **options),
            SubsetOptions(caption_extension=".txt"),
            CacheOptions(),
            spec=SD1,
            kinds=("dreambooth",),
            tokenizers=(),
            context=ScanContext(run_batches=batches),
        )
        for name, options in ways.items()
    }


def rate(data: Any, warm_up: int, count: int) -> float:
    """Return pictures a second of `count` batches after `warm_up`."""
    from library.contracts import Position, RunLength
    from library.data.options import LoaderOptions
    from library.data.stream import batches_of

    length = RunLength(1 << 20, 1 << 10, data.batch_count(), 1, 1, 1)
    loader = LoaderOptions(max_data_loader_n_workers=WORKERS)
    batches = batches_of(data, length, rank=0, seed=1, loader=loader).iterate(Position())
    for _ in range(warm_up):
        next(batches)
    begin = time.perf_counter()
    pictures = sum(next(batches).size for _ in range(count))
    seconds = time.perf_counter() - begin
    batches.close()
    return pictures / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    from tools import make_webdataset

    with tempfile.TemporaryDirectory() as name:
        photos, shards = Path(name) / "tree" / "1_photos", Path(name) / "shards"
        make_pictures(photos, args.images)
        for picture in list(photos.iterdir()):
            picture.with_suffix(".txt").write_text("a photograph", encoding="utf-8")
        size = f"--shard_size={-(-args.images // SHARDS)}"
        run(make_webdataset.main, [str(photos), str(shards), size])
        count = args.images // BATCH
        ways = open_all(photos, shards, 1 << 20)
        rounds = [{way: rate(data, 8, count) for way, data in ways.items()} for _ in range(args.rounds)]
    rows: list[Mapping[str, Any]] = [
        {
            "what": f"{way}, {SHARDS} shards, {WORKERS} workers",
            "pictures a second": median(one[way] for one in rounds),
            "ratio to the folder": median(one[way] / one["folder"] for one in rounds),
            "limit": "" if way == "folder" else LEAST,
        }
        for way in ways
    ]
    report("tar_streaming", rows, args.output)


if __name__ == "__main__":
    main()
