"""The page of the data set report: one file without any link, which opens wherever it is sent."""

from __future__ import annotations

import base64
import io
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from library.data.images import BadImage, load_image
from library.data.token_counts import count_tokens

if TYPE_CHECKING:
    from library.data.dataset import TrainingData

MAX_CARDS = 240
MAX_ROWS = 2000
THUMBNAIL = 180
THUMBNAIL_SECONDS = 25.0

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --accent: #d33; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .6rem; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; } .num { text-align: right; white-space: nowrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .6rem; font-size: 13px; overflow-wrap: anywhere; }
.thumb { position: relative; display: inline-block; line-height: 0; background: var(--soft); overflow: hidden; }
.thumb img { max-width: 100%; display: block; } .box { position: absolute; border: 2px solid var(--accent);
  box-shadow: 0 0 0 999px #0006; box-sizing: border-box; } .warn { color: var(--accent); } .dim { opacity: .7; }
.buckets { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-end; } .bucket { text-align: center;
  font-size: 12px; } .bucket div { background: #48c4; border: 1px solid #48c8; margin: 0 auto .2rem; }
.unused div { background: none; border: 1px dashed var(--line); } .unused { opacity: .6; }
"""


def page(data: TrainingData, report: dict[str, Any]) -> str:
    """Return the whole page."""
    return "\n".join(
        (
            "<!doctype html><html lang='en'><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>Data set report</title><style>{_STYLE}</style>",
            "<h1>Data set report</h1>",
            *_overview(data, report),
            *_warning_list(report),
            *_skipped(data),
            *(part for number, dataset in enumerate(report["datasets"]) for part in _dataset(data, number, dataset)),
            "</html>",
        )
    )


def _overview(data: TrainingData, report: dict[str, Any]) -> Iterator[str]:
    yield f"<p>{report['total_steps']:,} steps in {report['num_epochs']:,} epochs, "
    yield f"{data.batch_count():,} batches in an epoch: {data.num_train_images:,} training images and "
    yield f"{data.num_reg_images:,} regularization images, repeats included.</p>"
    yield "<table><tr><th>data set<th>resolution<th class=num>batch size<th class=num>images"
    yield "<th class=num>with repeats<th class=num>batches per epoch</tr>"
    for number, dataset in enumerate(report["datasets"]):
        repeats = sum(image["num_repeats"] for image in dataset["images"])
        yield f"<tr><td>{number + 1}<td>{_size(dataset['resolution_wh'])}<td class=num>{dataset['batch_size']}"
        yield f"<td class=num>{len(dataset['images']):,}<td class=num>{repeats:,}"
        yield f"<td class=num>{dataset['batches_per_epoch']:,}</tr>"
    yield "</table>"
    if data.validation is not None:
        yield f"<p>{len(data.validation.table):,} images are kept apart for validation.</p>"


def _warning_list(report: dict[str, Any]) -> Iterator[str]:
    found = [
        (text, image) for dataset in report["datasets"] for image in dataset["images"] for text in image["warnings"]
    ]
    if not found:
        return
    kinds = Counter(text.partition(":")[0] for text, _ in found)
    yield "<h2>Warnings</h2><table>"
    for kind, count in kinds.most_common():
        names = [image["path"] for text, image in found if text.partition(":")[0] == kind][:5]
        more = ", …" if count > len(names) else ""
        yield f"<tr><td class=warn>{escape(kind)}<td class=num>{count:,}<td>{_text(', '.join(names))}{more}</tr>"
    yield "</table>"


def _skipped(data: TrainingData) -> Iterator[str]:
    if data.skipped:
        yield f"<h2>Left out ({len(data.skipped):,})</h2><table>"
        for problem in data.skipped[:MAX_ROWS]:
            yield f"<tr><td>{_text(problem.where)}<td class=warn>{_text(problem.what)}</tr>"
        yield "</table>"


def _dataset(data: TrainingData, number: int, dataset: dict[str, Any]) -> Iterator[str]:
    images = dataset["images"]
    yield f"<h2>Data set {number + 1}: buckets</h2><div class=buckets>"
    yield from _buckets(dataset)
    yield "</div>"
    chosen = _spread(images, MAX_CARDS)
    thumbnails = _thumbnails(data, [images[place] for place in chosen])
    yield f"<h2>Data set {number + 1}: images</h2>"
    yield "<p class=dim>The red frame is what is cut out for training.</p>"
    if len(chosen) < len(images):
        yield f"<p class=dim>{len(chosen):,} of {len(images):,} images, some of every bucket; the JSON has all.</p>"
    yield "<div class=cards>"
    for place, thumbnail in zip(chosen, thumbnails, strict=True):
        yield _card(data, images[place], thumbnail)
    yield "</div>"
    rest = len(images) - len(chosen)
    if rest:
        shown = set(chosen)
        yield f"<details><summary>{rest:,} more images</summary><table>"
        others = (image for place, image in enumerate(images) if place not in shown)
        for image, _ in zip(others, range(MAX_ROWS), strict=False):
            notes = "; ".join(image["warnings"])
            yield f"<tr><td>{_text(image['path'])}<td class=num>{_size(image['size_wh'])} → {_size(image['bucket_wh'])}"
            yield f"<td class=num>×{image['num_repeats']}<td>{_text(image['caption'])}"
            yield f"<td class=warn>{escape(notes)}</tr>"
        yield "</table></details>"


def _buckets(dataset: dict[str, Any]) -> Iterator[str]:
    """Draw every bucket to scale, empty ones included, with its number of visits."""
    counts = Counter({tuple(size): 0 for size in dataset["bucket_resolutions_wh"] or ()})
    for image in dataset["images"]:
        counts[tuple(image["bucket_wh"])] += image["num_repeats"]
    scale = 120 / max(max(size) for size in counts)
    for size, count in sorted(counts.items()):
        style = f"width:{size[0] * scale:.0f}px;height:{size[1] * scale:.0f}px"
        batches = -(-count // dataset["batch_size"])
        kind = "" if count else " unused"
        yield f"<div class='bucket{kind}'><div style='{style}'></div>{_size(size)}<br>"
        yield f"{count:,} visits, {batches:,} batches</div>" if count else "unused</div>"


def _card(data: TrainingData, image: dict[str, Any], thumbnail: str | None) -> str:
    picture = "<p class=warn>cannot be shown</p>"
    if thumbnail:
        picture = f"<div class=thumb><img alt='' src='data:image/jpeg;base64,{thumbnail}'>{_crop_box(image)}</div>"
    pads = [tokenizer.spec.pad_id for tokenizer in data.catalogue.tokenizers]
    tokens = f", {count_tokens(image['token_ids'], pads[0])} tokens" if pads else ""
    notes = "".join(f"<br><span class=warn>{escape(text)}</span>" for text in image["warnings"])
    kind = ", regularization" if image["is_reg"] else ""
    return (
        f"<div class=card>{picture}<br><b>{_text('/'.join(image['path'].split('/')[-2:]))}</b><br>"
        f"<span class=dim>{_size(image['size_wh'])} → {_size(image['resized_wh'])} → {_size(image['bucket_wh'])}, "
        f"×{image['num_repeats']}{kind}{tokens}</span><br>{_text(image['caption'])}{notes}</div>"
    )


def _crop_box(image: dict[str, Any]) -> str:
    """Return the frame of the crop in shares of the whole picture."""
    names = ("left", "top", "width", "height")
    values = (*image["crop_xy"], *image["bucket_wh"])
    whole = image["resized_wh"] * 2
    shares = (f"{n}:{100 * v / w:.2f}%" for n, v, w in zip(names, values, whole, strict=True))
    return f"<div class=box style='{';'.join(shares)}'></div>"


def _spread(images: Sequence[dict[str, Any]], count: int) -> list[int]:
    """Choose at most `count` images so that every bucket is shown, in the order of the list."""
    by_bucket: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(images):
        by_bucket.setdefault(tuple(image["bucket_wh"]), []).append(place)
    chosen: list[int] = []
    turn = 0
    while len(chosen) < min(count, len(images)):
        chosen += [places[turn] for places in by_bucket.values() if turn < len(places)]
        turn += 1
    return sorted(chosen[:count])


def _thumbnails(data: TrainingData, images: Sequence[dict[str, Any]]) -> list[str | None]:
    """Return JPEGs in base64; None for what cannot be read, or when time runs out."""
    deadline = time.monotonic() + THUMBNAIL_SECONDS
    exif = data.catalogue.reading.exif_transpose

    def make(image: dict[str, Any]) -> str | None:
        if time.monotonic() > deadline:
            return None
        try:
            pixels = load_image(
                image["path"], orientation=None if exif else 1, enough_wh=(THUMBNAIL, THUMBNAIL), reduce_above=0
            )
        except BadImage:
            return None
        return _jpeg(pixels)

    with ThreadPoolExecutor(max_workers=4, thread_name_prefix="thumbnails") as pool:
        return list(pool.map(make, images))


def _jpeg(pixels: np.ndarray[Any, Any]) -> str:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    target = io.BytesIO()
    image.save(target, format="JPEG", quality=72)
    return base64.b64encode(target.getvalue()).decode()


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"


def _text(text: str) -> str:
    """Escape text for the page; what cannot be shown becomes visible."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
    return escape(shown)
