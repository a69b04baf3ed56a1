"""Statistics at the edge of what can be solved: each ends in a named status or a named error, never in NaN.

What is stored is put there as the first pass does it, then solved as a run does it: `Solver` over a unit. Corruption is
written into the store before its commit, so that no checksum gives it away.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamda.config import SolveConfig
from streamda.errors import DamagedError, MismatchError, NumericalError, StreamdaError
from streamda.layers import BlockSpec, InputGroup, LinearSpec
from streamda.panels import block_panels
from streamda.rundir import RunDirectory
from streamda.solutions import read_factors, read_summaries, solve_unit
from streamda.solve_stage import Solver
from streamda.store import BlockStatisticsReader, BlockStatisticsWriter, stats_unit
from tests.test_store import set_tile

CPU = torch.device("cpu")
D_IN, D_OUT, RANK, NUM_SAMPLES = 24, 20, 4, 8
Q, K = "h.0.q", "h.0.k"
SPEC = BlockSpec(
    0, "h.0", (LinearSpec(Q, D_IN, D_OUT), LinearSpec(K, D_IN, D_OUT)), (InputGroup((Q, K), D_IN),)
)  # fmt: skip


@dataclasses.dataclass
class Sums:
    """What the first pass sums over a block, in float32; by name of the layer where it has its own."""

    input_moment: Tensor
    gradient: dict[str, Tensor]
    output_moment: dict[str, Tensor]
    num_tokens: dict[str, int]
    num_samples: dict[str, int] = dataclasses.field(default_factory=lambda: {Q: NUM_SAMPLES, K: NUM_SAMPLES})
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)


def sums_of(x: Tensor, g: Tensor) -> Sums:
    """From inputs [tokens, d_in] and output gradients [tokens, d_out]; k's gradients are q's, turned round."""
    x, g = x.float(), g.float()
    gradients = {Q: g, K: g.flip(1)}
    return Sums(
        x.T @ x,
        {name: each.T @ x for name, each in gradients.items()},
        {name: each.square().sum(0) for name, each in gradients.items()},
        {Q: len(x), K: len(x)},
    )


def draw(tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, D_IN, generator=generator), torch.randn(tokens, D_OUT, generator=generator)


def write(run: RunDirectory, sums: Sums, patch: Callable[[BlockStatisticsWriter], None] | None = None) -> None:
    with run.units.create(stats_unit(0)) as draft:
        writer = BlockStatisticsWriter(draft.path, SPEC, "none")
        for panel in block_panels(SPEC):
            values = sums.input_moment if panel.statistic == "input_moment" else (
                getattr(sums, panel.statistic)[panel.module]
            )  # fmt: skip
            if bool(values.isfinite().all()):
                writer.write_panel(panel, values[panel.start : panel.stop, ..., : panel.columns].clone()
                                   if values.ndim > 1 else values.clone())  # fmt: skip
        if patch is not None:
            patch(writer)
        for name in (Q, K):
            facts = {"num_tokens": sums.num_tokens[name], "num_samples": sums.num_samples[name], "weight_norm": 1.0}
            writer.write_facts(name, facts | ({"skipped": sums.skipped[name]} if name in sums.skipped else {}))
        draft.metadata |= {"prefix": SPEC.prefix, "modules": [Q, K]}


def solver(**options: Any) -> Solver:
    skip = options.pop("skip_bad_layers", False)
    return Solver(SolveConfig(rank=RANK, **options), 1000, 0, CPU, skip_bad_layers=skip)


@contextmanager
def a_run(folder: Path) -> Iterator[RunDirectory]:
    with RunDirectory.open(folder, {"model": {"id": "m"}}, settings={}) as run:
        yield run


def solve(
    folder: Path, sums: Sums, patch: Callable[[BlockStatisticsWriter], None] | None = None, **options: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[Tensor, Tensor]]]:
    """Status and facts by layer, and the factors, all of them seen to be finite."""
    with a_run(folder) as run:
        write(run, sums, patch)
        solver(**options).solve(run.units, BlockStatisticsReader(run.units, 0))
        factors = read_factors(run.units, 0)
        summaries = read_summaries(run.units, 0)
    for lora_a, lora_b in factors.values():
        assert bool(lora_a.isfinite().all())
        assert bool(lora_b.isfinite().all())
    assert factors.keys() == {name for name, facts in summaries.items() if facts["status"] != "skipped"}
    return summaries, factors


def statuses(summaries: dict[str, dict[str, Any]]) -> set[str]:
    return {facts["status"] for facts in summaries.values()}


SOLVED = {"ok", "damped", "unconverged"}


def _scaled(x_scale: float, g_scale: float) -> Callable[[], Sums]:
    return lambda: sums_of(draw()[0] * x_scale, draw()[1] * g_scale)


def _one_token() -> Sums:
    return sums_of(*draw(1))


def _dead_channels() -> Sums:
    x, g = draw()
    x[:, 3:9] = 0
    g[:, :5] = 0
    return sums_of(x, g)


def _outlier() -> Sums:
    x, g = draw()
    x[:, 5] *= 1e4
    return sums_of(x, g)


def _one_direction() -> Sums:
    x, g = draw()
    return sums_of(x[:, :1] * torch.ones(D_IN), g)


def _equal_eigenvalues() -> Sums:
    x = torch.eye(D_IN).repeat(10, 1)
    g = torch.eye(D_OUT, D_IN).repeat(1, 10).T.contiguous()
    return sums_of(x, g)


# what an honest run can come upon: the solution exists and must be finite, whatever it is worth
HONEST: dict[str, tuple[Callable[[], Sums], set[str]]] = {
    "fewer tokens than inputs": (lambda: sums_of(*draw(9)), SOLVED),
    "one token": (_one_token, SOLVED),
    "one direction": (_one_direction, SOLVED),
    "dead channels": (_dead_channels, SOLVED),
    "one outlier channel": (_outlier, SOLVED),
    "equal eigenvalues": (_equal_eigenvalues, SOLVED),
    "inputs near 1e-15": (_scaled(1e-15, 1), SOLVED),
    "inputs near 1e-19, their moment a denormal": (_scaled(1e-20, 1e10), SOLVED),
    "inputs near 1e12": (_scaled(1e12, 1e-10), SOLVED),
    "gradients near 1e-15": (_scaled(1, 1e-15), SOLVED),
    "gradients near 1e-19, their squares denormals": (_scaled(1, 1e-20), SOLVED),
    "gradients near 1e-25, their squares zero": (_scaled(1, 1e-25), SOLVED),
    "gradients near 1e12": (_scaled(1e-10, 1e12), SOLVED),
    "no gradient": (_scaled(1, 0), {"zero"}),
    "no input": (_scaled(0, 1), {"zero"}),
    "nothing": (_scaled(0, 0), {"zero"}),
}


@pytest.mark.parametrize(
    ("case", "damping"),
    [(case, 1e-6) for case in HONEST]
    + [pytest.param(case, damping, marks=pytest.mark.faults) for case in HONEST for damping in (1e-30, 1e-2, 1e3)],
)
def test_statistics_of_any_kind_end_in_a_finite_adapter_with_a_status(
    case: str, damping: float, tmp_path: Path
) -> None:
    make, expected = HONEST[case]
    summaries, factors = solve(tmp_path, make(), damping=damping)
    assert statuses(summaries) <= expected
    for name, facts in summaries.items():
        assert facts["num_tokens"] == make().num_tokens[name]
        if "zero" not in expected:
            assert math.isfinite(facts["residual"])
            assert facts["damping"] >= damping
            assert float(factors[name][1].abs().max()) > 0  # no standard start in disguise


def test_no_tokens_at_all_is_the_standard_start(tmp_path: Path) -> None:
    """An expert that the router never chose."""
    zero = sums_of(*draw(1))
    sums = Sums(
        torch.zeros_like(zero.input_moment),
        {name: torch.zeros_like(value) for name, value in zero.gradient.items()},
        {name: torch.zeros_like(value) for name, value in zero.output_moment.items()},
        {Q: 0, K: 0},
    )
    summaries, factors = solve(tmp_path, sums)
    assert statuses(summaries) == {"zero"}
    assert all(not bool(lora_b.any()) and bool(lora_a.any()) for lora_a, lora_b in factors.values())


@pytest.mark.parametrize("case", ["fewer tokens than inputs", "one outlier channel", "equal eigenvalues"])
def test_hard_cases_give_the_same_bits_again(case: str, tmp_path: Path) -> None:
    first = solve(tmp_path / "1", HONEST[case][0]())[1]
    second = solve(tmp_path / "2", HONEST[case][0]())[1]
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))
    for lora_a, _ in first.values():
        largest = lora_a.gather(1, lora_a.abs().argmax(1, keepdim=True))
        assert bool((largest > 0).all())


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("equal eigenvalues", D_IN),
        ("one direction", 1),
        ("one token", 1),
        ("fewer tokens than inputs", 9),
    ],
)
def test_the_effective_rank_tells_how_few_directions_were_seen(case: str, expected: float, tmp_path: Path) -> None:
    found = solve(tmp_path, HONEST[case][0]())[0][Q]["effective_rank"]
    assert found <= expected * (1 + 1e-6)
    assert found > 0.5 * expected


def test_the_effective_rank_is_of_the_whole_moment_whatever_its_bands(tmp_path: Path) -> None:
    sums = sums_of(*draw(40))
    found = []
    for tile in (2048, 7):
        with pytest.MonkeyPatch.context() as patch:
            set_tile(patch, tile)
            found.append(solve(tmp_path / str(tile), sums)[0][Q]["effective_rank"])
    values = torch.linalg.eigvalsh(sums.input_moment.double())
    expected = float(values.sum() ** 2 / values.square().sum())
    assert found == [pytest.approx(expected, rel=1e-6)] * 2


def _indefinite(smallest: float, tokens: int = 200) -> Sums:
    """The mean diagonal is one; one eigenvalue is `smallest`."""
    sums = sums_of(*draw(tokens))
    basis = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(1)).double())[0]
    values = torch.ones(D_IN).double()
    values[0] = smallest
    sums.input_moment = (basis * values @ basis.T * tokens).float()
    assert bool((sums.input_moment.diagonal() > 0).all())
    return sums


def _with_moment(change: Callable[[Tensor], None]) -> Callable[[], Sums]:
    def make() -> Sums:
        sums = sums_of(*draw())
        change(sums.input_moment)
        return sums

    return make


def _swap_sign_of_a_diagonal_entry(moment: Tensor) -> None:
    moment[3, 3] *= -1


def _swap_sign(moment: Tensor) -> None:
    moment *= -1


def _zero_diagonal(moment: Tensor) -> None:
    moment.diagonal().zero_()


def _few_tokens_damaged() -> Sums:
    sums = sums_of(*draw(5))
    sums.input_moment[:, 2] *= -1
    sums.input_moment[2, :] *= -1
    sums.input_moment[2, 2] *= 0.25
    return sums


# what no sum of squares can be: corruption or a bug, which damping must not hide
CORRUPT: dict[str, Callable[[], Sums]] = {
    "an eigenvalue of -0.002": lambda: _indefinite(-0.002),
    "an eigenvalue of -0.02": lambda: _indefinite(-0.02),
    "an eigenvalue of -0.3": lambda: _indefinite(-0.3),
    "an eigenvalue of -0.3, and fewer tokens than inputs": lambda: _indefinite(-0.3, tokens=9),
    "few tokens and a diagonal entry too small for its row": _few_tokens_damaged,
    "a negative diagonal entry": _with_moment(_swap_sign_of_a_diagonal_entry),
    "a negative trace": _with_moment(_swap_sign),
    "a zero diagonal with entries beside it": _with_moment(_zero_diagonal),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_matrix_that_is_no_second_moment_is_refused_and_never_damped_away(case: str, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=rf"^({Q}|{K}): ") as caught:
        solve(tmp_path, CORRUPT[case]())
    assert caught.value.exit_code == 9


class TestSkippedLayers:
    def test_what_cannot_be_solved_is_left_out_and_says_why(self, tmp_path: Path) -> None:
        summaries, factors = solve(tmp_path, CORRUPT["an eigenvalue of -0.3"](), skip_bad_layers=True)
        assert statuses(summaries) == {"skipped"}
        assert factors == {}
        for facts in summaries.values():
            assert "not positive semidefinite" in facts["reason"]
            assert facts["num_samples"] == NUM_SAMPLES

    def test_a_layer_may_be_left_out_without_the_one_that_shares_its_input(self, tmp_path: Path) -> None:
        """Also the first of its group, under whose name the input moment is stored."""
        plain = solve(tmp_path / "plain", sums_of(*draw()))[1]
        for name, other in ((Q, K), (K, Q)):
            sums = sums_of(*draw())
            sums.gradient[name].fill_(math.nan)  # and so never written
            sums.skipped[name] = "its gradient holds NaN or Inf"
            summaries, factors = solve(tmp_path / name, sums, skip_bad_layers=True)
            assert summaries[name]["status"] == "skipped"
            assert summaries[name]["reason"] == "its gradient holds NaN or Inf"
            assert factors.keys() == {other}
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(factors[other], plain[other], strict=True))

    def test_without_the_flag_they_are_an_error(self, tmp_path: Path) -> None:
        sums = sums_of(*draw())
        sums.skipped[K] = "its gradient holds NaN or Inf"
        with pytest.raises(NumericalError, match=rf"^{K}: its gradient holds NaN or Inf; --skip-bad-layers leaves"):
            solve(tmp_path, sums)

    def test_damage_is_never_skipped(self, tmp_path: Path) -> None:
        sums = sums_of(*draw())
        sums.gradient[K].fill_(math.nan)  # never written, and no reason given: a chunk is missing
        with pytest.raises(DamagedError):
            solve(tmp_path, sums, skip_bad_layers=True)

    def test_a_block_solved_with_the_flag_is_not_taken_for_one_without_it(self, tmp_path: Path) -> None:
        sums = CORRUPT["an eigenvalue of -0.3"]()
        with a_run(tmp_path) as run:
            write(run, sums)
            lenient, strict = solver(skip_bad_layers=True), solver()
            assert lenient.digest == strict.digest
            lenient.solve(run.units, BlockStatisticsReader(run.units, 0))
            assert lenient.is_solved(run.units, 0)
            assert not strict.is_solved(run.units, 0)  # and so it is solved again, which fails
            assert solve_unit(0) not in run.units
            lenient.solve(run.units, BlockStatisticsReader(run.units, 0))
            run.units.drop(stats_unit(0))
            with pytest.raises(MismatchError, match="--skip-bad-layers"):
                strict.is_solved(run.units, 0)

    def test_a_block_without_bad_layers_serves_both(self, tmp_path: Path) -> None:
        with a_run(tmp_path) as run:
            write(run, sums_of(*draw()))
            solver(skip_bad_layers=True).solve(run.units, BlockStatisticsReader(run.units, 0))
            assert solver().is_solved(run.units, 0)


class TestStore:
    @pytest.mark.parametrize(("change", "damaged"), [(1e-2, True), (2e-5, True), (1e-7, False)])
    @pytest.mark.parametrize("place", [(1, 7), (7, 1)])
    def test_a_moment_that_is_not_symmetric_is_damage(
        self, place: tuple[int, int], change: float, damaged: bool, tmp_path: Path
    ) -> None:
        sums = sums_of(*draw())
        largest = float(sums.input_moment.abs().max())

        def patch(writer: BlockStatisticsWriter) -> None:
            array: Any = writer._groups[Q]["input_moment_sum"]
            array[place] = array[place] + change * largest

        if not damaged:
            solve(tmp_path, sums, patch)
            return
        with pytest.raises(DamagedError, match=rf"^{Q}: its stored input moment is not symmetric") as caught:
            solve(tmp_path, sums, patch)
        assert caught.value.exit_code == 10

    @pytest.mark.parametrize("tokens", [9, 200])
    def test_an_asymmetry_is_seen_in_the_last_band_and_with_few_tokens_too(self, tokens: int, tmp_path: Path) -> None:
        sums = sums_of(*draw(tokens))

        def patch(writer: BlockStatisticsWriter) -> None:
            array: Any = writer._groups[Q]["input_moment_sum"]
            array[22, 21] = array[22, 21] + float(sums.input_moment.abs().max())

        with pytest.MonkeyPatch.context() as tiles:
            set_tile(tiles, 7)
            with pytest.raises(DamagedError, match="not symmetric"):
                solve(tmp_path, sums, patch, skip_bad_layers=True)

    @pytest.mark.parametrize(
        "change",
        [
            {"num_tokens": {Q: 200, K: 199}},
            {"num_samples": {Q: 8, K: 7}},
            {"num_tokens": {Q: -1, K: -1}},
            {"num_samples": {Q: 0, K: 0}},
            {"num_tokens": {Q: 200.5, K: 200.5}},
            {"num_samples": {Q: None, K: None}},
        ],
    )
    def test_counts_that_contradict_each_other_are_damage(self, change: dict[str, Any], tmp_path: Path) -> None:
        sums = dataclasses.replace(sums_of(*draw()), **change)
        with pytest.raises(DamagedError, match=rf"{Q} (has counts|share an input but not its counts)") as caught:
            solve(tmp_path, sums, skip_bad_layers=True)
        assert caught.value.exit_code == 10

    def test_a_statistic_that_was_never_written_is_damage(self, tmp_path: Path) -> None:
        sums = sums_of(*draw())
        sums.output_moment[Q][2] = math.inf
        with pytest.raises(StreamdaError) as caught:
            solve(tmp_path, sums)
        assert caught.value.exit_code == 10

    def test_the_reader_gives_what_was_written(self, tmp_path: Path) -> None:
        """Or the tests above would test something else."""
        sums = sums_of(*draw())
        with a_run(tmp_path) as run:
            write(run, sums)
            reader = BlockStatisticsReader(run.units, 0)
            moment = reader.input_moment(SPEC.groups[0], torch.float32, CPU)
            assert torch.equal(moment, sums.input_moment / 200)
            assert torch.equal(reader.gradient(K, torch.float32, CPU), sums.gradient[K] / NUM_SAMPLES)
