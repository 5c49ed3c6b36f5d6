"""What an adapter adds to a weight: the formulas of every kind of LoRA file, in float32.

Sources: LoRA (Hu et al. 2021), LoHa (FedPara, Hyeon-Woo et al. 2021), LoKr and the CP form of LoCon (LyCORIS), GLoRA
(Chavan et al. 2023), OFT (Qiu et al. 2023), BOFT (Liu et al. 2023), DoRA (Liu et al. 2024), IA3 (Liu et al. 2022).
A weight is [out, in] or [out, in, *kernel]; `strength` 1 is the adapter as it was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.lora_file import AdapterWeights

Shape = tuple[int, ...]
_NEEDS_BASE = ("oft_blocks", "dora_scale", "a1.weight", "on_input")
_BIAS_NAMES = ("diff_b", "b_norm")


def needs_base(weights: AdapterWeights) -> bool:
    """Whether what the adapter adds depends on the weight it is added to (DoRA, OFT, BOFT, GLoRA, IA3)."""
    return any(name in weights.tensors for name in _NEEDS_BASE)


def delta_weight(weights: AdapterWeights, shape: Shape) -> Tensor:
    """Return what an adapter adds to a weight of this shape, at strength 1.

    Factors of a 1x1 convolution fit a matrix and the other way round.

    Returns:
        float32 [shape], where the factors are.

    Raises:
        UserError: the factors do not fit the shape, or the sum depends on the base weight: see `weight_change`.
    """
    if needs_base(weights):
        raise UserError(f"{weights.name} ({weights.kind}) cannot be computed without the weight that it changes")
    return _plain_delta(weights, tuple(shape))


def weight_change(base: Tensor, weights: AdapterWeights, strength: float = 1.0) -> Tensor:
    """Return what an adapter adds to this weight, in float32 [shape of `base`].

    The change is `strength` times that at strength 1 for every kind but BOFT, whose stages are each drawn towards the
    identity, as LyCORIS and ComfyUI do.

    DoRA: `V = W + delta`, then `W' = m * V / |V|`. The norm is taken per output where `dora_scale` has the size of the
    outputs first, per input where it is [1, in] (OneTrainer, LyCORIS' `wd_on_output=False`).

    Raises:
        UserError: the factors do not fit the weight.
    """
    base = base.float()
    tensors = weights.tensors
    if "oft_blocks" in tensors:
        return _orthogonal_change(base, weights, strength)
    if "a1.weight" in tensors:
        return _glora_change(base, weights).mul_(strength)
    if "on_input" in tensors:
        return _ia3_change(base, weights).mul_(strength)
    delta = _plain_delta(weights, tuple(base.shape))
    if "dora_scale" in tensors:
        delta = _decomposed(base + delta, tensors["dora_scale"], weights.name).sub_(base)
    return delta.mul_(strength)


def apply_delta(base: Tensor, weights: AdapterWeights, strength: float) -> Tensor:
    """Return the weight with an adapter at `strength` merged in: float32, a new tensor. See `weight_change`."""
    import torch

    merged = base.to(torch.float32, copy=True).contiguous()
    add_change_(merged, base, weights, strength)
    return merged


def add_change_(target: Tensor, base: Tensor, weights: AdapterWeights, strength: float) -> None:
    """Add to `target` what an adapter adds to `base`; several adapters of one base can be added to one target.

    Args:
        target: float32, contiguous, of the shape of `base`; changed in place.
        base: the weight that the adapter was trained on.
        weights: the adapter.
        strength: 1 is the adapter as it was trained.

    Raises:
        UserError: the factors do not fit the weight.
    """
    factors = None if needs_base(weights) else plain_factors(weights)
    if factors is None:
        target.add_(weight_change(base, weights, strength))
        return
    up, down = factors
    flat = target.view(target.shape[0], -1) if target.dim() else target
    if up.shape[1] != down.shape[0] or (up.shape[0], down.shape[1]) != tuple(flat.shape):
        raise _misfit(weights, tuple(base.shape))
    flat.addmm_(up, down, alpha=strength * weights.scale)


def bias_delta(weights: AdapterWeights) -> Tensor | None:
    """Return what an adapter adds to the bias, in float32 [out], or None: only full and norm adapters do."""
    found = next((weights.tensors[name] for name in _BIAS_NAMES if name in weights.tensors), None)
    return None if found is None else found.float().reshape(-1)


def is_supported(weights: AdapterWeights) -> bool:
    """Whether this module knows the formula of an adapter."""
    return any(name in weights.tensors for name in (*_BIAS_NAMES, *_NEEDS_BASE, "lora_up.weight", *_FORMULAS))


def changes_weight(weights: AdapterWeights) -> bool:
    """Whether the adapter changes the weight; one that holds nothing but a bias does not."""
    return any(name not in (*_BIAS_NAMES, "alpha") for name in weights.tensors)


def plain_factors(weights: AdapterWeights) -> tuple[Tensor, Tensor] | None:
    """Return LoRA factors as matrices, up [out, rank] and down [rank, in * kernel], or None for other kinds.

    A LoRA in CP form (`lora_mid`) is one, too: its core joins the down factor exactly. `scale` is not applied.
    """
    tensors = weights.tensors
    if "lora_up.weight" not in tensors:
        return None
    up, down = tensors["lora_up.weight"].float(), tensors["lora_down.weight"].float()
    core = tensors.get("lora_mid.weight")
    if core is not None:
        import torch

        down = torch.einsum("mn...,nj->mj...", core.float(), down.flatten(1))
    return up.flatten(1), down.flatten(1)


def factor_shape(weights: AdapterWeights) -> Shape | None:
    """Return [out, in * kernel] of what plain LoRA factors give, without computing it; None for other kinds."""
    tensors = weights.tensors
    if "lora_up.weight" not in tensors:
        return None
    up, down, core = tensors["lora_up.weight"], tensors["lora_down.weight"], tensors.get("lora_mid.weight")
    return up.shape[0], _count(down.shape[1:]) * (1 if core is None else _count(core.shape[2:]))


def matrix_shape(weights: AdapterWeights) -> Shape:
    """Return [out, in * kernel] of the weight that an adapter changes, as its factors tell.

    Raises:
        UserError: the kind does not tell.
    """
    found = factor_shape(weights)
    if found is not None:
        return found
    tensors = weights.tensors
    if "hada_w1_a" in tensors:
        return _half_shape(tensors, "hada_w1_a", "hada_w1_b", "hada_t1")
    if "diff" in tensors:
        return tensors["diff"].shape[0], _count(tensors["diff"].shape[1:])
    if "lokr_w1" not in tensors and "lokr_w1_a" not in tensors:
        raise UserError(f"{weights.name} ({weights.kind}) does not tell the shape of the weight that it changes")
    rows = columns = 1
    for n in (1, 2):
        whole = tensors.get(f"lokr_w{n}")
        if whole is None:
            half = _half_shape(tensors, f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}")
        else:
            half = whole.shape[0], _count(whole.shape[1:])
        rows, columns = rows * half[0], columns * half[1]
    return rows, columns


def _half_shape(tensors: Mapping[str, Tensor], outer: str, inner: str, core: str) -> Shape:
    a, b = tensors[outer].shape, tensors[inner].shape
    return (a[1], b[1] * _count(tensors[core].shape[2:])) if core in tensors else (a[0], _count(b[1:]))


# Kinds that stand alone ---------------------------------------------------------------------------------------------


def _plain_delta(weights: AdapterWeights, shape: Shape) -> Tensor:
    tensors = weights.tensors
    factors = plain_factors(weights)
    if factors is not None:
        if factors[0].shape[1] != factors[1].shape[0]:
            raise _misfit(weights, shape)
        return _shaped((factors[0] @ factors[1]).mul_(weights.scale), shape, weights)
    for mark, formula in _FORMULAS.items():
        if mark in tensors:
            return _shaped(formula(weights, shape), shape, weights)
    raise UserError(f"{weights.name} is an adapter of a kind that is not known ({', '.join(sorted(tensors))})")


def _shaped(delta: Tensor, shape: Shape, weights: AdapterWeights) -> Tensor:
    if delta.numel() != _count(shape) or (delta.dim() > 1 and shape and delta.shape[0] != shape[0]):
        raise _misfit(weights, shape)
    return delta.reshape(shape)


def _count(shape: Shape) -> int:
    number = 1
    for length in shape:
        number *= length
    return number


def _misfit(weights: AdapterWeights, shape: Shape) -> UserError:
    sizes = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(weights.tensors.items()) if t.dim())
    return UserError(
        f"{weights.name} does not fit a weight of shape {list(shape)} ({sizes})", "Was it made for another model?"
    )


def _loha(weights: AdapterWeights, shape: Shape) -> Tensor:
    """(alpha / r) (w1_a w1_b) o (w2_a w2_b), each half with its CP core where there is one."""
    tensors = weights.tensors
    halves = [_half(tensors, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2)]
    rank = tensors["hada_w1_b"].shape[0]
    return (halves[0] * halves[1]).mul_(_scale(weights, rank))


def _lokr(weights: AdapterWeights, shape: Shape) -> Tensor:
    """(alpha / r) kron(w1, w2); with both factors whole there is no rank and alpha does not count."""
    import torch

    tensors = weights.tensors
    halves, rank = [], None
    for n in (1, 2):
        if f"lokr_w{n}" in tensors:
            halves.append(tensors[f"lokr_w{n}"].float())
        else:
            halves.append(_half(tensors, f"lokr_w{n}_a", f"lokr_w{n}_b", f"lokr_t{n}"))
            rank = tensors[f"lokr_w{n}_b"].shape[0]
    first, second = halves
    # A flat convolution [r, in * kernel] gives the same numbers in the same order.
    first = first.reshape(*first.shape, *(1 for _ in range(second.dim() - first.dim())))
    return torch.kron(first, second.contiguous()).mul_(1.0 if rank is None else _scale(weights, rank))


def _half(tensors: Mapping[str, Tensor], outer: str, inner: str, core: str) -> Tensor:
    """Return a @ b, or with a core [r, r, *kernel] (a then is [r, out]) the CP product."""
    import torch

    a, b = tensors[outer].float(), tensors[inner].float()
    if core in tensors:
        return torch.einsum("ij...,jr,ip->pr...", tensors[core].float(), b, a)
    return (a.flatten(1) @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


def _scale(weights: AdapterWeights, rank: int) -> float:
    alpha = weights.tensors.get("alpha")
    value = 0.0 if alpha is None else float(alpha)
    return value / rank if value else 1.0


def _full(weights: AdapterWeights, shape: Shape) -> Tensor:
    return weights.tensors["diff"].float().clone()


def _norm(weights: AdapterWeights, shape: Shape) -> Tensor:
    return weights.tensors["w_norm"].float().clone()


_FORMULAS: dict[str, Callable[[AdapterWeights, Shape], Tensor]] = {
    "hada_w1_a": _loha,
    "lokr_w1": _lokr,
    "lokr_w1_a": _lokr,
    "diff": _full,
    "w_norm": _norm,
}


# Kinds that need the weight -----------------------------------------------------------------------------------------


def _decomposed(weight: Tensor, magnitude: Tensor, name: str) -> Tensor:
    import torch

    magnitude = magnitude.float()
    outputs = magnitude.dim() == 1 or magnitude.shape[0] == weight.shape[0]
    kept = 0 if outputs else 1
    if magnitude.numel() != weight.shape[kept]:
        raise UserError(f"{name}.dora_scale {list(magnitude.shape)} does not fit a weight of {list(weight.shape)}")
    others = [dim for dim in range(weight.dim()) if dim != kept]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True) + torch.finfo(weight.dtype).eps
    return weight * (magnitude.reshape(norm.shape) / norm)


def _orthogonal_change(base: Tensor, weights: AdapterWeights, strength: float) -> Tensor:
    """Return the change by OFT (blocks [k, n, n], rows of block k turned by R_k^T) or BOFT ([stages, k, n, n])."""
    import torch

    blocks = weights.tensors["oft_blocks"].float()
    count = blocks.shape[-3] * blocks.shape[-1]
    if blocks.dim() not in (3, 4) or count != base.shape[0]:
        raise _misfit(weights, tuple(base.shape))
    rotation = _cayley(blocks, weights, base.shape[0])
    if blocks.dim() == 4:
        turned, strength = _butterfly(base, rotation, strength), 1.0
    else:
        rows = base.reshape(blocks.shape[0], blocks.shape[1], -1)
        turned = torch.einsum("knm,kn...->km...", rotation, rows).reshape(base.shape)
    rescale = weights.tensors.get("rescale")
    if rescale is not None:
        turned = turned * rescale.float().reshape(-1, *(1 for _ in base.shape[1:]))
    return (turned - base).mul_(strength)


def _cayley(blocks: Tensor, weights: AdapterWeights, outputs: int) -> Tensor:
    """Return (I + Q)(I - Q)^-1 of Q = B - B^T, whose norm over all blocks is at most alpha * outputs (0: any)."""
    import torch

    skew = blocks - blocks.transpose(-1, -2)
    alpha = weights.tensors.get("alpha")
    limit = 0.0 if alpha is None else float(alpha) * outputs
    norm = float(skew.norm()) + 1e-8
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    identity = torch.eye(blocks.shape[-1], device=blocks.device)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


def _butterfly(base: Tensor, rotation: Tensor, strength: float) -> Tensor:
    """Apply the stages of BOFT: in stage i, rows 2^i * b / 2 apart are turned together."""
    import torch

    size = rotation.shape[-1]
    identity = torch.eye(size, device=rotation.device)
    result = base.reshape(base.shape[0], -1)
    for stage, turn in enumerate(rotation):
        stride = 2**stage * (size // 2)
        turn = turn * strength + (1 - strength) * identity
        mixed = result.reshape(-1, 2, stride, result.shape[1]).transpose(1, 2).reshape(-1, size, result.shape[1])
        mixed = torch.einsum("bij,bjc->bic", turn, mixed)
        result = mixed.reshape(-1, stride, 2, result.shape[1]).transpose(1, 2).reshape(result.shape)
    return result.reshape(base.shape)


def _glora_change(base: Tensor, weights: AdapterWeights) -> Tensor:
    """Return (alpha / r) (W a1 a2 + b1 b2)."""
    import torch

    tensors = {name: tensor.float() for name, tensor in weights.tensors.items()}
    inner, core = tensors["b2.weight"].flatten(1), tensors.get("bm.weight")
    if core is not None:
        inner = torch.einsum("mn...,nj->mj...", core, inner).flatten(1)
    added = tensors["b1.weight"].flatten(1) @ inner
    through = torch.einsum("oi...,ir,rj->oj...", base, tensors["a1.weight"].flatten(1), tensors["a2.weight"].flatten(1))
    rank = tensors["a2.weight"].shape[0]
    return (through + _shaped(added, tuple(base.shape), weights)).mul_(_scale(weights, rank))


def _ia3_change(base: Tensor, weights: AdapterWeights) -> Tensor:
    """Return W scaled per input (`on_input`) or per output."""
    scale = weights.tensors["weight"].float().reshape(-1)
    axis = 1 if bool(weights.tensors["on_input"]) else 0
    if scale.numel() != base.shape[axis]:
        raise _misfit(weights, tuple(base.shape))
    sizes = [1] * base.dim()
    sizes[axis] = -1
    return base * scale.reshape(sizes)
