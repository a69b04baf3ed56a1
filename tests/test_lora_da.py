"""LoRA-DA without a dense matrix is LoRA-DA with all of them; and no input, however nasty, passes in silence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamda import cholesky, eigen
from streamda.config import PRESETS, SolveConfig
from streamda.errors import NumericalError
from streamda.methods import (
    InputFactor,
    LayerSolution,
    SolveStatus,
    SpannedFactor,
    input_factor,
    prepare_input_factor,
    solve_layer,
)
from tests.lower_factor import lower_factor
from tests.oracles import DenseSolution, dense_lora_da

POPULATION = 5000


@dataclass
class Statistics:
    """Of one layer, in float64."""

    gradient: torch.Tensor
    input_moment: torch.Tensor
    output_moment: torch.Tensor

    def scaled(self, inputs: float = 1.0, outputs: float = 1.0) -> Statistics:
        """As if all inputs and all output gradients had been larger."""
        return Statistics(
            self.gradient * inputs * outputs, self.input_moment * inputs**2, self.output_moment * outputs**2
        )


def draw(seed: int, d_out: int, d_in: int, tokens: int) -> Statistics:
    """Statistics of random tokens whose inputs and output gradients differ in size by channel, as real ones do."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(tokens, d_in) * normal(d_in).exp() @ torch.linalg.qr(normal(d_in, d_in))[0]
    g = normal(tokens, d_out) * (0.01 * normal(d_out).exp())
    return Statistics(g.T @ x / tokens, x.T @ x / tokens, (g * g).mean(dim=0))


