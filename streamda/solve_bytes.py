"""What the parts of a solution take in memory, and from which sizes on it is solved which way. Plain integers."""

from __future__ import annotations

from streamda.cholesky import MAX_BLOCK_ROWS
from streamda.eigen import GUARD_VECTORS, basis_limit, guard_vectors
from streamda.low_rank import extra_vectors
from streamda.panels import FLOAT32_BYTES, PANEL_ROWS
from streamda.token_span import CHUNK_COLUMNS

FLOAT64_BYTES = 8
THIN_BLOCKS = 4
"""Blocks of vectors that an application of the operator holds beside the basis and the images of that."""
RESIDUAL_BLOCKS = 12
"""Blocks of rank + guard vectors while new directions are made of residuals."""
RITZ_MATRICES = 6
"""Square matrices of the basis's size: the projected operator, its eigenvectors, and LAPACK's workspace."""
SPAN_MATRICES = 12
"""Square matrices of the number of tokens, where their rows stand for the statistics: products, eigenvectors, what they
make of each other, and LAPACK's workspace."""
CHUNK_BYTES = 64 << 20
"""Of a float32 gradient that is in float64 at a time."""
MIN_CHUNK_ROWS = 256
INVERTED_SIZE = 1024
"""Inputs up to which a factor's inverse is made: solving with few vectors is two to four times as fast with it, which
one layer with as many inputs just makes up for."""
STEPWISE_SIZE, STEPWISE_BLOCKS = 512, 20
"""Rows of a matrix from which on its few largest eigenpairs are found step by step, in a quarter of the time of all or
less; and how many blocks of vectors it must have room for: steps to ten of these cost half of all eigenpairs."""
FEW_TOKENS = 1024
"""Rows that the small eigenproblem may have: dense, it costs the cube of them."""
FEW_ENTRIES = 1 << 24
"""And entries of its span: what it needs then hardly exceeds what the Cholesky factor needs."""


def is_stepwise(size: int, rank: int) -> bool:
    """Whether the few largest eigenpairs of a dense matrix are found step by step."""
    return size >= max(STEPWISE_SIZE, STEPWISE_BLOCKS * (rank + GUARD_VECTORS))


def few_tokens(d_in: int) -> int:
    """Most tokens for which a layer is solved on the span of its inputs: fewer than inputs, or there would be no gain.

    Decided by the shape only, never by the budget.
    """
    return min(FEW_TOKENS, d_in - 1, FEW_ENTRIES // d_in)


def band_bytes(d_in: int) -> list[int]:
    """Float64 bytes of each band of a lower triangle."""
    return [
        FLOAT64_BYTES * (min(start + PANEL_ROWS, d_in) - start) * min(start + PANEL_ROWS, d_in)
        for start in range(0, d_in, PANEL_ROWS)
    ]


def column_bytes(size: int) -> int:
    """A block column of a band and what it becomes, twice over, while a matrix of that size is factorized.

    Or its inverse, and the triangle that it is made of.
    """
    column = 4 * min(size, PANEL_ROWS) * min(size, MAX_BLOCK_ROWS) * FLOAT64_BYTES
    return column + 2 * inverse_bytes(size)


def inverse_bytes(size: int) -> int:
    """Of a small factor's inverse."""
    return size**2 * FLOAT64_BYTES if size <= INVERTED_SIZE else 0


def krylov_bytes(size: int, d_out: int, rank: int) -> int:
    """Vectors of an eigenproblem of that size, and the inverse of a small factor."""
    width = min(size, rank + guard_vectors(size))
    limit = basis_limit(size, width)
    thin = (2 * limit + width * (THIN_BLOCKS + RESIDUAL_BLOCKS)) * size + 4 * width * d_out + RITZ_MATRICES * limit**2
    return thin * FLOAT64_BYTES + inverse_bytes(size)


def few_tokens_bytes(d_in: int, d_out: int, gradient: int) -> int:
    """Peak on the span of few tokens, which in a mixture of experts any run may have.

    A band is read beside the vectors, their images and those of one multiplication; later the span lies beside the
    gradient and what that makes of it.
    """
    tokens = few_tokens(d_in)
    wide = tokens + extra_vectors(d_in, tokens)
    small = RITZ_MATRICES * wide**2
    factorizing = max(band_bytes(d_in)) + (5 * wide * d_in + small) * FLOAT64_BYTES
    # the span in float32 and what a chunk of the gradient makes of it in both precisions, before the small eigenproblem
    along = (d_in * FLOAT32_BYTES + chunk_rows(d_in, d_out) * (FLOAT32_BYTES + FLOAT64_BYTES)) * tokens
    solving = gradient + (d_in + d_out) * tokens * FLOAT64_BYTES + max(along, small * FLOAT64_BYTES)
    return max(factorizing, solving)


def token_rows_bytes(d_in: int, d_out: int, tokens: int) -> int:
    """Peak where rows stand for the statistics, which are read into memory if they are not there; see `token_span`.

    First the rows in float64, their basis, a copy, and what the singular vectors make of them; then the span, and a
    layer's rows, what they make along it and beside it, and room for two of its chunks in float64. That is the most: it
    needs singular vectors only where rows nearly depend on each other, and the gradient only where it nearly cancels.
    """
    span, columns = tokens * d_in * FLOAT64_BYTES, min(d_out, CHUNK_COLUMNS)
    spanning = tokens * d_in * FLOAT32_BYTES + 4 * span + SPAN_MATRICES * tokens**2 * FLOAT64_BYTES
    rows = tokens * d_out * FLOAT32_BYTES
    solving = span + rows + tokens * (d_out + 2 * columns + RITZ_MATRICES * tokens) * FLOAT64_BYTES
    return max(spanning, solving)


def most_chunk_rows(d_in: int) -> int:
    """Rows of a gradient that are cast to float64 and multiplied at a time, of a band that has as many."""
    return max(MIN_CHUNK_ROWS, CHUNK_BYTES // (FLOAT64_BYTES * d_in))


def chunk_rows(d_in: int, d_out: int) -> int:
    """Rows of the largest chunk of a gradient [d_out, d_in] in bands."""
    return min(d_out, PANEL_ROWS, most_chunk_rows(d_in))
