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
from typing import NamedTuple, Protocol, overload

import torch

from streamda.cholesky import Bands, inverse_triangle
from streamda.panels import PANEL_ROWS
from streamda.products import TERMS, add_product_, add_triangle_, linear
from streamda.token_span import CLEAR, DISTINCT, ROUNDING

BLOCK_TOKENS = 256
"""Rows that are made orthonormal among themselves in float64. Fewer make thinner products, more have more float64."""
ENOUGH, TIMES = 0.5, 5
"""Of a direction's length: when more than that is left of each, nothing of the earlier ones is in it any more. That is
so after the second time, unless a row had less of its own than the first time missed. And how often at most."""
NO_GRADIENT = 1e-7
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


class _Added(NamedTuple):
    """What rows add to earlier directions."""

    directions: torch.Tensor
    """[m, d_in], orthonormal, at right angles to the earlier ones; a view of the rows."""
    along: torch.Tensor
    """The rows along all of them, [n, earlier + m]."""
    shares: torch.Tensor
    """Of a token's length that the directions are, [m] float64."""
    left: float
    """The least that the first time left of a row that became one."""


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
        for block in _blocks(rows):
            wide = rows[block].double()
            lengths[block] = wide.norm(dim=1)
            unit[block] = wide / lengths[block, None].where(lengths[block, None] > 0, 1)
        del rows, wide
        if not bool(torch.isfinite(lengths).all()):
            raise NonFiniteError
        added, along, shares, _ = _orthonormal(unit, torch.ones_like(lengths), self._basis, PANEL_ROWS)
        self.is_faint |= bool((shares < CLEAR).any())
        own = along[:, self.size :]
        small = (shares <= DISTINCT).nonzero()[:, 0]
        own[(own[:, small] != 0).int().argmax(dim=0), small] = 0  # of the token that added it, not of those behind it
        distinct = own.abs().amax(dim=0) > DISTINCT
        if not bool(distinct.all()):
            added = added[distinct]
            along = torch.cat((along[:, : self.size], along[:, self.size :][:, distinct]), dim=1)
        for block in _blocks(along):
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
            for block in _blocks(along):
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
            for block in _blocks(along) if stop > rows.start else ():
                add_triangle_(band[: stop - rows.start, :stop], along[block, :stop].double(), rows.start)
            del along  # before the next one is read
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
        squares, norm = torch.zeros_like(basis.lengths), 0.0
        for number, outputs in enumerate(parts(rows.shape[1])):
            total = basis.lengths.new_zeros(outputs.stop - outputs.start, basis.size)
            for tokens, along in basis.coordinates():
                g = rows.part(tokens, outputs)
                for block in _blocks(g):
                    squares[tokens][block] += g[block].double().square_().sum(dim=1)
                add_product_(total[:, : along.shape[1]], g, along)
                del g, along  # before the next ones are read
            total /= num_samples
            norm = math.hypot(norm, float(total.norm()))
            bands[number] = total.float().to(dtype)
        self.is_zero = norm <= NO_GRADIENT * float(squares.sqrt() @ basis.lengths) / num_samples
        """Whether it is nothing but the rounding of its terms."""

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


def _blocks(rows: torch.Tensor) -> list[slice]:
    return [slice(start, start + BLOCK_TOKENS) for start in range(0, rows.shape[0], BLOCK_TOKENS)]


def _orthonormal(rows: torch.Tensor, shares: torch.Tensor, earlier: Bands, block_rows: int) -> _Added:
    """Makes rows orthonormal, and orthogonal to earlier ones.

    Args:
        rows: [n, d_in] of unit length; the directions take their place.
        shares: of a token's length that they stand for, [n] float64.
        earlier: bands of orthonormal rows.
        block_rows: that are made orthonormal among themselves at a time.
    """
    along = _project_(rows, earlier)
    found = first = _among_themselves(rows, shares, block_rows)
    if not len(earlier) and block_rows > BLOCK_TOKENS:  # each of its blocks did what follows
        return found
    own = found.along
    for _ in range(TIMES - 1):
        rest = _project_(found.directions, earlier)
        found = _among_themselves(found.directions, found.shares, block_rows)
        along.addmm_(own, rest)
        own = own @ found.along
        if found.left > ENOUGH:
            break
    return _Added(found.directions, torch.cat((along, own), dim=1), found.shares, first.left)


