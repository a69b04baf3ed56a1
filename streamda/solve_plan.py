"""How the solution of one input group is cut to the memory there is. Plain integers.

Bands of the factor and of the gradient are the rows of stored tiles: at 28672 columns a band is at most 470 MB.
The factor is float64 in every case; what changes is where it lies. In this order, until it fits: everything in memory;
the gradient in the float32 it is stored in; the gradient read anew at each use; the factor's last bands in a file.
(On the span of few tokens float32 is the first choice: nothing there uses the gradient in float64. Along a basis of
tokens it is that basis which goes to a file next, and then the gradient along it.) None of it changes a bit of the
result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from streamda.errors import BudgetError
from streamda.gram_schmidt import BLOCK_TOKENS
from streamda.layers import BlockSpec
from streamda.memory import format_size
from streamda.panels import FLOAT32_BYTES, PANEL_ROWS, statistics_bytes
from streamda.solve_bytes import (
    FLOAT64_BYTES,
    band_bytes,
    chunk_rows,
    column_bytes,
    few_tokens,
    few_tokens_bytes,
    krylov_bytes,
    token_rows_bytes,
)

WORKSPACE_BYTES = 64 << 20
"""What a run takes beside its tensors: interpreter objects, kernels and buffers of the matrix libraries, buffers of the
tensor reader and of the statistics writer. Measured on CPU, see tests/test_memory_bound.py."""
TILE_COPIES, HELD_TILE_COPIES = 6, 3
"""Copies of a tile that are there while two are read at a time: the reader's two, and two of each in Zarr, as
they lie in the file and decompressed. From memory, the reader's two, and one for what is made of them."""

ROWS_PER_INPUT = 1.5
"""Tokens for each input, below which a layer is solved from their rows: with hardly more tokens than inputs the
smallest eigenvalues of a moment are below the rounding of a float32 sum. Adapters of SmolLM2 from such sums were off by
0.9 at 1.02 for each, by 0.1 at 1.26, and by 0.02, as others are, at 1.6. Float64 sums are as good as rows; these are
faster."""
MORE_FOR_ROWS, SMALL_SOLUTION_BYTES = 1.25, 96 << 20
"""Memory that the solution may take for it, times that of sums, or in any case: blocks of a model with small layers
need more than that."""
USUAL_RANK = 8
"""Of the adapter, where it is asked whether one way takes more than another."""

GradientForm = Literal["float64", "float32", "streamed"]


@dataclass(frozen=True, slots=True)
class SolveLayout:
    """Where the factor and the gradients of an input group lie while its layers are solved."""

    bands_in_memory: int
    gradient: GradientForm
    num_bytes: int
    """Peak in memory."""
    spilled_bytes: int
    """Of the factor, in a file, and of what else lies there along a basis of tokens."""
    basis_in_memory: int = 0
    """Bands of such a basis, and of coordinates along it."""


def solve_capacity(budget_bytes: int, specs: Sequence[BlockSpec], rank: int, *, library_bytes: int = 0) -> int:
    """Memory for the solution of one input group where there is no model beside it.

    Args:
        budget_bytes: of the run.
        specs: of all blocks.
        rank: of the adapter.
        library_bytes: what the device's libraries keep of the budget.

    Raises:
        BudgetError: it is too little, naming the smallest budget that would do.
    """
    beside = WORKSPACE_BYTES + library_bytes
    need = largest_bytes(solve_layouts(specs, rank, 0)) + beside
    if need > budget_bytes:
        raise BudgetError(
            f"the budget of {format_size(budget_bytes)} is too small: these statistics need {format_size(need)} at "
            f"least; use --max-gpu-mem {-(-need // 1_000_000)}MB or more"
        )
    return budget_bytes - beside


@dataclass(frozen=True, slots=True)
class BesideStatistics:
    """A solution with its block's statistics in memory beside it."""

    capacity: int
    """Memory for the solution."""
    layouts: list[SolveLayout]
    growth: int
    """Bytes that its peak is higher for it."""


def keeps_rows(num_tokens: int, d_in: int, widths: Sequence[int]) -> bool:
    """Whether rows of inputs and output gradients stand for the sums of their products, in a run that keeps no sums.

    They do where they are fewer than inputs or hardly more, unless the solution would need much more memory. Decided by
    shapes only, never by the budget.

    Args:
        num_tokens: rows of each.
        d_in: of an input group.
        widths: outputs of its layers.
    """
    if not 0 < num_tokens < ROWS_PER_INPUT * d_in:
        return False
    widest = max(widths)
    rows, sums = (
        solve_layout(d_in, widest, USUAL_RANK, 0, num_tokens, token_rows=count).num_bytes for count in (num_tokens, 0)
    )
    return rows <= max(MORE_FOR_ROWS * sums, SMALL_SOLUTION_BYTES)


