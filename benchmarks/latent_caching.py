"""Latent caching: how full VAE batches are for assorted shapes, and the speed against the bare VAE on those batches.

The pictures go through train_db.py up to the end of its caching. After each batch that it encodes, the bare VAE encodes
the same pixels with the same noise once more, already in memory, so that whatever else the machine does meets both
alike. `wall` is what a person waits for (decoding, encoding and storing go on at the same time), `CPU` what all threads
work.

    python benchmarks/latent_caching.py
    python benchmarks/latent_caching.py --size tiny --images 203 --resolution 128
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402

SHAPES = [(640, 480), (480, 640), (600, 600), (800, 450), (450, 800)]
Pair = tuple[float, float]
"""CPU and wall seconds."""


class Clock:
    """Seconds of training's caching, and those of the bare VAE inside it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.bare: list[Pair] = []
        self.whole: Pair = (0.0, 0.0)

    def caching(self) -> Pair:
        """Return the seconds of the caching without those of the bare VAE."""
        return tuple(self.whole[i] - sum(pair[i] for pair in self.bare) for i in (0, 1))  # type: ignore[return-value]

    def encode(self, inner: Any) -> Any:
        """Return `encode_latents` with a bare encoding of the same batch after it."""

        def encode(family: Any, pixels: Any, noise: Any) -> Any:
            latents = inner(family, pixels, noise)
            self.sizes.append(len(pixels))
            cpu, wall = time.thread_time(), time.perf_counter()
            inner(family, pixels, noise)
            self.bare.append((time.thread_time() - cpu, time.perf_counter() - wall))
            return latents

        return encode

    def fill(self, inner: Any) -> Any:
        """Return `fill_caches`, measured as a whole."""

        def fill(run: Any, family: Any, data: Any) -> None:
            family.vae.model  # noqa: B018 - builds it; how long loading takes is measured elsewhere
            cpu, wall = time.process_time(), time.perf_counter()
            inner(run, family, data)
            self.whole = (time.process_time() - cpu, time.perf_counter() - wall)

        return fill


def make_pictures(folder: Path, count: int) -> None:
    """Write pictures of many shapes, made of the photographs in examples/."""
    from PIL import Image

    folder.mkdir(parents=True)
    sources = sorted((ROOT / "examples" / "photos").glob("*/*.jpg"))
    for index in range(count):
        picture = Image.open(sources[index % len(sources)])
        picture.resize(SHAPES[index % len(SHAPES)]).save(folder / f"{index:04d}.jpg")


def cache_latents(folder: Path, model: Path, resolution: int, batch: int) -> Clock:
    """Run train_db.py up to the end of its caching."""
    import train_db
    from library.models.sd import StableDiffusion
    from library.training import caching, loop

    clock = Clock()
    StableDiffusion.encode_latents = clock.encode(StableDiffusion.encode_latents)  # type: ignore[method-assign]
    caching.fill_caches = clock.fill(caching.fill_caches)
    loop.fit = lambda *_: None
    options = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": folder / "data",
        "output_dir": folder / "out",
        "resolution": resolution,
        "vae_batch_size": batch,
        "min_bucket_reso": 64,
        "seed": 1,
    }
    try:
        train_db.main([*(f"--{key}={value}" for key, value in options.items()), "--cache_latents", "--enable_bucket"])
    except SystemExit as end:
        if end.code:
            raise
    return clock


def rows_of(clock: Clock, batch: int) -> list[dict[str, Any]]:
    filled = sum(clock.sizes) / (len(clock.sizes) * batch)
    rows: list[dict[str, Any]] = [
        {"what": "pictures", "value": sum(clock.sizes), "limit": ""},
        {"what": "VAE batches filled", "value": filled, "limit": "at least 0.95"},
    ]
    for index, kind in enumerate(("CPU", "wall")):
        bare, caching = sum(pair[index] for pair in clock.bare), clock.caching()[index]
        rows += [
            {"what": f"bare VAE, s {kind}", "value": bare, "limit": ""},
            {"what": f"caching, s {kind}", "value": caching, "limit": ""},
            {
                "what": f"throughput against the bare VAE, {kind}",
                "value": bare / caching,
                "limit": "at least 0.95",
            },
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=80)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--output")
    args = parser.parse_args()
    import torch

    from library.models.random_models import make_random_sd

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder / "data" / "1_things", args.images)
        model = make_random_sd(folder / "model.safetensors", family="sd1", size=args.size)
        clock = cache_latents(folder, model, args.resolution, args.batch)
    report(f"latent_caching_{args.size}", rows_of(clock, args.batch), args.output)


if __name__ == "__main__":
    main()
