"""Parameter groups of a network: one for each part of the model and learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from networks.adapter_base import Adapter


@dataclass(frozen=True, slots=True)
class PlusRatios:
    """LoRA+ (Hayou et al. 2024): how many times faster the second factor learns; one for a part of the model wins."""

    every: float | None = None
    unet: float | None = None
    text: float | None = None

    @property
    def for_unet(self) -> float | None:
        """The ratio of the U-Net."""
        return self.unet or self.every or None

    @property
    def for_text(self) -> float | None:
        """The ratio of text encoders."""
        return self.text or self.every or None


def parameter_groups(
    adapters: Sequence[Adapter], title: str, rate: float | None, plus: float | None
) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, group for an optimizer) pairs, leaving out what has no learning rate.

    Args:
        adapters: of one part of the model.
        title: name of the part; adapters that are in a group add `_<group>`, and LoRA+ ` plus`.
        rate: learning rate of the part.
        plus: LoRA+ ratio or None.
    """
    members: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        members.setdefault(adapter.group, []).append(adapter)
    found: list[tuple[str, dict[str, Any]]] = []
    for group, some in members.items():
        name = f"{title}_{group}" if group else title
        own = some[0].rate if some[0].rate is not None else (rate or 0.0) * some[0].rate_factor
        slow, fast = _split(some, with_plus=plus is not None)
        for suffix, parameters, group_rate in (("", slow, own), (" plus", fast, own * (plus or 1.0))):
            if parameters and group_rate:
                found.append((name + suffix, {"params": parameters, "lr": group_rate}))
    return found


def _split(adapters: Sequence[Adapter], *, with_plus: bool) -> tuple[list[Any], list[Any]]:
    slow: list[Any] = []
    fast: list[Any] = []
    for adapter in adapters:
        for name, parameter in adapter.named_parameters():
            (fast if with_plus and name.startswith(adapter.plus_names) else slow).append(parameter)
    return slow, fast
