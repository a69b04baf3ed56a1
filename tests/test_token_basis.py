"""What is solved along a basis of tokens' rows is what the rows give whole, and the dense solution."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda import gram_schmidt, token_basis
from streamda.config import SolveConfig
from streamda.methods import BasisFactor, LayerSolution, SolveStatus, prepare_basis_factor, solve_layer
from streamda.scratch import SpilledBands
from streamda.token_basis import BasisGradient, BasisMoment, TokenBasis
from streamda.token_span import CLEAR, DISTINCT, ROUNDING, TokenGradient
from tests.test_lora_da import ABLATIONS, POPULATION, dense, product, relative_error
from tests.test_token_span import draw_rows, require_refusal, require_same_numbers, solve_rows, sums_of

CPU = torch.device("cpu")


class Held:
    """Rows in memory."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self.shape = (values.shape[0], values.shape[1])

    def part(self, tokens: slice, columns: slice) -> torch.Tensor:
        return self._values[tokens, columns]


@pytest.fixture(autouse=True)
def several_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of 16 tokens in blocks of 5, so that a few dozen of them have all that thousands have."""
    monkeypatch.setattr(token_basis, "PANEL_ROWS", 16)
    monkeypatch.setattr(gram_schmidt, "BLOCK_TOKENS", 5)


def prepare(x: torch.Tensor, damping: float = 1e-6) -> BasisFactor | None:
    return prepare_basis_factor(Held(x), damping, ("layer",), ({}, {}), {})


def solve_along(
    x: torch.Tensor, g: torch.Tensor, dtype: torch.dtype = torch.float32, folder: Path | None = None, **options: Any
) -> LayerSolution:
    """From rows of one sample per token; with a folder hardly anything stays in memory."""
    config = SolveConfig(**options)
    bands = [SpilledBands(folder, number, CPU) for number in (0, 1, 1, 0)] if folder else [{}, {}, {}, {}]
    factor = prepare_basis_factor(Held(x), config.damping, ("layer",), (bands[0], bands[1]), bands[2])
    assert factor is not None
    gradient = BasisGradient(factor.basis, Held(g), len(x), bands[3], dtype)
    moment = g.double().square().mean(dim=0)
    return solve_layer("layer", factor, gradient, moment, config, population_size=POPULATION, seed=0)


def make_basis(x: torch.Tensor) -> TokenBasis:
    return TokenBasis(Held(x), {}, {})


def coordinates(basis: TokenBasis) -> torch.Tensor:
    """M [tokens, k], whole."""
    whole = torch.zeros(basis.num_tokens, basis.size, dtype=torch.float64)
    for tokens, along in basis.coordinates():
        whole[tokens, : along.shape[1]] = along
    return whole


def directions(basis: TokenBasis) -> torch.Tensor:
    """Q [k, d_in]."""
    return basis.lift(torch.eye(basis.size, dtype=torch.float64)).T


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 60), d_in=st.integers(1, 80), seed=st.integers(0, 10**6), scale=st.integers(-15, 15))
def test_rows_moment_and_gradient_are_what_they_are_along_the_basis(
    tokens: int, d_in: int, seed: int, scale: int
) -> None:
    """Also of more tokens than inputs, which have no more directions than these."""
    # Hypothesis resets no fixture between its examples, and needs none reset
    x, g = draw_rows(seed, tokens, d_in, 20)
    x *= 10.0**scale
    basis = make_basis(x)
    whole, q, wide = coordinates(basis), directions(basis), x.double()
    assert basis.size == min(tokens, d_in)
    torch.testing.assert_close(q @ q.T, torch.eye(basis.size, dtype=torch.float64), rtol=0, atol=2e-6)
    assert bool(((whole @ q - wide).norm(dim=1) <= 5e-6 * wide.norm(dim=1)).all())
    torch.testing.assert_close(basis.lengths, wide.norm(dim=1))
    moment = BasisMoment(basis)
    expected = whole.T @ whole / tokens
    torch.testing.assert_close(moment.diagonal(), expected.diagonal(), rtol=1e-10, atol=1e-12 * float(expected.max()))
    start = 0
    for index in range(len(moment)):
        band = moment.band(index)
        stop = start + band.shape[0]
        assert band.shape[1] == stop
        part = band.tril(start) - expected[start:stop, :stop].tril(start)
        assert float(part.abs().max()) <= 1e-12 * float(expected.abs().max())
        start = stop
    assert start == basis.size
    assert moment.effective_rank == pytest.approx(float(expected.trace() ** 2 / expected.norm() ** 2), rel=1e-9)
    gradient = torch.cat(list(BasisGradient(basis, Held(g), 3, {}, torch.float64)))
    # each column to the digits of float32, however small it is
    sizes = g.double().abs().T @ whole.abs() / 3
    assert bool(((gradient - g.double().T @ whole / 3).abs() <= 1e-6 * sizes).all())


def test_as_many_tokens_as_inputs_that_hardly_differ_still_have_an_orthonormal_basis() -> None:
    """The smallest singular value of such rows is far below the least of their pivots."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 80, generator=generator) * torch.logspace(0, -4, 80)
    basis = make_basis(x)
    q = directions(basis)
    torch.testing.assert_close(q @ q.T, torch.eye(basis.size, dtype=torch.float64), rtol=0, atol=2e-6)
    assert float(((coordinates(basis) @ q - x.double()).norm(dim=1) / x.double().norm(dim=1)).max()) < 2 * DISTINCT


