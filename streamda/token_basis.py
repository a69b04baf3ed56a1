"""Tokens by coordinates along their own rows made orthonormal: for more of them than `streamda.token_span` decomposes.

With ``x`` [tokens, d_in] the inputs of a layer, ``u`` their rows at unit length and ``l`` their lengths,

    u u^T    = L L^T                                  a Cholesky factorization, token by token
    u        = L Q,   x = M Q,   M = diag(l) L        Q [tokens, d_in] orthonormal rows, M lower triangular
    moment   = Q^T (M^T M / tokens) Q
    gradient = (g^T M / samples) Q

so that moment and gradient are those of as many inputs as there are tokens, and what is solved along Q is the solution.
A token that lies in the span of those before it, but for what may be rounding, has no direction of its own: its row of
Q and its column of L are zeros, which the damping alone weighs, as it does all that lies outside the span. So there may
be more tokens than inputs.

Why not the sums of products: in float32 their rounding is as large as what tells some tokens apart. A column of M is as
small as what it tells apart, so that products with it lose nothing of that, in float32 neither. (Unless a far larger
token comes later: one that is 10000 times as large as the others costs them all but four digits.)

Q is never formed. L lies in bands as `streamda.cholesky` cuts them, in memory or in a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol, overload

import torch

from streamda import cholesky
from streamda.panels import PANEL_ROWS
from streamda.products import add_product_, add_triangle_
from streamda.token_span import CLEAR, DISTINCT, ROUNDING

NO_GRADIENT = 1e-7
"""Of the sizes of its two factors, below which a product is the rounding of zero in float32."""


class Rows(Protocol):
    """Rows of tokens that are read a part at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens, and columns."""

    def part(self, tokens: slice, columns: slice) -> torch.Tensor:
        """Float32, on the device that computes."""


class NonFiniteError(ArithmeticError):
    """There is NaN or Inf where numbers should be."""


class TokenBasis:
    """An orthonormal basis of tokens' rows, and their coordinates along it."""

    def __init__(self, rows: Rows, bands: cholesky.Bands) -> None:
        """Factorizes.

        Args:
            rows: x [tokens, d_in]. They are read again for `lift`.
            bands: takes L.

        Raises:
            NonFiniteError: a row holds NaN or Inf.
        """
        self.num_tokens, self.d_in = rows.shape
        self._rows, self._bands = rows, bands
        self._triangles: dict[int, torch.Tensor] = {}  # diagonal blocks of L, of which `bands` has the inverses
        self.is_faint = False
        """Whether a direction may as well be the rounding of the rows."""
        self.lengths = self._measured()
        """[tokens] float64; 1 for a row of zeros."""
        if not bool(torch.isfinite(self.lengths).all()):
            raise NonFiniteError
        self.is_zero = not bool(self.lengths.any())
        """Whether all rows are: then there is nothing in any direction."""
        self.lengths[self.lengths == 0] = 1
        cholesky.factorize(self._gram, len(self), bands, self._invert)

    def __len__(self) -> int:
        """Bands of tokens."""
        return len(_parts(self.num_tokens))

    def tokens(self, index: int) -> slice:
        """Those of a band."""
        return _parts(self.num_tokens)[index]

    def coordinates(self, index: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """M of a band of tokens, a few rows at a time.

        Yields:
            Tokens, and what they are along the basis, [rows, stop] float64, a new tensor; all behind `stop` is zero.
        """
        band = self._bands[index]
        for rows, tokens in cholesky.diagonal_blocks(band):
            along = torch.cat((band[rows, : tokens.start], self._triangles[tokens.start]), dim=1)
            yield tokens, along.mul_(self.lengths[tokens, None])

    def lift(self, block: torch.Tensor) -> torch.Tensor:
        """``Q^T block``: [tokens, k] -> [d_in, k]."""
        weights = cholesky.solve_transposed(self._bands, block).T / self.lengths  # [k, tokens]
        lifted = weights.new_zeros(weights.shape[0], self.d_in)
        for tokens in _parts(self.num_tokens):
            for columns in _parts(self.d_in):
                lifted[:, columns].addmm_(weights[:, tokens], self._rows.part(tokens, columns).double())
        return lifted.T

    def _measured(self) -> torch.Tensor:
        squares = [
            sum(self._rows.part(tokens, columns).double().square().sum(dim=1) for columns in _parts(self.d_in))
            for tokens in _parts(self.num_tokens)
        ]
        return torch.cat([each for each in squares if isinstance(each, torch.Tensor)]).sqrt()

    def _unit(self, index: int, columns: slice) -> torch.Tensor:
        tokens = self.tokens(index)
        return self._rows.part(tokens, columns).double().div_(self.lengths[tokens, None])

    def _gram(self, index: int) -> torch.Tensor:
        """A band of ``u u^T``, [rows, stop]."""
        tokens = self.tokens(index)
        band = self.lengths.new_zeros(tokens.stop - tokens.start, tokens.stop)
        for columns in _parts(self.d_in):
            unit = self._unit(index, columns)
            add_triangle_(band[:, tokens], unit.T, 0)
            for earlier in range(index):
                band[:, self.tokens(earlier)].addmm_(unit, self._unit(earlier, columns).T)
        return band

    def _invert(self, block: torch.Tensor, row: int) -> torch.Tensor:
        """The inverse of the factor of a diagonal block, with zeros where a token has no direction of its own."""
        triangle, info = torch.linalg.cholesky_ex(block)
        if int(info) != 0 or not float(triangle.diagonal().min()) > CLEAR:
            triangle = self._one_by_one(block)
        self._triangles[row] = triangle
        kept = triangle.diagonal().nonzero()[:, 0]
        inverse = torch.zeros_like(triangle)
        inverse[kept[:, None], kept] = cholesky.inverse_triangle(triangle[kept[:, None], kept])
        return inverse

    def _one_by_one(self, block: torch.Tensor) -> torch.Tensor:
        rest = block.to("cpu", copy=True)  # a step is a few microseconds of work
        triangle = torch.zeros_like(rest)
        for index in range(rest.shape[0]):
            share = max(float(rest[index, index]), 0.0) ** 0.5
            self.is_faint |= ROUNDING < share < CLEAR
            if share > DISTINCT:
                column = rest[index:, index] / share
                triangle[index:, index] = column
                rest[index + 1 :, index + 1 :].addr_(column[1:], column[1:], alpha=-1)
        return triangle.to(block.device)


class BasisMoment:
    """The mean input moment along a basis, ``M^T M / tokens`` [tokens, tokens]; see `streamda.methods.input_factor`."""

    def __init__(self, basis: TokenBasis) -> None:
        self._basis = basis
        self._squares: dict[int, float] = {}  # of the entries of each band that was read, with those above the diagonal
        self._trace = 0.0

    def __len__(self) -> int:
        return len(self._basis)

    def diagonal(self) -> torch.Tensor:
        """[tokens] float64."""
        total = torch.zeros_like(self._basis.lengths)
        for index in range(len(self)):
            for _, along in self._basis.coordinates(index):
                total[: along.shape[1]] += along.square_().sum(dim=0)
        self._trace = float(total.sum()) / self._basis.num_tokens
        return total / self._basis.num_tokens

    def band(self, index: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Band `index`, [rows, stop]; a new tensor each time."""
        tokens = self._basis.tokens(index)
        band = self._basis.lengths.new_zeros(tokens.stop - tokens.start, tokens.stop)
        for below in range(index, len(self)):
            for _, along in self._basis.coordinates(below):
                stop = min(along.shape[1], tokens.stop)
                add_triangle_(band[: stop - tokens.start, :stop], along[:, :stop], tokens.start)
        band /= self._basis.num_tokens
        if index not in self._squares:
            lower = 0.0
            for rows, columns in cholesky.diagonal_blocks(band):
                left, triangle = band[rows, : columns.start], band[rows, columns].tril(-1)
                lower += float(left.square().sum() + triangle.square().sum())
            on_diagonal = float(band.diagonal(tokens.start).square().sum())
            self._squares[index] = 2 * lower + on_diagonal
        return band.to(dtype)

    @property
    def effective_rank(self) -> float:
        """Squared trace over squared Frobenius norm, once all was read."""
        return self._trace**2 / sum(self._squares.values())


class BasisGradient(Sequence[torch.Tensor]):
    """A mean gradient along a basis, [d_out, tokens], by bands of rows; rounded to float32, as sums are."""

    def __init__(
        self, basis: TokenBasis, rows: Rows, num_samples: int, bands: cholesky.Bands, dtype: torch.dtype
    ) -> None:
        """Multiplies.

        Args:
            basis: of the inputs.
            rows: g [tokens, d_out], the output gradients of the same tokens.
            num_samples: that the gradient is the mean of.
            bands: takes the bands.
            dtype: that they are held in.
        """
        self._bands = bands
        squares = norm = 0.0
        for number, outputs in enumerate(_parts(rows.shape[1])):
            total = basis.lengths.new_zeros(outputs.stop - outputs.start, basis.num_tokens)
            for index in range(len(basis)):
                g, first = rows.part(basis.tokens(index), outputs), basis.tokens(index).start
                squares += float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2
                for tokens, along in basis.coordinates(index):
                    ours = g[tokens.start - first : tokens.stop - first]
                    add_product_(total[:, : along.shape[1]], ours, along.float())
                del g  # before the next one is read
            total /= num_samples
            norm = math.hypot(norm, float(total.norm()))
            bands[number] = total.float().to(dtype)
        size = math.sqrt(squares) * float(basis.lengths.norm()) / num_samples
        self.is_zero = norm <= NO_GRADIENT * size
        """Whether it is nothing but the rounding of its two factors' product."""

    def __len__(self) -> int:
        return len(self._bands)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        if not 0 <= index < len(self):
            raise IndexError(index)  # what ends an iteration
        return self._bands[index]


def _parts(size: int) -> Sequence[slice]:
    return [slice(start, min(start + PANEL_ROWS, size)) for start in range(0, size, PANEL_ROWS)]