class Cut:
    """A moment in memory, by bands; counts how often each was read."""

    def __init__(self, matrix: torch.Tensor, band_rows: int = 32) -> None:
        self._matrix, self._band_rows = matrix.double(), band_rows
        self.reads: list[int] = []

    def __len__(self) -> int:
        return -(-self._matrix.shape[0] // self._band_rows)

    def diagonal(self) -> torch.Tensor:
        return self._matrix.diagonal()

    def band(self, index: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        self.reads.append(index)
        start = index * self._band_rows
        return self._matrix[start : start + self._band_rows, : start + self._band_rows].to(dtype, copy=True)


def factorize(
    statistics: Statistics, damping: float = 1e-6, num_tokens: int | None = None
) -> InputFactor | SpannedFactor | None:
    return prepare_input_factor(Cut(statistics.input_moment), damping, ("layer",), num_tokens=num_tokens)


def solve(
    statistics: Statistics, seed: int = 0, name: str = "layer", num_tokens: int | None = None, **options: Any
) -> LayerSolution:
    config = SolveConfig(**options)
    return solve_layer(
        name,
        factorize(statistics, config.damping, num_tokens),
        statistics.gradient.split(16),
        statistics.output_moment,
        config,
        population_size=POPULATION,
        seed=seed,
    )


def dense(statistics: Statistics, **options: Any) -> DenseSolution:
    options.pop("lora_alpha", None)
    return dense_lora_da(
        statistics.gradient,
        statistics.input_moment,
        statistics.output_moment,
        population_size=POPULATION,
        **({"rank": 8} | options),
    )


def product(solution: LayerSolution) -> torch.Tensor:
    return solution.lora_b.double() @ solution.lora_a.double()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """In the Frobenius norm."""
    return float((found - expected).norm() / expected.norm())


def assert_is_dense_answer(statistics: Statistics, tolerance: float = 1e-5, **options: Any) -> None:
    found, expected = solve(statistics, **options), dense(statistics, **options)
    assert found.status is SolveStatus.OK
    assert relative_error(product(found), expected.product) < tolerance
    assert found.lora_a.dtype == found.lora_b.dtype == torch.float32
    assert found.lora_a.is_contiguous()
    assert found.lora_b.is_contiguous()
    if not options.get("balance"):
        # with its signs fixed every eigenvector of a simple eigenvalue is unique, and so are both factors
        torch.testing.assert_close(
            found.lora_a.double(), expected.lora_a, rtol=0, atol=1e-4 * float(expected.lora_a.abs().max())
        )
        torch.testing.assert_close(
            found.lora_b.double(), expected.lora_b, rtol=0, atol=1e-4 * float(expected.lora_b.abs().max())
        )


ABLATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "theorem": PRESETS["theorem"],
    "without variance": PRESETS["without-variance"],
    "without bias": PRESETS["without-bias"],
    "without Fisher": PRESETS["without-fisher"],
    "without Fisher, not normalized": PRESETS["without-fisher"] | {"normalize": False},
    "much variance": {"variance_weight": 1e4},
    "overwhelming variance": {"variance_weight": 1e8},
    "little bias": {"bias_weight": 1e-3},
    "output damping": {"output_damping_ratio": 0.1},
    "large damping": {"damping": 0.1},
    "balanced": {"balance": True},
    "balanced theorem": PRESETS["theorem"] | {"balance": True},
    "orthonormal A": {"a_norm": 1.0},
    "small gamma": {"gamma": 16.0, "a_norm": 0.58},
    "rank 1": {"rank": 1},
    "rank 20": {"rank": 20},
}


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("shape", [(24, 40), (60, 30), (32, 32)], ids=str)
def test_every_setting_of_the_method_gives_the_dense_solution(name: str, shape: tuple[int, int]) -> None:
    assert_is_dense_answer(draw(7, *shape, tokens=300), **ABLATIONS[name])


@pytest.mark.parametrize("name", ABLATIONS)
@pytest.mark.parametrize("stored", [False, True], ids=["exact", "float32"])
def test_few_tokens_are_solved_on_the_span_of_their_inputs(name: str, stored: bool) -> None:
    """The small eigenproblem gives what the plain way gives, and the dense one; also of rounded sums."""
    exact = draw(11, 90, 160, tokens=40)
    statistics = rounded(exact) if stored else exact
    spanned = solve(statistics, num_tokens=40, **ABLATIONS[name])
    expected = dense(exact, **ABLATIONS[name])
    assert spanned.status is SolveStatus.OK
    assert spanned.stats is not None
    assert spanned.stats.steps == 1
    assert relative_error(product(spanned), expected.product) < 1e-5
    if stored:
        return
    plain = solve(statistics, **ABLATIONS[name])
    assert plain.stats is not None
    assert plain.stats.steps > 1
    assert relative_error(product(spanned), product(plain)) < 1e-5
    torch.testing.assert_close(
        torch.tensor(spanned.stats.eigenvalues), torch.tensor(plain.stats.eigenvalues), rtol=1e-5, atol=0
    )
    assert spanned.stats.next_eigenvalue == pytest.approx(plain.stats.next_eigenvalue, rel=1e-3)
    assert spanned.stats.displacement_norm == pytest.approx(plain.stats.displacement_norm, rel=1e-6)


def test_a_gradient_of_lower_rank_than_its_tokens_is_no_harm() -> None:
    statistics = draw(12, 90, 160, tokens=40)
    statistics.gradient[:] = statistics.gradient[:, :1] @ statistics.gradient[:1]
    found, expected = solve(statistics, num_tokens=40), dense(statistics)
    assert relative_error(product(found), expected.product) < 1e-5


def test_repeated_tokens_span_less_and_are_no_harm() -> None:
    """Ten directions, though forty tokens were counted."""
    statistics = draw(13, 90, 160, tokens=10)
    found, expected = solve(statistics, num_tokens=40), dense(statistics)
    assert found.stats is not None
    assert found.stats.steps == 1
    assert relative_error(product(found), expected.product) < 1e-5


def rounded(statistics: Statistics) -> Statistics:
    """Sums as they are stored."""
    parts = (statistics.gradient, statistics.input_moment, statistics.output_moment)
    return Statistics(*(part.float().double() for part in parts))


@pytest.mark.parametrize("tokens", [1, 3, 7, 8])
@pytest.mark.parametrize("name", ["defaults", "without bias", "theorem", "balanced", "without Fisher"])
def test_fewer_directions_than_the_rank_leave_the_rest_of_b_zero(tokens: int, name: str) -> None:
    """Outside the span all eigenvalues are equal and D is zero: the product is determined, A's last rows are not."""
    exact = draw(14, 90, 160, tokens=tokens)
    found, expected = solve(rounded(exact), num_tokens=tokens, **ABLATIONS[name]), dense(exact, **ABLATIONS[name])
    assert found.status is SolveStatus.OK
    assert found.stats is not None
    assert found.stats.steps == 1
    assert relative_error(product(found), expected.product) < 1e-5
    if name == "balanced":
        return
    assert not bool(found.lora_b[:, tokens:].any())
    gram = (found.lora_a @ found.lora_a.T).double()
    torch.testing.assert_close(
        gram, torch.eye(8, dtype=torch.float64) / ABLATIONS[name].get("gamma", 1024), rtol=0, atol=1e-6
    )
    if tokens == 8:
        assert found.stats.next_eigenvalue == pytest.approx(-float(expected.eigenvalues[8]), rel=1e-3)


def test_a_gradient_of_other_tokens_than_the_moment_counts_is_solved_with_a_cholesky_factor() -> None:
    """As with token mask `labels`: the moment counts some tokens, the gradient all."""
    statistics, others = draw(15, 90, 160, tokens=40), draw(16, 90, 160, tokens=300)
    statistics.gradient[:] += 1e-2 * others.gradient
    found, expected = solve(statistics, num_tokens=40), dense(statistics)
    assert found.stats is not None
    assert found.stats.steps > 1
    assert relative_error(product(found), expected.product) < 1e-4


def test_tokens_that_hardly_stand_out_of_the_rounding_of_others_make_a_noisy_solution() -> None:
    """One token is a thousand times as large as the others; the status says what the numbers cannot."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 160, generator=generator, dtype=torch.float64)
    g = torch.randn(40, 90, generator=generator, dtype=torch.float64)
    for size, status, tolerance in ((1.0, SolveStatus.OK, 1e-6), (1e3, SolveStatus.NOISY, 1e-2)):
        x[0] *= size
        g[0] /= size
        exact = Statistics(g.T @ x / 40, x.T @ x / 40, (g * g).mean(dim=0))
        found = solve(rounded(exact), num_tokens=40)
        assert found.status is status
        assert relative_error(product(found), dense(exact).product) < tolerance


@pytest.mark.parametrize("damping", [1e-6, 1e6])
def test_damping_far_above_the_moment_does_not_drown_what_tells_directions_apart(damping: float) -> None:
    statistics = draw(18, 90, 160, tokens=40)
    found = solve(statistics, num_tokens=40, damping=damping, output_damping_ratio=1.0)
    expected = dense(statistics, damping=damping, output_damping_ratio=1.0)
    assert relative_error(product(found), expected.product) < 1e-5


def test_the_span_of_few_tokens_is_that_of_the_moment() -> None:
    statistics = draw(17, 20, 160, tokens=40)
    factor = factorize(statistics, 1e-3, 40)
    assert isinstance(factor, SpannedFactor)
    assert factor.vectors.shape == (160, 40)
    torch.testing.assert_close(
        factor.vectors.T @ factor.vectors, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-12
    )
    moment = factor.vectors * factor.eigenvalues @ factor.vectors.T
    torch.testing.assert_close(moment, statistics.input_moment, rtol=1e-6, atol=1e-9)
    assert isinstance(factor.cholesky(), InputFactor)
    assert factor.cholesky() is factor.cholesky()  # made once, for all layers of the group


@st.composite
def settings_of_the_method(draw_one: st.DrawFn) -> dict[str, Any]:
    options: dict[str, Any] = {
        "gamma": draw_one(st.sampled_from([1.0, 16.0, 1024.0])),
        "damping": draw_one(st.sampled_from([1e-6, 1e-4, 1e-2])),
        "normalize": draw_one(st.booleans()),
        "bias_weight": draw_one(st.sampled_from([1.0, 0.01, 30.0])),
        "variance_weight": draw_one(st.sampled_from([0.03, 0.0, 1.0, 1e3, 1e6])),
        "output_damping_ratio": draw_one(st.sampled_from([None, 0.1, 1.0])),
        "use_fisher": draw_one(st.sampled_from([True, True, True, False])),
    }
    if draw_one(st.booleans()):
        options |= draw_one(st.sampled_from([{"balance": True}, {"a_norm": 1.0}]))
    if not options["use_fisher"]:
        options["variance_weight"] = 0.0
    elif options["variance_weight"] > 0 and draw_one(st.sampled_from([False, False, True])):
        options["bias_weight"] = 0.0
    return options


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    options=settings_of_the_method(),
    d_out=st.integers(1, 30),
    d_in=st.integers(1, 40),
    tokens=st.integers(1, 120),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_any_shape_and_setting_gives_the_dense_solution(
    options: dict[str, Any], d_out: int, d_in: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    """Fewer tokens than inputs, one token, one output: what is determined is found, and its eigenvalues always."""
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    statistics = draw(seed, d_out, d_in, tokens)
    found, expected = solve(statistics, rank=rank, **options), dense(statistics, rank=rank, **options)
    stats = found.stats
    assert stats is not None
    assert found.status in (SolveStatus.OK, SolveStatus.UNCONVERGED)
    magnitude = float(expected.eigenvalues.abs().max())
    kept = -expected.eigenvalues[:rank]
    torch.testing.assert_close(
        torch.tensor(stats.eigenvalues, dtype=torch.float64), kept, rtol=1e-6, atol=1e-8 * magnitude
    )
    assert stats.displacement_norm == pytest.approx(expected.sigma, rel=1e-7)
    # where the cut goes through (nearly) equal eigenvalues, the subspace is open; elsewhere it is the oracle's
    assume(expected.relative_gap(rank) > 1e-5)
    assert found.status is SolveStatus.OK
    gamma, scale = options["gamma"], expected.displacement.norm()
    assert float((product(found) - expected.product).norm() * gamma / scale) < 1e-4


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    d_out=st.integers(1, 24), d_in=st.integers(1, 24), seed=st.integers(0, 999), name=st.sampled_from(sorted(ABLATIONS))
)
def test_full_rank_reconstructs_the_whole_displacement(d_out: int, d_in: int, seed: int, name: str) -> None:
    """With r = d_in nothing is cut off: B A is the displacement over gamma."""
    d_in = min(d_in, d_out)
    options = {"gamma": 1024.0} | ABLATIONS[name] | {"rank": d_in}
    statistics = draw(seed, d_out, d_in, tokens=60)
    found = solve(statistics, **options)
    expected = dense(statistics, **options).displacement.T / options["gamma"]
    assert relative_error(product(found), expected) < 1e-5
    assert found.stats is not None
    assert found.stats.next_eigenvalue is None


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_without_the_fisher_factors_b_a_is_the_best_low_rank_copy_of_the_negative_gradient(rank: int) -> None:
    """LoRA-One's subspace, by torch's own SVD."""
    statistics = draw(3, 20, 30, tokens=200)
    found = solve(statistics, rank=rank, use_fisher=False, variance_weight=0.0, normalize=False, gamma=1.0)
    left, singular, right = torch.linalg.svd(statistics.gradient, full_matrices=False)
    best = -(left[:, :rank] * singular[:rank]) @ right[:rank]
    assert relative_error(product(found), best) < 1e-6
    projector = found.lora_a.double().T @ found.lora_a.double()
    torch.testing.assert_close(projector, right[:rank].T @ right[:rank], rtol=0, atol=1e-5)


def test_without_bias_a_spans_the_top_eigenvectors_of_the_input_moment() -> None:
    """Whatever the gradient is."""
    statistics = draw(3, 20, 30, tokens=200)
    found = solve(statistics, bias_weight=0.0, a_norm=1.0)
    top = torch.linalg.eigh(statistics.input_moment).eigenvectors[:, -8:].flip(1)
    torch.testing.assert_close(found.lora_a.double().abs(), top.T.abs(), rtol=0, atol=1e-5)


def test_rows_of_a_are_orthogonal_of_the_norm_asked_for_and_the_product_does_not_depend_on_it() -> None:
    statistics = draw(5, 16, 24, tokens=100)
    plain = solve(statistics)
    torch.testing.assert_close(plain.lora_a @ plain.lora_a.T, torch.eye(8) / 1024, rtol=0, atol=1e-9)
    for a_norm in (1e-3, 0.5773, 1.0, 40.0):
        found = solve(statistics, a_norm=a_norm)
        torch.testing.assert_close(
            found.lora_a @ found.lora_a.T, torch.eye(8) * a_norm**2, rtol=0, atol=1e-6 * a_norm**2
        )
        assert relative_error(product(found), product(plain)) < 1e-6


def test_balanced_factors_have_equal_gram_matrices_and_the_same_product() -> None:
    """Both are the singular values of the product, over the scale that gamma gives them."""
    statistics = draw(5, 16, 24, tokens=100)
    plain, balanced = solve(statistics), solve(statistics, balance=True)
    assert relative_error(product(balanced), product(plain)) < 1e-6
    gram_a, gram_b = balanced.lora_a @ balanced.lora_a.T, balanced.lora_b.T @ balanced.lora_b
    torch.testing.assert_close(gram_a, gram_b, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(gram_a.diag().double(), torch.linalg.svdvals(product(plain))[:8], rtol=1e-4, atol=1e-9)


def test_the_largest_entry_of_each_row_of_a_is_positive() -> None:
    found = solve(draw(5, 16, 24, tokens=100))
    assert bool((found.lora_a.gather(1, found.lora_a.abs().argmax(dim=1, keepdim=True)) > 0).all())


class TestNothingDependsOnChance:
    def test_the_same_layer_gives_the_same_bits_whatever_was_solved_before(self) -> None:
        statistics = draw(5, 30, 50, tokens=200)
        first = solve(statistics)
        torch.manual_seed(123)
        solve(draw(6, 10, 20, tokens=50), name="another")
        second = solve(statistics)
        assert torch.equal(first.lora_a, second.lora_a)
        assert torch.equal(first.lora_b, second.lora_b)

    @pytest.mark.parametrize("name", ["defaults", "without bias", "theorem", "much variance", "output damping"])
    def test_seed_and_name_change_the_start_and_not_the_answer(self, name: str) -> None:
        statistics = draw(5, 30, 50, tokens=200)
        one, other = solve(statistics, **ABLATIONS[name]), solve(statistics, seed=99, name="layer 2", **ABLATIONS[name])
        assert one.stats is not None
        assert other.stats is not None
        assert one.stats.residual != other.stats.residual  # another way was gone
        assert relative_error(product(one), product(other)) < 1e-6
        assert one.stats.eigenvalues == pytest.approx(other.stats.eigenvalues, rel=1e-6)

    def test_a_shared_factor_gives_what_a_factor_of_one_s_own_gives(self) -> None:
        """q, k and v read one input: the factor must come out of each solve as it went in."""
        statistics, config = draw(5, 30, 50, tokens=200), SolveConfig()
        shared = factorize(statistics)
        assert shared is not None
        before = lower_factor(shared.bands)
        for _ in range(3):
            found = solve_layer(
                "layer",
                shared,
                [statistics.gradient],
                statistics.output_moment,
                config,
                population_size=POPULATION,
                seed=0,
            )
            assert torch.equal(found.lora_b, solve(statistics).lora_b)
        assert torch.equal(lower_factor(shared.bands), before)

    def test_the_statistics_are_not_changed(self) -> None:
        statistics = draw(5, 30, 50, tokens=200)
        before = draw(5, 30, 50, tokens=200)
        solve(statistics)
        assert torch.equal(statistics.gradient, before.gradient)
        assert torch.equal(statistics.output_moment, before.output_moment)


class TestScales:
    """Gradients of real models are as small as 1e-12, activations as large as 1e3; neither is a reason to be wrong."""

    @pytest.mark.parametrize("outputs", [1e-12, 1e-6, 1e6, 1e12])
    @pytest.mark.parametrize("inputs", [1e-6, 1.0, 1e4])
    @pytest.mark.parametrize("ratio", [None, 0.1])
    def test_the_dense_solution_is_found_at_any_scale(self, inputs: float, outputs: float, ratio: float | None) -> None:
        statistics = draw(5, 20, 30, tokens=200).scaled(inputs, outputs)
        options = {"output_damping_ratio": ratio}
        # over 16 orders of magnitude the variance term wins or loses entirely: then the top of Z, or of D
        expected = dense(statistics, **options)
        found = solve(statistics, **options)
        assert found.status is SolveStatus.OK
        assert expected.relative_gap(8) > 1e-12
        if expected.relative_gap(8) > 1e-8:  # else dense eigh itself cannot tell them apart
            assert relative_error(product(found), expected.product) < 1e-4
        v = found.lora_a.double() * 32
        objective = float(torch.trace(v @ expected.omega @ v.T))
        assert objective == pytest.approx(float(expected.eigenvalues[:8].sum()), rel=1e-6)

    def test_a_relative_output_damping_makes_the_result_independent_of_the_loss_scale(self) -> None:
        """D scales inversely, and normalization takes that out; without variance nothing is left that could differ."""
        statistics = draw(5, 20, 30, tokens=200)
        options = {"output_damping_ratio": 0.1, "variance_weight": 0.0}
        plain = product(solve(statistics, **options))
        for scale in (1e-15, 1e-9, 1e9):
            assert relative_error(product(solve(statistics.scaled(outputs=scale), **options)), plain) < 1e-6


class TestDamping:
    @pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e6, 1e9])
    @pytest.mark.parametrize("outlier", [1.0, 30.0, 1000.0])
    def test_a_float32_sum_of_too_few_tokens_is_damped_until_it_can_be_factorized_and_says_so(
        self, scale: float, outlier: float
    ) -> None:
        """Rounding leaves negative eigenvalues of about 1e-7 of the largest one, at every scale of the activations."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(50, 300, generator=generator)
        x[:, 3] *= outlier
        x *= scale**0.5
        moment = (x.T @ x) / 50
        smallest = float(torch.linalg.eigvalsh(moment.double())[0])
        assert smallest < 0
        factor = prepare_input_factor(Cut(moment), 1e-6, ("layer",))
        assert factor is not None
        assert (factor.raises > 0) == (factor.damping > 1e-6)
        assert factor.damping >= min(1e-6, -smallest)
        assert factor.damping <= 1e-4 * factor.scale
        lower = lower_factor(factor.bands)
        damped = moment.double() + factor.damping * torch.eye(300, dtype=torch.float64)
        assert relative_error(lower @ lower.T * factor.scale, damped) < 1e-6
        if factor.raises:
            config = SolveConfig()
            gradient = torch.randn(20, 300, generator=generator, dtype=torch.float64)
            found = solve_layer("layer", factor, [gradient], torch.ones(20), config, population_size=1, seed=0)
            assert found.status in (SolveStatus.DAMPED, SolveStatus.UNCONVERGED)
            assert found.stats is not None
            assert found.stats.damping == factor.damping

    def test_what_the_damping_was_raised_to_is_what_is_solved_with(self) -> None:
        generator = torch.Generator().manual_seed(1)
        x = 10 * torch.randn(20, 60, generator=generator)
        moment = ((x.T @ x) / 20).double()
        lowered = moment - (0.0004 + float(torch.linalg.eigvalsh(moment)[0])) * torch.eye(60, dtype=torch.float64)
        gradient = torch.randn(30, 60, generator=generator, dtype=torch.float64)
        statistics = Statistics(gradient, lowered, torch.rand(30, generator=generator, dtype=torch.float64))
        found = solve(statistics)
        assert found.status is SolveStatus.DAMPED
        assert found.stats is not None
        assert found.stats.damping == pytest.approx(0.001)  # ten times 1e-6, and again, and again
        assert found.stats.output_damping == 1e-6  # that factor needed none
        y, z = statistics.output_moment + 1e-6, lowered + found.stats.damping * torch.eye(60, dtype=torch.float64)
        displacement = -torch.linalg.inv(z) @ gradient.T / y
        sigma = float(torch.linalg.matrix_norm(displacement, ord=2))
        assert found.stats.displacement_norm == pytest.approx(sigma, rel=1e-6)

    def test_a_well_conditioned_moment_is_read_once_and_never_damped_more(self) -> None:
        moment = Cut(draw(5, 20, 30, tokens=200).input_moment, band_rows=8)
        factor = prepare_input_factor(moment, 1e-3, ("layer",))
        assert factor is not None
        assert (factor.damping, factor.raises, moment.reads) == (1e-3, 0, [0, 1, 2, 3])

    @pytest.mark.parametrize("smallest", [-0.02, -0.3, -5.0])
    def test_an_indefinite_matrix_is_no_second_moment_however_much_damping_would_hide_it(self, smallest: float) -> None:
        vectors = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[
            0
        ]
        values = torch.ones(40, dtype=torch.float64)
        values[0] = smallest
        matrix = vectors * values @ vectors.T
        assert bool((matrix.diagonal() > 0).all())
        with pytest.raises(NumericalError, match=r"^layer: the input moment is not positive semidefinite .*damaged$"):
            prepare_input_factor(Cut(matrix), 1e-6, ("layer", "other"))

    def test_a_negative_diagonal_is_damage(self) -> None:
        matrix = torch.eye(5, dtype=torch.float64)
        matrix[2, 2] = -0.5
        with pytest.raises(NumericalError, match=r"^layer: the input moment has a negative diagonal"):
            prepare_input_factor(Cut(matrix), 1e-6, ("layer",))
        with pytest.raises(NumericalError, match=r"negative diagonal"):
            prepare_input_factor(Cut(-matrix), 1e-6, ("layer",))

    def test_a_zero_diagonal_with_something_beside_it_is_damage_and_not_a_layer_without_input(self) -> None:
        matrix = torch.zeros(5, 5, dtype=torch.float64)
        matrix[3, 1] = 0.5
        with pytest.raises(NumericalError, match=r"^layer: the input moment"):
            prepare_input_factor(Cut(matrix), 1e-6, ("layer",))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [(0, 0), (7, 2), (29, 29), (29, 0)])
    def test_a_moment_that_is_not_finite_is_refused_by_name(self, value: float, place: tuple[int, int]) -> None:
        moment = draw(5, 20, 30, tokens=200).input_moment
        moment[place] = value
        with pytest.raises(NumericalError, match=r"^layer: the input moment is not (finite|positive)") as caught:
            prepare_input_factor(Cut(moment), 1e-6, ("layer",))
        assert "finite" in str(caught.value)