@pytest.mark.parametrize("tokens", [1, 8, 40, 100])
@pytest.mark.parametrize("name", ABLATIONS)
def test_every_setting_of_the_method_gives_the_dense_solution(name: str, tokens: int) -> None:
    x, g = draw_rows(tokens, tokens, 160, 90)
    found, expected = solve_along(x, g, **ABLATIONS[name]), dense(sums_of(x, g), **ABLATIONS[name])
    assert found.status is SolveStatus.OK
    assert relative_error(product(found), expected.product) < 1e-5
    assert found.lora_a.shape[1] == 160
    plain = solve_rows(x, g, **ABLATIONS[name])
    require_same_numbers(found, plain, kept=min(tokens, ABLATIONS[name].get("rank", 8)))
    if tokens > 8 and not ABLATIONS[name].get("balance"):
        # the same signs, too
        torch.testing.assert_close(found.lora_a, plain.lora_a, rtol=0, atol=1e-4 * float(plain.lora_a.abs().max()))


@pytest.mark.parametrize("tokens", [61, 75, 90])
def test_a_few_more_tokens_than_inputs_are_no_other_case(tokens: int) -> None:
    """What sums in float32 get wrong: the smallest eigenvalues of the moment are nearly zero."""
    x, g = draw_rows(tokens, tokens, 60, 40)
    found = solve_along(x, g)
    assert found.status is SolveStatus.OK
    assert relative_error(product(found), dense(sums_of(x, g)).product) < 1e-5


@pytest.mark.parametrize(("tokens", "d_in"), [(70, 160), (90, 60), (33, 20)])
def test_wherever_it_lies_and_however_it_is_held_the_bits_are_the_same(tokens: int, d_in: int, tmp_path: Path) -> None:
    """Also where whole bands of tokens add no direction."""
    x, g = draw_rows(3, tokens, d_in, 50)
    first = solve_along(x, g)
    for found in (solve_along(x, g, torch.float64), solve_along(x, g, folder=tmp_path)):
        assert torch.equal(found.lora_a, first.lora_a)
        assert torch.equal(found.lora_b, first.lora_b)


def kahan(size: int, least: float) -> torch.Tensor:
    """Rows [size, size] of unit length, of whose Cholesky factor the least pivot says nothing of its condition."""
    sine = least ** (1 / size)
    above = torch.triu(torch.ones(size, size, dtype=torch.float64), 1) * math.sqrt(1 - sine**2)
    scaled = sine ** torch.arange(size, dtype=torch.float64)
    return torch.nn.functional.normalize((scaled[:, None] * (torch.eye(size, dtype=torch.float64) - above)).T, dim=1)


