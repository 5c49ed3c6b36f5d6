"""Options of training that only Stable Cascade has: how losses are weighted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.errors import Problem
from library.option_groups import OptionGroup, opt

LOSS_WEIGHTINGS = (
    "p2",
    "adaptive",
    "constant",
    "snr",
    "snr+1",
    "min-snr",
    "min-snr+1",
    "truncated",
    "sech",
    "debiased",
    "sigmoid",
)


@dataclass(frozen=True, kw_only=True)
class CascadeLossOptions(OptionGroup, title="loss of Stable Cascade"):
    """How much the loss counts at different levels of noise."""

    adaptive_loss_weight: bool = opt(
        False,
        metadata_key="ss_adaptive_loss_weight",
        help="Weight the loss by what it was lately at the same level of noise, so that all levels count alike.",
    )
    loss_weighting: str | None = opt(
        None,
        choices=LOSS_WEIGHTINGS,
        metadata_key="ss_loss_weighting",
        help="Weight of the loss as a function of the level of noise. Default: p2.",
    )

    def check(self) -> Iterator[Problem]:
        """Refuse two weightings at once."""
        if self.adaptive_loss_weight and self.loss_weighting not in (None, "adaptive"):
            yield Problem("--adaptive_loss_weight", f"goes without --loss_weighting={self.loss_weighting}")
