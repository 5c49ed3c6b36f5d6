"""`--debug_dataset`: what training would see of the data, as JSON for programs and as a page for people. No model."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from library import files
from library.contracts import RunLength, SampleKey
from library.data.report_html import page
from library.data.token_counts import fills_all_tokens

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.data.serving import BatchDataset

_log = logging.getLogger(__name__)

JSON_NAME = "dataset_report.json"
HTML_NAME = "dataset_report.html"
VERSION = 1

_ENLARGED = 1.25
_CUT_OFF = 0.25


def write_report(
    data: TrainingData, folder: str | Path | None, *, length: RunLength, seed: int = 0
) -> tuple[Path, Path]:
    """Write `dataset_report.json` and `dataset_report.html` and log a summary.

    Args:
        data: of the run.
        folder: where the files go; None for the working folder.
        length: of the run.
        seed: of the run; captions are those of the first epoch under it.

    Returns:
        The paths of the JSON and of the page.

    Raises:
        CannotSave: a file could not be written.
    """
    report = build_report(data, length=length, seed=seed)
    target = Path(folder) if folder else Path()
    json_path, html_path = target / JSON_NAME, target / HTML_NAME
    files.write_bytes(json_path, _encoded(report))
    files.write_bytes(html_path, page(data, report).encode("utf-8", "replace"))
    for kind, count in warning_counts(report).items():
        _log.info("%d images: %s", count, kind)
    _log.info("%d steps in %d epochs; written: %s and %s", length.total_steps, length.epochs, json_path, html_path)
    return json_path, html_path


def build_report(data: TrainingData, *, length: RunLength, seed: int) -> dict[str, Any]:
    """Return the content of the JSON; `docs/dataset_report.md` describes it."""
    return {
        "version": VERSION,
        "total_steps": length.total_steps,
        "num_epochs": length.epochs,
        "datasets": list(_datasets(data, length, seed)),
    }


def warning_counts(report: dict[str, Any]) -> dict[str, int]:
    """Return how many images have each kind of warning, most frequent first; numbers in the texts do not count."""
    found = (text for dataset in report["datasets"] for image in dataset["images"] for text in image["warnings"])
    return dict(Counter(text.partition(":")[0] for text in found).most_common())


def _datasets(data: TrainingData, length: RunLength, seed: int) -> Iterator[dict[str, Any]]:
    served = data.dataset(seed, length.total_steps)
    visits = _first_visits(data, length, seed)
    for spec, resolutions in zip(data.specs, data.bucket_lists, strict=True):
        rows = np.flatnonzero(data.table.datasets == spec.index).tolist()
        yield {
            "resolution_wh": list(spec.resolution_wh),
            "batch_size": spec.batch_size,
            "bucket_resolutions_wh": None if resolutions is None else [list(size) for size in resolutions],
            "batches_per_epoch": data.planner.batches_of_dataset(spec.index),
            "images": [_image(data, served, visits[row]) for row in rows],
        }


def _first_visits(data: TrainingData, length: RunLength, seed: int) -> dict[int, SampleKey]:
    """Return for each row the key under which the first epoch serves it first."""
    plan = data.plan(seed, 0)
    rows, places = np.unique(plan.entries, return_index=True)
    steps = (np.searchsorted(plan.offsets, places, "right") - 1) // length.micro_batches_per_update
    columns = zip(rows.tolist(), places.tolist(), steps.tolist(), strict=True)
    return {row: SampleKey(row, 0, place, step) for row, place, step in columns}


def _image(data: TrainingData, served: BatchDataset, visit: SampleKey) -> dict[str, Any]:
    row = visit.index
    record, placement = data.table.record(row), data.placements[row]
    caption = served.caption(row, visit)
    tokenizer = next(iter(data.catalogue.tokenizers), None)
    ids = [] if tokenizer is None else tokenizer.encode(caption)[0].tolist()
    facts = {
        "path": record.path,
        "size_wh": list(record.size_wh),
        "bucket_wh": list(placement.bucket_wh),
        "resized_wh": list(placement.resized_wh),
        "crop_xy": list(placement.crop_xy),
        "num_repeats": record.repeats,
        "is_reg": record.is_reg,
        "caption": caption,
        "token_ids": ids,
    }
    full = tokenizer is not None and fills_all_tokens(ids, tokenizer.spec.pad_id)
    return facts | {"warnings": list(_warnings(facts, full=full))}


def _warnings(facts: dict[str, Any], *, full: bool) -> Iterator[str]:
    (width, height), (resized_width, resized_height) = facts["size_wh"], facts["resized_wh"]
    factor = max(resized_width / width, resized_height / height)
    if factor > _ENLARGED:
        yield f"enlarged: {factor:.1f} times, from {width}x{height}"
    bucket = facts["bucket_wh"]
    lost = 1 - bucket[0] * bucket[1] / (resized_width * resized_height)
    if lost > _CUT_OFF:
        yield f"much is cut off: {lost:.0%} of the picture"
    if not facts["caption"].strip():
        yield "empty caption"
    if full:
        yield f"caption too long: it fills all {75 * len(facts['token_ids'])} tokens, the rest is not used"


def _encoded(report: dict[str, Any]) -> Iterator[bytes]:
    """Yield JSON with one line per image, which is compact and still can be read and compared."""
    head = {key: value for key, value in report.items() if key != "datasets"}
    yield (json.dumps(head)[:-1] + ', "datasets": [').encode()
    for number, dataset in enumerate(report["datasets"]):
        facts = {key: value for key, value in dataset.items() if key != "images"}
        yield (("," if number else "") + "\n" + json.dumps(facts)[:-1] + ', "images": [').encode()
        for place, image in enumerate(dataset["images"]):
            text = ("," if place else "") + "\n" + json.dumps(image, ensure_ascii=False)
            # Undecodable bytes of file names become JSON escapes.
            yield text.encode("utf-8", "backslashreplace")
        yield b"\n]}"
    yield b"\n]}\n"
