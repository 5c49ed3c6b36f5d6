"""Cutting matrices of low rank: exact where it can be, as good as possible where not, and how many ranks are kept."""

import pytest
import torch

from library.checkpoints.low_rank import chosen_rank, svd_of_matrix, svd_of_product, truncate


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(rows, columns, values, seed=0):
    left = torch.linalg.qr(normal(rows, len(values), seed=seed))[0]
    right = torch.linalg.qr(normal(columns, len(values), seed=seed + 1))[0]
    return (left * values) @ right.T


@pytest.mark.parametrize(("rows", "rank", "columns"), [(60, 8, 45), (12, 30, 9), (5, 1, 70)])
def test_product_is_decomposed_as_the_full_matrix_would_be(rows, rank, columns):
    up, down = normal(rows, rank), normal(rank, columns, seed=1)
    parts = svd_of_product(up, down)
    full = torch.linalg.svdvals((up @ down).double())
    assert len(parts.s) == min(rows, rank, columns)
    assert torch.allclose(parts.s.double(), full[: len(parts.s)], atol=2e-6 * float(full[0]))
    assert torch.allclose((parts.u * parts.s) @ parts.vh, up @ down, atol=1e-4)
    assert torch.allclose(parts.u.T @ parts.u, torch.eye(len(parts.s)), atol=1e-5)


def test_product_of_a_rank_that_is_not_full():
    up = normal(30, 2) @ normal(2, 8, seed=1)
    parts = svd_of_product(up, normal(8, 40, seed=2))
    assert (parts.s[2:] < 1e-5 * parts.s[0]).all()


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_truncation_is_the_best_approximation(rank):
    up, down = normal(50, 8), normal(8, 40, seed=1)
    new_up, new_down = truncate(svd_of_product(up, down), rank)
    dropped = torch.linalg.svdvals((up @ down).double())[rank:].square().sum().sqrt()
    error = torch.linalg.norm((up @ down - new_up @ new_down).double())
    assert new_up.shape == (50, rank)
    assert new_down.shape == (rank, 40)
    assert float(error) == pytest.approx(float(dropped), rel=1e-4)
    # Balanced: neither factor holds all of the size.
    assert torch.allclose(new_up.norm(dim=0), new_down.norm(dim=1), rtol=1e-4)


def test_ranks_beyond_those_that_exist_change_nothing_and_can_be_trained():
    up, down = normal(20, 3), normal(3, 15, seed=1)
    new_up, new_down = truncate(svd_of_product(up, down), 6)
    assert torch.allclose(new_up @ new_down, up @ down, atol=1e-5)
    assert (new_up[:, 3:] == 0).all()
    assert (new_down[3:].norm(dim=1) > 0).all()


def test_matrix_of_low_rank_is_recovered():
    matrix = normal(400, 4) @ normal(4, 600, seed=1)
    parts = svd_of_matrix(matrix, 4)
    assert torch.allclose((parts.u * parts.s) @ parts.vh, matrix, atol=2e-5 * float(parts.s[0]))


def test_matrix_with_falling_singular_values():
    values = torch.arange(1, 301).float().rsqrt()
    matrix = with_spectrum(320, 700, values)
    parts = svd_of_matrix(matrix, 16)
    best = values[16:].square().sum().sqrt()
    error = torch.linalg.norm(matrix - (parts.u * parts.s) @ parts.vh)
    assert float(error) == pytest.approx(float(best), rel=1e-4)
    assert torch.allclose(parts.s, values[:16], rtol=1e-3)


def test_noise_is_approximated_within_a_thousandth_of_the_best():
    matrix = normal(300, 500)
    parts = svd_of_matrix(matrix, 16)
    best = torch.linalg.svdvals(matrix)[16:].square().sum().sqrt()
    error = torch.linalg.norm(matrix - (parts.u * parts.s) @ parts.vh)
    assert float(error) <= 1.001 * float(best)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(30, 50, 4), (300, 300, 200), (400, 300, 9)])
def test_matrix_keeps_shapes_and_repeats(rows, columns, rank):
    matrix = normal(rows, columns)
    one, two = svd_of_matrix(matrix, rank), svd_of_matrix(matrix, rank)
    assert (one.u.shape, one.s.shape, one.vh.shape) == ((rows, rank), (rank,), (rank, columns))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_matrix_of_zeros():
    parts = svd_of_matrix(torch.zeros(300, 400), 4)
    assert (parts.s == 0).all()
    assert all(tensor.isfinite().all() for tensor in parts)


SPECTRUM = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.5, 0.25, 0.125])


@pytest.mark.parametrize(
    ("method", "param", "cap", "rank"),
    [
        # S > S0/4 = 2: 8 and 4, and one more.
        ("sv_ratio", 4.0, 64, 3),
        # Everything but the last is above 8/33; k is at most one less than there are values.
        ("sv_ratio", 33.0, 64, 8),
        ("sv_ratio", 1000.0, 64, 8),
        # Nothing is above the largest: k is at least 1.
        ("sv_ratio", 1.0, 64, 2),
        # Sum 16.875: 8 are 0.474, 12 are 0.711, 14 are 0.83.
        ("sv_cumulative", 0.5, 64, 3),
        ("sv_cumulative", 0.8, 64, 4),
        ("sv_cumulative", 0.4, 64, 2),
        ("sv_cumulative", 1.0, 64, 8),
        # Squares 64, 16, 4...: of 86.33 they are 0.741, 0.927, 0.973; squared parameters 0.64, 0.81, 0.9409.
        ("sv_fro", 0.8, 64, 2),
        ("sv_fro", 0.9, 64, 3),
        ("sv_fro", 0.97, 64, 4),
        ("sv_fro", 0.97, 3, 3),
        ("sv_ratio", 1000.0, 5, 5),
        (None, None, 5, 5),
        (None, None, 64, 64),
    ],
)
def test_rank_by_rule(method, param, cap, rank):
    assert chosen_rank(SPECTRUM, method, param, cap) == rank


def test_rank_of_nothing():
    zeros = torch.full((8,), 1e-7)
    assert {chosen_rank(zeros, method, 0.9, 16) for method in ("sv_ratio", "sv_fro", "sv_cumulative")} == {1}
    assert chosen_rank(torch.tensor([3.0]), "sv_fro", 0.9, 16) == 1
