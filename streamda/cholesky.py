"""Cholesky factorization of a matrix held as bands of rows, and its application to thin blocks.

Of ``Z = L L^T`` only the lower triangle exists, cut into bands: band i holds rows ``[start, stop)`` and columns
``[0, stop)``. Half of a square matrix in float64 is as large as all of it in float32, so the factor needs neither less
precision nor a second matrix, and bands that do not fit may lie anywhere: what is called `Bands` here reads and writes
them one at a time. Each new band needs every earlier one once, in order.

Of the factor's diagonal blocks their inverses are kept: dividing by a block is then a product, and triangular solvers
with few vectors reach a fraction of a product's rate. Of float64's sixteen digits it loses half as many as the matrix's
condition number has.

All but a sliver of the work is matrix products: LAPACK's own factorization reached a quarter of the GEMM rate on two
cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

BLOCK_ROWS = 224
"""About the width of a block column: as near to it as bands are cut evenly. On CPUs: of 128, 192, 256 and 320 none was
faster at 1024 to 6144 rows. Narrower, the products grow thin; wider, LAPACK's part, the diagonal blocks, is slow; and
256 took 5 to 18 % longer, perhaps because bands are cut into powers of two."""
MAX_BLOCK_ROWS = BLOCK_ROWS + BLOCK_ROWS // 2
"""A band that is cut at all is not cut into wider ones."""


class Bands(Protocol):
    """A lower triangle by bands; a ``dict[int, torch.Tensor]`` is one."""

    def __len__(self) -> int:
        """Bands that are there."""

    def __getitem__(self, index: int, /) -> torch.Tensor:
        """Band `index`, [rows, stop]; may be a copy."""

    def __setitem__(self, index: int, band: torch.Tensor, /) -> None:
        """Takes a band over."""

    def clear(self) -> None:
        """Forgets all bands, before another attempt."""


class NotPositiveDefiniteError(ArithmeticError):
    """A pivot was not positive, or not finite; `row` is its block's first row."""

    def __init__(self, row: int) -> None:
        super().__init__(f"not positive definite in the block at row {row}")
        self.row = row


def factorize(read: Callable[[int], torch.Tensor], num_bands: int, bands: Bands) -> None:
    """Fills `bands` with the Cholesky factor of a symmetric positive definite matrix, given by its bands.

    In place of each diagonal block of L stands its inverse, with zeros above the diagonal.

    Args:
        read: gives band i of the matrix, [rows, stop] float32 or float64, row-major; it is changed in place. What lies
            above the diagonal in it is neither used nor kept meaningful.
        num_bands: bands of the matrix.
        bands: takes the factor's bands, in order; the earlier ones are read back from it.

    Raises:
        NotPositiveDefiniteError: the matrix is not positive definite in this precision, or holds a non-finite value.
    """
    for index in range(num_bands):
        band = read(index)
        for earlier in range(index):
            pivot = bands[earlier]
            for rows, columns in diagonal_blocks(pivot):
                _eliminate(band, pivot[rows], columns)
            del pivot
        for rows, columns in diagonal_blocks(band):
            below = band[rows.start :]
            _subtract(below, band[rows], columns)
            diagonal, info = torch.linalg.cholesky_ex(band[rows, columns])
            # cholesky_ex lets Inf and NaN pass with info == 0, so its result is checked as well
            if int(info) != 0 or not bool(torch.isfinite(diagonal).all()):
                raise NotPositiveDefiniteError(columns.start)
            band[rows, columns] = inverse_triangle(diagonal)
            _divide(band[rows.stop :, columns], band[rows, columns])
        bands[index] = band


def solve(bands: Bands, rhs: torch.Tensor) -> torch.Tensor:
    """``Z^-1 rhs`` for ``Z = L L^T``.

    Args:
        bands: of L.
        rhs: [n, k], of the factor's dtype.

    Returns:
        [n, k], its columns contiguous.
    """
    # vectors are rows here: with few of them, products that read the factor are two to four times as fast that way
    x = rhs.T.clone(memory_format=torch.contiguous_format)  # [k, n]
    for index in range(len(bands)):
        band = bands[index]
        start = band.shape[1] - band.shape[0]
        if start:
            x[:, start : band.shape[1]].addmm_(x[:, :start], band[:, :start].T, alpha=-1)
        for rows, columns in diagonal_blocks(band):
            done = slice(start, columns.start)
            if rows.start:
                x[:, columns].addmm_(x[:, done], band[rows, done].T, alpha=-1)
            x[:, columns] = x[:, columns] @ band[rows, columns].T
        del band
    for index in reversed(range(len(bands))):
        band = bands[index]
        start = band.shape[1] - band.shape[0]
        for rows, columns in reversed(list(diagonal_blocks(band))):
            rest = slice(start, columns.start)
            x[:, columns] = x[:, columns] @ band[rows, columns]
            if rows.start:
                x[:, rest].addmm_(x[:, columns], band[rows, rest], alpha=-1)
        if start:
            x[:, :start].addmm_(x[:, start : band.shape[1]], band[:, :start], alpha=-1)
        del band
    return x.T


