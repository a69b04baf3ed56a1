"""The factorization by bands is LAPACK's, at every edge; what is no second moment is refused, never factorized."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda import cholesky
from streamda.cholesky import NotPositiveDefiniteError, factorize, multiply, solve
from tests.lower_factor import lower_factor

EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 70]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "BLOCK_ROWS", 16)


def spd(size: int, seed: int = 0, condition: float = 1e6) -> torch.Tensor:
    """Symmetric positive definite, [size, size] float64, of a known condition number."""
    generator = torch.Generator().manual_seed(seed)
    vectors, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    matrix = vectors * values @ vectors.T
    return (matrix + matrix.T) / 2


def cut(matrix: torch.Tensor, band_rows: int = 32) -> dict[int, torch.Tensor]:
    """The bands of a matrix's lower triangle, with rubbish above the diagonal."""
    rubbish = matrix.tril() + torch.full_like(matrix, 7e7).triu(1)
    starts = range(0, matrix.shape[0], band_rows)
    return {
        index: rubbish[start : start + band_rows, : start + band_rows].clone() for index, start in enumerate(starts)
    }


def factorized(matrix: torch.Tensor, band_rows: int = 32) -> dict[int, torch.Tensor]:
    bands = cut(matrix, band_rows)
    result: dict[int, torch.Tensor] = {}
    factorize(bands.__getitem__, len(bands), result)
    return result


def factor_of(matrix: torch.Tensor, band_rows: int = 32) -> torch.Tensor:
    """The factor L as one matrix."""
    return lower_factor(factorized(matrix, band_rows))


@pytest.mark.parametrize("band_rows", [16, 24, 32, 100])
@pytest.mark.parametrize("size", EDGES)
def test_the_factor_is_torch_s_own_around_every_edge(size: int, band_rows: int) -> None:
    matrix = spd(size)
    factor = factor_of(matrix, band_rows)
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(factor @ factor.T, matrix, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [383, 384, 385, 639, 640, 641, 2048, 2100])
def test_the_factor_is_torch_s_own_at_the_real_widths(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    matrix = spd(size, condition=100.0)
    factor = factor_of(matrix, 2048)
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix), rtol=1e-9, atol=1e-12)


def test_each_band_is_asked_for_once_and_handed_over_when_it_is_done() -> None:
    """What lies on disk is read as seldom as can be, and two bands are in memory at a time."""
    matrix, log = spd(80), []
    bands = cut(matrix)

    class Logged(dict[int, torch.Tensor]):
        def __getitem__(self, index: int) -> torch.Tensor:
            log.append(f"back {index}")
            return super().__getitem__(index)

        def __setitem__(self, index: int, band: torch.Tensor) -> None:
            log.append(f"done {index}")
            super().__setitem__(index, band)

    def read(index: int) -> torch.Tensor:
        log.append(f"read {index}")
        return bands[index]

    factorize(read, 3, Logged())
    assert log == ["read 0", "done 0", "read 1", "back 0", "done 1", "read 2", "back 0", "back 1", "done 2"]


def test_float32_works_too_with_float32_s_accuracy() -> None:
    matrix = spd(70, condition=10.0)
    factor = factor_of(matrix.float())
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor.double(), torch.linalg.cholesky(matrix), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e25])
def test_the_scale_of_the_matrix_does_not_matter(scale: float) -> None:
    factor = factor_of(spd(40) * scale)
    torch.testing.assert_close(factor / scale**0.5, torch.linalg.cholesky(spd(40)), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(("row", "block"), [(0, 0), (15, 0), (16, 16), (40, 32), (49, 32)])
def test_a_negative_eigenvalue_is_refused_with_the_row_of_its_block(row: int, block: int) -> None:
    matrix = torch.eye(50, dtype=torch.float64)
    matrix[row, row] = -1e-3
    with pytest.raises(NotPositiveDefiniteError) as caught:
        factor_of(matrix)
    assert caught.value.row == block


def test_bands_are_cut_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for rows in range(1, 2049):
        band = torch.empty(rows, rows, device="meta")
        widths = [where.stop - where.start for where, _ in cholesky.diagonal_blocks(band)]
        assert sum(widths) == rows
        assert max(widths) <= cholesky.MAX_BLOCK_ROWS
        assert max(widths) - min(widths) < len(widths)


def test_an_indefinite_matrix_with_a_positive_diagonal_is_refused() -> None:
    matrix = torch.eye(40, dtype=torch.float64)
    matrix[30, 3] = matrix[3, 30] = 1.5
    assert float(torch.linalg.eigvalsh(matrix)[0]) == pytest.approx(-0.5)
    with pytest.raises(NotPositiveDefiniteError):
        factor_of(matrix)


def test_an_exactly_singular_matrix_is_refused() -> None:
    with pytest.raises(NotPositiveDefiniteError):
        factor_of(torch.ones(20, 20, dtype=torch.float64))
    with pytest.raises(NotPositiveDefiniteError):
        factor_of(torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (5, 2), (16, 16), (20, 3), (33, 17), (49, 49), (49, 48)])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(value: float, place: tuple[int, int]) -> None:
    """LAPACK lets an infinite diagonal pass and calls it success."""
    matrix = spd(50)
    matrix[place] = value
    with pytest.raises(NotPositiveDefiniteError):
        factor_of(matrix)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 90),
    band_rows=st.sampled_from([16, 24, 40, 100]),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_multiply_and_solve_are_the_dense_products(size: int, band_rows: int, columns: int, seed: int) -> None:
    matrix = spd(size, seed, condition=1e4)
    bands = factorized(matrix, band_rows)
    block = torch.randn(size, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = block.clone()
    torch.testing.assert_close(multiply(bands, block), matrix @ block, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(solve(bands, block), torch.linalg.inv(matrix) @ block, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(solve(bands, multiply(bands, block)), block, rtol=1e-8, atol=1e-9)
    assert torch.equal(block, before)


def test_a_nearly_singular_system_is_still_solved_to_a_small_residual() -> None:
    """A rank-deficient moment with the least damping that makes it definite."""
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = x.T @ x / 20 + 1e-9 * torch.eye(64, dtype=torch.float64)
    block = torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solution = solve(factorized(matrix), block)
    assert float((matrix @ solution - block).norm() / block.norm()) < 1e-6


@pytest.mark.parametrize("size", EDGES)
def test_the_inverse_of_one_band_is_torch_s_own(size: int) -> None:
    matrix = spd(size)
    found = cholesky.inverse(factorized(matrix, band_rows=size)[0])
    torch.testing.assert_close(found, found.T, rtol=1e-12, atol=1e-6)
    torch.testing.assert_close(found, torch.linalg.inv(matrix), rtol=1e-8, atol=1e-4)
    torch.testing.assert_close(found @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-8)
