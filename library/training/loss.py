"""Distances between prediction and target, one number per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as functional
from torch import Tensor

if TYPE_CHECKING:
    from library.training.options import LossOptions

LossFunction = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]
"""(prediction [B,C,h,w], target [B,C,h,w], mask [B,1,H,W] | None, huber_c [B] | None) -> loss [B] float32."""


def make_loss(loss: LossOptions) -> LossFunction:
    """Return the loss that the options name.

    The element-wise loss is multiplied by the mask, brought to the size of the latents by area, and averaged over
    channels and pixels. The average counts masked pixels too: it is not divided by the mask's area.
    """
    elementwise = LOSSES[loss.loss_type]

    def per_sample(prediction: Tensor, target: Tensor, mask: Tensor | None, huber_c: Tensor | None) -> Tensor:
        values = elementwise(prediction.float(), target.float(), huber_c)
        if mask is not None:
            values = values * functional.interpolate(mask.float(), values.shape[-2:], mode="area")
        return values.flatten(1).mean(1)

    return per_sample


def _l2(prediction: Tensor, target: Tensor, huber_c: Tensor | None) -> Tensor:
    return functional.mse_loss(prediction, target, reduction="none")


def _l1(prediction: Tensor, target: Tensor, huber_c: Tensor | None) -> Tensor:
    return functional.l1_loss(prediction, target, reduction="none")


def _huber(prediction: Tensor, target: Tensor, huber_c: Tensor | None) -> Tensor:
    c = _column(huber_c)
    return c * _smooth_l1(prediction, target, huber_c)


def _smooth_l1(prediction: Tensor, target: Tensor, huber_c: Tensor | None) -> Tensor:
    """Pseudo-Huber: quadratic below c, linear above; Charbonnier et al. 1997, in the scale of arXiv 2310.14189."""
    c = _column(huber_c)
    return 2 * (((prediction - target) ** 2 + c**2).sqrt() - c)


def _column(huber_c: Tensor | None) -> Tensor:
    if huber_c is None:
        raise ValueError("the Huber losses need the threshold of each sample")
    return huber_c.view(-1, 1, 1, 1)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "l2": _l2,
    "l1": _l1,
    "huber": _huber,
    "smooth_l1": _smooth_l1,
}
"""Element-wise losses by the name of `--loss_type`."""