class TestNothingToSolve:
    @pytest.mark.parametrize("name", ABLATIONS)
    def test_a_zero_gradient_gives_lora_s_own_start(self, name: str) -> None:
        statistics = draw(5, 30, 50, tokens=200)
        statistics.gradient.zero_()
        found = solve(statistics, **ABLATIONS[name])
        rank = ABLATIONS[name].get("rank", 8)
        assert found.status is SolveStatus.ZERO
        assert found.stats is None
        assert found.summary() == {"status": "zero"}
        assert torch.equal(found.lora_b, torch.zeros(30, rank))
        # kaiming_uniform_ with a = sqrt(5), as PEFT does it, is uniform in +-1/sqrt(d_in)
        assert found.lora_a.shape == (rank, 50)
        assert float(found.lora_a.abs().max()) <= 1 / math.sqrt(50)
        if rank > 1:
            assert float(found.lora_a.std()) == pytest.approx(1 / math.sqrt(3 * 50), rel=0.1)
        other = solve(statistics, seed=1, **ABLATIONS[name])
        assert not torch.equal(other.lora_a, found.lora_a)
        assert torch.equal(solve(statistics, **ABLATIONS[name]).lora_a, found.lora_a)

    def test_an_input_that_was_always_zero_gives_lora_s_own_start(self) -> None:
        statistics = Statistics(torch.zeros(4, 9).double(), torch.zeros(9, 9).double(), torch.zeros(4).double())
        assert factorize(statistics) is None
        found = solve(statistics, rank=2)
        assert found.status is SolveStatus.ZERO
        assert bool(torch.isfinite(found.lora_a).all())

    def test_a_dead_output_channel_is_no_harm(self) -> None:
        statistics = draw(5, 30, 50, tokens=200)
        statistics.gradient[7], statistics.output_moment[7] = 0, 0
        assert_is_dense_answer(statistics)
        assert not bool(solve(statistics).lora_b[7].any())

    def test_a_dead_input_channel_is_no_harm(self) -> None:
        statistics = draw(5, 30, 50, tokens=200)
        statistics.gradient[:, 7], statistics.input_moment[7], statistics.input_moment[:, 7] = 0, 0, 0
        assert_is_dense_answer(statistics)
        assert float(solve(statistics).lora_a[:, 7].abs().max()) < 1e-9

    def test_a_gradient_of_lower_rank_than_wanted_is_copied_whole(self) -> None:
        """The vectors that fill A up see no displacement, so the product is exact although they are open."""
        statistics = draw(5, 30, 50, tokens=200)
        thin = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        statistics.gradient = thin @ thin.T @ statistics.gradient
        found = solve(statistics, variance_weight=0.0)
        expected = dense(statistics, variance_weight=0.0)
        assert relative_error(product(found), expected.displacement.T / 1024) < 1e-6
        torch.testing.assert_close(found.lora_a @ found.lora_a.T, torch.eye(8) / 1024, rtol=0, atol=1e-9)


class TestWhatIsNotFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("which", ["gradient", "output_moment"])
    def test_statistics_that_are_not_finite_are_refused_by_name(self, value: float, which: str) -> None:
        statistics = draw(5, 30, 50, tokens=200)
        getattr(statistics, which).view(-1)[-1] = value
        with pytest.raises(NumericalError, match=r"^layer: the gradient statistics are not finite"):
            solve(statistics)

    def test_an_output_factor_that_is_not_positive_is_refused(self) -> None:
        statistics = draw(5, 30, 50, tokens=200)
        statistics.output_moment[:20] = 0
        with pytest.raises(NumericalError, match=r"^layer: the damped output factor is not positive; the median"):
            solve(statistics, output_damping_ratio=0.1)
        assert solve(statistics).status is SolveStatus.OK  # an absolute damping is positive whatever the median
        statistics.output_moment[3] = -1.0
        with pytest.raises(NumericalError, match=r"^layer: the damped output factor is not positive"):
            solve(statistics)

    def test_a_solution_beyond_float32_is_refused_and_not_written_as_infinity(self) -> None:
        statistics = draw(5, 30, 50, tokens=200).scaled(inputs=1e-9, outputs=1e-25)
        options = {
            "normalize": False,
            "gamma": 1e-20,
            "output_damping_ratio": 1e-3,
            "damping": 1e-20,
            "variance_weight": 0.0,
        }
        assert float(dense(statistics, **options).lora_b.abs().max()) > torch.finfo(torch.float32).max
        with pytest.raises(NumericalError, match=r"^layer: the solution is not finite in float32"):
            solve(statistics, **options)


