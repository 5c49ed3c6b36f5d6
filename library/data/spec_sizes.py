"""Sizes of a data set: as options and data set files give them, and as pictures are trained.

They differ where a model's encoder looks at pictures in another size than that of the pictures which are to be drawn
(`DatasetOptions.encoded_share`): buckets are chosen in the sizes that the user gave, and then all of them are scaled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from library.data.aspect_list import aspect_sizes
from library.data.buckets import adjusted_limits
from library.data.dataset_spec import DatasetSpec
from library.errors import Problem


def step_as_given(multiple: int, share: Fraction) -> int:
    """Return what given sides must be multiples of, so that trained ones are multiples of `multiple`.

    >>> step_as_given(32, Fraction(3, 4))
    128
    """
    whole = multiple * share.denominator
    return whole // math.gcd(whole, share.numerator)


def side_problems(spec: DatasetSpec, where: str, multiple: int) -> Iterator[Problem]:
    """Yield why pictures of a data set without buckets cannot be trained on in its resolution."""
    if spec.enable_bucket or all(side % multiple == 0 for side in spec.resolution_wh):
        return
    given = "x".join(map(str, spec.resolution_wh))
    nearest = ",".join(str(max(1, round(side / multiple)) * multiple) for side in spec.resolution_wh)
    yield Problem(
        where,
        f"the sides of the resolution {given} must be multiples of {multiple}",
        f"Use {nearest}, or enable_bucket.",
    )


def with_bucket_sizes(spec: DatasetSpec, step: int, share: Fraction) -> DatasetSpec:
    """Work out the buckets that `multi_aspect_ratio` stands for, as they are trained; their sides fit `step`."""
    if not spec.multi_aspect_ratio:
        return spec
    width, height = (side * share for side in spec.resolution_wh)
    return replace(spec, bucket_sizes=aspect_sizes(math.isqrt(int(width * height)), spec.multi_aspect_ratio, step=step))


def as_trained(spec: DatasetSpec, share: Fraction) -> DatasetSpec:
    """Return a data set with the sizes that pictures are trained in, given one with those of the user."""
    if share == 1:
        return spec
    step = spec.bucket_reso_steps
    # Rounded before they are scaled, so that the buckets are those of the given sizes, one by one.
    limits = adjusted_limits(spec.min_bucket_reso, spec.max_bucket_reso, step)
    low, high, step = (max(1, round(side * share)) for side in (*limits, step))
    width, height = (max(1, round(side * share)) for side in spec.resolution_wh)
    return replace(
        spec, resolution_wh=(width, height), min_bucket_reso=low, max_bucket_reso=high, bucket_reso_steps=step
    )
