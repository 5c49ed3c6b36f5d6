"""The tools for metadata files, and how fast a start of training reads such a file.

- merge: captions and then tags, one text file for each image, into one metadata file (two runs of the tools).
- clean: all captions and tags of that file, by the rules that come with the tool.
- load: what a start of training does with the file when it holds the sizes of all images: names resolved, files looked
  at, rows placed in buckets. With plain names as keys, and with full paths.

CPU seconds of the whole process, Python's start included, except for load, which has the scan of training alone. The
tools run one thread. The reference of merge is a loop that reads the same files as Python opens them. The folder is hot
in the cache of the system.

    python benchmarks/metadata_tools.py                  # 100,000 images
    python benchmarks/metadata_tools.py --images 5000
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.report import child_cpu_seconds, report  # noqa: E402
from benchmarks.scanning import SIZES, best, make_folder, scan  # noqa: E402

WORDS = "a young woman lady anime girl person people in on with red blue dress duck hair sea sky of the cartoon"
TAGS = (
    "1girl 2girls multiple_girls blue_hair red_hair long_hair short_hair blue_eyes red_eyes white_shirt shirt skirt "
    "smile ^_^ hair_ornament red_hair_ornament long_sleeves ponytail twin_braids outdoors sky sea standing sitting hat "
    "open_mouth looking_at_viewer simple_background white_background gloves boots holding holding_cup cup"
)
MERGE_AND_CLEAN, LOAD = 20.0, 3.0


def write_texts(folder: Path, count: int) -> None:
    """Write a caption of 12 words and 25 tags beside each image."""
    rng = random.Random(1)
    words, known = WORDS.split(), TAGS.split()
    for index in range(count):
        stem = str(folder / f"image_{index:06}")
        Path(stem + ".caption").write_text(" ".join(rng.choices(words, k=12)), encoding="utf-8")
        tags = [*rng.sample(known, k=25), f"tag_{index % 5000}"]
        Path(stem + ".txt").write_text(", ".join(tags) + ", rating:safe", encoding="utf-8")


def seconds_of(tool: str, *words: object) -> float:
    return child_cpu_seconds([sys.executable, str(ROOT / "finetune" / f"{tool}.py"), *map(str, words)])


def plain_reading(folder: Path) -> None:
    for suffix in (".caption", ".txt"):
        for path in sorted(folder.glob("*.jpg")):
            with open(str(path)[:-4] + suffix, encoding="utf-8") as file:  # noqa: PTH123
                file.read()


def measure_tools(folder: Path, parent: Path) -> list[dict[str, Any]]:
    merged, cleaned = parent / "merged.json", parent / "cleaned.json"
    plain = best(lambda: plain_reading(folder))
    merge = seconds_of("merge_captions_to_metadata", folder, merged)
    merge += seconds_of("merge_dd_tags_to_metadata", folder, merged)
    clean = seconds_of("clean_captions_and_tags", merged, cleaned)
    good = merge + clean <= MERGE_AND_CLEAN
    return [
        row("merge captions and tags, s", merge, plain, "", None),
        row("clean, s", clean, None, "", None),
        row("merge and clean, s", merge + clean, None, f"<= {MERGE_AND_CLEAN:g} s", good),
    ]


def measure_load(folder: Path, parent: Path, *, full: bool) -> dict[str, Any]:
    table = json.loads((parent / "cleaned.json").read_text(encoding="utf-8"))
    sized = {}
    for index, (key, entry) in enumerate(table.items()):
        name = str(folder / f"{key}.jpg") if full else key
        sized[name] = {**entry, "image_size": SIZES[index % len(SIZES)]}
    metadata = parent / "sized.json"
    metadata.write_text(json.dumps(sized, indent=2), encoding="utf-8")
    count = len(sized)
    seconds = best(lambda: scan(folder, count, metadata))
    what = "load with sizes, full paths, s" if full else "load with sizes, plain names, s"
    return row(what, seconds, None, f"<= {LOAD:g} s", seconds <= LOAD)


def row(what: str, seconds: float, reference: float | None, limit: str, good: bool | None) -> dict[str, Any]:
    met = "-" if good is None else "yes" if good else "NO"
    return {"what": what, "measured": seconds, "reference": reference, "limit": limit, "met": met}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", default=None, help="where to make the images (default: the temporary folder)")
    parser.add_argument("--output", default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        parent = Path(temporary)
        folder = make_folder(parent / "images", args.images)
        write_texts(folder, args.images)
        rows = measure_tools(folder, parent)
        rows += [measure_load(folder, parent, full=full) for full in (False, True)]
    for entry in rows:
        entry["images"] = args.images
    report("metadata_tools", rows, args.output)


if __name__ == "__main__":
    main()
