"""Sums of second moments and gradients: in whatever panels and batches, they are the dense products."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda import products
from streamda.factors import (
    LayerStatistics,
    add_gradient_,
    add_input_moment_,
    add_output_moment_,
    mirror_lower_,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(seed: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator).to(dtype)


def cuts(size: int, places: list[float]) -> list[tuple[int, int]]:
    """Splits ``range(size)`` at shares of its length; empty pieces left out."""
    edges = sorted({0, size, *(round(place * size) for place in places)})
    return list(itertools.pairwise(edges))


SPLIT = st.lists(st.floats(0, 1), max_size=4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 40), width=st.integers(1, 70), panels=SPLIT, batches=SPLIT, seed=st.integers(0, 99))
def test_panels_of_an_input_moment_hold_the_lower_triangle_of_the_dense_product(
    tokens: int, width: int, panels: list[float], batches: list[float], seed: int
) -> None:
    x = rows(seed, tokens, width)
    dense = x.double().T @ x.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "TRIANGLE_ROWS", 16)  # several blocks, and a last one that is not full
        for start, stop in cuts(width, panels):
            total = torch.zeros(stop - start, stop)
            for first, last in cuts(tokens, batches):
                add_input_moment_(total, x[first:last], start)
            lower = torch.ones(width, width).tril()[start:stop, :stop].bool()
            torch.testing.assert_close(total[lower].double(), dense[start:stop, :stop][lower], rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 40), d_in=st.integers(1, 30), d_out=st.integers(1, 50), panels=SPLIT, batches=SPLIT)
def test_panels_of_a_gradient_hold_the_dense_product(
    tokens: int, d_in: int, d_out: int, panels: list[float], batches: list[float]
) -> None:
    x, g = rows(1, tokens, d_in), rows(2, tokens, d_out)
    dense = g.double().T @ x.double()
    squares = (g.double() ** 2).sum(dim=0)
    moment = torch.zeros(d_out)
    for first, last in cuts(tokens, batches):
        add_output_moment_(moment, g[first:last])
    torch.testing.assert_close(moment.double(), squares, rtol=1e-5, atol=1e-6)
    for start, stop in cuts(d_out, panels):
        total = torch.zeros(stop - start, d_in)
        for first, last in cuts(tokens, batches):
            add_gradient_(total, x[first:last], g[first:last, start:stop])
        torch.testing.assert_close(total.double(), dense[start:stop], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_float32_whatever_the_operands(dtype: torch.dtype) -> None:
    """The operands' own rounding stays; summing 2000 rows of them in 16 bits would be wrong by percents."""
    tokens, width = 2000, 24
    x, g = rows(1, tokens, width, dtype), rows(2, tokens, width, dtype)
    moment, gradient, squares = torch.zeros(width, width), torch.zeros(width, width), torch.zeros(width)
    for start in range(0, tokens, 100):
        add_input_moment_(moment, x[start : start + 100], 0)
        add_gradient_(gradient, x[start : start + 100], g[start : start + 100])
        add_output_moment_(squares, g[start : start + 100])
    x, g = x.double(), g.double()
    torch.testing.assert_close(moment.double().tril(), (x.T @ x).tril(), rtol=2e-6, atol=1e-3)
    torch.testing.assert_close(gradient.double(), g.T @ x, rtol=2e-6, atol=1e-3)
    torch.testing.assert_close(squares.double(), (g * g).sum(dim=0), rtol=2e-6, atol=0)


def test_half_precision_operands_do_not_overflow_in_their_products() -> None:
    """300 squared is above the largest float16 number."""
    x = torch.full((3, 2), 300.0, dtype=torch.float16)
    moment, squares = torch.zeros(2, 2), torch.zeros(2)
    add_input_moment_(moment, x, 0)
    add_output_moment_(squares, x)
    assert moment.tril()[1].tolist() == [270000.0, 270000.0]
    assert squares.tolist() == [270000.0, 270000.0]


def test_sums_of_two_runs_add_up_to_the_sum_of_both() -> None:
    """Exactly: on small integers every partial sum is exact in float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (60, 20), generator=generator).float()
    whole, parts = torch.zeros(20, 20), []
    add_input_moment_(whole, x, 0)
    for share in (x[:13], x[13:]):
        part = torch.zeros(20, 20)
        add_input_moment_(part, share, 0)
        parts.append(part)
    assert torch.equal((parts[0] + parts[1]).tril(), whole.tril())
    assert torch.equal(whole.tril(), (x.T @ x).tril())


def test_rows_beyond_the_triangle_are_skipped() -> None:
    """Above the diagonal only what is left of the last partial block is computed: that is half of the work saved."""
    x = rows(0, 8, 8 * products.TRIANGLE_ROWS)
    total = torch.zeros(x.shape[1], x.shape[1])
    add_input_moment_(total, x, 0)
    computed = int((total != 0).sum())
    assert x.shape[1] ** 2 / 2 < computed < 0.6 * x.shape[1] ** 2


@pytest.mark.parametrize("size", [1, 2, 5, 255, 256, 257, 1100])
def test_mirroring_copies_the_lower_triangle_and_reads_nothing_above_it(size: int) -> None:
    matrix = rows(size, size, size)
    expected = matrix.tril() + matrix.tril(-1).T
    matrix += torch.full((size, size), 1e9).triu(1)  # rubbish above the diagonal
    result = mirror_lower_(matrix)
    assert result is matrix
    assert torch.equal(matrix, expected)
    assert torch.equal(matrix, matrix.T)


def test_statistics_of_a_layer_show_shapes_and_no_numbers() -> None:
    zeros = torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(3)
    shown = repr(LayerStatistics("h.0.w", *zeros, num_tokens=5, num_samples=1, weight_norm=1.0))
    assert shown == "LayerStatistics('h.0.w', 3 x 2, 5 tokens, 1 samples)"
