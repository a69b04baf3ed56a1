"""The blocked factorization is LAPACK's, at every block edge; what is no second moment is refused, never factorized."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda import cholesky
from streamda.cholesky import NotPositiveDefiniteError, factorize_, multiply, solve

EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 70]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "BLOCK_ROWS", 16)  # of `multiply`; `factorize_` is told


def spd(size: int, seed: int = 0, condition: float = 1e6) -> torch.Tensor:
    """Symmetric positive definite, [size, size] float64, of a known condition number."""
    generator = torch.Generator().manual_seed(seed)
    vectors, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    matrix = vectors * values @ vectors.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("size", EDGES)
def test_the_factor_is_torch_s_own_around_every_block_edge(size: int) -> None:
    matrix = spd(size)
    factor = factorize_(matrix.clone(), block_rows=16).tril()
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(factor @ factor.T, matrix, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [511, 512, 513, 1100])
def test_the_factor_is_torch_s_own_at_the_real_block_width(size: int) -> None:
    matrix = spd(size, condition=100.0)
    torch.testing.assert_close(factorize_(matrix.clone()).tril(), torch.linalg.cholesky(matrix), rtol=1e-9, atol=1e-12)


def test_it_works_in_place_and_neither_reads_nor_changes_the_upper_triangle() -> None:
    matrix = spd(50)
    rubbish = matrix.tril() + torch.full_like(matrix, 7e7).triu(1)
    result = factorize_(rubbish, block_rows=16)
    assert result is rubbish
    torch.testing.assert_close(rubbish.tril(), torch.linalg.cholesky(matrix), rtol=1e-8, atol=1e-11)
    # inside a diagonal block LAPACK's zeros are copied as well; beyond them nothing is touched
    beyond = torch.ones(50, 50).triu(1).bool()
    for start in range(0, 50, 16):
        beyond[start : start + 16, start : start + 16] = False
    assert bool((rubbish[beyond] == 7e7).all())
    assert int(beyond.sum()) > 500


def test_float32_works_too_with_float32_s_accuracy() -> None:
    matrix = spd(70, condition=10.0)
    factor = factorize_(matrix.float(), block_rows=16).tril()
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor.double(), torch.linalg.cholesky(matrix), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e25])
def test_the_scale_of_the_matrix_does_not_matter(scale: float) -> None:
    factor = factorize_(spd(40) * scale, block_rows=16).tril()
    torch.testing.assert_close(factor / scale**0.5, torch.linalg.cholesky(spd(40)), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("row", [0, 15, 16, 40, 49])
def test_a_negative_eigenvalue_is_refused_with_the_row_of_its_block(row: int) -> None:
    matrix = torch.eye(50, dtype=torch.float64)
    matrix[row, row] = -1e-3
    with pytest.raises(NotPositiveDefiniteError) as caught:
        factorize_(matrix, block_rows=16)
    assert caught.value.row == row // 16 * 16


def test_an_indefinite_matrix_with_a_positive_diagonal_is_refused() -> None:
    matrix = torch.eye(40, dtype=torch.float64)
    matrix[30, 3] = matrix[3, 30] = 1.5
    assert float(torch.linalg.eigvalsh(matrix)[0]) == pytest.approx(-0.5)
    with pytest.raises(NotPositiveDefiniteError):
        factorize_(matrix, block_rows=16)


def test_an_exactly_singular_matrix_is_refused() -> None:
    with pytest.raises(NotPositiveDefiniteError):
        factorize_(torch.ones(20, 20, dtype=torch.float64), block_rows=16)
    with pytest.raises(NotPositiveDefiniteError):
        factorize_(torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (5, 2), (16, 16), (20, 3), (33, 17), (49, 49), (49, 48)])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(value: float, place: tuple[int, int]) -> None:
    """LAPACK lets an infinite diagonal pass and calls it success."""
    matrix = spd(50)
    matrix[place] = value
    with pytest.raises(NotPositiveDefiniteError):
        factorize_(matrix, block_rows=16)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(size=st.integers(1, 60), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_multiply_and_solve_are_the_dense_products(size: int, columns: int, seed: int) -> None:
    matrix = spd(size, seed, condition=1e4)
    factor = torch.linalg.cholesky(matrix)
    rubbish = factor + torch.full_like(factor, 3e3).triu(1)  # what stands above the diagonal is never read
    block = torch.randn(size, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(multiply(rubbish, block), matrix @ block, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(solve(rubbish, block), torch.linalg.inv(matrix) @ block, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(solve(rubbish, multiply(rubbish, block)), block, rtol=1e-8, atol=1e-9)


def test_a_nearly_singular_system_is_still_solved_to_a_small_residual() -> None:
    """A rank-deficient moment with the least damping that makes it definite."""
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = x.T @ x / 20 + 1e-9 * torch.eye(64, dtype=torch.float64)
    block = torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solution = solve(factorize_(matrix.clone(), block_rows=16), block)
    assert float((matrix @ solution - block).norm() / block.norm()) < 1e-6
