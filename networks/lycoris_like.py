"""What `networks.loha` and `networks.lokr` share: rows left out in training; which layers get which rank and rate."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.lora_file import AdapterWeights
from library.checkpoints.lora_math import delta_weight
from library.errors import Problem, raise_problems
from library.option_values import BadValue
from networks.adapter_base import Adapter, Dropouts
from networks.adapter_network import AdapterNetwork
from networks.chance import uniform
from networks.from_weights import network_from_weights
from networks.network_args import (
    CONV_KEYS,
    DEFAULT_ALPHA,
    DROPOUT_KEYS,
    PLUS_KEYS,
    WHERE,
    Keys,
    dropouts_of,
    flag,
    plus_of,
    problems_of,
    rank_and_alpha,
    read_arguments,
)
from networks.targets import CONV_CLASSES, TRANSFORMER_CLASSES, Target, text_targets, unet_targets

logger = logging.getLogger(__name__)


# The adapters -------------------------------------------------------------------------------------------------------


class WeightAdapter(Adapter):
    """An adapter that adds a product of small tensors to the weight, and in training leaves out rows of it."""

    kind = ""
    """What files of this kind are called in `library.checkpoints.lora_file`."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer with its adapter."""
        return self.adapted(x, self._kept_rows(x.device) if self.dropping else None)

    def _kept_rows(self, device: torch.device) -> Tensor:
        """Draw what each row of the change is multiplied by, [out]: 0, or what keeps the mean."""
        drops = self.dropouts
        kept = uniform(self.layer.weight.shape[:1], device) >= drops.rank
        # No branch on what is drawn for the whole adapter: it would wait for the device.
        whole = uniform((), device) >= drops.module
        return (kept & whole) * (1 / (1 - drops.rank) if drops.rank < 1 else 0.0)

    def adapted(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Compute the layer with its adapter.

        Args:
            x: the layer's input.
            rows: [out], what each row of the change is multiplied by; None: 1.
        """
        raise NotImplementedError

    def delta(self) -> Tensor:
        """Return what the adapter adds to the layer's weight at strength 1: float32, of that weight's shape."""
        return delta_weight(AdapterWeights(self.name, self.kind, self.file_tensors()), tuple(self.layer.weight.shape))


# Arguments ----------------------------------------------------------------------------------------------------------


def patterns(value: Any) -> tuple[str, ...]:
    """Read a list of regular expressions written as in Python: `['.*attn1.*', '.*ff.*']`."""
    try:
        found = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise BadValue(f"expected a list such as ['.*attn1.*'], got {value!r}") from error
    if not isinstance(found, (list, tuple)) or not all(isinstance(item, str) for item in found):
        raise BadValue(f"expected a list of texts such as ['.*attn1.*'], got {value!r}")
    for pattern in found:
        _compile(pattern)
    return tuple(found)


_PAIR = re.compile(r"\s*(.+?)\s*=\s*([^=,]*?)\s*(?:,|$)")


def _pairs(value: Any, number: Callable[[str], Any]) -> tuple[tuple[str, Any], ...]:
    # A comma or an equals sign inside a regular expression does not end it: only `=number` before a comma does.
    found, position = [], 0
    while position < len(value):
        match = _PAIR.match(value, position)
        if match is None:
            raise BadValue(f"expected pairs such as .*attn1.*=8,.*ff.*=4, got {value[position:]!r}")
        position = match.end()
        try:
            read = number(match[2])
        except ValueError as error:
            raise BadValue(f"{match[2]!r} (for {match[1]!r}) is not a usable number") from error
        _compile(match[1])
        found.append((match[1], read))
    return tuple(found)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BadValue(f"{pattern!r} is not a regular expression ({error})") from error


def _rank(word: str) -> int:
    if (rank := int(word)) < 0:
        raise ValueError(word)
    return rank


def _rate(word: str) -> float:
    if not 0 <= (rate := float(word)) < float("inf"):
        raise ValueError(word)
    return rate


PRODUCT_KEYS: Keys = {
    **CONV_KEYS,
    **DROPOUT_KEYS,
    **PLUS_KEYS,
    "use_tucker": flag,
    "exclude_patterns": patterns,
    "include_patterns": patterns,
    "network_reg_dims": lambda value: _pairs(value, _rank),
    "network_reg_lrs": lambda value: _pairs(value, _rate),
    "verbose": flag,
}
"""The keys that both modules know."""


_DECIDED_BY_FILE = (
    "conv_dim", "conv_alpha", "use_tucker", "factor", "exclude_patterns", "include_patterns", "network_reg_dims",
)  # fmt: skip


def product_problems(kwargs: Mapping[str, Any], keys: Keys) -> Iterator[Problem]:
    """Yield what is wrong with the arguments of a module of this kind."""
    found = list(problems_of(kwargs, keys))
    yield from found
    if found:
        return
    values = read_arguments(kwargs, keys)
    if values["include_patterns"] and not values["exclude_patterns"]:
        what = "include_patterns brings back layers that exclude_patterns takes out, and that is not given"
        yield Problem(WHERE, what, "To train nothing but the included layers add exclude_patterns=['.*'].")
    yield from _neuron_problems(values["dropout"])


def _neuron_problems(dropout: float | None) -> Iterator[Problem]:
    if dropout:
        hint = "Use rank_dropout or module_dropout in --network_args."
        yield Problem("--network_dropout", "this kind of network has no neurons that could be left out", hint)


@dataclass(frozen=True, slots=True)
class Rules:
    """Which layers are adapted, at which rank and rate.

    Patterns are matched against the whole path of a layer in its part of the model, such as
    `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`. The first that fits counts.

    Attributes:
        rank: of linear layers and 1x1 convolutions.
        alpha: of those.
        conv_rank: of larger convolutions; 0: neither they nor anything else outside of the transformers is adapted.
        conv_alpha: of those.
        exclude: patterns of layers that get no adapter...
        include: ...unless one of these fits.
        ranks: (pattern, rank) pairs; a rank of 0 takes a layer out.
        rates: (pattern, learning rate) pairs.
        verbose: whether to log every layer that a pattern decides about.
    """

    rank: int
    alpha: float
    conv_rank: int
    conv_alpha: float
    exclude: Sequence[str]
    include: Sequence[str]
    ranks: Sequence[tuple[str, int]]
    rates: Sequence[tuple[str, float]]
    verbose: bool

    @classmethod
    def of(cls, values: Mapping[str, Any], size: tuple[int | None, float | None]) -> Rules:
        """Return the rules that arguments, network_dim and network_alpha ask for."""
        rank, alpha = rank_and_alpha(*size)
        conv_alpha = values["conv_alpha"]
        return cls(
            rank,
            alpha,
            values["conv_dim"] or 0,
            DEFAULT_ALPHA if conv_alpha is None else conv_alpha,
            values["exclude_patterns"] or (),
            values["include_patterns"] or (),
            values["network_reg_dims"] or (),
            values["network_reg_lrs"] or (),
            bool(values["verbose"]),
        )

    def choose(self, targets: Iterable[Target]) -> Iterator[tuple[Target, int, float]]:
        """Yield the layers that get an adapter, with its rank and alpha."""
        for target in targets:
            rank, alpha = (self.conv_rank, self.conv_alpha) if target.is_conv else (self.rank, self.alpha)
            excluded = _first([(pattern, 0) for pattern in self.exclude], target)
            if excluded is not None and _first([(pattern, 0) for pattern in self.include], target) is None:
                self._tell("%s: no adapter, by exclude_patterns", target)
                continue
            own = _first(self.ranks, target)
            if own is not None:
                rank = own[1]
                self._tell("%s: rank %d, by network_reg_dims", target, rank)
            if rank:
                yield target, rank, alpha

    def warn_of_idle_patterns(self, targets: Sequence[Target]) -> None:
        """Log every pattern that fits no layer at all: it has no effect, which nobody wrote it for."""
        pairs = (*self.ranks, *self.rates)
        for pattern in dict.fromkeys((*self.exclude, *self.include, *(pattern for pattern, _ in pairs))):
            if not any(re.fullmatch(pattern, target.path) for target in targets):
                logger.warning("%s: the pattern %r fits no layer; it must fit a whole path", WHERE, pattern)

    def set_rate(self, target: Target, adapter: Adapter) -> None:
        """Give an adapter the learning rate that a pattern says."""
        found = _first(self.rates, target)
        if found is not None:
            adapter.group, adapter.rate = f"reg_lr_{found[0]}", found[1]
            self._tell("%s: learning rate %g, by network_reg_lrs", target, found[1])

    def _tell(self, message: str, target: Target, *values: Any) -> None:
        logger.log(logging.INFO if self.verbose else logging.DEBUG, message, target.path, *values)


def _first(rules: Sequence[tuple[str, Any]], target: Target) -> tuple[int, Any] | None:
    """Return the position and the value of the first rule whose pattern fits the layer."""
    for position, (pattern, value) in enumerate(rules):
        if re.fullmatch(pattern, target.path):
            return position, value
    return None


# Networks -----------------------------------------------------------------------------------------------------------


def build_network(
    make: Callable[..., Adapter],
    values: Mapping[str, Any],
    size: tuple[int | None, float | None],
    models: tuple[Any, Any],
    multiplier: float,
    neuron_dropout: float | None,
) -> AdapterNetwork:
    """Make adapters for the layers that the arguments choose.

    Args:
        make: called with a layer, and `rank`, `alpha` and `dropouts`.
        values: arguments, read.
        size: network_dim and network_alpha.
        models: text encoder (a module, a list of several, or None) and U-Net (or None).
        multiplier: strength.
        neuron_dropout: as the trainer passes it.
    """
    rules, dropouts = Rules.of(values, size), dropouts_of(values, neuron_dropout)
    raise_problems(_neuron_problems(dropouts.neuron))
    classes = (*TRANSFORMER_CLASSES, *(CONV_CLASSES if rules.conv_rank else ()))
    layers = text_targets(models[0]), [] if models[1] is None else unet_targets(models[1], classes)
    rules.warn_of_idle_patterns([target for targets in layers for target in targets])
    parts: list[list[Adapter]] = []
    for targets in layers:
        parts.append([])
        for target, rank, alpha in rules.choose(targets):
            parts[-1].append(make(target, rank=rank, alpha=alpha, dropouts=dropouts))
            rules.set_rate(target, parts[-1][-1])
    return AdapterNetwork(*parts, multiplier=multiplier, plus=plus_of(values))


def network_like(
    make: Callable[..., Adapter | None],
    values: Mapping[str, Any],
    source: tuple[str | Path | None, Mapping[str, Tensor] | None],
    models: tuple[Any, Any],
    multiplier: float,
    *,
    for_inference: bool = False,
) -> tuple[AdapterNetwork, dict[str, Tensor]]:
    """Make adapters for the layers in a file, in its forms, with the dropouts and rates of the arguments.

    Args:
        make: called with a layer, its tensors, and `dropouts`; returns None for tensors of another kind.
        values: arguments, read.
        source: the file, and its tensors if they were read before.
        models: text encoder (a module, a list of several, or None) and U-Net (or None).
        multiplier: strength.
        for_inference: nothing is left out by chance.
    """
    useless = [name for name in _DECIDED_BY_FILE if values.get(name) is not None]
    if useless and not for_inference:
        logger.warning("%s: the file decides about %s; these have no effect", WHERE, ", ".join(useless))
    rules, dropouts = Rules.of(values, (None, None)), Dropouts() if for_inference else dropouts_of(values)
    raise_problems(_neuron_problems(dropouts.neuron))

    def made(target: Target, tensors: Mapping[str, Tensor]) -> Adapter | None:
        adapter = make(target, tensors, dropouts=dropouts)
        if adapter is not None:
            rules.set_rate(target, adapter)
        return adapter

    return network_from_weights(*source, models, made, multiplier=multiplier, plus=plus_of(values))
