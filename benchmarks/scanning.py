"""Scanning folders and metadata, against one `scandir` plus the reading of headers and captions.

- first: a folder that was never seen, to the table of images in buckets, against a loop that lists the folder and
  opens every image (first 4 KB, size from the JPEG frame) and every caption file as Python opens files; the second
  reference does the same with bare system calls.
- again: the next start, when nothing changed (target: 1 s for 100,000 images).
- metadata: entries with sizes and latent caches beside the images, at two sizes: the time per entry must not grow.
- memory: of the table without its texts, and growth of the process, in a process of its own.

CPU seconds of the whole process; it runs one thread. The folder is hot in the cache of the system.

    python benchmarks/scanning.py                       # 100,000 images
    python benchmarks/scanning.py --images 5000
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import cpu_seconds, report  # noqa: E402

SIZES = [(64, 64), (96, 64), (64, 96), (80, 60), (120, 60), (72, 128), (128, 72)]
REPEATS = 3


def make_folder(parent: Path, count: int, caches: bool = False) -> Path:
    """Write `count` small JPEGs with captions, or with empty latent caches."""
    from PIL import Image

    pictures = []
    for size in SIZES:
        buffer = io.BytesIO()
        Image.effect_noise(size, 40).convert("RGB").save(buffer, "JPEG", quality=60)
        pictures.append(buffer.getvalue())
    folder = parent / "1_a thing"
    folder.mkdir(parents=True)
    for index in range(count):
        stem = str(folder / f"image_{index:06}")
        Path(stem + ".jpg").write_bytes(pictures[index % len(SIZES)])
        if caches:
            width, height = SIZES[index % len(SIZES)]
            Path(f"{stem}_{width:04}x{height:04}_sd.npz").write_bytes(b"")
        else:
            Path(stem + ".txt").write_text(f"a photo of thing number {index}, a tag, another tag", encoding="utf-8")
    return folder


def frame_size(head: bytes) -> tuple[int, int]:
    """Return the size in a JPEG's start of frame, the plainest way."""
    position = 2
    while head[position + 1] not in (0xC0, 0xC1, 0xC2):
        position += 2 + int.from_bytes(head[position + 2 : position + 4], "big")
    return int.from_bytes(head[position + 7 : position + 9], "big"), int.from_bytes(
        head[position + 5 : position + 7], "big"
    )


def plain_loop(folder: Path) -> dict[str, Any]:
    found = {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(".jpg"))
    for name in names:
        path = os.path.join(folder, name)  # noqa: PTH118
        with open(path, "rb") as file:  # noqa: PTH123
            size = frame_size(file.read(4096))
        with open(path[:-4] + ".txt", encoding="utf-8") as text:  # noqa: PTH123
            found[path] = (size, text.readline().strip())
    return found


def bare_loop(folder: Path) -> dict[str, Any]:
    found = {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(".jpg"))
    directory = os.open(folder, os.O_RDONLY)
    for name in names:
        image = os.open(name, os.O_RDONLY, dir_fd=directory)
        size = frame_size(os.read(image, 4096))
        os.close(image)
        text = os.open(name[:-4] + ".txt", os.O_RDONLY, dir_fd=directory)
        found[name] = (size, os.read(text, 4096).decode().strip())
        os.close(text)
    os.close(directory)
    return found


def scan(folder: Path, count: int, metadata: Path | None = None) -> Any:
    """Do what a start of training does with the data, from options to placed images."""
    from library.data.dataset_config import load_dataset_specs
    from library.data.options import DatasetOptions, SubsetOptions
    from library.data.scan import scan_datasets

    named = str(folder) if metadata else str(folder.parent)
    check = "auto" if count > 20_000 else "none"  # up to 20,000 images "auto" decodes every one
    data = DatasetOptions(
        train_data_dir=named, resolution="64", enable_bucket=True, min_bucket_reso=64, check_images=check
    )
    subset = SubsetOptions(caption_extension=".txt")
    kinds = ("finetuning",) if metadata else ("dreambooth",)
    in_json = str(metadata) if metadata else None
    specs = load_dataset_specs(data, subset, kinds=kinds, bucket_step_multiple=64, in_json=in_json)
    return scan_datasets(specs, data)


