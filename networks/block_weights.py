"""Ranks, alphas and learning rates of a network by blocks of the U-Net.

Blocks are numbered as in the original code of the models. SD1 and SD2 have 25: down 0..11, middle 12, up 13..24. SDXL
has 23: 0 (embeddings), input 1..9, middle 10..12, output 13..21, 22 (output layer). Nothing of the first block of SD1
and SD2, nor of the outer two of SDXL, is ever adapted.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.checkpoints.cascade_lora import CASCADE
from library.checkpoints.lora_blocks import MID, block_of
from library.errors import Problem, raise_problems
from library.option_values import BadValue, convert, nearest
from networks.adapter_base import Adapter
from networks.network_args import WHERE, Keys, number, text
from networks.targets import Target

logger = logging.getLogger(__name__)

_MIDDLE = re.compile(r"_middle_block_(\d+)_")
BLOCK_LISTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
_RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")

_CURVES: dict[str, Callable[[float], float]] = {
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}
"""Weight of a block by its place among those of its side, from 0 (first) to 1 (last)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How many blocks a model has: on each side, in the middle, and those at both ends that are never adapted."""

    side: int
    middle: int
    ends: int

    @property
    def count(self) -> int:
        """Number of all blocks."""
        return 2 * self.side + self.middle + 2 * self.ends

    def index(self, name: str) -> int | None:
        """Return the number of the block that a U-Net module belongs to, by its name in files."""
        if self is UNDIVIDED:
            return 0
        block = block_of(name)
        if block is None:
            return None
        if block == MID:
            middle = _MIDDLE.search(name)
            return self.ends + self.side + (int(middle[1]) if middle else 0)
        before = self.ends if block.startswith("IN") else self.ends + self.side + self.middle
        return before + int(re.sub(r"\D", "", block))


SD = Layout(side=12, middle=1, ends=0)
SDXL = Layout(side=9, middle=3, ends=1)
UNDIVIDED = Layout(side=0, middle=1, ends=0)
"""A model without blocks in this sense, such as stage C of Stable Cascade: all of it is one."""


def layout_of(base: str | None) -> Layout:
    """Return the block layout of a model family."""
    return {"sdxl": SDXL, CASCADE: UNDIVIDED}.get(base or "", SD)


def _numbers(kind: type) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        items = value if isinstance(value, (list, tuple)) else str(value).split(",")
        found = tuple(convert(item, kind, None) for item in items)
        if any(item < 0 for item in found):
            raise BadValue(f"must not hold numbers below 0, got {value!r}")
        return found

    return read


BLOCK_KEYS: Keys = {
    "block_dims": _numbers(int),
    "block_alphas": _numbers(float),
    "conv_block_dims": _numbers(int),
    "conv_block_alphas": _numbers(float),
    "down_lr_weight": text,
    "mid_lr_weight": text,
    "up_lr_weight": text,
    "block_lr_zero_threshold": number(0),
}


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """What every block of the U-Net gets.

    Attributes:
        layout: of the model.
        dims: rank of linear layers and 1x1 convolutions; 0: none.
        alphas: alike.
        conv_dims: rank of larger convolutions; None: only what is below transformers is adapted.
        conv_alphas: alike.
        rates: factor of the learning rate; None: one rate for all.
    """

    layout: Layout
    dims: Sequence[int]
    alphas: Sequence[float]
    conv_dims: Sequence[int] | None
    conv_alphas: Sequence[float]
    rates: Sequence[float] | None

    def set_rate(self, adapter: Adapter) -> None:
        """Put an adapter into the parameter group of its block where blocks have rates of their own."""
        index = self.layout.index(adapter.name)
        if self.rates is not None and index is not None:
            adapter.group, adapter.rate_factor = f"block{index}", self.rates[index]

    def size_of(self, target: Target) -> tuple[int, float]:
        """Return rank (0: leave the layer alone) and alpha of a layer."""
        index = self.layout.index(target.name)
        if index is None or (self.rates is not None and not self.rates[index]):
            return 0, 0.0
        if not target.is_conv:
            return self.dims[index], self.alphas[index]
        return (0, 0.0) if self.conv_dims is None else (self.conv_dims[index], self.conv_alphas[index])


def block_problems(values: Mapping[str, Any], layout: Layout) -> Iterator[Problem]:
    """Yield what is wrong with the block arguments (as `BLOCK_KEYS` reads them) for a model of this layout."""
    if layout is UNDIVIDED:
        hint = "Leave it out; module_filters and exclude_patterns choose layers."
        for name in BLOCK_KEYS:
            if values.get(name) is not None:
                what = f"{name} is for the blocks of Stable Diffusion's U-Net, which stage C of Stable Cascade has not"
                yield Problem(WHERE, what, hint)
        return
    for name in BLOCK_LISTS:
        given = values.get(name)
        if given is not None and len(given) != layout.count:
            hint = (
                f"The U-Net has {layout.count} blocks: {layout.side} down, {layout.middle} in the middle, and so on up."
            )
            yield Problem(WHERE, f"{name} has {len(given)} numbers, not {layout.count}", hint)
    for needed, name in (("block_dims", "block_alphas"), ("conv_block_dims", "conv_block_alphas")):
        if values.get(name) is not None and values.get(needed) is None:
            yield Problem(WHERE, f"{name} needs {needed}")
    for name in _RATES:
        if values.get(name) is not None:
            try:
                _side(values[name], layout.middle if name == "mid_lr_weight" else layout.side, name, warn=False)
            except BadValue as error:
                yield Problem(WHERE, f"{name}: {error}", f"Give numbers, or one of {', '.join(_CURVES)}.")


def block_plan(values: Mapping[str, Any], network_dim: int, network_alpha: float, layout: Layout) -> BlockPlan:
    """Return what the arguments of a network give to every block.

    Args:
        values: as `BLOCK_KEYS` and `CONV_KEYS` read them.
        network_dim: rank where there is no list.
        network_alpha: alpha where there is no list.
        layout: of the model.

    Raises:
        UserError: naming everything that is wrong.
    """
    raise_problems(block_problems(values, layout))
    conv_dim, conv_alpha = values.get("conv_dim"), values.get("conv_alpha")
    conv_alpha = 1.0 if conv_alpha is None else conv_alpha
    return BlockPlan(
        layout=layout,
        dims=values.get("block_dims") or [network_dim] * layout.count,
        alphas=values.get("block_alphas") or [network_alpha] * layout.count,
        conv_dims=values.get("conv_block_dims") or ([conv_dim] * layout.count if conv_dim else None),
        conv_alphas=values.get("conv_block_alphas") or [conv_alpha] * layout.count,
        rates=block_rates(values, layout),
    )


def block_rates(values: Mapping[str, Any], layout: Layout) -> tuple[float, ...] | None:
    """Return the factor of the learning rate of every block; None when none of the weights is given."""
    if all(values.get(name) is None for name in _RATES):
        return None
    threshold = values.get("block_lr_zero_threshold") or 0.0
    down, middle, up = (
        _side(values.get(name), layout.middle if name == "mid_lr_weight" else layout.side, name, warn=True)
        for name in _RATES
    )
    ends = (1.0,) * layout.ends
    inner = tuple(weight if weight > threshold else 0.0 for weight in (*down, *middle, *up))
    return (*ends, *inner, *ends)


def _side(value: Any, count: int, name: str, *, warn: bool) -> tuple[float, ...]:
    """Read the weights of one side: numbers, one number for all of its blocks, or a curve such as `cosine+.25`."""
    if value is None:
        return (1.0,) * count
    if "," not in str(value):
        return _curve(str(value), count)
    weights = tuple(float(convert(item.strip() or "0", float, None)) for item in str(value).split(","))
    if any(weight < 0 for weight in weights):
        raise BadValue(f"must not hold numbers below 0, got {value!r}")
    if warn and len(weights) != count:
        done = "the others count 1" if len(weights) < count else "the rest is ignored"
        logger.warning("%s: %s has %d numbers for %d blocks; %s", WHERE, name, len(weights), count, done)
    return (*weights[:count], *(1.0,) * (count - len(weights)))


def _curve(value: str, count: int) -> tuple[float, ...]:
    name, _, base = (part.strip() for part in value.partition("+"))
    if name not in _CURVES:
        try:
            return (float(convert(value, float, None)),) * count
        except BadValue:
            near = nearest(name, tuple(_CURVES), cutoff=0.6)
            hint = f" (did you mean {near}?)" if near else ""
            raise BadValue(f"{value!r} is neither a number nor a curve{hint}") from None
    start = float(convert(base, float, None)) if base else 0.0
    last = max(1, count - 1)
    return tuple(_CURVES[name](place / last) + start for place in range(count))
