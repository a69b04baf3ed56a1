"""What is solved from the rows of few tokens is what their sums give, and nearer to the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda import solve_bytes
from streamda import token_span as module
from streamda.config import SolveConfig
from streamda.errors import NumericalError
from streamda.methods import LayerSolution, SolveStatus, on_span, prepare_token_factor, solve_layer
from streamda.methods.displacement import Displacement
from streamda.methods.on_span import displacement_of_tokens, displacement_on_span, token_gradient_on_span
from streamda.token_span import TokenGradient, TokenSpan, token_span
from tests.test_lora_da import (
    ABLATIONS,
    LOUD_GRADIENTS,
    POPULATION,
    Statistics,
    dense,
    product,
    relative_error,
    rounded,
    solve,
    two_parts,
)


def draw_rows(seed: int, tokens: int, d_in: int, d_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and output gradients in float32, whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return 0.1 * normal(tokens, d_in) * normal(d_in).exp(), normal(tokens, d_out) * (0.01 * normal(d_out).exp())


def sums_of(x: torch.Tensor, g: torch.Tensor) -> Statistics:
    """In float64, of one sample per token."""
    x, g = x.double(), g.double()
    return Statistics(g.T @ x / len(x), x.T @ x / len(x), (g * g).mean(dim=0))


def solve_rows(x: torch.Tensor, g: torch.Tensor, **options: Any) -> LayerSolution:
    config = SolveConfig(**options)
    return solve_layer(
        "layer",
        prepare_token_factor(x, config.damping, ("layer",)),
        TokenGradient(g, x.shape[1], len(x)),
        g.double().square().mean(dim=0),
        config,
        population_size=POPULATION,
        seed=0,
    )


def require_same_numbers(found: LayerSolution, plain: LayerSolution, kept: int) -> None:
    """Checks what is said of a solution against what is said of the same one found another way."""
    assert found.stats is not None
    assert plain.stats is not None
    torch.testing.assert_close(
        torch.tensor(found.stats.eigenvalues[:kept]),
        torch.tensor(plain.stats.eigenvalues[:kept]),
        rtol=1e-4,
        atol=1e-6 * max(map(abs, plain.stats.eigenvalues)),
    )
    assert found.stats.displacement_norm == pytest.approx(plain.stats.displacement_norm, rel=1e-5)


def require_refusal(
    solve: Callable[[torch.Tensor, torch.Tensor], LayerSolution],
    x: torch.Tensor,
    g: torch.Tensor,
    value: float,
    places: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    """Checks that a value at a place of the inputs, and at one of the gradients, is refused with the layer's name."""
    bad = x.clone()
    bad[places[0]] = value
    with pytest.raises(NumericalError, match="layer: its input is not finite"):
        solve(bad, g)
    bad = g.clone()
    bad[places[1]] = value
    with pytest.raises(NumericalError, match="layer: the gradient statistics are not finite"):
        solve(x, bad)


def vectors_of(span: TokenSpan) -> torch.Tensor:
    """W [d_in, k]."""
    return span.lift(torch.eye(span.eigenvalues.numel(), dtype=torch.float64))


def require_span(x: torch.Tensor, tolerance: float = 1e-12) -> int:
    """Checks a span against the rows; returns how many directions it has."""
    span = token_span(x)
    assert span is not None
    wide, vectors = x.double(), vectors_of(span)
    assert bool((span.eigenvalues.diff() >= 0).all())
    assert float(span.eigenvalues[0]) > 0
    unit = torch.eye(vectors.shape[1], dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, unit, rtol=0, atol=1e-7)
    largest = float(wide.norm())
    assert float((span.images - wide @ vectors).abs().max()) <= tolerance * largest
    # all of the rows is in the span or in the rest, and what the span has of the moment is its eigenpairs'
    missing = wide - span.images @ vectors.T
    assert float((missing @ missing.T - span.rest @ span.rest.T).norm()) <= tolerance * largest**2
    assert float((missing @ vectors).norm()) <= 1e-9 * largest
    product = span.images.T @ span.images
    assert float((product - torch.diag(span.eigenvalues)).norm()) <= tolerance * largest**2
    return vectors.shape[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 40), extra=st.integers(0, 60), seed=st.integers(0, 10**6), scale=st.integers(-15, 15))
def test_a_span_is_that_of_the_rows(tokens: int, extra: int, seed: int, scale: int) -> None:
    x = draw_rows(seed, tokens, tokens + extra, 1)[0] * 10.0**scale
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    left, singular, _ = torch.linalg.svd(unit, full_matrices=False)
    assert require_span(x) == int((left.abs().amax(dim=0) * singular > module.DISTINCT).sum())


