"""The same image with the same options lands in the same bucket, scaled and cropped alike, as in the reference."""

import json
import pickle
from pathlib import Path

import pytest

from library.data.buckets import (
    BucketChooser,
    UnusableSize,
    adjusted_limits,
    bucket_problems,
    choose_bucket,
    resolution_list,
    sdxl_crop_ltrb,
    sdxl_crop_top_left,
)
from library.data.dataset_spec import DatasetSpec

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "bucket_cases.json").read_text(encoding="utf-8"))


def spec_of(given):
    return DatasetSpec(
        resolution_wh=tuple(given["max_reso"]),
        enable_bucket=given["enable_bucket"],
        min_bucket_reso=given["min_bucket_reso"],
        max_bucket_reso=given["max_bucket_reso"],
        bucket_reso_steps=given["bucket_reso_steps"],
        bucket_no_upscale=given["bucket_no_upscale"],
    )


@pytest.mark.parametrize("case", GOLDEN["bucket_cases"], ids=lambda case: str(case["id"]))
def test_bucket_case(case):
    spec, expected = spec_of(case["input"]), case["expected"]
    size = tuple(case["input"]["image"])
    problems = list(bucket_problems(spec, "data set"))
    if "error" in expected or expected.get("degenerate"):
        if not problems:
            with pytest.raises(UnusableSize, match=f"{size[0]}x{size[1]} is too"):
                choose_bucket(size, spec)
        return
    assert problems == []
    if "adjusted_min_max" in expected:
        limits = adjusted_limits(spec.min_bucket_reso, spec.max_bucket_reso, spec.bucket_reso_steps)
        assert list(limits) == expected["adjusted_min_max"]
    placement = choose_bucket(size, spec)
    assert list(placement.bucket_wh) == expected["bucket"]
    assert list(placement.resized_wh) == expected["resized"]
    assert list(placement.crop_xy) == expected["crop_xy"]
    assert list(sdxl_crop_ltrb(size, placement.bucket_wh)) == expected["sdxl_crop_ltrb"]
    assert list(sdxl_crop_top_left(size, placement.bucket_wh)) == expected["sdxl_crop_top_left"]
    flipped = sdxl_crop_top_left(size, placement.bucket_wh, flipped=True)
    assert list(flipped) == expected["sdxl_crop_top_left_flipped"]
    assert pickle.loads(pickle.dumps(BucketChooser(spec))).place(size) == placement


@pytest.mark.parametrize("case", GOLDEN["resolution_lists"], ids=lambda case: f"{case['max_reso']}/{case['divisible']}")
def test_resolution_list(case):
    made = resolution_list(tuple(case["max_reso"]), case["min_size"], case["max_size"], case["divisible"])
    assert [list(size) for size in made] == case["resolutions"]