def best(work: Any, before: Any = None) -> float:
    times = []
    for _ in range(REPEATS):
        if before is not None:
            before()
        gc.collect()
        times.append(cpu_seconds(work)[0])
    return min(times)


def measure_folder(folder: Path, count: int) -> list[dict[str, Any]]:
    index = folder / ".image_index"

    def forget() -> None:
        index.unlink(missing_ok=True)

    plain, bare = best(lambda: plain_loop(folder)), best(lambda: bare_loop(folder))
    first = best(lambda: scan(folder, count), before=forget)
    again = best(lambda: scan(folder, count))
    return [
        row("first start / plain loop, s", first, plain, "ratio <= 1.3", first / plain <= 1.3),
        row("first start / bare system calls, s", first, bare, "", None),
        row("next start, s", again, plain, "<= 1 s", again <= 1.0),
    ]


def row(name: str, seconds: float, reference: float | None, limit: str, good: bool | None) -> dict[str, Any]:
    ratio = seconds / reference if reference else None
    verdict = "-" if good is None else "yes" if good else "NO"
    return {"what": name, "measured": seconds, "reference": reference, "ratio": ratio, "limit": limit, "met": verdict}


def measure_metadata(parent: Path, count: int) -> dict[str, Any]:
    """Compare the time per entry of a small and a large metadata file."""
    times = []
    for number in (count // 10, count):
        folder = make_folder(parent / str(number), number, caches=True)
        table = {f"image_{i:06}": {"caption": "x", "image_size": SIZES[i % len(SIZES)]} for i in range(number)}
        metadata = parent / f"{number}.json"
        metadata.write_text(json.dumps(table), encoding="utf-8")
        scan(folder, number, metadata)
        times.append(best(partial(scan, folder, number, metadata)))
    ten_small = 10 * times[0]
    return row(
        "metadata / ten times a tenth of it, s", times[1], ten_small, "ratio <= 1.5", times[1] <= 1.5 * ten_small
    )


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def report_memory(folder: Path) -> None:
    """Child process: print the bytes of the table and the growth of this process."""
    small = make_folder(Path(tempfile.mkdtemp()), 10)
    scan(small, 10)
    gc.collect()
    before = resident()
    result = scan(folder, 0)
    gc.collect()
    numbers, texts = result.table.nbytes()
    print(json.dumps({"count": len(result.table), "numbers": numbers, "texts": texts, "rss": resident() - before}))


def measure_memory(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--memory-of", str(folder)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    count = found["count"]
    table, grown = found["numbers"] / count, (found["rss"] - found["texts"]) / count
    return [
        {"what": "table without texts, bytes per image", "value": table, "limit": "<= 300", "met": met(table <= 300)},
        {
            "what": "process growth without texts, bytes per image",
            "value": grown,
            "limit": "<= 300",
            "met": met(grown <= 300),
        },
    ]


def met(good: bool) -> str:
    return "yes" if good else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", default=None, help="where to make the images (default: the temporary folder)")
    parser.add_argument("--output", default=None)
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        report_memory(Path(args.memory_of))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        parent = Path(temporary)
        folder = make_folder(parent / "plain", args.images)
        time.sleep(3)  # so that the index does not distrust files as just written
        scan(folder, args.images)
        rows = measure_folder(folder, args.images)
        memory = measure_memory(folder)
        rows.append(measure_metadata(parent / "metadata", args.images))
    for entry in memory:
        value = {"measured": entry["value"], "reference": None, "ratio": None}
        rows.append({"what": entry["what"], **value, "limit": entry["limit"], "met": entry["met"]})
    for entry in rows:
        entry["images"] = args.images
    report("scanning", rows, args.output)


if __name__ == "__main__":
    main()
