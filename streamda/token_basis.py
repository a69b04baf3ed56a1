"""Tokens by coordinates along their own rows made orthonormal: for more of them than `streamda.token_span` decomposes.

With ``x`` [tokens, d_in] the inputs of a layer,

    x        = M Q                             Q [k, d_in] orthonormal rows, M [tokens, k] a lower trapezoid
    moment   = Q^T (M^T M / tokens) Q
    gradient = (g^T M / samples) Q

so that moment and gradient are those of k inputs, with k no more than tokens or inputs, and what is solved along Q is
the solution. A token that lies in the span of those before it, but for what may be rounding, adds no row to Q.

Why not the sums of products: in float32 their rounding is as large as what tells some tokens apart. Here all rounding,
in float32 too, is as if each token's row had been rounded once more, for what little is left of a row keeps its digits
(`streamda.gram_schmidt`). The Cholesky factor of ``x x^T`` in float64 has the square of its condition, and was of no
use for as many tokens as inputs. A column of M is as small as what it tells apart, so that sums of products with M lose
nothing of that, unless a far larger token comes later: one that is 10000 times as large as the others costs them all
but four digits.

Q and M lie in bands of tokens, in memory or in files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch

from streamda.block_statistics import GradientBands
from streamda.cholesky import Bands
from streamda.gram_schmidt import blocks, orthonormal
from streamda.panels import PANEL_ROWS
from streamda.products import add_product_, add_triangle_
from streamda.token_span import CLEAR, DISTINCT

ZERO_IN_FLOAT32 = 1e-7
"""Of the sizes of its terms, below which a sum of products is the rounding of zero in float32."""


class NonFiniteError(ArithmeticError):
    """There is NaN or Inf where numbers should be."""


class Rows(Protocol):
    """Rows of tokens that are read a part at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens, and columns."""

    def part(self, tokens: slice, columns: slice) -> torch.Tensor:
        """Float32, on the device that computes; not to be changed."""


class TokenBasis:
    """An orthonormal basis of tokens' rows, and their coordinates along it."""

    def __init__(self, rows: Rows, basis: Bands, coordinates: Bands) -> None:
        """Makes both.

        Args:
            rows: x [tokens, d_in].
            basis: takes Q, the rows that each band of tokens adds.
            coordinates: takes M, by bands of tokens, [tokens, k so far].

        Raises:
            NonFiniteError: a row holds NaN or Inf.
        """
        self.num_tokens, self.d_in = rows.shape
        self.size = 0
        """k."""
        self.is_faint = False
        """Whether a direction may as well be the rounding of the rows."""
        self._basis, self._coordinates = basis, coordinates
        lengths = [self._add(index, rows.part(each, slice(None))) for index, each in enumerate(parts(self.num_tokens))]
        self.lengths = torch.cat(lengths)
        """Of x's rows, [tokens] float64."""

    def coordinates(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Tokens of each band, and their rows of M as far as there is something in them, [tokens, up to k] float32."""
        for index, tokens in enumerate(parts(self.num_tokens)):
            yield tokens, self._coordinates[index]

    def lift(self, block: torch.Tensor) -> torch.Tensor:
        """``Q^T block``: [k, n] -> [d_in, n] float64."""
        vectors = block.T.double()  # as rows
        lifted, first = vectors.new_zeros(vectors.shape[0], self.d_in), 0
        for index in range(len(self._basis)):
            band = self._basis[index]
            rows = slice(first, first + band.shape[0])
            for columns in parts(self.d_in):
                lifted[:, columns].addmm_(vectors[:, rows], band[:, columns].double())
            first = rows.stop
            del band  # before the next one is read
        return lifted.T

    def _add(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        """Takes a band of tokens in; returns the lengths of their rows."""
        lengths = rows.new_zeros(rows.shape[0], dtype=torch.float64)
        unit = torch.empty_like(rows)
        for block in blocks(rows):
            wide = rows[block].double()
            lengths[block] = wide.norm(dim=1)
            unit[block] = wide / lengths[block, None].where(lengths[block, None] > 0, 1)
        del rows, wide
        if not bool(torch.isfinite(lengths).all()):
            raise NonFiniteError
        added, along, shares, _ = orthonormal(unit, torch.ones_like(lengths), self._basis, PANEL_ROWS)
        self.is_faint |= bool((shares < CLEAR).any())
        own = along[:, self.size :]
        small = (shares <= DISTINCT).nonzero()[:, 0]
        own[(own[:, small] != 0).int().argmax(dim=0), small] = 0  # of the token that added it, not of those behind it
        distinct = own.abs().amax(dim=0) > DISTINCT
        if not bool(distinct.all()):
            added = added[distinct]
            along = torch.cat((along[:, : self.size], along[:, self.size :][:, distinct]), dim=1)
        for block in blocks(along):
            along[block] = along[block].double() * lengths[block, None]
        self._basis[index], self._coordinates[index] = added, along
        self.size += added.shape[0]
        return lengths


class BasisMoment:
    """The mean input moment along a basis, ``M^T M / tokens`` [k, k]; see `streamda.methods.input_factor`."""

    def __init__(self, basis: TokenBasis) -> None:
        self._basis = basis
        self._squares: dict[int, float] = {}  # of the entries of each band that was read, with those above the diagonal
        self._trace = 0.0

    def __len__(self) -> int:
        return len(parts(self._basis.size))

    def diagonal(self) -> torch.Tensor:
        """[k] float64."""
        total = self._basis.lengths.new_zeros(self._basis.size)
        for _, along in self._basis.coordinates():
            for block in blocks(along):
                total[: along.shape[1]] += along[block].double().square_().sum(dim=0)
            del along  # before the next one is read
        self._trace = float(total.sum()) / self._basis.num_tokens
        return total / self._basis.num_tokens

    def band(self, index: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Band `index`, [rows, stop]; a new tensor each time."""
        rows = parts(self._basis.size)[index]
        band = self._basis.lengths.new_zeros(rows.stop - rows.start, rows.stop)
        for _, along in self._basis.coordinates():
            stop = min(along.shape[1], rows.stop)
            for block in blocks(along) if stop > rows.start else ():
                add_triangle_(band[: stop - rows.start, :stop], along[block, :stop].double(), rows.start)
            del along  # before the next one is read
        band /= self._basis.num_tokens
        self._squares[index] = _symmetric_squares(band, rows.start)
        return band.to(dtype)

    @property
    def effective_rank(self) -> float:
        """Squared trace over squared Frobenius norm, once all was read."""
        return self._trace**2 / sum(self._squares.values())


class BasisGradient(GradientBands):
    """A mean gradient along a basis, [d_out, k], by bands of rows; rounded to float32, as sums are."""

    def __init__(self, basis: TokenBasis, rows: Rows, num_samples: int, bands: Bands, dtype: torch.dtype) -> None:
        """Multiplies.

        Args:
            basis: of the inputs.
            rows: g [tokens, d_out], the output gradients of the same tokens.
            num_samples: that the gradient is the mean of.
            bands: takes the bands.
            dtype: that they are held in.
        """
        self._bands = bands
        squares, norm = torch.zeros_like(basis.lengths), 0.0
        for number, outputs in enumerate(parts(rows.shape[1])):
            total = basis.lengths.new_zeros(outputs.stop - outputs.start, basis.size)
            for tokens, along in basis.coordinates():
                g = rows.part(tokens, outputs)
                for block in blocks(g):
                    squares[tokens][block] += g[block].double().square_().sum(dim=1)
                add_product_(total[:, : along.shape[1]], g, along)
                del g, along  # before the next ones are read
            total /= num_samples
            norm = math.hypot(norm, float(total.norm()))
            bands[number] = total.float().to(dtype)
        self.is_zero = norm <= ZERO_IN_FLOAT32 * float(squares.sqrt() @ basis.lengths) / num_samples
        """Whether it is nothing but the rounding of its terms."""

    def __len__(self) -> int:
        return len(self._bands)

    def _band(self, index: int) -> torch.Tensor:
        return self._bands[index]


def parts(size: int) -> list[slice]:
    """Bands of a number of rows."""
    return [slice(start, min(start + PANEL_ROWS, size)) for start in range(0, size, PANEL_ROWS)]


def _symmetric_squares(band: torch.Tensor, start: int) -> float:
    """Sum of the squares of a symmetric matrix that is given by its lower half, as far as a band of it goes."""
    below = 0.0
    for block in blocks(band):
        below += float(band[block].tril(start + block.start - 1).square_().sum())
    return 2 * below + float(band.diagonal(start).square().sum())
