"""How long training waits for its data when latents come from disk.

Pictures are encoded by tools/cache_latents.py, and captions by tools/cache_text_encoder_outputs.py; then
train_network.py runs on the files, as a person runs it. Measured are the seconds in which the training loop has nothing
to do because the next batch is not there, as a share of the wall time of the steps, and, without any model, how many
batches a second the loader serves at most: training that makes fewer steps a second need not wait.

The first steps are left out: until the loader runs there is nothing to overlap with.

    python benchmarks/disk_latents.py
    python benchmarks/disk_latents.py --size full --mixed_precision bf16     # with a GPU
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.latent_caching import make_pictures  # noqa: E402
from benchmarks.report import report  # noqa: E402

WARM_UP = 5
SIZES = ("tiny", "thin", "full")
"""Random models: a few channels, all layers with few channels, and SD 1.5."""


class Waiting:
    """Times at which the loop got its batches, and how long it waited for each."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.marks: list[float] = []
        self.workers = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measure every batch that is served inside the block."""
        from library.data.loader import PlannedBatches

        inner = PlannedBatches.iterate

        def iterate(loader: Any, start: Any) -> Iterator[Any]:
            self.workers = loader.workers
            before = loader.wait_seconds
            for batch in inner(loader, start):
                self.marks.append(time.perf_counter())
                self.seconds.append(loader.wait_seconds - before)
                yield batch
                before = loader.wait_seconds

        PlannedBatches.iterate = iterate  # type: ignore[method-assign, assignment]
        yield
        PlannedBatches.iterate = inner  # type: ignore[method-assign]

    @property
    def share(self) -> float:
        """Of the time from one batch to the next, what was spent waiting."""
        return sum(self.seconds[WARM_UP:]) / (self.marks[-1] - self.marks[WARM_UP - 1])

    @property
    def step(self) -> float:
        """Median seconds from one batch to the next."""
        marks = self.marks[WARM_UP - 1 :]
        return median(later - earlier for earlier, later in zip(marks, marks[1:], strict=False))


def run(main: Any, options: list[str]) -> None:
    try:
        main(options)
    except SystemExit as end:
        if end.code:
            raise


def train(folder: Path, options: list[str], steps: int) -> Waiting:
    """Fill the caches and train on them."""
    import train_network
    from tools import cache_latents, cache_text_encoder_outputs

    run(cache_latents.main, options)
    run(cache_text_encoder_outputs.main, options)
    waiting = Waiting()
    own = [f"--output_dir={folder / 'out'}", f"--max_train_steps={steps}", "--seed=1", "--optimizer_type=AdamW"]
    network = ["--network_module=networks.lora", "--network_dim=16", "--network_train_unet_only"]
    caches = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    with waiting.watch():
        run(train_network.main, [*options, *own, *network, *caches])
    return waiting


def loader_alone(folder: Path, options: list[str], steps: int) -> float:
    """Return how many batches a second come out of the loader when nobody works with them."""
    import train_network
    from library.training import loop

    served: list[float] = []

    def drain(run: Any, family: Any, method: Any, data: Any, opts: Any) -> None:
        from library.contracts import Position
        from library.data.loader import PlannedBatches

        loader = PlannedBatches(data, run.begin.length, rank=0, seed=1, loader=opts.loader)
        for _ in loader.iterate(Position()):
            served.append(time.perf_counter())

    loop.fit = drain
    own = [f"--output_dir={folder / 'out'}", f"--max_train_steps={steps}", "--seed=1", "--overwrite"]
    caches = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    network = ["--network_module=networks.lora", "--network_train_unet_only"]
    run(train_network.main, [*options, *own, *network, *caches])
    return (len(served) - WARM_UP) / (served[-1] - served[WARM_UP - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--output")
    args = parser.parse_args()
    import torch

    from library.models.random_models import make_random_sd

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder / "data" / "1_things", args.images)
        model = make_random_sd(folder / "model.safetensors", family="sd1", size=args.size)
        options = [
            f"--pretrained_model_name_or_path={model}",
            f"--train_data_dir={folder / 'data'}",
            f"--resolution={args.resolution}",
            f"--train_batch_size={args.batch}",
            f"--mixed_precision={args.mixed_precision}",
            "--enable_bucket",
            "--flip_aug",
            "--min_bucket_reso=64",
        ]
        waiting = train(folder, options, args.steps)
        alone = loader_alone(folder, options, 10 * args.steps)
    rows = [
        {"what": "median step, ms", "value": 1000 * waiting.step, "limit": ""},
        {"what": "waiting for data, % of the steps' time", "value": 100 * waiting.share, "limit": "below 1"},
        {"what": "batches a second, loader alone", "value": alone, "limit": ""},
        {"what": "loader processes", "value": waiting.workers, "limit": ""},
        {"what": "device", "value": "GPU" if torch.cuda.is_available() else "CPU", "limit": ""},
    ]
    report(f"disk_latents_{args.size}", rows, args.output)


if __name__ == "__main__":
    main()
