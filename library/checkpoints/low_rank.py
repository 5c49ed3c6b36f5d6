"""Matrices of low rank: decomposing them, cutting them to fewer ranks, and choosing how many.

A LoRA module is a product `up @ down` of rank r. Its singular values are those of an r x r core, so the full matrix is
never made: thousands of times less work than a decomposition of the product. Everything is computed in float32 on the
device of the arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DYNAMIC_METHODS", "Decomposition", "chosen_rank", "svd_of_matrix", "svd_of_product", "truncate"]

DYNAMIC_METHODS = ("sv_ratio", "sv_fro", "sv_cumulative")
"""How `chosen_rank` counts: size against the largest value, share of the norm, share of the sum."""

_NOTHING = 1e-6
_OVERSAMPLING = 16
_MAX_ROUNDS = 12
_CONVERGED = 1e-5
_EXACT_BELOW = 256


class Decomposition(NamedTuple):
    """A matrix as `u @ diag(s) @ vh`: u [o,n], s [n] descending and not negative, vh [n,i]; float32."""

    u: Tensor
    s: Tensor
    vh: Tensor


def svd_of_product(up: Tensor, down: Tensor) -> Decomposition:
    """Decompose `up @ down` without making it.

    With `up = Qu Ru` and `down.T = Qd Rd`, the product is `Qu (Ru Rd.T) Qd.T`, and what remains is the decomposition of
    the small matrix in the middle.

    Args:
        up: [o,r].
        down: [r,i].

    Returns:
        n = min(o, r, i) singular values with their vectors; further ones of the product are zero.
    """
    left, upper = torch.linalg.qr(up.float())
    right, lower = torch.linalg.qr(down.float().T)
    u, s, vh = _svd(upper @ lower.T)
    return Decomposition(left @ u, s, vh @ right.T)


def svd_of_matrix(matrix: Tensor, rank: int, generator: torch.Generator | None = None) -> Decomposition:
    """Return the largest `rank` singular values of a full matrix, with their vectors.

    Small matrices, and those of which most values are wanted, are decomposed completely. For others a random subspace
    is turned towards the largest vectors by multiplying with the matrix and its transpose until the captured norm
    stays the same (Halko, Martinsson and Tropp 2011, algorithm 4.4). What is left out is then at most a thousandth
    larger than in the best approximation, also where singular values hardly fall off.

    Args:
        matrix: [o,i].
        rank: how many; at most min(o, i) are returned.
        generator: of the random subspace, on the CPU; default: one with a fixed seed.
    """
    matrix = matrix.float()
    smaller = min(matrix.shape)
    size = rank + max(_OVERSAMPLING, rank // 4)
    if smaller <= _EXACT_BELOW or size * 2 > smaller:
        return _cut(_svd(matrix), rank)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    start = torch.randn((matrix.shape[1], size), generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start)[0]
    captured = 0.0
    for _ in range(_MAX_ROUNDS):
        towards, triangle = torch.linalg.qr(matrix.T @ basis)
        before, captured = captured, float(torch.linalg.svdvals(triangle)[:rank].square().sum())
        if captured - before <= _CONVERGED * captured:
            break
        basis = torch.linalg.qr(matrix @ towards)[0]
    # Here basis.T @ matrix = triangle.T @ towards.T: the product with the matrix need not be repeated.
    u, s, vh = _svd(triangle.T)
    return _cut(Decomposition(basis @ u, s, vh @ towards.T), rank)


def truncate(parts: Decomposition, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (up [o,rank], down [rank,i]) of the best approximation of that rank.

    Both factors get the square root of each singular value, so neither runs out of the range of float16. Ranks beyond
    those that the matrix has add nothing to the product, but can be trained: their column of `up` is zero and their row
    of `down` is not.
    """
    kept = min(rank, len(parts.s))
    root = parts.s[:kept].sqrt()
    up, down = parts.u[:, :kept] * root, root[:, None] * parts.vh[:kept]
    if rank == kept:
        return up, down
    width = down.shape[1]
    rows = down.new_zeros(rank - kept, width)
    index = torch.arange(rank - kept, device=down.device)
    rows[index, index % width] = width**-0.5
    return torch.cat([up, up.new_zeros(len(up), rank - kept)], 1), torch.cat([down, rows])


def chosen_rank(singular: Tensor, method: str | None, param: float | None, cap: int) -> int:
    """Return the rank that a matrix is cut to.

    A method counts k singular values: `sv_ratio` those above the largest divided by `param`; `sv_fro` as many as reach
    the share `param` of the Frobenius norm; `sv_cumulative` as many as reach the share `param` of the sum. k is at
    least 1 and at most one less than there are values, and the rank is k + 1: one more than needed, which other tools
    give too and users' settings are tuned to. A matrix of (nearly) zeros gets rank 1.

    Args:
        singular: [n], descending.
        method: one of `DYNAMIC_METHODS`, or None for `cap` as it is.
        param: of the method.
        cap: the most that is allowed.
    """
    if not len(singular) or float(singular[0]) <= _NOTHING:
        return 1 if method is not None else cap
    if method is None:
        return cap
    if param is None:
        raise ValueError(f"{method} needs a parameter")
    values = singular.double().cpu()
    if method == "sv_ratio":
        count = int((values > values[0] / param).sum())
    elif method == "sv_fro":
        count = _first_reaching(values.square(), param**2)
    elif method == "sv_cumulative":
        count = _first_reaching(values, param)
    else:
        raise ValueError(f"no such method: {method}")
    return min(max(1, min(count, len(values) - 1)) + 1, cap, len(values))


def _first_reaching(values: Tensor, share: float) -> int:
    """Return how many of `values` it takes for their sum to reach a share of the whole; one more than all if never."""
    return int(torch.searchsorted(values.cumsum(0) / values.sum(), share)) + 1


def _svd(matrix: Tensor) -> Decomposition:
    try:
        return Decomposition(*torch.linalg.svd(matrix, full_matrices=False))
    except torch.linalg.LinAlgError:
        # The fast driver can fail to converge on matrices with many equal values; twice the digits settle it.
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return Decomposition(u.float(), s.float(), vh.float())


def _cut(parts: Decomposition, rank: int) -> Decomposition:
    return Decomposition(parts.u[:, :rank], parts.s[:rank], parts.vh[:rank])