def test_eigenvalues_on_both_sides_of_the_cut_are_those_of_minus_the_guidance_matrix() -> None:
    """Of the very matrix of eq. 19, in its own units: a number in the report means the same in every run."""
    statistics = draw(5, 20, 30, tokens=200)
    for name in ("defaults", "theorem", "without bias", "little bias", "without variance", "output damping"):
        stats = solve(statistics, **ABLATIONS[name]).stats
        expected = -dense(statistics, **ABLATIONS[name]).eigenvalues
        assert stats is not None
        assert stats.eigenvalues == pytest.approx(expected[:8].tolist(), rel=1e-6)
        assert list(stats.eigenvalues) == sorted(stats.eigenvalues, reverse=True)
        assert stats.next_eigenvalue == pytest.approx(float(expected[8]), rel=1e-2)
        assert stats.eigenvalues[-1] > stats.next_eigenvalue


def test_a_cut_through_equal_eigenvalues_shows_in_the_report() -> None:
    """A displacement of eight equal singular values, and rank 4: any four will do, and the numbers say so."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(20, 8, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(30, 8, generator=generator, dtype=torch.float64))[0]
    statistics = Statistics(left @ right.T, torch.eye(30, dtype=torch.float64), torch.ones(20, dtype=torch.float64))
    stats = solve(statistics, rank=4, variance_weight=0.0).stats
    assert stats is not None
    assert stats.next_eigenvalue == pytest.approx(stats.eigenvalues[-1], rel=1e-9)
    assert stats.eigenvalues == pytest.approx([1.0] * 4, rel=1e-9)


def test_eigenvectors_that_have_not_settled_are_unconverged(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = draw(5, 90, 160, tokens=400)
    assert solve(statistics).status is SolveStatus.OK
    monkeypatch.setattr(eigen, "largest_eigenpairs", partial(eigen.largest_eigenpairs, max_steps=2))
    found = solve(statistics)
    assert found.status is SolveStatus.UNCONVERGED
    assert bool(product(found).isfinite().all())


def test_every_status_has_a_sentence_of_advice() -> None:
    assert {status.value for status in SolveStatus} == {"ok", "damped", "noisy", "zero", "unconverged", "skipped"}
    for status in SolveStatus:
        assert status.advice.endswith(".")
        assert len({other.advice for other in SolveStatus}) == len(SolveStatus)


LOUD_GRADIENTS = (1.0, 0.3, 0.1, 0.08, 0.065, 0.05, 0.04, 0.03, 0.025, 0.02, 0.01)


def two_parts(
    inputs: tuple[int, int], tokens: tuple[int, int], loudness: float, size: float, outputs: int = 30
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and output gradients of two kinds of tokens, which share neither channels nor outputs.

    The inputs of the first are `loudness` times as large, and their gradients `size` times.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(sum(tokens), sum(inputs))
    g = torch.zeros(sum(tokens), 2 * outputs)
    x[: tokens[0], : inputs[0]] = loudness * torch.randn(tokens[0], inputs[0], generator=generator)
    x[tokens[0] :, inputs[0] :] = torch.randn(tokens[1], inputs[1], generator=generator)
    g[: tokens[0], :outputs] = size * torch.randn(tokens[0], outputs, generator=generator)
    g[tokens[0] :, outputs:] = torch.randn(tokens[1], outputs, generator=generator)
    return x, g


@pytest.mark.parametrize("outputs", [1, 30])
@pytest.mark.parametrize(
    "options", [{"bias_weight": 0.0}, {}, {"variance_weight": 1e3}, {"variance_weight": 1e5}], ids=str
)
def test_the_norm_of_the_displacement_is_its_own_wherever_the_eigenvectors_lie(
    options: dict[str, float], outputs: int
) -> None:
    """Eight loud channels, at which all eigenvectors lie where the variance decides, may be small in the displacement.

    Their singular values cross those of the others as their gradients shrink.
    """
    for size in LOUD_GRADIENTS:
        x, g = (part.double() for part in two_parts((8, 60), (200, 200), 10.0, size, outputs))
        statistics = Statistics(g.T @ x / len(x), x.T @ x / len(x), (g * g).mean(dim=0))
        found, expected = solve(statistics, **options), dense(statistics, **options)
        assert found.stats is not None
        assert found.stats.displacement_norm == pytest.approx(expected.sigma, rel=1e-6)
        assert relative_error(product(found), expected.product) < 1e-5


def test_the_norm_of_the_displacement_needs_no_steps_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the eigenvectors hold its singular vector, as they nearly always do, that is seen by one product."""
    ranks: list[int] = []
    widths: list[int] = []
    plain = eigen.largest_eigenpairs

    def counted(apply: Any, start: torch.Tensor, rank: int, **options: Any) -> Any:
        ranks.append(rank)
        widths.append(start.shape[1])
        return plain(apply, start, rank, **options)

    monkeypatch.setattr(eigen, "largest_eigenpairs", counted)
    statistics = draw(3, 90, 160, 400)
    for options in ({"variance_weight": 0.0}, {"variance_weight": 1e-4}):
        found = solve(statistics, **options)
        assert found.stats is not None
        assert found.stats.displacement_norm == pytest.approx(float(dense(statistics, **options).sigma), rel=1e-8)
    assert ranks == [8, 8]
    solve(statistics, variance_weight=1e5)
    assert ranks == [8, 8, 8, 1]
    assert set(widths) == {16}  # as planned


