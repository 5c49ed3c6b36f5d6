"""Several LoRA files in one: the sum of what they add, each at its strength, as a LoRA file again.

A sum of products is a product of stacked factors: `a1 b1 + a2 b2 = [a1 a2] [b1; b2]`. It is exact, with the sum of the
ranks; fewer ranks then come from the singular values of the stacked factors, never from full matrices.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from library.checkpoints import lora_math
from library.checkpoints.lora_file import AdapterWeights
from library.checkpoints.lora_merge import Ingredient
from library.errors import UserError
from library.randomness import derive

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_log = logging.getLogger(__name__)

_KERNEL_3 = re.compile(r"_(conv1|conv2|conv|op|in_layers_2|out_layers_3)$")
_KERNEL_1 = re.compile(r"_(conv_shortcut|skip_connection)$")
_PROJECTION = re.compile(r"_attentions_\d+_proj_(in|out)$")
_UP, _DOWN, _ALPHA = "lora_up.weight", "lora_down.weight", "alpha"
_MERGE_FIRST = "Merge it into a checkpoint with --sd_model instead"


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many ranks the result has.

    Attributes:
        linear: of matrices and 1x1 convolutions.
        conv: of larger kernels.
    """

    linear: int
    conv: int


class _Term(NamedTuple):
    weights: AdapterWeights
    strength: float
    base: str | None


class _Total(NamedTuple):
    """A sum: stacked factors, or the whole matrix in place of `up` where there are none."""

    up: Tensor
    down: Tensor | None
    shape: tuple[int, ...]


