"""Cholesky factorization of a matrix held as bands of rows, and its application to thin blocks.

Of ``Z = L L^T`` only the lower triangle exists, cut into bands: band i holds rows ``[start, stop)`` and columns
``[0, stop)``. Half of a square matrix in float64 is as large as all of it in float32, so the factor needs neither less
precision nor a second matrix, and bands that do not fit may lie anywhere: what is called `Bands` here reads and writes
them one at a time. Each new band needs every earlier one once, in order.

All but a sliver of the work is matrix products: LAPACK's own factorization reached a quarter of the GEMM rate on two
cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

BLOCK_ROWS = 512
"""Width of a block column. Below about 256 the products grow thin; above about 1024 the unblocked factorization of the
diagonal block starts to show."""


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


def factorize(read: Callable[[int], torch.Tensor], num_bands: int, bands: Bands, block_rows: int = BLOCK_ROWS) -> None:
    """Fills `bands` with the Cholesky factor of a symmetric positive definite matrix, given by its bands.

    Args:
        read: gives band i of the matrix, [rows, stop] float32 or float64, row-major; it is changed in place. What lies
            above the diagonal in it is neither used nor kept meaningful.
        num_bands: bands of the matrix.
        bands: takes the factor's bands, in order; the earlier ones are read back from it.
        block_rows: width of a block column.

    Raises:
        NotPositiveDefiniteError: the matrix is not positive definite in this precision, or holds a non-finite value.
    """
    for index in range(num_bands):
        band = read(index)
        for earlier in range(index):
            pivot = bands[earlier]
            for rows, columns in _blocks(pivot, block_rows):
                _eliminate(band, pivot[rows], columns)
            del pivot
        for rows, columns in _blocks(band, block_rows):
            below = band[rows.start :]
            _subtract(below, band[rows], columns)
            diagonal, info = torch.linalg.cholesky_ex(band[rows, columns])
            # cholesky_ex lets Inf and NaN pass with info == 0, so its result is checked as well
            if int(info) != 0 or not bool(torch.isfinite(diagonal).all()):
                raise NotPositiveDefiniteError(columns.start)
            band[rows, columns] = diagonal
            _divide(band[rows.stop :, columns], diagonal)
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
    if len(bands) == 1:  # in one piece, so nothing is copied for the triangular solver
        return _right_divide(_right_divide(x, bands[0].T, upper=True), bands[0], upper=False).T
    for index in range(len(bands)):
        band = bands[index]
        start = band.shape[1] - band.shape[0]
        if start:
            x[:, start : band.shape[1]].addmm_(x[:, :start], band[:, :start].T, alpha=-1)
        for rows, columns in _blocks(band, BLOCK_ROWS):
            done = slice(start, columns.start)
            if rows.start:
                x[:, columns].addmm_(x[:, done], band[rows, done].T, alpha=-1)
            x[:, columns] = _right_divide(x[:, columns], band[rows, columns].T, upper=True)
        del band
    for index in reversed(range(len(bands))):
        band = bands[index]
        start = band.shape[1] - band.shape[0]
        for rows, columns in reversed(list(_blocks(band, BLOCK_ROWS))):
            rest = slice(start, columns.start)
            x[:, columns] = _right_divide(x[:, columns], band[rows, columns], upper=False)
            if rows.start:
                x[:, rest].addmm_(x[:, columns], band[rows, rest], alpha=-1)
        if start:
            x[:, :start].addmm_(x[:, start : band.shape[1]], band[:, :start], alpha=-1)
        del band
    return x.T


def multiply(bands: Bands, block: torch.Tensor) -> torch.Tensor:
    """``Z block`` for ``Z = L L^T``, block by block so that no copy of L without its upper part is made.

    Args:
        bands: of L; what lies above its diagonal is ignored.
        block: [n, k].

    Returns:
        [n, k], its columns contiguous.
    """
    x = block.T.contiguous()  # vectors are rows, as in `solve`
    half = torch.zeros_like(x)  # (L^T block)^T
    for index in range(len(bands)):
        band = bands[index]
        for rows, columns in _blocks(band, BLOCK_ROWS):
            half[:, : columns.start].addmm_(x[:, columns], band[rows, : columns.start])
            half[:, columns].addmm_(x[:, columns], band[rows, columns].tril())
        del band
    result = torch.zeros_like(x)
    for index in range(len(bands)):
        band = bands[index]
        for rows, columns in _blocks(band, BLOCK_ROWS):
            result[:, columns].addmm_(half[:, : columns.start], band[rows, : columns.start].T)
            result[:, columns].addmm_(half[:, columns], band[rows, columns].tril().T)
        del band
    return result.T


def _right_divide(x: torch.Tensor, triangle: torch.Tensor, *, upper: bool) -> torch.Tensor:
    """``x triangle^-1``, asked for from the left: torch's right-hand solver copies more and takes twice as long."""
    quotient: torch.Tensor = torch.linalg.solve_triangular(triangle.T, x.T, upper=not upper)
    return quotient.T


def _blocks(band: torch.Tensor, block_rows: int) -> Iterator[tuple[slice, slice]]:
    """The diagonal blocks of a band: their rows within it, and their columns."""
    num_rows, stop = band.shape
    for start in range(0, num_rows, block_rows):
        end = min(start + block_rows, num_rows)
        yield slice(start, end), slice(stop - num_rows + start, stop - num_rows + end)


def _eliminate(band: torch.Tensor, pivot: torch.Tensor, columns: slice) -> None:
    """Finishes a block column of a band with the factor's finished rows of that column's diagonal block."""
    _subtract(band, pivot, columns)
    _divide(band[:, columns], pivot[:, columns])


def _subtract(band: torch.Tensor, pivot: torch.Tensor, columns: slice) -> None:
    """Takes all finished columns to the left out of a block column, [rows, b] -= [rows, start] @ [start, b]."""
    if columns.start:
        band[:, columns].addmm_(band[:, : columns.start], pivot[:, : columns.start].T, alpha=-1)


def _divide(column: torch.Tensor, diagonal: torch.Tensor) -> None:
    """``column <- column diagonal^-T`` for a finished lower-triangular diagonal block."""
    if column.shape[0]:
        column.copy_(_right_divide(column, diagonal.T, upper=True))
