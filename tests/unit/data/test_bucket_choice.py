"""Bucket rules beyond the golden cases: any size gets a bucket or a reason, and mistakes are explained."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import BucketChooser, UnusableSize, bucket_info, bucket_notes, bucket_problems, choose_bucket
from library.data.dataset_spec import DatasetSpec

SIDES = st.integers(1, 20_000)


@given(SIDES, SIDES, st.sampled_from([8, 32, 64]), st.booleans(), st.booleans())
def test_every_size_gets_a_bucket_that_it_covers_or_a_reason(width, height, step, no_upscale, buckets):
    spec = DatasetSpec(
        resolution_wh=(512, 384), enable_bucket=buckets, bucket_reso_steps=step, bucket_no_upscale=no_upscale
    )
    chooser = BucketChooser(spec)
    try:
        placement = chooser.place((width, height))
    except UnusableSize as error:
        assert f"{width}x{height}" in str(error)
        return
    (bucket_w, bucket_h), (resized_w, resized_h), (x, y) = (
        placement.bucket_wh,
        placement.resized_wh,
        placement.crop_xy,
    )
    assert 0 < bucket_w <= resized_w
    assert 0 < bucket_h <= resized_h
    assert 0 <= x <= resized_w - bucket_w
    assert 0 <= y <= resized_h - bucket_h
    if not buckets:
        assert placement.bucket_wh == (512, 384)
    elif no_upscale:
        # Rounding the shorter side of a shrunk image can add one pixel.
        assert resized_w <= width + 1
        assert resized_h <= height + 1
        assert bucket_w % step == bucket_h % step == 0
    else:
        assert (bucket_w, bucket_h) in chooser.resolutions
        assert bucket_w * bucket_h <= 512 * 384


@given(SIDES, SIDES)
def test_nearest_ratio_is_found_as_by_looking_at_all(width, height):
    chooser = BucketChooser(DatasetSpec(enable_bucket=True, bucket_reso_steps=32))
    if min(width, height) < 8 or (width, height) in chooser.resolutions:
        return
    try:
        found = chooser.place((width, height)).bucket_wh
    except UnusableSize:
        return
    ratio = width / height
    assert found == min(chooser.resolutions, key=lambda size: abs(size[0] / size[1] - ratio))


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (7, 512), (60_000, 10)])
def test_hopeless_sizes_are_refused_even_with_upscaling(size):
    with pytest.raises(UnusableSize, match="too small|too elongated"):
        choose_bucket(size, DatasetSpec(enable_bucket=True))


def problems(**options):
    options.setdefault("enable_bucket", True)
    return [str(problem) for problem in bucket_problems(DatasetSpec(**options), "data set 1", 64)]


def test_limits_are_explained_with_the_value_to_give():
    assert "Raise max_bucket_reso to 1536" in problems(resolution_wh=(1024, 1536))[0]
    assert "Lower min_bucket_reso to 512" in problems(min_bucket_reso=576)[0]
    assert "min_bucket_reso to 64" in problems(min_bucket_reso=32, bucket_reso_steps=64)[0]
    assert "multiple of 64" in problems(bucket_reso_steps=32)[0]
    assert problems(bucket_reso_steps=32, enable_bucket=False) == []
    assert problems(min_bucket_reso=250, max_bucket_reso=1000) == []
    notes = list(bucket_notes(DatasetSpec(enable_bucket=True, min_bucket_reso=250, max_bucket_reso=1000)))
    assert "rounded down to 192" in notes[0]
    assert "rounded up to 1024" in notes[1]


def test_predefined_buckets():
    chooser = BucketChooser(DatasetSpec(), [(512, 512), (640, 384)])
    assert chooser.place((1000, 500)).bucket_wh == (640, 384)
    same_ratio = BucketChooser(DatasetSpec(), [(512, 512), (256, 256), (768, 768)])
    assert same_ratio.place((300, 300)).bucket_wh == (256, 256)


def test_bucket_info():
    info = bucket_info([((512, 512), 3), ((256, 832), 1), ((512, 512), 2)], 0.25)
    assert info == {
        "buckets": {"0": {"resolution": [256, 832], "count": 1}, "1": {"resolution": [512, 512], "count": 5}},
        "mean_img_ar_error": 0.25,
    }