def combine(
    ingredients: Sequence[Ingredient],
    *,
    concat: bool = False,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[str, Tensor]:
    """Return the sum of LoRA files as the tensors of a new one.

    Args:
        ingredients: files and strengths.
        concat: keep all ranks: the sum of the files' ranks, without any loss.
        ranks: ranks of the result; None takes those of the first file that has the module.
        device: where singular values are computed.
        progress: wraps the names of the modules.

    Returns:
        float32 tensors by file name; alpha equals the rank.

    Raises:
        UserError: an adapter cannot be added without its base weight, or not without loss although `concat` asks.
    """
    terms = _terms(ingredients)
    _check_kinds(ingredients, concat)
    tensors: dict[str, Tensor] = {}
    for name in progress(terms):
        total = _total(name, terms[name], device)
        wanted = None if concat else _wanted_rank(total, terms[name][0].weights, ranks)
        up, down = _cut(total, wanted)
        rank, shape = down.shape[0], total.shape
        tensors[f"{name}.{_DOWN}"] = down.reshape(rank, *shape[1:]).cpu().contiguous()
        tensors[f"{name}.{_UP}"] = up.reshape(shape[0], rank, *(1 for _ in shape[2:])).cpu().contiguous()
        tensors[f"{name}.{_ALPHA}"] = down.new_tensor(float(rank)).cpu()
    _log.info("merged %d modules of %d files", len(terms), len(ingredients))
    return tensors


def _terms(ingredients: Sequence[Ingredient]) -> dict[str, list[_Term]]:
    terms: dict[str, list[_Term]] = {}
    for ingredient in ingredients:
        for name, weights in ingredient.file.modules.items():
            term = _Term(weights, ingredient.strength(name), ingredient.file.base)
            terms.setdefault(name, []).append(term)
    return terms


def _check_kinds(ingredients: Sequence[Ingredient], concat: bool) -> None:
    for ingredient in ingredients:
        where = str(ingredient.file.path)
        full = []
        for name, weights in ingredient.file.modules.items():
            if lora_math.needs_base(weights) or not lora_math.is_supported(weights):
                what = f"{name} ({weights.kind}) depends on the weights of the model"
                raise UserError(what, _MERGE_FIRST, where=where)
            if lora_math.bias_delta(weights) is not None or "w_norm" in weights.tensors:
                raise UserError(f"{name} changes a bias or a norm, which a LoRA cannot", _MERGE_FIRST, where=where)
            if lora_math.factor_shape(weights) is None:
                full.append(name)
        if full and concat:
            what = f"{len(full)} modules are no LoRA ({ingredient.file.modules[full[0]].kind}), such as {full[0]}"
            raise UserError(what, "Leave out --concat: they are then reduced to a rank", where=where)
        if full:
            _log.warning("%s: %d modules are no LoRA: reduced by singular values", ingredient.file.path.name, len(full))


def _total(name: str, terms: Sequence[_Term], device: torch.device | None) -> _Total:
    import torch

    shape = _weight_shape(name, terms)
    ups, downs, whole = [], [], None
    for weights, strength, _ in terms:
        factors, found = lora_math.plain_factors(weights), lora_math.factor_shape(weights)
        if factors is None:
            delta = lora_math.delta_weight(weights, shape).to(device).flatten(1).mul_(strength)
            whole = delta if whole is None else whole.add_(delta)
            continue
        if found != (shape[0], math.prod(shape[1:])):
            what = f"the files disagree about the size of {name}: {list(found or ())} and {list(shape)}"
            raise UserError(what, "Were they made for the same model?")
        ups.append((factors[0] * (strength * weights.scale)).to(device))
        downs.append(factors[1].to(device))
    if whole is None:
        return _Total(torch.cat(ups, 1), torch.cat(downs), shape)
    for up, down in zip(ups, downs, strict=True):
        whole.addmm_(up, down)
    return _Total(whole, None, shape)


def _weight_shape(name: str, terms: Sequence[_Term]) -> tuple[int, ...]:
    """Return the shape of the weight that a module changes, as exactly as its files tell."""
    for weights, _, _ in terms:
        tensors = weights.tensors
        if _DOWN in tensors:
            core = tensors.get("lora_mid.weight", tensors[_DOWN])
            return (tensors[_UP].shape[0], tensors[_DOWN].shape[1], *core.shape[2:])
        if "diff" in tensors:
            return tuple(tensors["diff"].shape)
    weights, _, base = terms[0]
    rows, columns = lora_math.matrix_shape(weights)
    kernel = _kernel_by_name(name, base)
    size = math.prod(kernel)
    return (rows, columns // size, *kernel) if columns % size == 0 else (rows, columns)


def _kernel_by_name(name: str, base: str | None) -> tuple[int, ...]:
    """Return the kernel of a layer whose file does not show it: LyCORIS flattens some."""
    if _KERNEL_3.search(name):
        return (3, 3)
    one = _KERNEL_1.search(name) or (base == "sd1" and _PROJECTION.search(name))
    return (1, 1) if one else ()


def _wanted_rank(total: _Total, first: AdapterWeights, ranks: Ranks | None) -> int:
    if ranks is None:
        return first.rank or 1
    kernel = total.shape[2:]
    return min(ranks.conv if math.prod(kernel) > 1 else ranks.linear, *total.shape[:2])


def _cut(total: _Total, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return factors of the wanted rank; None, or the rank that there is, leaves them as they are."""
    from library.checkpoints.low_rank import svd_of_matrix, svd_of_product, truncate

    up, down, shape = total
    if down is None:
        wanted = min(shape[0], math.prod(shape[1:])) if rank is None else rank
        return truncate(svd_of_matrix(up, wanted), wanted)
    if rank is None or rank == down.shape[0]:
        return up, down
    return truncate(svd_of_product(up, down), rank)


def clamp_factors(tensors: Mapping[str, Tensor], quantile: float) -> dict[str, Tensor]:
    """Return the tensors with the factors of each module clamped at a quantile of their values, together."""
    import torch

    clamped = dict(tensors)
    for key, up in tensors.items():
        if not key.endswith(f".{_UP}"):
            continue
        other = key.removesuffix(_UP) + _DOWN
        values = torch.cat([up.flatten(), tensors[other].flatten()])
        # torch.quantile is limited to 16 million values.
        limit = float(values.kthvalue(max(1, math.ceil(quantile * values.numel()))).values)
        clamped[key], clamped[other] = up.clamp(-limit, limit), tensors[other].clamp(-limit, limit)
    return clamped


# As it was ---------------------------------------------------------------------------------------------------------


def combine_legacy(ingredients: Sequence[Ingredient], *, concat: bool = False) -> dict[str, Tensor]:
    """Return what sd-scripts makes of several LoRA files, for results that must not change.

    Both factors are multiplied by `ratio * sqrt(alpha / alpha of the first file)`, so a ratio counts twice, and then
    summed factor by factor (or stacked with `concat`), with the first file's alpha.

    Raises:
        UserError: ranks differ without `concat`, or a module is no LoRA.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for ingredient in ingredients:
        where = str(ingredient.file.path)
        for name, weights in ingredient.file.modules.items():
            if set(weights.tensors) - {_UP, _DOWN, _ALPHA}:
                hint = "Leave out --legacy_ratio"
                raise UserError(f"{name} ({weights.kind}) is no plain LoRA", hint, where=where)
            first = alphas.setdefault(name, weights.alpha)
            scale = math.sqrt(weights.alpha / first) * ingredient.strength(name)
            for suffix, factor, dim in ((_UP, abs(scale), 1), (_DOWN, scale, 0)):
                key, value = f"{name}.{suffix}", weights.tensors[suffix].float() * factor
                before = tensors.get(key)
                if before is not None and not concat and before.shape != value.shape:
                    what = f"{key} has the shape {list(value.shape)}, that of the file before is {list(before.shape)}"
                    raise UserError(what, "Leave out --legacy_ratio, or add --concat", where=where)
                if before is not None:
                    value = torch.cat([before, value], dim) if concat else before + value
                tensors[key] = value
    return {**tensors, **{f"{name}.{_ALPHA}": torch.tensor(alpha) for name, alpha in alphas.items()}}


def shuffle_ranks(tensors: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Return the tensors with the ranks of every module in another order; what they add stays the same."""
    import torch

    shuffled = dict(tensors)
    for key, down in tensors.items():
        if key.endswith(f".{_DOWN}"):
            name = key.removesuffix(f".{_DOWN}")
            generator = torch.Generator().manual_seed(derive(seed, "shuffle ranks", name) >> 1)
            order = torch.randperm(down.shape[0], generator=generator)
            shuffled[key] = down[order].contiguous()
            shuffled[f"{name}.{_UP}"] = tensors[f"{name}.{_UP}"][:, order].contiguous()
    return shuffled