def needs_basis(d_in: int, token_rows: int) -> bool:
    """Whether rows that stand for sums are solved along a basis of theirs, being too many for a dense eigenproblem."""
    return token_rows > few_tokens(d_in)


def solve_layout(
    d_in: int,
    d_out: int,
    rank: int,
    capacity_bytes: int | None,
    num_tokens: int | None = None,
    tile_copies: int = TILE_COPIES,
    token_rows: int = 0,
    min_tokens: int = 0,
    moment_bytes: int = FLOAT32_BYTES,
) -> SolveLayout:
    """The fastest layout that fits, or the smallest one where none does.

    Args:
        d_in: of the group.
        d_out: of its widest layer.
        rank: of the adapter.
        capacity_bytes: memory for all of it; None for as much as it likes.
        num_tokens: that the statistics are summed over, at most. Few of them need no Cholesky factor.
        tile_copies: of a tile of the statistics while they are read.
        token_rows: that stand for the statistics; 0 for sums.
        min_tokens: that they are of, at least. Where there may be few, those are provided for.
        moment_bytes: of each sum of the input moment.
    """
    if token_rows and not needs_basis(d_in, token_rows):
        return SolveLayout(0, "float32", token_rows_bytes(d_in, d_out, token_rows), 0)
    whole = len(band_bytes(min(token_rows or d_in, d_in)))
    forms: tuple[GradientForm, ...] = ("float64", "float32", "streamed")
    choices = [(whole, form) for form in forms]
    choices += [(count, form) for form in forms[1:] for count in range(whole - 1, -1, -1)]
    tiles = tile_copies * min(d_in, PANEL_ROWS) ** 2 * (FLOAT32_BYTES if token_rows else moment_bytes)
    if token_rows:
        bases = [(whole, form, True) for form in forms[:2]] + [(count, form, False) for count, form in choices]
        return _fastest([_basis_layout(token_rows, d_in, d_out, rank, each, tiles) for each in bases], capacity_bytes)
    found: list[SolveLayout] = []
    if num_tokens is None or num_tokens == 0 or num_tokens > few_tokens(d_in):
        found.append(_fastest([_layout(d_in, d_out, rank, each, tiles) for each in choices], capacity_bytes))
    if min_tokens <= few_tokens(d_in):
        # the factor that is made for a gradient off the span, if there is any, goes to a file
        few = [_layout(d_in, d_out, rank, (0, form), tiles, are_few=True) for form in forms[1:]]
        found.append(_fastest(few, capacity_bytes))
    # which it is shows when all tokens are counted. Left out is the file for a factor that few would need where the
    # gradient leaves their span, as token mask `labels` makes it
    return dataclasses.replace(found[0], num_bytes=largest_bytes(found))


def solve_layouts(
    specs: Sequence[BlockSpec],
    rank: int,
    capacity: int,
    num_tokens: int | None = None,
    tile_copies: int = TILE_COPIES,
) -> list[SolveLayout]:
    """How each kind of input group is solved; none where the rank is 0 and nothing is."""
    kinds = {
        (
            group.d_in,
            max(spec.linear(name).d_out for name in group.modules),
            group.token_rows,
            group.min_tokens,
            group.moment_bytes,
        )
        for spec in specs
        for group in spec.groups
    }
    if not rank:
        return []
    return [
        solve_layout(d_in, d_out, rank, capacity, num_tokens, tile_copies, rows, least, width)
        for d_in, d_out, rows, least, width in kinds
    ]


def layouts_beside_statistics(
    specs: Sequence[BlockSpec], rank: int, capacity: int, num_tokens: int, alone: Sequence[SolveLayout], most: int
) -> BesideStatistics | None:
    """How groups are solved with their block's statistics in memory beside them.

    Args:
        specs: of all blocks.
        rank: of the adapter.
        capacity: memory for the statistics and the solution.
        num_tokens: that the statistics are summed over, at most.
        alone: the layouts without statistics beside them.
        most: bytes that the peak may grow by.

    Returns:
        None where they do not fit, or where more of a factor would lie on disk for it: that is read at every step,
        statistics but once.
    """
    held = max(map(statistics_bytes, specs))
    left = max(0, capacity - held)
    layouts = solve_layouts(specs, rank, left, num_tokens, HELD_TILE_COPIES)
    growth = held + largest_bytes(layouts) - largest_bytes(alone)
    fits = growth <= most and spilled_bytes(layouts) <= spilled_bytes(alone)
    return BesideStatistics(left, layouts, growth) if fits else None


def _fastest(layouts: Sequence[SolveLayout], capacity_bytes: int | None) -> SolveLayout:
    """The first that fits, or the smallest one where none does."""
    fitting = (each for each in layouts if capacity_bytes is None or each.num_bytes <= capacity_bytes)
    return next(fitting, min(layouts, key=lambda each: each.num_bytes))


