import json
import logging
import time
from html.parser import HTMLParser

import pytest
from loading_helpers import FakeTokenizer, bucketed, picture, some_pictures, training_data

from library.contracts import RunLength
from library.data.dataset_spec import DatasetSpec, SubsetSpec
from library.data.report import build_report, warning_counts, write_report
from library.data.token_counts import count_tokens, fills_all_tokens
from library.errors import Problem


class ClipLike(FakeTokenizer):
    """Begin 49406, a token per word, end and padding 49407."""

    def encode(self, text):
        import numpy as np

        body = [len(word) for word in text.split()][:75]
        return np.array([[49406, *body, *[49407] * (76 - len(body))]]), None


def length_of(data, total_steps=10, accumulation=1):
    return RunLength(total_steps, 3, data.batch_count(), accumulation, accumulation, 1)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_json_has_exactly_the_documented_format(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rows = some_pictures(images, 3, repeats=2)
    rows[1]["is_reg"] = True
    data = training_data(rows, [bucketed(images)], tokenizers=(ClipLike(),))
    json_path, html_path = write_report(data, tmp_path / "out", length=length_of(data))
    assert (json_path.name, html_path.name) == ("dataset_report.json", "dataset_report.html")
    report = json.loads(json_path.read_text(encoding="utf-8"))
    assert set(report) == {"version", "total_steps", "num_epochs", "datasets"}
    assert (report["version"], report["total_steps"], report["num_epochs"]) == (1, 10, 3)
    [dataset] = report["datasets"]
    assert set(dataset) == {"resolution_wh", "batch_size", "bucket_resolutions_wh", "batches_per_epoch", "images"}
    assert dataset["resolution_wh"] == [64, 64] and dataset["batch_size"] == 2
    assert dataset["batches_per_epoch"] == data.batch_count() == 3
    first = dataset["images"][0]
    ids = first.pop("token_ids")
    assert first == {
        "path": str(images / "00.png"),
        "size_wh": [96, 64],
        "bucket_wh": [80, 48],
        "resized_wh": [80, 53],
        "crop_xy": [0, 2],
        "num_repeats": 2,
        "is_reg": False,
        "caption": "picture 0, red, blue",
        "warnings": [],
    }
    assert len(ids) == 1 and len(ids[0]) == 77 and ids[0][:5] == [49406, 7, 2, 4, 4]
    assert [image["is_reg"] for image in dataset["images"]] == [False, True, False]


def test_captions_are_those_that_the_first_epoch_serves(tmp_path):
    from library.contracts import Position
    from library.data.plan import batch_keys

    spec = bucketed(tmp_path, shuffle_caption=True, caption_dropout_rate=0.3, token_warmup_step=4)
    data = training_data(some_pictures(tmp_path, 8), [spec])
    length = length_of(data, data.batch_count(), accumulation=2)
    report = build_report(data, length=length, seed=3)
    served = {}
    dataset = data.dataset(3, length.total_steps)
    for key in batch_keys(data.planner, length, 3, 0, Position()):
        if key.epoch == 0:
            served.update(zip((sample.index for sample in key.samples), dataset[key].captions, strict=True))
    assert [image["caption"] for image in report["datasets"][0]["images"]] == [served[row] for row in range(8)]


def test_bucket_resolutions_are_listed_or_null(tmp_path):
    rows = some_pictures(tmp_path, 2)
    data = training_data(rows, [bucketed(tmp_path)])
    data.bucket_lists = [((48, 80), (64, 64), (80, 48))]
    report = build_report(data, length=length_of(data), seed=0)
    assert report["datasets"][0]["bucket_resolutions_wh"] == [[48, 80], [64, 64], [80, 48]]
    plain = training_data(rows, [DatasetSpec(resolution_wh=(64, 64), subsets=(SubsetSpec(),))])
    assert build_report(plain, length=length_of(plain), seed=0)["datasets"][0]["bucket_resolutions_wh"] is None


def test_warnings(tmp_path):
    spec = DatasetSpec(resolution_wh=(64, 64), subsets=(SubsetSpec(),))
    rows = [
        {"path": picture(tmp_path / "small.png", (20, 20)), "size_wh": (20, 20)},
        {"path": picture(tmp_path / "wide.png", (200, 64)), "size_wh": (200, 64)},
        {"path": picture(tmp_path / "mute.png", (64, 64)), "size_wh": (64, 64), "caption": " "},
        {"path": picture(tmp_path / "long.png", (64, 64)), "size_wh": (64, 64), "caption": "word " * 90},
        {"path": picture(tmp_path / "fine.png", (64, 64)), "size_wh": (64, 64)},
    ]
    data = training_data(rows, [spec], tokenizers=(ClipLike(),))
    report = build_report(data, length=length_of(data), seed=0)
    warnings = [image["warnings"] for image in report["datasets"][0]["images"]]
    assert [len(found) for found in warnings] == [1, 1, 1, 1, 0]
    assert warnings[0][0] == "enlarged: 3.2 times, from 20x20"
    assert warnings[1][0] == "much is cut off: 68% of the picture"
    assert warnings[2][0] == "empty caption"
    assert warnings[3][0].startswith("caption too long: it fills all 75 tokens")
    assert sum(warning_counts(report).values()) == 4 and warning_counts(report)["enlarged"] == 1


@pytest.mark.parametrize("pad", [49407, 0])
def test_token_counts(pad):
    ids = [[49406, 5, 6, 7, 49407, *[pad] * 72]]
    assert count_tokens(ids, pad) == 3 and not fills_all_tokens(ids, pad)
    full = [[49406, *[9] * 75, 49407]]
    assert count_tokens(full * 2, pad) == 150 and fills_all_tokens(full * 2, pad)
    assert count_tokens([[49406, *[pad] * 76]], pad) == 0
    assert not fills_all_tokens([], pad)


def test_page_is_self_contained_and_escapes_everything(tmp_path):
    evil = '<script>alert(1)</script> \x1b[31m & "quotes"'
    rows = some_pictures(tmp_path, 4)
    rows[0]["caption"] = evil
    rows.append({"path": tmp_path / "<b>.png", "size_wh": (64, 64)})
    data = training_data(rows, [bucketed(tmp_path)])
    data.skipped = (Problem("/data/<i>.png", "empty file"),)
    _, html_path = write_report(data, tmp_path / "out", length=length_of(data))
    text = html_path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "b" in page.tags and "\x1b" not in text
    assert page.links and all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert "http" not in text.replace("http-equiv", "")
    shown = "".join(page.text)
    assert "alert(1)" in shown and "empty file" in shown and "cannot be shown" in shown
    assert len(page.links) == 4


def test_undecodable_names_do_not_break_the_report(tmp_path):
    path = str(tmp_path / "a") + "\udcff.png"
    picture(path, (64, 64))
    data = training_data([{"path": path, "size_wh": (64, 64)}], [bucketed(tmp_path)])
    json_path, _ = write_report(data, tmp_path, length=length_of(data))
    assert json.loads(json_path.read_text(encoding="utf-8"))["datasets"][0]["images"][0]["path"] == path


def test_paths_and_totals_are_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = training_data(some_pictures(tmp_path, 2), [bucketed(tmp_path)])
    write_report(data, tmp_path, length=length_of(data))
    assert "10 steps in 3 epochs" in caplog.text
    assert "dataset_report.json" in caplog.text and "dataset_report.html" in caplog.text


def test_large_sets_stay_quick_and_small(tmp_path):
    import os

    path = picture(tmp_path / "a.jpg", (64, 64))
    rows = []
    for number in range(3000):
        link = tmp_path / f"{number}.jpg"
        os.link(path, link)
        rows.append({"path": link, "size_wh": (64 + number % 40, 64)})
    data = training_data(rows, [bucketed(tmp_path)])
    begin = time.process_time()
    json_path, html_path = write_report(data, tmp_path, length=length_of(data))
    assert time.process_time() - begin < 15
    assert len(json.loads(json_path.read_text())["datasets"][0]["images"]) == 3000
    assert html_path.stat().st_size < 5_000_000
