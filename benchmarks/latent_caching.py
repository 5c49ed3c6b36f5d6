"""Latent caching: how full VAE batches are for assorted shapes, and the speed against the bare VAE on those batches."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402


def make_pictures(folder: Path, count: int) -> None:
    """Pictures of many shapes, derived from the photographs in examples/."""
    from PIL import Image

    sources = sorted((ROOT / "examples" / "photos").glob("*/*.jpg"))
    for index in range(count):
        picture = Image.open(sources[index % len(sources)])
        shape = [(640, 480), (480, 640), (600, 600), (800, 450), (450, 800)][index % 5]
        picture.resize(shape).save(folder / f"{index:04d}.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--output")
    args = parser.parse_args()
    import torch

    import train_db
    from library.models.random_models import make_random_sd
    from library.training import caching, loop

    torch.set_num_threads(1)
    batches: list[list[object]] = []
    spent = {"fill": 0.0, "vae": 0.0}
    encode, fill = caching._Encoder._encode, caching.fill_caches

    def counted(self: object, inputs: list[object], *, flipped: bool) -> object:
        batches.append(inputs)
        return encode(self, inputs, flipped=flipped)  # type: ignore[arg-type]

    family_box: list[object] = []

    def timed_fill(run: object, family: object, data: object) -> None:
        family_box[:] = [run, family, data]
        begin = time.perf_counter()
        fill(run, family, data)  # type: ignore[arg-type]
        spent["fill"] = time.perf_counter() - begin

    caching._Encoder._encode = counted  # type: ignore[assignment, method-assign]
    caching.fill_caches = timed_fill  # type: ignore[assignment]

    def only_cache(run: object, family: object, *rest: object, **more: object) -> None:
        encoder = caching._Encoder(run, family, family_box[2])  # type: ignore[arg-type]
        begin = time.perf_counter()
        for inputs in list(batches):
            encode(encoder, inputs, flipped=False)  # type: ignore[arg-type]
        spent["vae"] = time.perf_counter() - begin

    loop.fit = only_cache  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "1_things").mkdir()
        make_pictures(folder / "1_things", args.images)
        model = make_random_sd(folder / "model.safetensors", family="sd1", size=args.size)
        options = {
            "pretrained_model_name_or_path": model,
            "train_data_dir": folder,
            "output_dir": folder / "out",
            "resolution": args.resolution,
            "vae_batch_size": args.batch,
            "min_bucket_reso": 64,
        }
        try:
            train_db.main(
                [*(f"--{key}={value}" for key, value in options.items()), "--cache_latents", "--enable_bucket"]
            )
        except SystemExit as end:
            if end.code:
                raise
    filled = sum(len(batch) for batch in batches) / (len(batches) * args.batch)
    rows = [
        {"what": "VAE batches filled", "value": filled, "limit": "at least 0.95"},
        {"what": "bare VAE, s", "value": spent["vae"], "limit": ""},
        {"what": "fill_caches, s", "value": spent["fill"], "limit": ""},
        {"what": "throughput against bare VAE", "value": spent["vae"] / spent["fill"], "limit": "at least 0.95"},
    ]
    report("latent_caching", rows, args.output)


if __name__ == "__main__":
    main()
