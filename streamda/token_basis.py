"""Tokens by coordinates along their own rows made orthonormal: for more of them than `streamda.token_span` decomposes.

With ``x`` [tokens, d_in] the inputs of a layer,

    x        = M Q                             Q [k, d_in] orthonormal rows, M [tokens, k] a lower trapezoid
    moment   = Q^T (M^T M / tokens) Q
    gradient = (g^T M / samples) Q

so that moment and gradient are those of k inputs, with k no more than tokens or inputs, and what is solved along Q is
the solution. A token that lies in the span of those before it, but for what may be rounding, adds no row to Q.

Why not the sums of products: in float32 their rounding is as large as what tells some tokens apart. Here all rounding,
in float32 too, is as if each token's row had been rounded once more: blocks of rows are made orthogonal to the rows of
Q twice over (block classical Gram-Schmidt with reorthogonalization; Giraud, Langou and Rozloznik, 2005, on why twice is
enough), and what little is left of a row keeps its digits. (The Cholesky factor of ``x x^T`` in float64 has the square
of its condition, and was of no use for as many tokens as inputs.) A column of M is as small as what it tells apart, so
that sums of products with M lose nothing of that.

Q and M lie in bands of tokens, in memory or in files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol, overload

import torch

from streamda.cholesky import Bands, inverse_triangle
from streamda.panels import PANEL_ROWS
from streamda.products import TERMS, add_product_, add_triangle_, linear
from streamda.token_span import CLEAR, DISTINCT, ROUNDING

BLOCK_TOKENS = 256
"""Rows that are made orthonormal among themselves in float64. Fewer make thinner products, more have more float64."""
LOST = 0.5
"""Of a direction's length, below which what is left of it after the second time is what the first one had missed."""
NO_GRADIENT = 1e-7
"""Of the sizes of its two factors, below which a product is the rounding of zero in float32."""


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
        self.norm = 0.0
        """Of x, Frobenius."""
        self.is_faint = False
        """Whether a direction may as well be the rounding of the rows."""
        self._basis, self._coordinates = basis, coordinates
        for index, tokens in enumerate(parts(self.num_tokens)):
            self._add(index, rows.part(tokens, slice(None)))

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

    def _add(self, index: int, rows: torch.Tensor) -> None:
        """Takes a band of tokens in."""
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        if not bool(torch.isfinite(lengths).all()):
            raise NonFiniteError
        self.norm = math.hypot(self.norm, float(lengths.norm()))
        lengths[lengths == 0] = 1
        unit = torch.empty_like(rows)
        for start in range(0, rows.shape[0], BLOCK_TOKENS):
            block = slice(start, start + BLOCK_TOKENS)
            unit[block] = rows[block].double() / lengths[block, None]
        del rows
        added, along = self._orthonormal(unit, self._basis, PANEL_ROWS, DISTINCT)
        del unit
        self._basis[index] = added
        self._coordinates[index] = along.mul_(lengths[:, None])
        self.size += added.shape[0]

    def _orthonormal(
        self, rows: torch.Tensor, earlier: Bands, block_rows: int, least: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Directions that rows add to earlier ones, and the rows along all of them.

        Args:
            rows: [n, d_in]; the directions take their place.
            earlier: bands of orthonormal rows.
            block_rows: that are made orthonormal among themselves at a time.
            least: length of what is left of a row, from which on it is a direction.

        Returns:
            Orthonormal rows [m, d_in] at right angles to the earlier ones, a view of `rows`, and what multiplies
            these and those, [n, earlier + m].
        """
        along = _project_(rows, earlier)
        added, own = self._among_themselves(rows, block_rows, least)
        if not len(earlier):
            return added, own
        rest = _project_(added, earlier)
        added, turned = self._among_themselves(added, block_rows, LOST)
        return added, torch.cat((along.addmm_(own, rest), own @ turned), dim=1)

    def _among_themselves(self, rows: torch.Tensor, block_rows: int, least: float) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_orthonormal`, without earlier directions."""
        if block_rows <= BLOCK_TOKENS:
            return self._in_float64(rows, least)
        own = rows.new_zeros(rows.shape[0], rows.shape[0])
        found: dict[int, torch.Tensor] = {}
        count = 0
        for start in range(0, rows.shape[0], BLOCK_TOKENS):
            block = slice(start, min(start + BLOCK_TOKENS, rows.shape[0]))
            added, along = self._orthonormal(rows[block], found, BLOCK_TOKENS, least)
            own[block, : along.shape[1]] = along
            count = along.shape[1]
            found[len(found)] = rows[count - added.shape[0] : count]
            found[len(found) - 1].copy_(added.clone() if count < block.stop else added)
        return rows[:count], own[:, :count]

    def _in_float64(self, rows: torch.Tensor, least: float) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_among_themselves`, for few rows: by the Cholesky factor of their products with each other."""
        wide = rows.double()
        gram = wide.new_zeros(rows.shape[0], rows.shape[0])
        add_triangle_(gram, wide.T, 0)
        triangle, info = torch.linalg.cholesky_ex(gram)
        if int(info) != 0 or not bool((triangle.diagonal() > max(least, CLEAR)).all()):
            triangle = self._one_by_one(gram, least)
        kept = triangle.diagonal().nonzero()[:, 0]
        rows[: len(kept)] = inverse_triangle(triangle[kept[:, None], kept]) @ wide[kept]
        return rows[: len(kept)], triangle[:, kept].float()

    def _one_by_one(self, gram: torch.Tensor, least: float) -> torch.Tensor:
        """The Cholesky factor, with a column of zeros for each row that adds less than `least`."""
        rest = gram.to("cpu", copy=True)  # a step is a few microseconds of work
        triangle = torch.zeros_like(rest)
        for index in range(rest.shape[0]):
            share = max(float(rest[index, index]), 0.0) ** 0.5
            self.is_faint |= least == DISTINCT and ROUNDING < share < CLEAR
            if share > least:
                column = rest[index:, index] / share
                triangle[index:, index] = column
                rest[index + 1 :, index + 1 :].addr_(column[1:], column[1:], alpha=-1)
        return triangle.to(gram.device)


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
        total: torch.Tensor | None = None
        for _, along in self._basis.coordinates():
            if total is None:
                total = along.new_zeros(self._basis.size, dtype=torch.float64)
            total[: along.shape[1]] += torch.linalg.vector_norm(along, dim=0, dtype=torch.float64).square()
        assert total is not None
        self._trace = float(total.sum()) / self._basis.num_tokens
        return total / self._basis.num_tokens

    def band(self, index: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Band `index`, [rows, stop]; a new tensor each time."""
        rows = parts(self._basis.size)[index]
        band: torch.Tensor | None = None
        for _, along in self._basis.coordinates():
            if band is None:
                band = along.new_zeros(rows.stop - rows.start, rows.stop, dtype=torch.float64)
            stop = min(along.shape[1], rows.stop)
            for start in range(0, along.shape[0] if stop > rows.start else 0, BLOCK_TOKENS):
                terms = along[start : start + BLOCK_TOKENS, :stop].double()
                add_triangle_(band[: stop - rows.start, :stop], terms, rows.start)
        assert band is not None
        band /= self._basis.num_tokens
        self._squares[index] = _symmetric_squares(band, rows.start)
        return band.to(dtype)

    @property
    def effective_rank(self) -> float:
        """Squared trace over squared Frobenius norm, once all was read."""
        return self._trace**2 / sum(self._squares.values())


class BasisGradient(Sequence[torch.Tensor]):
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
        squares = norm = 0.0
        for number, outputs in enumerate(parts(rows.shape[1])):
            total: torch.Tensor | None = None
            for tokens, along in basis.coordinates():
                g = rows.part(tokens, outputs)
                squares += float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2
                if total is None:
                    total = g.new_zeros(g.shape[1], basis.size, dtype=torch.float64)
                add_product_(total[:, : along.shape[1]], g, along)
                del g, along  # before the next ones are read
            assert total is not None
            total /= num_samples
            norm = math.hypot(norm, float(total.norm()))
            bands[number] = total.float().to(dtype)
        self.is_zero = norm <= NO_GRADIENT * math.sqrt(squares) * basis.norm / num_samples
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


def parts(size: int) -> list[slice]:
    """Bands of a number of rows."""
    return [slice(start, min(start + PANEL_ROWS, size)) for start in range(0, size, PANEL_ROWS)]


def _project_(rows: torch.Tensor, bands: Bands) -> torch.Tensor:
    """Takes what rows [n, d_in] have along bands of orthonormal rows out of them; returns that, [n, all rows]."""
    along = [rows.new_zeros(rows.shape[0], 0)]
    for index in range(len(bands)):
        band = bands[index]
        along.append(rows.new_empty(rows.shape[0], band.shape[0]))
        for start in range(0, rows.shape[0], BLOCK_TOKENS):
            block = slice(start, start + BLOCK_TOKENS)
            for piece in _pieces(band.shape[0]):
                along[-1][block, piece] = _take_out_(rows[block], band[piece])
        del band  # before the next one is read
    return torch.cat(along, dim=1)


def _take_out_(rows: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    # oneDNN would make a kernel for each number of directions that data leave over
    multiply = linear if directions.shape[0] in TERMS else _matmul
    along = multiply(rows, directions)
    rows -= multiply(along, directions.T)
    return along


def _pieces(count: int) -> Iterator[slice]:
    start = 0
    for size in TERMS:
        for _ in range((count - start) // size):
            yield slice(start, start + size)
            start += size
    if start < count:
        yield slice(start, count)


def _matmul(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rows @ weight.T


def _symmetric_squares(band: torch.Tensor, start: int) -> float:
    """Sum of the squares of a symmetric matrix that is given by its lower half, as far as a band of it goes."""
    below = 0.0
    for row in range(0, band.shape[0], BLOCK_TOKENS):
        part = band[row : row + BLOCK_TOKENS].tril(start + row - 1)
        below += float(part.square().sum())
    return 2 * below + float(band.diagonal(start).square().sum())