def largest_bytes(layouts: Iterable[SolveLayout]) -> int:
    """The highest of their peaks."""
    return max((layout.num_bytes for layout in layouts), default=0)


def spilled_bytes(layouts: Iterable[SolveLayout]) -> int:
    """The most that one of them puts into a file."""
    return max((layout.spilled_bytes for layout in layouts), default=0)


def _layout(
    d_in: int,
    d_out: int,
    rank: int,
    choice: tuple[int, GradientForm],
    tiles: int,
    *,
    are_few: bool = False,
) -> SolveLayout:
    """Of sums.

    Args:
        d_in: of the group.
        d_out: of its widest layer.
        rank: of the adapter.
        choice: bands of the factor in memory, form of the gradient.
        tiles: bytes while statistics are read.
        are_few: whether the layers are solved on the span of few tokens, if their gradients are on it.
    """
    (in_memory, form), sizes = choice, band_bytes(d_in)
    held, spilled = sum(sizes[:in_memory]), sorted(sizes[in_memory:])  # the last band may be a part of one
    factorizing = held + sum(spilled[-2:]) + tiles + column_bytes(d_in)
    gradient_band = min(PANEL_ROWS, d_out) * d_in * FLOAT32_BYTES
    chunk = chunk_rows(d_in, d_out) * d_in * FLOAT64_BYTES
    gradient = {
        "float64": d_out * d_in * FLOAT64_BYTES + gradient_band,
        "float32": d_out * d_in * FLOAT32_BYTES + chunk,
        "streamed": gradient_band + chunk,
    }[form]
    solving = held + sum(spilled[-1:]) + gradient + tiles + krylov_bytes(d_in, d_out, rank)
    peak = max(factorizing, solving, few_tokens_bytes(d_in, d_out, gradient) + tiles if are_few else 0)
    return SolveLayout(in_memory, form, peak, sum(spilled))


def _basis_layout(
    tokens: int,
    d_in: int,
    d_out: int,
    rank: int,
    choice: tuple[int, GradientForm, bool],
    tiles: int,
) -> SolveLayout:
    """Along a basis of tokens (see `token_basis`), where ``streamed`` is a gradient in a file.

    Args:
        tokens: rows.
        d_in: of the group.
        d_out: of its widest layer.
        rank: of the adapter.
        choice: bands of the factor in memory, form of the gradient, whether the basis is in memory.
        tiles: bytes while rows are read.
    """
    in_memory, form, holds_basis = choice
    size, side = min(tokens, d_in), min(tokens, PANEL_ROWS)
    starts = range(0, tokens, PANEL_ROWS)
    coordinates = sum(min(PANEL_ROWS, tokens - start) * min(start + PANEL_ROWS, size) for start in starts)
    basis = (size * d_in + coordinates) * FLOAT32_BYTES
    directions, along = side * d_in * FLOAT32_BYTES, side * size * FLOAT32_BYTES  # a band of each
    held = basis if holds_basis else 0
    # rows and what they become, or that and earlier directions; coordinates twice over; a block in float64
    making = held + 2 * directions + 4 * along + 3 * BLOCK_TOKENS * d_in * FLOAT64_BYTES + tiles

    sizes = band_bytes(size)
    spilled = sorted(sizes[in_memory:])
    held += sum(sizes[:in_memory])
    factorizing = held + sum(spilled[-2:]) + along + BLOCK_TOKENS * size * FLOAT64_BYTES + column_bytes(size)
    band = min(PANEL_ROWS, d_out) * size
    whole = {"float64": d_out * size * FLOAT64_BYTES, "float32": d_out * size * FLOAT32_BYTES, "streamed": 0}[form]
    multiplying = held + whole + along + band * (FLOAT64_BYTES + FLOAT32_BYTES) + tiles
    multiplying += (side * min(PANEL_ROWS, d_out) + 3 * BLOCK_TOKENS * size) * FLOAT32_BYTES  # operands, and copies
    chunk = chunk_rows(size, d_out) * size * FLOAT64_BYTES + (band * FLOAT32_BYTES if form == "streamed" else 0)
    solving = held + sum(spilled[-1:]) + whole + chunk + krylov_bytes(size, d_out, rank)
    lifting = held + whole + directions + (side * PANEL_ROWS + 4 * rank * d_in) * FLOAT64_BYTES
    in_file = sum(spilled) + (0 if holds_basis else basis) + (d_out * size * FLOAT32_BYTES if form == "streamed" else 0)
    peak = max(making, factorizing, multiplying, solving, lifting)
    return SolveLayout(in_memory, form, peak, in_file, len(starts) if holds_basis else 0)
