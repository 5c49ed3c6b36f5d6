"""What the first batch of an epoch costs: the time a training loop waits for it, against waiting inside an epoch.

Each row serves the same small data set for several epochs while the loop pretends to train (it sleeps). The reference
opens a new torch DataLoader iterator in every epoch, with worker processes that end with the epoch, as sd-scripts does
without --persistent_data_loader_workers.

    python benchmarks/epoch_turnover.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "unit" / "data"))

from benchmarks.report import report  # noqa: E402

EPOCHS = 12
STEP_SECONDS = 0.03
LIMITS_MS = {"latents": 5.0, "pixels": 50.0}


def open_set(folder: Path, *, latents: str | None, images: int):
    """Return training data of 256 pixel pictures; latents in "memory", on "disk", or None for pixels."""
    from loading_helpers import bucketed, fill, some_pictures, training_data

    from library.data.options import CacheOptions

    rows = some_pictures(folder, images, sizes=((320, 240), (240, 320), (256, 256)))
    cache = CacheOptions(cache_latents=latents is not None, cache_latents_to_disk=latents == "disk")
    data = training_data(rows, [bucketed(folder, resolution=(256, 256), flip_aug=True, batch_size=2)], cache=cache)
    if latents:
        fill(data)
    return data


def ours(data, workers: int, method: str | None) -> Iterator[tuple[float, bool]]:
    """Yield (seconds waited, whether it was for the first batch of a later epoch)."""
    from library.contracts import Position, RunLength
    from library.data.loader import PlannedBatches
    from library.data.options import LoaderOptions

    length = RunLength(data.batch_count() * EPOCHS, EPOCHS, data.batch_count(), 1, 1, 1)
    batches = PlannedBatches(
        data,
        length,
        rank=0,
        seed=0,
        loader=LoaderOptions(max_data_loader_n_workers=workers),
        start_method=method,
    )
    before = 0.0
    for batch in batches.iterate(Position()):
        yield batches.wait_seconds - before, batch.key.update_in_epoch == 0 and batch.key.epoch > 0
        before = batches.wait_seconds


def reference(data, workers: int, method: str | None) -> Iterator[tuple[float, bool]]:
    """The same batches from a loader whose iterator and workers are made anew for each epoch."""
    from torch.utils.data import DataLoader

    from library.contracts import Position, RunLength
    from library.data.plan import batch_keys

    length = RunLength(data.batch_count() * EPOCHS, EPOCHS, data.batch_count(), 1, 1, 1)
    keys = list(batch_keys(data.planner, length, 0, 0, Position()))
    dataset = data.dataset(0, length.total_steps)
    for epoch in range(EPOCHS):
        mine = [key for key in keys if key.epoch == epoch]
        begin = time.perf_counter()
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=mine,
            num_workers=workers,
            multiprocessing_context=method if workers else None,
        )
        for number, _ in enumerate(loader):
            yield time.perf_counter() - begin, number == 0 and epoch > 0
            time.sleep(STEP_SECONDS)
            begin = time.perf_counter()


def waits(stream: Iterator[tuple[float, bool]], *, sleep: bool) -> tuple[float, float]:
    """Return the median milliseconds waited at the start of epochs and inside them."""
    turns, inside = [], []
    for number, (seconds, is_turn) in enumerate(stream):
        if is_turn:
            turns.append(1000 * seconds)
        elif number > 4:
            inside.append(1000 * seconds)
        if sleep:
            time.sleep(STEP_SECONDS)
    return median(turns), median(inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--output", default=None)
    args = parser.parse_args()
    rows = []
    cases = (
        ("latents in memory", "memory", 0, None),
        ("latents on disk", "disk", 0, None),
        ("latents on disk", "disk", 1, "fork"),
        ("latents on disk", "disk", 1, "spawn"),
        ("pixels", None, 0, None),
        ("pixels", None, 2, "fork"),
        ("pixels", None, 2, "spawn"),
    )
    for name, latents, workers, method in cases:
        with tempfile.TemporaryDirectory() as folder:
            data = open_set(Path(folder), latents=latents, images=args.images)
            turn, inside = waits(ours(data, workers, method), sleep=True)
            theirs, _ = waits(reference(data, workers, method), sleep=False)
        rows.append(
            {
                "data": name,
                "workers": workers,
                "start": method or "-",
                "new epoch, ms": turn,
                "inside, ms": inside,
                "limit, ms": LIMITS_MS["latents" if latents else "pixels"],
                "reference, ms": theirs,
                "ratio": turn / theirs,
            }
        )
    report("epoch_turnover", rows, args.output)


if __name__ == "__main__":
    main()
