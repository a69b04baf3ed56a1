"""The few largest eigenpairs, against dense `eigh`; and an honest word where they are not well determined."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda import eigen
from streamda.eigen import GUARD_VECTORS, EigenSolution, canonical_signs, largest_eigenpairs

F64 = torch.float64


def orthogonal(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64))[0]


def with_spectrum(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A symmetric matrix of known eigenvalues."""
    vectors = orthogonal(values.numel(), seed)
    matrix = vectors * values.double() @ vectors.T
    return (matrix + matrix.T) / 2


def start_block(size: int, rank: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(size, min(size, rank + GUARD_VECTORS), generator=generator, dtype=F64)
    return block / block.norm(dim=0)


def solve(matrix: torch.Tensor, rank: int, seed: int = 1, **options: object) -> EigenSolution:
    start = start_block(matrix.shape[0], rank, seed)
    return largest_eigenpairs(lambda block: matrix @ block, start, rank, **options)


def subspace_distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Sine of the largest angle between the spans of two orthonormal blocks [n, k]."""
    return float(torch.linalg.matrix_norm(left - right @ (right.T @ left), ord=2))


def assert_is_dense_answer(found: EigenSolution, matrix: torch.Tensor, rank: int, tolerance: float = 2e-6) -> None:
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    magnitude = max(1e-300, float(values.abs().max()))
    assert found.converged
    assert found.vectors.shape == (matrix.shape[0], rank)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(rank, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.values, values[:rank], rtol=0, atol=1e-9 * magnitude)
    assert subspace_distance(found.vectors, vectors[:, :rank]) < tolerance
    residuals = matrix @ found.vectors - found.vectors * found.values
    # relative to the largest magnitude that was seen, which is at most the largest that there is
    assert float(residuals.norm(dim=0).max()) <= 1.01 * found.residual * magnitude + 1e-13 * magnitude
    if rank < matrix.shape[0]:
        assert found.next_value <= float(values[rank]) + 1e-9 * magnitude  # an estimate from below
    else:
        assert found.next_value == -math.inf


SPECTRA: dict[str, Callable[[int], torch.Tensor]] = {
    "one over i": lambda n: 1 / torch.arange(1, n + 1, dtype=F64),
    "geometric": lambda n: 0.9 ** torch.arange(n, dtype=F64),
    "indefinite": lambda n: torch.linspace(1, -3, n, dtype=F64),  # the largest in magnitude are not wanted
    "all negative": lambda n: -torch.logspace(-3, 0, n, dtype=F64),
    "few above many": lambda n: torch.cat(
        (torch.linspace(2, 1.5, 8, dtype=F64), torch.linspace(1, 0.99, n - 8, dtype=F64))
    ),
    "a cluster inside": lambda n: torch.cat(
        (
            torch.tensor([3, 2 + 1e-9, 2 + 5e-10, 2, 1.5, 1.4, 1.3, 1.2], dtype=F64),
            torch.linspace(1, 0, n - 8, dtype=F64),
        )
    ),
    "steep": lambda n: torch.exp(-2 * torch.arange(n, dtype=F64)),
    "low rank": lambda n: torch.cat((torch.linspace(1, 0.1, 8, dtype=F64), torch.zeros(n - 8, dtype=F64))),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("size", [24, 150])
def test_a_known_spectrum_is_found(spectrum: str, size: int) -> None:
    matrix = with_spectrum(SPECTRA[spectrum](size))
    assert_is_dense_answer(solve(matrix, 8), matrix, 8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.integers(1, 40), data=st.data())
def test_any_small_symmetric_matrix_is_solved(size: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, size))
    seed = data.draw(st.integers(0, 999))
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    matrix = (matrix + matrix.T) / 2 / math.sqrt(size)
    found = solve(matrix, rank)
    # a gap as small as 1e-4 still leaves the subspace found to 1e-6 of it
    assert_is_dense_answer(found, matrix, rank, tolerance=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_all_eigenpairs_of_a_tiny_matrix_are_found(size: int) -> None:
    """The rank may be the size; solvers with a 3k < n rule fail here."""
    matrix = with_spectrum(torch.linspace(-1, 1, size, dtype=F64))
    found = solve(matrix, size)
    assert_is_dense_answer(found, matrix, size)
    torch.testing.assert_close(found.vectors * found.values @ found.vectors.T, matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-6, 1e6, 1e25])
def test_the_answer_does_not_depend_on_the_scale(scale: float) -> None:
    """LOBPCG reports convergence on values 92 % off at 1e-30."""
    matrix = with_spectrum(1 / torch.arange(1, 101, dtype=F64))
    found = solve(matrix * scale, 4)
    assert found.converged
    torch.testing.assert_close(
        found.values / scale, torch.tensor([1, 1 / 2, 1 / 3, 1 / 4], dtype=F64), rtol=1e-9, atol=0
    )


def test_the_zero_operator_has_eigenvalue_zero_and_orthonormal_vectors() -> None:
    found = solve(torch.zeros(30, 30, dtype=F64), 4)
    assert found.converged
    assert found.values.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(4, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank_of_matrix", [1, 3])
def test_a_matrix_of_lower_rank_than_wanted_is_filled_up_with_its_null_space(rank_of_matrix: int) -> None:
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(60, rank_of_matrix, generator=generator, dtype=F64)
    matrix = thin @ thin.T
    found = solve(matrix, 6)
    assert found.converged
    values = torch.linalg.eigvalsh(matrix).flip(0)[:6]
    torch.testing.assert_close(found.values, values, rtol=1e-10, atol=1e-10 * float(values[0]))
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(6, dtype=F64), rtol=0, atol=1e-12)
    # whatever fills it up, the range of the matrix is inside
    torch.testing.assert_close(found.vectors @ (found.vectors.T @ thin), thin, rtol=0, atol=1e-9)


def test_a_start_of_dependent_columns_is_no_harm() -> None:
    matrix = with_spectrum(1 / torch.arange(1, 51, dtype=F64))
    start = start_block(50, 4)
    start[:, 5:] = start[:, :1]
    found = largest_eigenpairs(lambda block: matrix @ block, start, 4)
    assert_is_dense_answer(found, matrix, 4)


def test_a_start_that_is_already_the_answer_is_no_harm() -> None:
    matrix = with_spectrum(1 / torch.arange(1, 51, dtype=F64))
    exact = torch.linalg.eigh(matrix).eigenvectors.flip(1)
    assert_is_dense_answer(largest_eigenpairs(lambda block: matrix @ block, exact[:, :12], 4), matrix, 4)


class TestNearlyEqualEigenvaluesAtTheCut:
    """Eigenvalues 4 and 5 differ by a given gap; the wanted subspace is as well determined as that gap."""

    @staticmethod
    def matrix(gap: float) -> torch.Tensor:
        top = torch.tensor([2, 1.8, 1.6, 1.4, 1.4 - gap, 1.0], dtype=F64)
        return with_spectrum(torch.cat((top, torch.linspace(0.9, 0, 94, dtype=F64))))

    @pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
    def test_the_gap_is_reported_as_it_is(self, gap: float) -> None:
        matrix = self.matrix(gap)
        found = solve(matrix, 4)
        assert found.converged
        assert float(found.values[-1]) - found.next_value == pytest.approx(gap, rel=1e-2)
        assert_is_dense_answer(found, matrix, 4, tolerance=1e-5)

    @pytest.mark.parametrize("gap", [0.0, 1e-14])
    def test_without_a_gap_the_eigenvalues_still_are_right_and_their_difference_shows_it(self, gap: float) -> None:
        matrix = self.matrix(gap)
        found = solve(matrix, 4)
        torch.testing.assert_close(found.values, torch.tensor([2, 1.8, 1.6, 1.4], dtype=F64), rtol=0, atol=1e-10)
        assert abs(float(found.values[-1]) - found.next_value) < 1e-9
        # which of the two equal ones is taken is open, but the three above it are not
        exact = torch.linalg.eigh(matrix).eigenvectors.flip(1)
        assert subspace_distance(exact[:, :3], found.vectors) < 1e-6
        assert subspace_distance(found.vectors, exact[:, :5]) < 1e-6

    def test_too_few_steps_are_reported_as_such(self) -> None:
        """Never a wrong answer that calls itself converged."""
        matrix = with_spectrum(torch.linspace(1, 0.999, 400, dtype=F64))
        found = solve(matrix, 4, max_steps=3)
        assert not found.converged
        assert found.steps == 3
        residuals = matrix @ found.vectors - found.vectors * found.values
        assert found.residual == pytest.approx(float(residuals.norm(dim=0).max()), rel=1e-2)


def test_a_spectrum_that_needs_restarts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """More steps than a basis holds blocks: what a restart keeps must be enough to go on."""
    monkeypatch.setattr(eigen, "basis_limit", lambda _size, width: 10 * width)
    restarts = []
    rotate = eigen._Rows.rotate

    def counted(rows: eigen._Rows, rotation: torch.Tensor) -> None:
        restarts.append(rotation.shape)
        rotate(rows, rotation)

    monkeypatch.setattr(eigen._Rows, "rotate", counted)
    matrix = with_spectrum(
        torch.cat((torch.tensor([1.02, 1.015, 1.01], dtype=F64), torch.linspace(1, 0, 297, dtype=F64)))
    )
    found = solve(matrix, 3)
    assert len(restarts) >= 2
    assert found.converged
    assert_is_dense_answer(found, matrix, 3, tolerance=1e-5)


def test_a_preconditioner_finds_what_the_operator_hardly_separates() -> None:
    """The case of a large variance term: minus an inverse, whose large eigenvalues all crowd at zero."""
    z = with_spectrum(torch.logspace(0, 8, 900, dtype=F64))
    inverse = torch.linalg.inv(z)
    operator = -(inverse + inverse.T) / 2
    calls = []

    def precondition(block: torch.Tensor) -> torch.Tensor:
        calls.append(block.shape[1])
        return z @ block

    start = start_block(900, 6)
    plain = largest_eigenpairs(lambda block: operator @ block, start, 6, max_steps=60)
    found = largest_eigenpairs(lambda block: operator @ block, start, 6, precondition=precondition, max_steps=60)
    exact = torch.linalg.eigh(z).eigenvectors.flip(1)[:, :6]
    assert calls
    assert found.converged
    assert subspace_distance(found.vectors, exact) < 1e-6
    assert not plain.converged
    assert subspace_distance(plain.vectors, exact) > 0.1


def test_a_preconditioner_is_not_asked_where_the_operator_does_well() -> None:
    matrix = with_spectrum(torch.cat((torch.linspace(9, 5, 4, dtype=F64), torch.linspace(1, 0, 96, dtype=F64))))

    def never(block: torch.Tensor) -> torch.Tensor:
        raise AssertionError(block.shape)

    assert_is_dense_answer(solve(matrix, 4, precondition=never), matrix, 4)


def test_even_a_useless_preconditioner_does_no_harm() -> None:
    matrix = with_spectrum(torch.linspace(1, 0, 200, dtype=F64))
    found = solve(matrix, 4, precondition=torch.zeros_like)
    assert found.steps > 6
    assert_is_dense_answer(found, matrix, 4, tolerance=1e-5)


def test_the_same_start_gives_the_same_bits_and_another_the_same_subspace() -> None:
    matrix = with_spectrum(SPECTRA["geometric"](120))
    first, second, other = solve(matrix, 5), solve(matrix, 5), solve(matrix, 5, seed=7)
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.vectors, other.vectors, rtol=0, atol=1e-6)


def test_the_largest_entry_of_each_vector_is_positive() -> None:
    vectors = torch.tensor([[0.1, -0.9, 0.5, 0.0], [-0.8, 0.2, 0.5, 0.0], [0.3, 0.1, -0.1, -0.2]])
    expected = torch.tensor([[-0.1, 0.9, 0.5, 0.0], [0.8, -0.2, 0.5, 0.0], [-0.3, -0.1, -0.1, 0.2]])
    assert torch.equal(canonical_signs(vectors), expected)
    found = solve(with_spectrum(SPECTRA["geometric"](50)), 6)
    for column in found.vectors.T:
        assert float(column[column.abs().argmax()]) > 0


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_steps_without_a_look_at_the_residuals_change_nothing_but_their_number(
    spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = with_spectrum(SPECTRA[spectrum](300))
    looks: list[int] = []
    plain = eigen._look
    monkeypatch.setattr(eigen, "_look", lambda *args: (looks.append(args[0].count), plain(*args))[1])
    few = solve(matrix, 8)
    seen_few = len(looks)
    looks.clear()
    monkeypatch.setattr(eigen, "MOST_UNSEEN", 1)
    all_of_them = solve(matrix, 8)
    assert len(looks) == all_of_them.steps
    assert few.converged == all_of_them.converged
    assert few.steps <= all_of_them.steps + (3 if spectrum == "steep" else 1)
    assert subspace_distance(few.vectors, all_of_them.vectors) < 1e-5
    if spectrum not in ("few above many", "low rank", "steep"):  # found in four steps at most
        assert seen_few < len(looks)


def test_a_search_that_cannot_end_in_time_is_given_up_and_one_that_can_is_not() -> None:
    flat, steep = (
        with_spectrum(values) for values in (torch.linspace(1, 0, 300, dtype=F64), SPECTRA["one over i"](300))
    )
    start = torch.randn(300, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    for hoped_for, steps in ((math.inf, 10), (10.0, 5)):
        found = largest_eigenpairs(lambda block: flat @ block, start, 8, max_steps=10, hoped_for=hoped_for)
        assert (found.converged, found.steps) == (False, steps)
        found = largest_eigenpairs(lambda block: steep @ block, start, 8, max_steps=10, hoped_for=hoped_for)
        assert found.converged


def test_an_operator_whose_first_images_all_leave_the_basis_is_solved() -> None:
    """Not one Ritz value of the start says how large anything is."""
    half = 20
    matrix = torch.zeros(2 * half, 2 * half, dtype=F64)
    matrix[half:, :half] = matrix[:half, half:] = torch.diag(1 / torch.arange(1, half + 1, dtype=F64))
    start = torch.cat((orthogonal(half, 0)[:, :10], torch.zeros(half, 10, dtype=F64)))
    found = largest_eigenpairs(lambda block: matrix @ block, start, 4)
    assert found.converged
    torch.testing.assert_close(found.values, torch.tensor([1, 1 / 2, 1 / 3, 1 / 4], dtype=F64), rtol=1e-9, atol=0)
