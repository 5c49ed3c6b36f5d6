"""Options of the moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.errors import Problem
from library.option_groups import OptionGroup, opt

_WITH_EMA = {"ema_decay": ()}


@dataclass(frozen=True, kw_only=True)
class EmaOptions(OptionGroup, title="average of the weights (EMA)"):
    """A second set of weights that follows the trained ones slowly, and is saved beside them."""

    ema_decay: float | None = opt(
        None,
        at_least=0,
        metadata_key="ss_ema_decay",
        help="Keep an average of the weights; this share of it stays at every change (0.999 is usual).",
    )
    ema_start_steps: int = opt(
        0, at_least=0, needs=_WITH_EMA, help="The average is a plain copy of the weights up to this update."
    )
    ema_every_n_steps: int = opt(
        1, at_least=1, needs=_WITH_EMA, help="Updates from one change of the average to the next."
    )
    ema_device: str | None = opt(
        None,
        choices=("cpu",),
        needs=_WITH_EMA,
        resume="free",
        help="Keep the average in main memory instead of beside the weights.",
    )

    def check(self) -> Iterator[Problem]:
        """Refuse an average that never changes."""
        if self.ema_decay is not None and self.ema_decay >= 1:
            yield Problem("--ema_decay", f"{self.ema_decay} would never let the average change", "Give 0.999, say.")
