"""A thin factor reproduces the matrix that it was made from, or there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from streamda.low_rank import low_rank_factor

BAND_ROWS = 48


def bands_of(matrix: torch.Tensor) -> Callable[[int, torch.dtype], torch.Tensor]:
    """Bands of the lower triangle, with garbage above the diagonal, where nobody may look."""
    size = matrix.shape[0]
    garbage = matrix.double().tril() + torch.full((size, size), 7.0, dtype=torch.float64).triu(1)

    def read(index: int, dtype: torch.dtype) -> torch.Tensor:
        start = index * BAND_ROWS
        return garbage[start : start + BAND_ROWS, : min(start + BAND_ROWS, size)].to(dtype, copy=True)

    return read


def factor_of(matrix: torch.Tensor, max_rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    num_bands = -(-matrix.shape[0] // BAND_ROWS)
    return low_rank_factor(bands_of(matrix), matrix.diagonal().double(), num_bands, max_rank, dtype)


def moment(seed: int, size: int, tokens: int, spread: float = 1.0) -> torch.Tensor:
    """Of tokens whose channels differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    x *= (spread * torch.randn(size, generator=generator, dtype=torch.float64)).exp()
    return x.T @ x / tokens


@pytest.mark.parametrize("size", [40, 48, 200, 331])
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_the_factor_reproduces_the_matrix(size: int, tokens: int) -> None:
    matrix = moment(size + tokens, size, tokens)
    factor = factor_of(matrix, tokens)
    assert factor is not None
    assert factor.shape == (size, tokens)
    torch.testing.assert_close(factor @ factor.T, matrix, rtol=1e-9, atol=1e-9 * float(matrix.abs().max()))


def test_the_matrix_is_read_in_float32_for_its_range_and_then_in_float64() -> None:
    """Float32 bands are half as much to read; in the second product they would cost digits."""
    matrix, asked = moment(1, 100, 10), []
    read = bands_of(matrix)

    def noted(index: int, dtype: torch.dtype) -> torch.Tensor:
        asked.append((index, dtype))
        return read(index, dtype)

    assert low_rank_factor(noted, matrix.diagonal(), 3, 10) is not None
    assert asked == [(index, dtype) for dtype in (torch.float32, torch.float64) for index in range(3)]


def test_sums_in_float64_show_tokens_that_float32_ones_do_not_tell_apart() -> None:
    """Two of ten differ from others by 1e-4 and 1e-5 of their length, and so by 1e-8 and 1e-10 in what is summed."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 200, generator=generator, dtype=torch.float64)
    for token, distance in ((8, 1e-4), (9, 1e-5)):
        x[token] = x[token - 8] + distance * torch.randn(200, generator=generator, dtype=torch.float64)
    matrix = x.T @ x / 10
    narrow, wide = factor_of(matrix.float(), 10), factor_of(matrix, 10, torch.float64)
    assert narrow is not None
    assert wide is not None
    assert narrow.shape == (200, 8)
    assert wide.shape == (200, 10)
    # each token is on the span: what is left of it is far smaller than what tells it from the others
    basis = torch.linalg.qr(wide).Q
    assert float((x - x @ basis @ basis.T).norm(dim=1).max()) < 1e-8 * float(x.norm(dim=1).min())


def test_each_entry_is_good_to_the_rounding_of_its_own_channels() -> None:
    """Channels differ by ten orders of magnitude, and the sums are rounded to float32."""
    matrix = moment(3, 300, 25, spread=4.0)
    scale = matrix.diagonal().sqrt()
    assert float(scale.max() / scale.min()) > 1e8
    factor = factor_of(matrix.float(), 25)
    assert factor is not None
    error = (factor @ factor.T - matrix) / (scale[:, None] * scale)
    assert float(error.abs().max()) < 1e-5


def test_repeated_tokens_and_dead_channels_lower_the_rank() -> None:
    matrix = moment(4, 200, 12)
    matrix[50:60] = 0
    matrix[:, 50:60] = 0
    factor = factor_of(matrix.float(), 30)
    assert factor is not None
    assert factor.shape[1] == 12
    assert float(factor[50:60].abs().max()) < 1e-15 * float(factor.abs().max())


@pytest.mark.parametrize("max_rank", [10, 29])
def test_a_matrix_of_higher_rank_has_none(max_rank: int) -> None:
    assert factor_of(moment(5, 200, 30), max_rank) is None


def test_a_matrix_that_is_not_semidefinite_has_none() -> None:
    matrix = moment(6, 200, 20)
    direction = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction *= matrix.diagonal().sqrt() / direction.norm()
    matrix -= 0.3 * torch.outer(direction, direction) + torch.diag(-0.3 * direction.square())
    assert float(torch.linalg.eigvalsh(matrix)[0]) < 0
    assert factor_of(matrix, 20) is None


@pytest.mark.parametrize("eigenvalue", [-0.005, 0.005])
def test_a_small_eigenvalue_too_many_is_noticed(eigenvalue: float) -> None:
    """Of the mean diagonal: far below what products with random vectors show where all others are large."""
    matrix = moment(8, 400, 20, spread=0.0)
    direction = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for vector in torch.linalg.eigh(matrix).eigenvectors[:, -20:].T:
        direction -= (direction @ vector) * vector
    direction /= direction.norm()
    assert factor_of(matrix, 20) is not None
    assert factor_of(matrix + eigenvalue * matrix.diagonal().mean() * torch.outer(direction, direction), 20) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(7, 3), (100, 3), (199, 150), (199, 199)])
def test_a_value_that_is_not_finite_has_none(value: float, place: tuple[int, int]) -> None:
    matrix = moment(9, 200, 20)
    matrix[place] = value
    assert factor_of(matrix, 20) is None


def test_a_zero_on_the_diagonal_of_a_row_that_is_not_has_none() -> None:
    matrix = moment(10, 200, 20)
    matrix[7, 7] = 0
    assert factor_of(matrix, 20) is None


def test_the_same_matrix_gives_the_same_bits() -> None:
    matrix = moment(7, 200, 20)
    first, second = factor_of(matrix, 20), factor_of(matrix, 20)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
