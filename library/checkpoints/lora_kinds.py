"""The kinds of adapters by the tensors of one module: what belongs together, the rank, and what cannot be. Light."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

Suffixes = Mapping[str, tuple[int, ...]]

RANKED = frozenset({"lora", "loha", "lokr", "glora"})
"""Kinds whose product is multiplied by alpha / rank."""

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
MAGNITUDE = "magnitude"
"""Suffix for PEFT's DoRA magnitudes, whose shape differs from that of `dora_scale`."""

_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lora", (DOWN, UP, MID)),
    ("loha", (*_LOHA, "hada_t1", "hada_t2")),
    ("lokr", ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2")),
    ("glora", _GLORA),
    ("diag-oft", ("oft_blocks", "oft_diag")),
    ("tlora", ("q_layer.weight", "p_layer.weight", "lambda_layer")),
    ("full", ("diff", "diff_b")),
    ("norm", ("w_norm", "b_norm")),
    ("ia3", ("on_input", "weight")),
)
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "lora": (DOWN, UP),
    "loha": _LOHA,
    "glora": _GLORA,
    "tlora": ("q_layer.weight", "p_layer.weight", "lambda_layer"),
    "ia3": ("weight", "on_input"),
    "norm": ("w_norm",),
}


def kind_of(suffixes: Suffixes, keys: Iterable[str] = ()) -> str:
    """Name the kind of adapter that a module's tensors make.

    Args:
        suffixes: shape by suffix.
        keys: what the tensors are called in the file; `networks.oft` has a prefix of its own.
    """
    kind = next((kind for kind, signs in _SIGNS if any(sign in suffixes for sign in signs)), "unknown")
    if kind == "diag-oft":
        if any(key.startswith("oft_") for key in keys):
            return "oft"
        return "boft" if len(suffixes.get("oft_blocks", ())) == 4 else kind
    return kind


def rank_of(kind: str, suffixes: Suffixes) -> int:
    """Return the number of ranks of a module, 0 where its kind has none or nothing is factored."""
    if kind == "lora":
        return _axis(suffixes, DOWN, 0)
    if kind == "loha":
        return _axis(suffixes, "hada_w1_b", 0)
    if kind == "glora":
        return _axis(suffixes, "a2.weight", 0)
    if kind == "lokr":
        return _axis(suffixes, "lokr_w2_b", 0) or _axis(suffixes, "lokr_w1_b", 0)
    return _axis(suffixes, "p_layer.weight", 1) if kind == "tlora" else 0


def _axis(suffixes: Suffixes, suffix: str, axis: int) -> int:
    shape = suffixes.get(suffix, ())
    return shape[axis] if len(shape) > axis else 0


def check_module(suffixes: Suffixes, keys: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with the tensors of one module.

    Args:
        suffixes: shape by suffix.
        keys: key in the file by suffix.
    """
    kind = kind_of(suffixes, keys.values())
    missing = [suffix for suffix in _NEEDED.get(kind, ()) if suffix not in suffixes]
    if kind == "lokr":
        missing = [part for part in ("lokr_w1", "lokr_w2") if not _whole_or_factors(part, suffixes)]
    if missing:
        present = next(iter(keys.values()))
        yield f"{present!r} lacks its counterpart {', '.join(missing)}: half of the module is missing"
        return
    empty = next((suffix for suffix, shape in suffixes.items() if 0 in shape), None)
    if empty is not None:
        yield f"{keys[empty]!r} of shape {list(suffixes[empty])} is empty (rank 0)"
        return
    alpha = suffixes.get("alpha", ())
    if any(length != 1 for length in alpha):
        yield f"{keys['alpha']!r} of shape {list(alpha)} is not a single number"
    if kind == "lora":
        yield from _check_lora(suffixes, keys)
    elif kind == "loha":
        yield from _check_loha(suffixes, keys)


def _whole_or_factors(part: str, suffixes: Suffixes) -> bool:
    return part in suffixes or (f"{part}_a" in suffixes and f"{part}_b" in suffixes)


def _check_lora(suffixes: Suffixes, keys: Mapping[str, str]) -> Iterator[str]:
    down, up, mid = suffixes[DOWN], suffixes[UP], suffixes.get(MID)
    for suffix, shape in ((DOWN, down), (UP, up)):
        if len(shape) not in (2, 4):
            yield f"{keys[suffix]!r} of shape {list(shape)} is neither a matrix nor a convolution"
            return
    fits = up[1] == down[0] if mid is None else len(mid) >= 2 and (up[1], down[0]) == (mid[0], mid[1])
    if not fits:
        between = "" if mid is None else f" with {list(mid)} between them"
        yield f"{keys[UP]!r} of shape {list(up)} does not fit {keys[DOWN]!r} of shape {list(down)}{between}"
    magnitude = suffixes.get(MAGNITUDE)
    if magnitude is not None and math.prod(magnitude) != up[0]:
        yield f"{keys[MAGNITUDE]!r} of shape {list(magnitude)} does not fit {keys[UP]!r} of shape {list(up)}"


def _check_loha(suffixes: Suffixes, keys: Mapping[str, str]) -> Iterator[str]:
    for first, second, core in (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2")):
        left, right = suffixes[first], suffixes[second]
        inner = left[0] if core in suffixes else left[-1]
        if len(left) != 2 or len(right) < 2 or inner != right[0]:
            yield f"{keys[first]!r} of shape {list(left)} does not fit {keys[second]!r} of shape {list(right)}"