@pytest.mark.parametrize("case", ["gaussian", "repeats", "nearly dependent", "and then others"])
def test_blocks_of_real_size_have_an_orthonormal_basis_and_no_false_alarm(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_basis, "PANEL_ROWS", 512)
    monkeypatch.setattr(gram_schmidt, "BLOCK_TOKENS", 256)
    generator = torch.Generator().manual_seed(0)
    if case == "gaussian":
        x = torch.randn(700, 576, generator=generator)
    elif case == "repeats":  # tokens of one template, in another band
        x = torch.randn(800, 1000, generator=generator) + 3 * torch.randn(1000, generator=generator)
        x[600:] = x[:200]
    else:
        turned = torch.linalg.qr(torch.randn(600, 256, generator=generator, dtype=torch.float64))[0].T
        x = (kahan(256, 2e-5) @ turned).float()
        if case == "and then others":
            x = torch.cat((x, torch.randn(150, 600, generator=generator)))
    basis = make_basis(x)
    q = directions(basis)
    torch.testing.assert_close(q @ q.T, torch.eye(basis.size, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(((coordinates(basis) @ q - x.double()).norm(dim=1) / x.double().norm(dim=1)).max()) < 2e-6
    assert basis.size == {"gaussian": 576, "repeats": 600, "nearly dependent": 256, "and then others": 406}[case]
    assert basis.is_faint == (case not in ("gaussian", "repeats"))


@pytest.mark.parametrize("rounding", [0.0, 1e-7, 1e-6])
def test_rows_that_repeat_others_but_for_rounding_have_no_direction_of_their_own(rounding: float) -> None:
    x, g = draw_rows(5, 50, 120, 60)
    x[35:] = x[:15]
    exact = dense(sums_of(x, g)).product
    x[35:] *= 1 + rounding * torch.randn(15, 120, generator=torch.Generator().manual_seed(0))
    assert make_basis(x).size == 35
    found = solve_along(x, g)
    assert found.status is SolveStatus.OK
    assert relative_error(product(found), exact) < 1e-6 + 100 * rounding


@pytest.mark.parametrize(
    ("share", "status"),
    [
        (2 * CLEAR, SolveStatus.OK),
        (2 * DISTINCT, SolveStatus.NOISY),
        (0.5 * DISTINCT, SolveStatus.NOISY),
        (0.3 * ROUNDING, SolveStatus.OK),
    ],
)
def test_tokens_that_hardly_differ_make_a_noisy_solution(share: float, status: SolveStatus) -> None:
    x, g = draw_rows(6, 40, 120, 60)
    away = torch.nn.functional.normalize(torch.randn(120, generator=torch.Generator().manual_seed(1)), dim=0)
    x[39] = x[2] + 1.1 * share * x[2].norm() * away
    assert solve_along(x, g).status is status
    assert make_basis(x).size == (40 if share > DISTINCT else 39)


@pytest.mark.parametrize(("size", "place", "tolerance"), [(1e-6, 21, 1e-3), (1e4, 0, 1e-5), (1e4, 21, 1e-3)])
def test_one_token_of_another_size_takes_few_digits_of_the_others(size: float, place: int, tolerance: float) -> None:
    x, g = draw_rows(7, 40, 120, 60)
    x[place] *= size
    assert relative_error(product(solve_along(x, g)), product(solve_rows(x, g))) < tolerance


@pytest.mark.parametrize("name", ["defaults", "without bias", "theorem", "without Fisher"])
@pytest.mark.parametrize("distinct", [1, 5])
def test_fewer_directions_than_the_rank_leave_the_rest_outside_them(distinct: int, name: str) -> None:
    x, g = draw_rows(8, 40, 120, 60)
    x = x[:distinct].repeat(40 // distinct, 1)
    found = solve_along(x, g, **ABLATIONS[name])
    expected = dense(sums_of(x, g), **ABLATIONS[name]).product
    assert relative_error(product(found), expected) < 1e-4
    assert found.stats is not None
    assert found.stats.next_eigenvalue == pytest.approx(found.stats.eigenvalues[-1], rel=1e-9)  # outside, like the last
    assert len(found.stats.eigenvalues) == 8
    a = found.lora_a.double()
    torch.testing.assert_close(a @ a.T / (a @ a.T)[0, 0], torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused_by_the_layer_s_name(value: float) -> None:
    x, g = draw_rows(6, 40, 120, 8)
    require_refusal(solve_along, x, g, value, places=((22, 3), (34, 7)))


def test_without_tokens_or_with_zeros_there_is_nothing_to_factorize() -> None:
    assert prepare(torch.zeros(0, 20)) is None
    assert prepare(torch.zeros(30, 20)) is None
    # which is the layer's gradient, then
    found = solve_layer(
        "layer",
        None,
        TokenGradient(torch.ones(30, 8), 20, 5),
        torch.ones(8),
        SolveConfig(rank=4),
        population_size=POPULATION,
        seed=0,
    )
    assert found.status is SolveStatus.ZERO


def test_a_gradient_of_zero_gets_the_standard_start() -> None:
    x, g = draw_rows(8, 30, 100, 8)
    one_half = (torch.arange(30) < 15).float()[:, None]
    for rows, gradients in (
        (x, torch.zeros_like(g)),
        (x * one_half, g * (1 - one_half)),
        (torch.cat((x, x)), torch.cat((g, -g))),  # whose sum is zero, as where no token has both
    ):
        found = solve_along(rows, gradients, rank=4)
        assert found.status is SolveStatus.ZERO
        assert found.lora_a.shape == (4, 100)
        assert not bool(found.lora_b.any())


def test_a_giant_without_gradient_makes_that_of_the_others_no_zero() -> None:
    x, g = draw_rows(8, 40, 120, 20)
    x[3] *= 1e8
    g[3] = 0
    assert solve_along(x, g).status is not SolveStatus.ZERO


def test_what_needs_more_damping_says_so() -> None:
    """Hardly any damping, and a token so large that the others are rounding beside it."""
    x, g = draw_rows(9, 50, 80, 20)
    x[40] *= 1e12
    found = solve_along(x, g, damping=1e-30, output_damping_ratio=0.1)
    assert found.status is SolveStatus.DAMPED
    assert found.stats is not None
    assert found.stats.damping > 1e-30
