"""Resolution buckets: which resolutions exist, which one an image goes to, and how it is scaled and cropped for it.

The rules and their rounding are those of sd-scripts 0.10.1, so that the same image with the same options lands in the
same bucket. All sizes are (width, height).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from library.contracts import Placement
from library.data.dataset_spec import DatasetSpec
from library.errors import Problem
from library.randomness import derive, uniform

Size = tuple[int, int]

SMALLEST_SIDE = 8
LONGEST_RESIZED_SIDE = 65_535


class UnusableSize(ValueError):
    """An image size that no bucket can take; the text says why."""


def adjusted_limits(min_reso: int, max_reso: int, step: int) -> Size:
    """Round the smallest side down and the largest side up to a multiple of `step`."""
    return min_reso // step * step, -(-max_reso // step) * step


def resolution_list(resolution_wh: Size, min_reso: int, max_reso: int, step: int) -> tuple[Size, ...]:
    """Return every bucket resolution for an area, ascending by (width, height).

    Args:
        resolution_wh: The training resolution; only its area matters.
        min_reso: Shortest side of a bucket, a multiple of `step`, at least 1.
        max_reso: Longest side of a bucket.
        step: Distance between neighbouring sides.
    """
    area = resolution_wh[0] * resolution_wh[1]
    square = int(math.sqrt(area) // step) * step
    found = {(square, square)}
    for width in range(min_reso, max_reso + 1, step):
        height = min(max_reso, area // width // step * step)
        if height >= min_reso:
            found.update(((width, height), (height, width)))
    return tuple(sorted(found))


def bucket_problems(spec: DatasetSpec, where: str, step_multiple: int = 1) -> Iterator[Problem]:
    """Yield what is wrong with the bucket options of a data set, with the option to change and the value it needs."""
    if not spec.enable_bucket or spec.bucket_sizes:
        return
    step = spec.bucket_reso_steps
    if step < 1 or step % step_multiple:
        yield Problem(
            where,
            f"bucket_reso_steps is {step}, but this model needs a multiple of {step_multiple}",
            f"Use bucket_reso_steps = {max(step_multiple, -(-step // step_multiple) * step_multiple)}.",
        )
        return
    low, high = adjusted_limits(spec.min_bucket_reso, spec.max_bucket_reso, step)
    size = f"{spec.resolution_wh[0]}x{spec.resolution_wh[1]}"
    if low < 1 and not spec.bucket_no_upscale:
        yield Problem(
            where,
            f"min_bucket_reso {spec.min_bucket_reso} is smaller than bucket_reso_steps {step}",
            f"Raise min_bucket_reso to {step} or more.",
        )
    if min(spec.resolution_wh) < low:
        yield Problem(
            where,
            f"min_bucket_reso {spec.min_bucket_reso} is larger than the shorter side of the resolution {size}",
            f"Lower min_bucket_reso to {min(spec.resolution_wh) // step * step} or less.",
        )
    if max(spec.resolution_wh) > high:
        yield Problem(
            where,
            f"max_bucket_reso {spec.max_bucket_reso} is smaller than the longer side of the resolution {size}",
            f"Raise max_bucket_reso to {-(-max(spec.resolution_wh) // step) * step} or more.",
        )


def bucket_notes(spec: DatasetSpec) -> Iterator[str]:
    """Yield one line for every bucket option that is rounded or has no effect."""
    if not spec.enable_bucket or spec.bucket_reso_steps < 1:
        return
    if spec.bucket_sizes:
        if spec.bucket_no_upscale:
            yield "bucket_no_upscale has no effect: multi_aspect_ratio names the buckets"
        return
    low, high = adjusted_limits(spec.min_bucket_reso, spec.max_bucket_reso, spec.bucket_reso_steps)
    step = spec.bucket_reso_steps
    if low != spec.min_bucket_reso:
        yield f"min_bucket_reso {spec.min_bucket_reso} is not a multiple of {step}: rounded down to {low}"
    if high != spec.max_bucket_reso:
        yield f"max_bucket_reso {spec.max_bucket_reso} is not a multiple of {step}: rounded up to {high}"
    if spec.bucket_no_upscale:
        yield "bucket_no_upscale: buckets follow the sizes of the images; min and max_bucket_reso are ignored"


def random_bucket(spec: DatasetSpec, key: str) -> Size | None:
    """Return the bucket of any aspect ratio that an image goes to (`bucket_random_ratio`), None for its own.

    It follows from the name of the image, so that caches stay valid.
    """
    sizes = spec.bucket_sizes
    if not sizes or uniform(0, "random_bucket", key) >= spec.bucket_random_ratio:
        return None
    return sizes[derive(0, "random_bucket", key, "size") % len(sizes)]


class BucketChooser:
    """Places images of one data set. Pure, picklable and remembers sizes it has seen."""

    def __init__(
        self,
        spec: DatasetSpec,
        resolutions: Iterable[Size] | None = None,
        assigned: Mapping[Size, Size] | None = None,
    ) -> None:
        """Prepare the table of buckets.

        Args:
            spec: The data set.
            resolutions: Buckets made earlier, in place of the computed list.
            assigned: Image size -> bucket made earlier, where that is known; other sizes go to the nearest one.
        """
        self.prepared = resolutions is not None
        self._assigned = dict(assigned or {})
        self.resolution_wh = spec.resolution_wh
        self.step = spec.bucket_reso_steps
        listed = bool(spec.bucket_sizes) or resolutions is not None
        self.no_upscale = spec.enable_bucket and spec.bucket_no_upscale and not listed
        self.resolutions: tuple[Size, ...] | None = None
        if resolutions is not None:
            self.resolutions = tuple(sorted(set(resolutions)))
        elif not spec.enable_bucket:
            self.resolutions = (spec.resolution_wh,)
        elif spec.bucket_sizes:
            self.resolutions = tuple(sorted(spec.bucket_sizes))
        elif not spec.bucket_no_upscale:
            low, high = adjusted_limits(spec.min_bucket_reso, spec.max_bucket_reso, self.step)
            self.resolutions = resolution_list(spec.resolution_wh, low, high, self.step)
        self._members = frozenset(self.resolutions or ())
        self._ratios: list[float] = []
        self._by_ratio: list[int] = []
        self._index_ratios()
        self.place = lru_cache(maxsize=65_536)(self._place)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the memory of sizes (a cached method does not pickle)."""
        return _rebuild, (self.resolution_wh, self.step, self.no_upscale, self.resolutions, self._assigned)

    def _index_ratios(self) -> None:
        first: dict[float, int] = {}
        for index, (width, height) in enumerate(self.resolutions or ()):
            first.setdefault(width / height, index)
        self._ratios = sorted(first)
        self._by_ratio = [first[ratio] for ratio in self._ratios]

    def _place(self, size_wh: Size) -> Placement:
        """Return bucket, resized size and centre crop of an image.

        Raises:
            UnusableSize: The image is too small or too elongated for any bucket.
        """
        width, height = size_wh
        if min(width, height) < SMALLEST_SIDE:
            raise UnusableSize(f"{width}x{height} is too small: both sides need {SMALLEST_SIDE} pixels or more")
        if self.no_upscale:
            bucket, resized = self._without_upscaling(width, height)
        else:
            bucket = self._assigned.get(size_wh) or self._nearest(width, height)
            resized = _cover(size_wh, bucket)
        return self._placed(size_wh, bucket, resized)

    def place_in(self, size_wh: Size, bucket: Size) -> Placement:
        """Return resized size and centre crop of an image in a bucket of the caller's choice.

        Raises:
            UnusableSize: The image is too elongated for it.
        """
        return self._placed(size_wh, bucket, _cover(size_wh, bucket))

    def _placed(self, size_wh: Size, bucket: Size, resized: Size) -> Placement:
        width, height = size_wh
        if max(resized) > LONGEST_RESIZED_SIDE:
            raise UnusableSize(f"{width}x{height} is too elongated for any bucket")
        crop = ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)
        return Placement(bucket, resized, crop)

    def _nearest(self, width: int, height: int) -> Size:
        """Return the bucket with the nearest width/height ratio; equal distances go to the first in sorted order."""
        resolutions = self.resolutions or ()
        if (width, height) in self._members:
            return (width, height)
        ratio = width / height
        right = bisect_left(self._ratios, ratio)
        if right == len(self._ratios):
            return resolutions[self._by_ratio[-1]]
        if right == 0:
            return resolutions[self._by_ratio[0]]
        below, above = abs(self._ratios[right - 1] - ratio), abs(self._ratios[right] - ratio)
        left_index, right_index = self._by_ratio[right - 1], self._by_ratio[right]
        if below == above:
            return resolutions[min(left_index, right_index)]
        return resolutions[left_index if below < above else right_index]

    def _without_upscaling(self, width: int, height: int) -> tuple[Size, Size]:
        """Return (bucket, resized) when images are only ever shrunk; the bucket is the resized size rounded down."""
        area = self.resolution_wh[0] * self.resolution_wh[1]
        resized = (width, height)
        if width * height > area:
            resized = self._shrink(width, height, area)
        bucket = (resized[0] // self.step * self.step, resized[1] // self.step * self.step)
        if min(bucket) < 1:
            raise UnusableSize(
                f"{width}x{height} is too small or too elongated: the shorter side would be below "
                f"bucket_reso_steps {self.step} (bucket_no_upscale never enlarges)"
            )
        return bucket, resized

    def _shrink(self, width: int, height: int, area: int) -> Size:
        ratio = width / height
        exact_width = math.sqrt(area * ratio)
        exact_height = area / exact_width
        wide = self._round(exact_width)
        wide_height = self._round(wide / ratio)
        high = self._round(exact_height)
        high_width = self._round(high * ratio)
        if not (wide and wide_height and high and high_width):
            return (min(wide, high_width), min(high, wide_height))
        if abs(wide / wide_height - ratio) < abs(high_width / high - ratio):
            return wide, int(wide / ratio + 0.5)
        return int(high * ratio + 0.5), high

    def _round(self, value: float) -> int:
        return int(value + 0.5) // self.step * self.step


def _rebuild(
    resolution_wh: Size,
    step: int,
    no_upscale: bool,
    resolutions: Sequence[Size] | None,
    assigned: Mapping[Size, Size],
) -> BucketChooser:
    spec = DatasetSpec(
        resolution_wh=resolution_wh, bucket_reso_steps=step, enable_bucket=no_upscale, bucket_no_upscale=no_upscale
    )
    return BucketChooser(spec, resolutions, assigned)


def choose_bucket(size_wh: Size, spec: DatasetSpec) -> Placement:
    """Place one image; make a `BucketChooser` when there are many.

    Raises:
        UnusableSize: The image is too small or too elongated for any bucket.
    """
    return BucketChooser(spec).place(size_wh)


def _cover(size_wh: Size, bucket_wh: Size) -> Size:
    """Scale so that the image covers the bucket and one side fits exactly."""
    (width, height), (bucket_width, bucket_height) = size_wh, bucket_wh
    if width / height > bucket_width / bucket_height:
        scale = bucket_height / height
    else:
        scale = bucket_width / width
    return int(width * scale + 0.5), int(height * scale + 0.5)


def sdxl_crop_ltrb(size_wh: Size, bucket_wh: Size) -> tuple[float, float, float, float]:
    """Return the crop that SDXL is conditioned on: left, top, right, bottom of the image letterboxed in its bucket.

    This is not the crop that was cut. Existing SDXL networks and caches carry these numbers, so they stay.
    """
    ratio = size_wh[0] / size_wh[1]
    width, height = float(bucket_wh[0]), float(bucket_wh[1])
    if width / height > ratio:
        width = height * ratio
    else:
        height = width / ratio
    left, top = (bucket_wh[0] - width) // 2, (bucket_wh[1] - height) // 2
    return left, top, left + width, top + height


def sdxl_crop_top_left(size_wh: Size, bucket_wh: Size, *, flipped: bool = False) -> Size:
    """Return the (top, left) integers of the SDXL size conditioning."""
    left, top, right, _bottom = sdxl_crop_ltrb(size_wh, bucket_wh)
    return int(top), int(bucket_wh[0] - right) if flipped else int(left)


def bucket_info(buckets: Iterable[tuple[Size, int]], mean_ratio_error: float) -> dict[str, Any]:
    """Return the `ss_bucket_info` value: buckets with their image counts (repeats included), ascending by size.

    Args:
        buckets: (bucket_wh, count) pairs; equal buckets are added up.
        mean_ratio_error: Mean of |bucket ratio - image ratio| over the images, without repeats.
    """
    counts: dict[Size, int] = {}
    for size, count in buckets:
        counts[size] = counts.get(size, 0) + count
    entries = {str(i): {"resolution": list(size), "count": counts[size]} for i, size in enumerate(sorted(counts))}
    return {"buckets": entries, "mean_img_ar_error": mean_ratio_error}