def _among_themselves(rows: torch.Tensor, shares: torch.Tensor, block_rows: int) -> _Added:
    """As `_orthonormal`, without earlier directions."""
    if block_rows <= BLOCK_TOKENS:
        return _in_float64(rows, shares)
    own = rows.new_zeros(rows.shape[0], rows.shape[0])
    directions: dict[int, torch.Tensor] = {}
    parts, count, left = [shares[:0]], 0, 1.0
    for block in _blocks(rows):
        found = _orthonormal(rows[block], shares[block], directions, BLOCK_TOKENS)
        first, count = count, found.along.shape[1]
        own[block, :count] = found.along
        # where some rows were none, those that follow move up
        moved = found.directions.clone() if first < block.start else found.directions
        directions[len(directions)] = rows[first:count].copy_(moved)
        parts.append(found.shares)
        left = min(left, found.left)
    return _Added(rows[:count], own[:, :count], torch.cat(parts), left)


def _in_float64(rows: torch.Tensor, shares: torch.Tensor) -> _Added:
    """As `_among_themselves` for few rows, by the Cholesky factor of their products with each other."""
    wide = rows.double()
    gram = wide.new_zeros(rows.shape[0], rows.shape[0])
    add_triangle_(gram, wide.T, 0)
    least = ROUNDING / shares
    triangle, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0 or not bool((triangle.diagonal() > 2 * least).all()):
        triangle = _one_by_one(gram, least)
    kept = triangle.diagonal() > 0
    left, along = triangle.diagonal()[kept], triangle[:, kept]
    directions = inverse_triangle(along[kept]) @ wide[kept]
    missed = (wide[~kept] - along[~kept] @ directions).norm(dim=1)
    if bool((missed > 3 * least[~kept]).any()):
        # the products have the square of the rows' condition, and that was too much
        directions, along, kept = _row_by_row(wide, least)
        left = along[kept].diagonal()
    rows[: len(left)] = directions
    least_left = float(left.min()) if len(left) else 1.0
    return _Added(rows[: len(left)], along.float(), shares[kept] * left, least_left)


def _row_by_row(wide: torch.Tensor, least: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gram-Schmidt [n, d_in], twice over: directions [m, d_in], the rows along them [n, m], and which rows have one."""
    directions, along = torch.empty_like(wide), wide.new_zeros(wide.shape[0], wide.shape[0])
    kept = torch.zeros(wide.shape[0], dtype=torch.bool, device=wide.device)
    count = 0
    for index, row in enumerate(wide.clone()):
        for _ in range(2):
            part = directions[:count] @ row
            row -= part @ directions[:count]
            along[index, :count] += part
        left = row.norm()
        if left > least[index]:
            directions[count], along[index, count], kept[index] = row / left, left, True
            count += 1
    return directions[:count], along[:, :count], kept


def _one_by_one(gram: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """The Cholesky factor [n, n], with a column of zeros for each row of which no more than `least` [n] is left."""
    rest, limits = gram.to("cpu", copy=True), least.tolist()  # a step is a few microseconds of work
    triangle = torch.zeros_like(rest)
    for index, limit in enumerate(limits):
        left = max(float(rest[index, index]), 0.0) ** 0.5
        if left > limit:
            column = rest[index:, index] / left
            triangle[index:, index] = column
            rest[index + 1 :, index + 1 :].addr_(column[1:], column[1:], alpha=-1)
    return triangle.to(gram.device)


def _project_(rows: torch.Tensor, bands: Bands) -> torch.Tensor:
    """Takes what rows [n, d_in] have along bands of orthonormal rows out of them; returns that, [n, all rows]."""
    along = [rows.new_zeros(rows.shape[0], 0)]
    for index in range(len(bands)):
        band = bands[index]
        along.append(rows.new_empty(rows.shape[0], band.shape[0]))
        for block in _blocks(rows):
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