def inverse(band: torch.Tensor) -> torch.Tensor:
    """``Z^-1`` of a factor that is one band [n, n], all of it: one product then solves, where `solve` takes a dozen.

    Of all that is multiplied half is not computed, as in the factorization. What it gives is as near to the solution as
    what `solve` does, but may fit the right-hand side less: it is not backward stable.
    """
    triangle = band.tril()  # becomes L^-1, block row by block row; of its diagonal blocks it is that already
    blocks = list(diagonal_blocks(band))
    for rows, columns in blocks[1:]:
        left = slice(0, columns.start)
        triangle[rows, left] = -(triangle[rows, columns] @ (triangle[rows, left] @ triangle[left, left]))
    result = torch.empty_like(triangle)
    for rows, columns in blocks:
        below = triangle[rows.start :]  # above there are zeros
        product = below[:, columns].T @ below[:, : columns.stop]
        result[rows, : columns.stop] = product
        result[: columns.stop, columns] = product.T
    return result


def multiply(bands: Bands, block: torch.Tensor) -> torch.Tensor:
    """``Z block`` for ``Z = L L^T``, block by block so that no copy of L without its upper part is made.

    Args:
        bands: of L, as `factorize` fills them.
        block: [n, k].

    Returns:
        [n, k], its columns contiguous.
    """
    x = block.T.contiguous()  # vectors are rows, as in `solve`
    half = torch.zeros_like(x)  # (L^T block)^T
    for index in range(len(bands)):
        band = bands[index]
        for rows, columns in diagonal_blocks(band):
            half[:, : columns.start].addmm_(x[:, columns], band[rows, : columns.start])
            half[:, columns].add_(_right_divide(x[:, columns], band[rows, columns]))
        del band
    result = torch.zeros_like(x)
    for index in range(len(bands)):
        band = bands[index]
        for rows, columns in diagonal_blocks(band):
            result[:, columns].addmm_(half[:, : columns.start], band[rows, : columns.start].T)
            result[:, columns].add_(_right_divide(half[:, columns], band[rows, columns].T, upper=True))
        del band
    return result.T


def _right_divide(x: torch.Tensor, triangle: torch.Tensor, *, upper: bool = False) -> torch.Tensor:
    """``x triangle^-1``, asked for from the left: torch's right-hand solver copies more and takes twice as long."""
    quotient: torch.Tensor = torch.linalg.solve_triangular(triangle.T, x.T, upper=not upper)
    return quotient.T


def inverse_triangle(diagonal: torch.Tensor) -> torch.Tensor:
    """Of a lower triangle, with exact zeros above its diagonal."""
    identity = torch.eye(diagonal.shape[0], dtype=diagonal.dtype, device=diagonal.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(diagonal, identity, upper=False)
    return inverse.tril_()


def diagonal_blocks(band: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """The diagonal blocks of a band: their rows within it, and their columns."""
    num_rows, stop = band.shape
    width = -(-num_rows // max(1, round(num_rows / BLOCK_ROWS)))
    for start in range(0, num_rows, width):
        end = min(start + width, num_rows)
        yield slice(start, end), slice(stop - num_rows + start, stop - num_rows + end)


def _eliminate(band: torch.Tensor, pivot: torch.Tensor, columns: slice) -> None:
    """Finishes a block column of a band with the factor's finished rows of that column's diagonal block."""
    _subtract(band, pivot, columns)
    _divide(band[:, columns], pivot[:, columns])


def _subtract(band: torch.Tensor, pivot: torch.Tensor, columns: slice) -> None:
    """Takes all finished columns to the left out of a block column, [rows, b] -= [rows, start] @ [start, b]."""
    if columns.start:
        band[:, columns].addmm_(band[:, : columns.start], pivot[:, : columns.start].T, alpha=-1)


def _divide(column: torch.Tensor, inverse: torch.Tensor) -> None:
    """``column <- column diagonal^-T``, given the inverse of a finished diagonal block."""
    column.copy_(column @ inverse.T)