@pytest.mark.parametrize("chunk", [7, 64, 100, 4096])
def test_rows_are_taken_by_chunks_of_columns(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_COLUMNS", chunk)
    x, g = draw_rows(3, 20, 100, 90)
    assert require_span(x) == 20
    images = torch.randn(20, 5, dtype=torch.float64)
    along = TokenGradient(g, 100, 4).along(images)
    torch.testing.assert_close(along, g.double().T @ images / 4, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [1e3, 1e5, 1e7])
def test_one_token_far_larger_than_the_others_takes_no_digit_of_theirs(size: float) -> None:
    x, _ = draw_rows(4, 30, 80, 1)
    x[0] *= size
    assert require_span(x) == 30


@pytest.mark.parametrize("rounding", [0.0, 1e-7, 1e-6])
def test_rows_that_repeat_others_but_for_rounding_span_nothing_of_their_own(rounding: float) -> None:
    """As the tokens of one template in many samples do."""
    x, g = draw_rows(5, 30, 80, 60)
    x[20:] = x[:10]
    exact = dense(sums_of(x, g)).product
    x[20:] *= 1 + rounding * torch.randn(10, 80)
    assert require_span(x) == 20
    found = solve_rows(x, g)
    assert found.status is SolveStatus.OK
    assert relative_error(product(found), exact) < 1e-6 + 100 * rounding


@pytest.mark.parametrize("copies", [2, 300])
@pytest.mark.parametrize("difference", [3e-7, 1e-6, 4e-6])
def test_two_variants_of_a_token_are_one_however_often_they_come(copies: int, difference: float) -> None:
    """As micro-batches of two shapes give the tokens of a template."""
    x, g = draw_rows(7, 20, 700, 60)
    first, more = x[:1].repeat(2 * copies, 1), draw_rows(8, 2 * copies, 1, 60)[1]
    x, g = torch.cat((first, x)), torch.cat((more, g))
    expected = product(solve_rows(x, g))
    x[:copies] += difference * x[0].norm() * torch.nn.functional.normalize(torch.randn(700), dim=0)
    assert require_span(x) == 20
    found = solve_rows(x, g)
    assert relative_error(product(found), expected) < 1e-4
    assert found.status is (SolveStatus.NOISY if difference > 2 * module.ROUNDING else SolveStatus.OK)


@pytest.mark.parametrize("others", [0, 300])
def test_many_equal_tokens_are_one_and_no_noise(others: int) -> None:
    x, g = draw_rows(9, 700 + others, 1536, 20)
    x[:700] = x[0]
    assert require_span(x, 1e-10) == 1 + others
    assert solve_rows(x, g).status is SolveStatus.OK


@pytest.mark.parametrize(
    ("difference", "status", "tolerance"), [(1e-3, SolveStatus.OK, 1e-5), (4e-5, SolveStatus.NOISY, 1e-2)]
)
def test_inputs_that_differ_little_are_told_apart_and_those_that_hardly_do_make_a_noisy_solution(
    difference: float, status: SolveStatus, tolerance: float
) -> None:
    x, g = draw_rows(5, 30, 80, 60)
    x[29] = x[0] + difference * x[0].norm() * torch.nn.functional.normalize(torch.randn(80), dim=0)
    assert require_span(x, 1e-10) == 30
    found = solve_rows(x, g)
    assert found.status is status
    assert relative_error(product(found), dense(sums_of(x, g)).product) < tolerance


@pytest.mark.parametrize("lengths", [1.0, 1e6])
def test_both_ways_to_decompose_rows_find_the_same_span(lengths: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = draw_rows(6, 25, 70, 1)
    x[3] *= lengths
    found = token_span(x)
    monkeypatch.setattr(module, "GRAM_RANGE", math.inf)
    monkeypatch.setattr(module, "SQUARED_RANGE", math.inf)
    other = token_span(x)
    assert found is not None
    assert other is not None
    torch.testing.assert_close(found.eigenvalues, other.eigenvalues, rtol=1e-8, atol=0)
    torch.testing.assert_close(vectors_of(found).abs(), vectors_of(other).abs(), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        found.images @ vectors_of(found).T, other.images @ vectors_of(other).T, rtol=0, atol=1e-12 * lengths
    )


def test_without_tokens_or_with_zeros_there_is_no_span() -> None:
    assert token_span(torch.zeros(0, 5)) is None
    assert token_span(torch.zeros(3, 5)) is None
    assert prepare_token_factor(torch.zeros(3, 5), 1e-6, ("layer",)) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused_by_the_layer_s_name(value: float) -> None:
    x, g = draw_rows(6, 5, 20, 8)
    require_refusal(solve_rows, x, g, value, places=((2, 3), (4, 7)))


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("name", ABLATIONS)
def test_every_setting_of_the_method_gives_the_dense_solution(name: str, tokens: int) -> None:
    x, g = draw_rows(tokens, tokens, 160, 90)
    found, expected = solve_rows(x, g, **ABLATIONS[name]), dense(sums_of(x, g), **ABLATIONS[name])
    assert found.status is SolveStatus.OK
    assert relative_error(product(found), expected.product) < 1e-6
    # and what goes with it is what the sums give
    plain = solve(sums_of(x, g), num_tokens=tokens, **ABLATIONS[name])
    require_same_numbers(found, plain, kept=min(tokens, ABLATIONS[name].get("rank", 8)))


def of_tokens(x: torch.Tensor, g: torch.Tensor, y: torch.Tensor | None) -> tuple[Any, Any]:
    """K from products of the rows, and from the gradient along the span."""
    config = SolveConfig() if y is not None else SolveConfig(use_fisher=False, variance_weight=0)
    factor = prepare_token_factor(x, 1e-6, ("layer",))
    assert factor is not None
    gradient = TokenGradient(g, x.shape[1], 7)
    displacement = Displacement(None, (), (g.shape[1], x.shape[1]), y, g.device)
    along = token_gradient_on_span(factor, gradient, displacement.weights)
    expected = None if along is None else displacement_on_span(factor, along, displacement, config)
    before = g.clone()
    found = displacement_of_tokens(factor, gradient, displacement, config)
    assert torch.equal(g, before)
    return found, expected


def require_same_displacement(found: Any, expected: Any, tolerance: float) -> None:
    unit = (found.scale / expected.scale) ** 2
    assert float((found.gram * unit - expected.gram).norm()) <= tolerance * float(expected.gram.norm())
    assert torch.equal(found.gram, found.gram.T)
    block = torch.randn(found.gram.shape[0], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = expected.times(block) * expected.scale
    assert float((found.times(block) * found.scale - wanted).norm()) <= tolerance * float(wanted.norm())
    assert found.noisy == expected.noisy


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    scales=st.tuples(*[st.integers(-15, 15)] * 3),
    use_fisher=st.booleans(),
)
def test_products_of_rows_are_what_the_gradient_along_the_span_makes(
    tokens: int, seed: int, scales: tuple[int, int, int], use_fisher: bool
) -> None:
    x, g = draw_rows(seed, tokens, 60, 30)
    y = torch.rand(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-3
    found, expected = of_tokens(
        x * 10.0 ** scales[0], g * 10.0 ** scales[1], y * 10.0 ** (5 * scales[2]) if use_fisher else None
    )
    require_same_displacement(found, expected, 1e-9)


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-6, 1e-9])
def test_a_gradient_that_nearly_cancels_keeps_its_digits(share: float) -> None:
    """Each token comes twice, with opposite gradients but for a share: squares of float64 would lose the smallest."""
    x, g = draw_rows(3, 20, 60, 30)
    rest = draw_rows(4, 20, 60, 30)[1]
    twice = torch.cat((g.double(), share * rest.double() - g.double()))
    y = torch.logspace(-3, 3, 30, dtype=torch.float64)
    found, expected = of_tokens(torch.cat((x, x)), twice, y)
    require_same_displacement(found, expected, 1e-6)
    # what is left of it is the product of the shares, in which nothing cancels
    factor = prepare_token_factor(torch.cat((x, x)), 1e-6, ("layer",))
    assert factor is not None
    gradient = share * rest.double().T @ x.double() / 7
    dense_displacement = gradient @ vectors_of(factor.span) / y[:, None] / (factor.eigenvalues + factor.damping)
    gram = dense_displacement.T @ dense_displacement
    # beside a gradient of order one the smallest share has seven digits, and the outputs' weights differ by 1e6
    tolerance = max(1e-6, 1e-13 / share)
    assert float((found.gram * found.scale**2 - gram).norm()) <= tolerance * float(gram.norm())


@pytest.mark.parametrize("y", [None, torch.logspace(-4, 4, 30, dtype=torch.float64)])
def test_a_gradient_outside_the_span_is_noise_either_way(y: torch.Tensor | None) -> None:
    """Tokens that differ by rounding, and have opposite gradients far above those of the others, or gradients alike."""
    x, g = draw_rows(5, 30, 60, 30)
    close = x[:15] * (1 + 3e-6 * torch.randn(15, 60, generator=torch.Generator().manual_seed(2)))
    seen = []
    for first, second in ((g[:15], g[:15]), (1e3 * g[:15], -1e3 * g[:15])):
        found, expected = of_tokens(torch.cat((x, close)), torch.cat((first, g[15:], second)), y)
        require_same_displacement(found, expected, 1e-6)
        seen.append(found.noisy)
    assert seen == [False, True]


def test_rows_keep_what_the_rounding_of_sums_takes() -> None:
    """A token a thousand times as large as the others: their sums leave a noisy solution, their rows do not."""
    generator = torch.Generator().manual_seed(2)
    x, g = torch.randn(40, 160, generator=generator), torch.randn(40, 90, generator=generator)
    x[0] *= 1e3
    g[0] /= 1e3
    exact = sums_of(x, g)
    summed, found = solve(rounded(exact), num_tokens=40), solve_rows(x, g)
    assert (summed.status, found.status) == (SolveStatus.NOISY, SolveStatus.OK)
    expected = dense(exact).product
    assert relative_error(product(found), expected) < 1e-6
    assert relative_error(product(found), expected) < 0.1 * relative_error(product(summed), expected)


def test_a_gradient_of_zero_or_of_no_token_gets_the_standard_start() -> None:
    x, g = draw_rows(8, 5, 20, 8)
    first, last = torch.zeros(5, 1), torch.zeros(5, 1)
    first[:3], last[3:] = 1, 1
    opposite = (torch.cat((x, x)), torch.cat((g, -g)))  # whose sum is zero, as where no token has both
    for rows, gradients in (
        (x, torch.zeros_like(g)),
        (torch.zeros_like(x), g),
        (x[:0], g[:0]),
        (x * first, g * last),
        opposite,
    ):
        found = solve_layer(
            "layer",
            prepare_token_factor(rows, 1e-6, ("layer",)),
            TokenGradient(gradients, 20, 5),
            torch.ones(8),
            SolveConfig(rank=4),
            population_size=POPULATION,
            seed=0,
        )
        assert found.status is SolveStatus.ZERO
        assert found.lora_a.shape == (4, 20)
        assert not bool(found.lora_b.any())


def test_the_effective_rank_is_that_of_the_moment() -> None:
    x, _ = draw_rows(9, 12, 50, 1)
    factor = prepare_token_factor(x, 1e-6, ("layer",))
    assert factor is not None
    moment = x.double().T @ x.double()
    assert factor.effective_rank == pytest.approx(float(moment.trace() ** 2 / moment.norm() ** 2), rel=1e-9)


@pytest.mark.parametrize("sizes", ["one size", "many sizes"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_a_few_eigenpairs_found_step_by_step_are_those_of_all(
    name: str, sizes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they do not settle soon all are computed after all, and the steps say so."""
    x, g = draw_rows(0, 300, 500, 200)
    if sizes == "many sizes":
        x *= 0.97 ** torch.arange(300)[:, None]
        g *= 0.97 ** torch.arange(300)[:, None]
    dense: list[int] = []
    eigh = torch.linalg.eigh

    def counted(matrix: torch.Tensor) -> Any:
        dense.append(matrix.shape[0])
        return eigh(matrix)

    monkeypatch.setattr(solve_bytes, "STEPWISE_BLOCKS", 1)
    monkeypatch.setattr(solve_bytes, "STEPWISE_SIZE", 256)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", counted)
        stepwise = solve_rows(x, g, **ABLATIONS[name])
    assert stepwise.stats is not None
    # two for the span; without bias the order is that of the tokens' own eigenvalues
    assert dense.count(300) in ((2,) if name in ("without bias", "without variance") else (2, 3))
    assert (stepwise.stats.steps == 1) == (name == "without bias")
    assert stepwise.stats.steps <= on_span.MAX_STEPS + (dense.count(300) == 3)
    if name == "defaults":
        assert dense.count(300) == (2 if sizes == "one size" else 3)
    if name == "overwhelming variance":
        assert dense.count(300) == 3
    monkeypatch.setattr(solve_bytes, "STEPWISE_SIZE", 10**6)
    plain = solve_rows(x, g, **ABLATIONS[name])
    assert plain.stats is not None
    assert relative_error(product(stepwise), product(plain)) < 1e-5
    require_same_numbers(stepwise, plain, 8)
    assert stepwise.stats.next_eigenvalue == pytest.approx(plain.stats.next_eigenvalue, rel=1e-4)


@pytest.mark.parametrize(
    "options", [{"bias_weight": 0.0}, {}, {"variance_weight": 1e3}, {"variance_weight": 1e5}], ids=str
)
def test_of_few_tokens_the_norm_of_the_displacement_is_its_own_wherever_the_eigenvectors_lie(
    options: dict[str, float],
) -> None:
    """Eight loud channels of their own tokens and outputs, at which the eigenvectors may all lie.

    Their singular values cross those of the others as their gradients grow.
    """
    for size in LOUD_GRADIENTS:
        x, g = two_parts((8, 500), (20, 290), 10.0, size)
        found, expected = solve_rows(x, g, **options), dense(sums_of(x, g), **options)
        assert found.stats is not None
        assert found.stats.displacement_norm == pytest.approx(expected.sigma, rel=1e-6)
        assert relative_error(product(found), expected.product) < 1e-5