@pytest.mark.parametrize(("bias_weight", "scales"), [(1e-310, (1, 1)), (1e-300, (1e-12, 1e12))])
def test_numbers_that_leave_the_range_are_refused_by_name(bias_weight: float, scales: tuple[float, float]) -> None:
    statistics = draw(0, 30, 40, 200).scaled(*scales)
    with pytest.raises(NumericalError, match=r"layer: the displacement.* over- or underflows in float64"):
        solve(statistics, bias_weight=bias_weight)


@pytest.mark.parametrize("tokens", [400, 30], ids=["full rank", "rank deficient"])
@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
def test_with_the_inverse_of_a_small_factor_the_solution_is_what_it_is_without(
    options: dict[str, Any], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cholesky, "BLOCK_ROWS", 16)
    statistics = draw(3, 90, 60, tokens)

    def solved() -> tuple[InputFactor, LayerSolution]:
        factor = prepare_input_factor(Cut(statistics.input_moment, band_rows=60), 1e-6, ("layer",))
        assert isinstance(factor, InputFactor)
        gradient, moment = statistics.gradient.split(16), statistics.output_moment
        config = SolveConfig(**options)
        found = solve_layer("layer", factor, gradient, moment, config, population_size=POPULATION, seed=0)
        return factor, found

    with_inverse, found = solved()
    monkeypatch.setattr(input_factor, "INVERTED_SIZE", 59)
    without, plain = solved()
    assert with_inverse.inverse is not None
    assert without.inverse is None
    block = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = float(without.solve(block).abs().max())
    torch.testing.assert_close(with_inverse.solve(block), without.solve(block), rtol=0, atol=1e-7 * size)
    assert relative_error(product(found), product(plain)) < 1e-6
