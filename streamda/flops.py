"""Operations of a run by phase, multiplications plus additions: exact for products, estimated for the eigensolver.

Attention's own products are left out: at usual lengths they are a percent of the products with weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamda.costs import Workload
from streamda.eigen import GUARD_VECTORS, guard_vectors
from streamda.layers import InputGroup
from streamda.low_rank import extra_vectors
from streamda.panels import FLOAT32_BYTES, Replay
from streamda.products import TRIANGLE_ROWS
from streamda.solve_bytes import INVERTED_SIZE, few_tokens, is_stepwise
from streamda.solve_plan import needs_basis

EIGEN_STEPS = 8
"""Steps of the eigensolver per layer, for the estimate of its work. The report has the true number of each layer."""

SVD_FLOPS, EIGH_FLOPS = 22, 9
"""Times n^3, as textbooks count: singular values and vectors; eigenvalues and vectors."""


def count_flops(
    workload: Workload, schedule: Sequence[tuple[Replay, ...]], rank: int, blocks_again: Sequence[int]
) -> dict[str, int]:
    """Work by phase: forward, epilogue, replay, statistics, statistics_float64, solve (in float64), solve_float32.

    Args:
        workload: the model and the samples.
        schedule: replays per block.
        rank: of the adapter (0: nothing is solved).
        blocks_again: blocks whose forward pass runs a second time.
    """
    rows = workload.num_rows
    again = [workload.blocks[index] for index in blocks_again]
    forward = sum(2 * cost.weight_count * rows for cost in (*workload.blocks, *again))
    replay = statistics = wide_statistics = solve = solve_float32 = 0
    for cost, replays in zip(workload.blocks, schedule, strict=True):
        for item in replays or (Replay(()),):
            replay += ((4 if item.needs_backward else 2) * cost.weight_count - 2 * cost.unread_count) * rows
        for panel in (p for r in replays for p in r.panels if p.statistic == "input_moment"):
            operations = 2 * (panel.stop - panel.start) * (panel.columns + panel.start) // 2 * rows
            if panel.item_bytes == FLOAT32_BYTES:
                statistics += operations
            else:
                wide_statistics += operations
        statistics += sum(
            2 * (p.stop - p.start) * p.columns * rows for r in replays for p in r.panels if p.statistic == "gradient"
        )
        for group in cost.spec.groups if rank else ():
            widths = [cost.spec.linear(name).d_out for name in group.modules]
            tokens = group.token_rows
            if needs_basis(group.d_in, tokens):
                in_float64, in_float32 = _basis_flops(group.d_in, widths, rank, tokens)
            elif tokens:
                in_float64, in_float32 = _span_flops(group.d_in, widths, rank, tokens), 0
            else:
                in_float64, in_float32 = _solve_flops(group, widths, rank, rows)
            solve += in_float64
            solve_float32 += in_float32
    head = 4 * workload.num_labels * workload.vocab_size * workload.hidden_size
    return {
        "forward": forward,
        "epilogue": head,
        "replay": replay,
        "statistics": statistics,
        "statistics_float64": wide_statistics,
        "solve": solve,
        "solve_float32": solve_float32,
    }


def _span_flops(d_in: int, widths: Sequence[int], rank: int, tokens: int) -> int:
    """Of an input group with rows for its statistics, all in float64."""
    # the products of its rows with themselves, and of each layer's; the eigenvectors that are kept, along both
    rows = _symmetric(tokens) * (d_in + sum(widths)) + 2 * tokens * rank * sum(d_in + width for width in widths)
    # small matrices: two eigenproblems, and two products per layer, whose own eigenproblem is solved step by step
    return rows + (2 * EIGH_FLOPS + 4 * len(widths)) * tokens**3 + len(widths) * _on_span_flops(tokens, rank)


def _basis_flops(d_in: int, widths: Sequence[int], rank: int, tokens: int) -> tuple[int, int]:
    """Of an input group whose rows are solved along a basis of theirs, in float64 and in float32."""
    size = min(tokens, d_in)
    coordinates = size * (2 * tokens - size)  # twice as many as there are, one behind the other, in a trapezoid
    # each row against all before it, twice over, there and back; output gradients times the coordinates
    single = 4 * coordinates * d_in + coordinates * sum(widths)
    # the moment along the basis, its factor, and what needs the two
    return size**2 * (tokens - size * 2 // 3) + size**3 // 3 + _krylov_flops(size, widths, rank), single


def _krylov_flops(size: int, widths: Sequence[int], rank: int) -> int:
    """An estimate: each step takes two products with Z^-1, two triangular solves each, and two with the gradient."""
    per_vector = sum(4 * size**2 + 4 * size * d_out for d_out in widths)
    return EIGEN_STEPS * min(size, rank + guard_vectors(size)) * per_vector


def _on_span_flops(tokens: int, rank: int) -> int:
    """Of a layer's own eigenproblem on the span of few tokens."""
    if not is_stepwise(tokens, rank):
        return EIGH_FLOPS * tokens**3
    return EIGEN_STEPS * (rank + GUARD_VECTORS) * 2 * tokens**2


def _symmetric(size: int) -> int:
    """Per term of a symmetric product, of which nothing is computed to the right of blocks on the diagonal."""
    return size * min(2 * size, size + TRIANGLE_ROWS)


def _solve_flops(group: InputGroup, widths: Sequence[int], rank: int, num_tokens: int) -> tuple[int, int]:
    """Of an input group with sums, whose layers have `widths` outputs, in float64 and in float32."""
    d_in = group.d_in
    if 0 < num_tokens <= few_tokens(d_in):
        wide = num_tokens + extra_vectors(d_in, num_tokens)
        # a product with the moment, as wide as that, and its orthogonal basis; the gradient on the span
        ranging = 2 * d_in**2 * wide + 4 * d_in * wide**2
        single = sum(2 * d_in * d_out * num_tokens for d_out in widths)
        # the second product, a basis again, an SVD; per layer what its gradient makes, eigenvalues and eigenvectors
        shared = ranging + SVD_FLOPS * num_tokens**3
        if group.moment_bytes == FLOAT32_BYTES:
            single += ranging
        else:
            shared += ranging
        return shared + sum(
            d_out * _symmetric(num_tokens) + _on_span_flops(num_tokens, rank) for d_out in widths
        ), single
    inverse = d_in**3 if d_in <= INVERTED_SIZE else 0
    return d_in**3 // 3 + inverse + _krylov_flops(d_in, widths, rank), 0
