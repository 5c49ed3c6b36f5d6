"""From samples of one bucket to a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from library.contracts import Batch, BatchKey, Sample


def collate(key: BatchKey, samples: Sequence[Sample]) -> Batch:
    """Stack samples of one bucket. Masks are made of ones where only some samples have one."""
    import torch

    def stack(arrays: Sequence[Any]) -> Any:
        return None if any(array is None for array in arrays) else torch.from_numpy(np.stack(arrays))

    first = samples[0]
    sizes = [
        (*reversed(sample.original_size_wh), *sample.crop_top_left, *reversed(sample.target_size_wh))
        for sample in samples
    ]
    texts = None
    if first.text_arrays is not None:
        texts = {name: stack([(sample.text_arrays or {})[name] for sample in samples]) for name in first.text_arrays}
    weights = None
    if all(sample.token_weights is not None for sample in samples) and first.token_weights:
        weights = tuple(stack(column) for column in zip(*(s.token_weights or () for s in samples), strict=True))
    return Batch(
        key=key,
        captions=tuple(sample.caption for sample in samples),
        record_keys=tuple(sample.record_key for sample in samples),
        loss_weight=torch.tensor([sample.loss_weight for sample in samples], dtype=torch.float32),
        pixels=stack([sample.pixels for sample in samples]),
        latents=stack([sample.latents for sample in samples]),
        text_arrays=texts,
        token_ids=tuple(stack(column) for column in zip(*(sample.token_ids for sample in samples), strict=True)),
        token_weights=weights,
        mask=_stack_masks(samples),
        control=stack([sample.control for sample in samples]),
        sizes_hw=torch.tensor(sizes, dtype=torch.int64),
        network_multiplier=first.network_multiplier,
        custom_attributes=tuple(sample.custom_attributes for sample in samples),
        replaced=tuple(sample.replaced_because for sample in samples if sample.replaced_because),
    )


def _stack_masks(samples: Sequence[Sample]) -> Any:
    import torch

    if all(sample.mask is None for sample in samples):
        return None
    width, height = samples[0].target_size_wh
    ones = np.ones((height, width), np.float32)
    masks = np.stack([ones if sample.mask is None else sample.mask for sample in samples])
    return torch.from_numpy(masks[:, None])
