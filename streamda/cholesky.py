"""Cholesky factorization in place, and its application to thin blocks.

``Z = L L^T`` overwrites the lower triangle of Z by L; the upper triangle is never read. The factorization is
left-looking and blocked, so all but a sliver of the work is matrix products: LAPACK's own reached a quarter of the
GEMM rate on two cores, and needs a second matrix for its result.
"""

from __future__ import annotations

import torch

BLOCK_ROWS = 512
"""Width of a block column. Below about 256 the products grow thin; above about 1024 the unblocked factorization of the
diagonal block starts to show."""


class NotPositiveDefiniteError(ArithmeticError):
    """A pivot was not positive, or not finite; `row` is its block's first row."""

    def __init__(self, row: int) -> None:
        super().__init__(f"not positive definite in the block at row {row}")
        self.row = row


def factorize_(matrix: torch.Tensor, block_rows: int = BLOCK_ROWS) -> torch.Tensor:
    """Replaces the lower triangle of a symmetric positive definite matrix by its Cholesky factor.

    Args:
        matrix: [n, n] float32 or float64, row-major; only its lower triangle is read. Changed in place.
        block_rows: width of a block column.

    Returns:
        The same tensor. Its strict upper triangle holds what it held before.

    Raises:
        NotPositiveDefiniteError: the matrix is not positive definite in this precision, or holds a non-finite value.
    """
    size = matrix.shape[0]
    for start in range(0, size, block_rows):
        stop = min(start + block_rows, size)
        if start:
            # [n - start, b] -= [n - start, start] @ [start, b]: all finished columns at once
            matrix[start:, start:stop].addmm_(matrix[start:, :start], matrix[start:stop, :start].T, alpha=-1)
        diagonal, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        # cholesky_ex lets Inf and NaN pass with info == 0, so its result is checked as well
        if int(info) != 0 or not bool(torch.isfinite(diagonal).all()):
            raise NotPositiveDefiniteError(start)
        matrix[start:stop, start:stop] = diagonal
        if stop < size:
            below = matrix[stop:, start:stop]
            below.copy_(torch.linalg.solve_triangular(diagonal.T, below, upper=True, left=False))
    return matrix


def solve(factor: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """``Z^-1 rhs`` for ``Z = L L^T``.

    Args:
        factor: [n, n], L in its lower triangle.
        rhs: [n, k], of the factor's dtype.

    Returns:
        [n, k].
    """
    half: torch.Tensor = torch.linalg.solve_triangular(factor, rhs, upper=False)
    solution: torch.Tensor = torch.linalg.solve_triangular(factor.T, half, upper=True)
    return solution


def multiply(factor: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """``Z block`` for ``Z = L L^T``, by bands of rows so that no copy of L without its upper part is made.

    Args:
        factor: [n, n], L in its lower triangle; what lies above is ignored.
        block: [n, k].

    Returns:
        [n, k].
    """
    size = factor.shape[0]
    half = torch.zeros_like(block)  # L^T block
    for start in range(0, size, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, size)
        half[:start].addmm_(factor[start:stop, :start].T, block[start:stop])
        half[start:stop].addmm_(factor[start:stop, start:stop].tril().T, block[start:stop])
    result = torch.zeros_like(block)
    for start in range(0, size, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, size)
        result[start:stop].addmm_(factor[start:stop, :start], half[:start])
        result[start:stop].addmm_(factor[start:stop, start:stop].tril(), half[start:stop])
    return result
