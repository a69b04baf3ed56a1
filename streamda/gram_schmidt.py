"""Block Gram-Schmidt with reorthogonalization, in float32, for rows some of which may depend on others.

Blocks of rows are made orthogonal to all before them, and then among themselves in float64, and all of it again until
nothing is missed (Giraud, Langou and Rozloznik, 2005, on why twice is enough as a rule). What little is left of a row
keeps its digits that way; a row of which only rounding is left adds no direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from streamda.cholesky import Bands, inverse_triangle
from streamda.products import TERMS, add_triangle_, linear
from streamda.token_span import ROUNDING

BLOCK_TOKENS = 256
"""Rows that are made orthonormal among themselves in float64. Fewer make thinner products, more have more float64."""
ENOUGH, TIMES = 0.5, 5
"""Of a direction's length: when more than that is left of each, nothing of the earlier ones is in it any more. That is
so after the second time, unless a row had less of its own than the first time missed. And how often at most."""


class Added(NamedTuple):
    """What rows add to earlier directions."""

    directions: torch.Tensor
    """[m, d_in], orthonormal, at right angles to the earlier ones; a view of the rows."""
    along: torch.Tensor
    """The rows along all of them, [n, earlier + m]."""
    shares: torch.Tensor
    """Of a token's length that the directions are, [m] float64."""
    left: float
    """The least that the first time left of a row that became one."""


def blocks(rows: torch.Tensor) -> list[slice]:
    """Rows that are taken at a time."""
    return [slice(start, start + BLOCK_TOKENS) for start in range(0, rows.shape[0], BLOCK_TOKENS)]


def orthonormal(rows: torch.Tensor, shares: torch.Tensor, earlier: Bands, block_rows: int) -> Added:
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
    return Added(found.directions, torch.cat((along, own), dim=1), found.shares, first.left)


def _among_themselves(rows: torch.Tensor, shares: torch.Tensor, block_rows: int) -> Added:
    """As `orthonormal`, without earlier directions."""
    if block_rows <= BLOCK_TOKENS:
        return _in_float64(rows, shares)
    own = rows.new_zeros(rows.shape[0], rows.shape[0])
    directions: dict[int, torch.Tensor] = {}
    parts, count, left = [shares[:0]], 0, 1.0
    for block in blocks(rows):
        found = orthonormal(rows[block], shares[block], directions, BLOCK_TOKENS)
        first, count = count, found.along.shape[1]
        own[block, :count] = found.along
        # where some rows were none, those that follow move up
        moved = found.directions.clone() if first < block.start else found.directions
        directions[len(directions)] = rows[first:count].copy_(moved)
        parts.append(found.shares)
        left = min(left, found.left)
    return Added(rows[:count], own[:, :count], torch.cat(parts), left)


def _in_float64(rows: torch.Tensor, shares: torch.Tensor) -> Added:
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
    return Added(rows[: len(left)], along.float(), shares[kept] * left, least_left)


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
        for block in blocks(rows):
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
