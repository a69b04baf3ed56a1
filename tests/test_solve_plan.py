"""A solution is cut to the memory there is, and not a bit of it depends on how."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from streamda import setup, solve_bytes, solve_plan
from streamda.config import RunConfig, SolveConfig
from streamda.errors import BudgetError
from streamda.layers import BlockSpec, InputGroup, LinearSpec
from streamda.memory import parse_size
from streamda.methods import input_factor
from streamda.panels import block_panels
from streamda.solve_bytes import band_bytes, few_tokens
from streamda.solve_plan import SolveLayout, keeps_rows, solve_layout
from streamda.solve_stage import Solver
from streamda.store import BlockStatisticsReader
from tests.models import make_config, make_samples, run_options, write_samples
from tests.test_store import CPU, a_run, block, draw, write

GB = 10**9


def test_bands_cover_the_lower_triangle() -> None:
    assert band_bytes(100) == [8 * 100 * 100]
    assert band_bytes(5000) == [8 * 2048 * 2048, 8 * 2048 * 4096, 8 * 904 * 5000]


@pytest.mark.parametrize(("d_in", "d_out"), [(576, 1536), (5120, 13824), (13824, 5120), (28672, 8192), (8192, 28672)])
def test_less_memory_gives_smaller_layouts_in_order_of_speed(d_in: int, d_out: int) -> None:
    many = 10**6

    def solve_layout(*args: Any) -> SolveLayout:
        return solve_plan.solve_layout(*args, many, min_tokens=many)

    best = solve_layout(d_in, d_out, 8, None)
    assert (best.bands_in_memory, best.gradient, best.spilled_bytes) == (len(band_bytes(d_in)), "float64", 0)
    smallest = solve_layout(d_in, d_out, 8, 0)
    assert smallest.num_bytes <= best.num_bytes
    capacity, seen = best.num_bytes, []
    while capacity >= smallest.num_bytes:
        layout = solve_layout(d_in, d_out, 8, capacity)
        assert layout.num_bytes <= capacity
        seen.append((layout.gradient, -layout.bands_in_memory))
        capacity = layout.num_bytes - 1
    assert solve_layout(d_in, d_out, 8, capacity).num_bytes > capacity
    assert len(set(seen)) == len(seen)
    assert len(seen) > 3 or d_in < 2048


def test_a_70b_down_projection_fits_where_two_float64_copies_of_its_moment_would_not() -> None:
    layout = solve_layout(28672, 8192, 8, 6 * GB)
    assert layout.spilled_bytes == 0
    assert 28672**2 * 8 > 6 * GB > layout.num_bytes
    assert solve_layout(28672, 8192, 8, 0).num_bytes < 2 * GB


def test_few_tokens_need_no_room_for_a_cholesky_factor() -> None:
    many, few = solve_layout(13824, 5120, 8, None, few_tokens(13824) + 1), solve_layout(13824, 5120, 8, None, 512)
    assert many == solve_layout(13824, 5120, 8, None)
    assert few.num_bytes < many.num_bytes - sum(band_bytes(13824)) // 2
    # one that is made all the same, for a gradient off the span, goes to a file
    assert (few.bands_in_memory, few.spilled_bytes) == (0, sum(band_bytes(13824)))


@pytest.mark.parametrize("skips", [False, True])
def test_all_layers_but_routed_ones_get_the_tokens_of_all_samples(skips: bool, tmp_path: Path) -> None:
    samples = make_samples()
    write_samples(tmp_path / "samples.jsonl", samples)
    make_config("llama").save_pretrained(tmp_path / "model")
    config = RunConfig.from_options(run_options(tmp_path, skip_bad_samples=skips, token_mask="labels"))
    prepared = setup.prepare(config, weights=False)
    labels = sum(int((label[1:] != -100).sum()) for _, label in samples)
    least = {group.min_tokens for spec in prepared.specs(64, keep_statistics=False) for group in spec.groups}
    assert least == {0 if skips else labels}
    group = dataclasses.replace(prepared.specs(64, keep_statistics=False)[0].groups[0], min_tokens=0)
    # called more than once, or on a part of the tokens
    assert prepared.workloads._counted(group, (), set(), 0).min_tokens == 0


@pytest.mark.parametrize(
    ("d_in", "d_out", "capacity"), [(4096, 16384, 646), (2048, 16384, 464), (2048, 8192, 324), (5120, 16384, 763)]
)
@pytest.mark.parametrize("least", [0, 300])
def test_whatever_tokens_a_layer_gets_its_solution_is_planned_for(
    d_in: int, d_out: int, capacity: int, least: int
) -> None:
    """The solver knows how many there are, the planner between what numbers: the faster way may be the larger one."""
    for budget in (None, 0, *range(capacity - 300, capacity + 300, 25)):
        room = None if budget is None else budget * 1_000_000
        planned = solve_layout(d_in, d_out, 8, room, 3000, min_tokens=least)
        for tokens in (max(least, 1), few_tokens(d_in), few_tokens(d_in) + 1, 3000):
            made = solve_layout(d_in, d_out, 8, room, tokens, min_tokens=tokens)
            assert made.num_bytes <= planned.num_bytes


def test_few_tokens_are_not_planned_for_where_there_are_more() -> None:
    few = few_tokens(2048)
    known, unknown = (solve_layout(2048, 2048, 8, None, 3000, min_tokens=least) for least in (few + 1, few))
    assert known.num_bytes < unknown.num_bytes
    assert known == solve_layout(2048, 2048, 8, None, 3000, min_tokens=3000)


@pytest.mark.parametrize("d_in", [1, 2, 100, 5000, 28672])
def test_few_is_fewer_than_inputs_and_a_bounded_span(d_in: int) -> None:
    assert 0 <= few_tokens(d_in) < min(d_in, 1025)
    assert few_tokens(d_in) * d_in <= 1 << 24


@pytest.mark.parametrize("few", [False, True])
def test_every_layout_solves_to_the_same_bits(few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (solve_plan, solve_bytes):
        monkeypatch.setattr(module, "PANEL_ROWS", 16)
    spec = block(70, 40)
    sums = draw(spec)
    if few:  # gradients on the span of the inputs, as those of the same tokens are
        for group in spec.groups:
            for name in group.modules:
                sums[name]["gradient"] @= sums[group.name]["input_moment"]
    else:
        for module in (solve_plan, solve_bytes, input_factor):
            monkeypatch.setattr(module, "few_tokens", lambda _d_in: 0)
    with a_run(tmp_path, tile=16) as run:
        write(run, spec, sums)
        results, largest = [], solve_layout(70, 40, 4, None).num_bytes
        layouts = {solve_layout(70, 40, 4, capacity): capacity for capacity in (None, *range(0, largest, 500))}
        wanted = [("float64", 5), ("float32", 5), ("streamed", 5), ("float32", 2), ("streamed", 0)]
        chosen = [capacity for each, capacity in layouts.items() if (each.gradient, each.bands_in_memory) in wanted]
        assert len(chosen) >= 4
        for capacity in chosen:
            solver = Solver(SolveConfig(rank=4), 1000, 0, CPU, capacity_bytes=capacity)
            solutions, _ = solver.solve_block(BlockStatisticsReader(run.units, 0), run.units.folder)
            # the other group has as many tokens as inputs
            wide = [s.stats for s in solutions if s.lora_a.shape[1] == 70]
            assert all(stats is not None and (stats.steps == 1) == few for stats in wide)
            results.append({s.name: (s.lora_a, s.lora_b) for s in solutions})
    for result in results[1:]:
        for name, factors in result.items():
            assert all(map(torch.equal, factors, results[0][name]))


class TestABudgetForSolvingAlone:
    def test_it_is_what_is_left_beside_the_process(self) -> None:
        left = 6 * GB - solve_plan.WORKSPACE_BYTES
        assert solve_plan.solve_capacity(6 * GB, [block(28672, 8192)], 8) == left
        assert solve_plan.solve_capacity(6 * GB, [block(28672, 8192)], 8, library_bytes=100) == left - 100

    def test_one_that_cannot_do_is_refused_with_the_one_that_can(self) -> None:
        spec = block(28672, 8192)
        with pytest.raises(BudgetError, match=r"budget of 1.00 GB is too small: these statistics need") as refusal:
            solve_plan.solve_capacity(GB, [spec], 8)
        smallest = parse_size(str(refusal.value).split("--max-gpu-mem ")[1].split(" ")[0])
        assert solve_layout(28672, 8192, 8, solve_plan.solve_capacity(smallest, [spec], 8)).num_bytes <= smallest


class TestRowsInPlaceOfSums:
    @pytest.mark.parametrize(
        ("tokens", "d_in", "widths", "kept"),
        [
            (0, 8192, [8192], False),
            (1, 8192, [8192], True),
            (512, 8192, [8192, 1024, 1024], True),
            (1024, 8192, [8192, 1024, 1024], True),
            (1025, 8192, [8192, 1024, 1024], True),
            (12287, 8192, [8192, 1024, 1024], True),
            (12288, 8192, [8192, 1024, 1024], False),  # sums are as good
            (20, 32, [64], True),
            (1023, 1024, [16], True),
            (1020, 2048, [32768], True),
            (28000, 28672, [8192], True),
            (40000, 28672, [8192], False),  # bands of so many tokens are half as large again as those of sums
        ],
    )
    def test_they_stand_for_sums_until_these_are_as_good_or_take_much_less(
        self, tokens: int, d_in: int, widths: list[int], kept: bool
    ) -> None:
        assert keeps_rows(tokens, d_in, widths) == kept

    @pytest.mark.parametrize("tokens", [40, 300, 512, 3000, 6000, 20000])
    @pytest.mark.parametrize("d_in", [900, 4096, 13824])
    @pytest.mark.parametrize("width", [900, 4096, 13824])
    def test_a_quarter_more_for_a_solution_that_is_not_small_is_all_that_they_may_take(
        self, tokens: int, d_in: int, width: int
    ) -> None:
        if keeps_rows(tokens, d_in, [width]):
            rows, sums = (solve_layout(d_in, width, 8, 0, tokens, token_rows=count) for count in (tokens, 0))
            assert rows.num_bytes <= max(1.25 * sums.num_bytes, 96 << 20)
            linear = LinearSpec("b.w", d_in, width)
            spec = BlockSpec(0, "b", (linear,), (InputGroup(("b.w",), d_in),))
            other = BlockSpec(0, "b", (linear,), (InputGroup(("b.w",), d_in, tokens),))
            largest = [max(panel.num_bytes for panel in block_panels(each)) for each in (other, spec)]
            assert largest[0] <= largest[1]

    def test_their_solution_takes_a_part_of_what_that_of_sums_takes(self) -> None:
        rows, sums = (solve_layout(13824, 5120, 8, None, 512, token_rows=count).num_bytes for count in (512, 0))
        assert rows < sums / 2
