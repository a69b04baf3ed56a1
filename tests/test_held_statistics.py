"""Statistics that stay in memory until their block is solved: the same bits as through the disk, without it."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import streamda
from streamda.block_statistics import HeldStatistics
from streamda.layers import BlockSpec, InputGroup, LinearSpec
from streamda.panels import Replay, block_panels
from streamda.solve_stage import Solver
from streamda.store import BlockStatisticsReader, stats_unit
from streamda.sweep import Sweep
from streamda.units import UnitStore
from tests.golden_options import golden_options
from tests.killed import recorded_points, run_until, weights
from tests.test_store import CPU, a_run, block, draw, fill, write


def held_options(folder: Path, **options: Any) -> dict[str, Any]:
    return golden_options(folder, spill_statistics=False, **options)


@pytest.fixture(scope="module")
def spilled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run whose statistics went through the disk."""
    folder = tmp_path_factory.mktemp("spilled")
    report = streamda.initialize(**golden_options(folder))
    assert report.bytes["statistics_written"] > 0
    assert report.plan["spill_statistics"]
    return weights(folder)


@pytest.mark.parametrize("moment_bytes", [4, 8])
@pytest.mark.parametrize("size", [5, 16, 37])
def test_held_and_stored_statistics_hand_out_the_same_numbers(tmp_path: Path, size: int, moment_bytes: int) -> None:
    spec = block(size, size + 6, moment_bytes=moment_bytes)
    sums = draw(spec)
    with a_run(tmp_path / "run") as run:
        write(run, spec, sums)
        stored, held = BlockStatisticsReader(run.units, 0), HeldStatistics(spec)
        fill(held, spec, sums)
        for _ in range(2):  # whoever asks may change what it is given
            for group in spec.groups:
                ours, theirs = held.moment(group, CPU), stored.moment(group, CPU)
                assert torch.equal(ours.diagonal(), theirs.diagonal())
                for index in range(len(theirs)):
                    for dtype in (torch.float64, torch.float32):
                        band = ours.band(index, dtype)
                        assert torch.equal(band, theirs.band(index, dtype))
                        band.fill_(7)
            for linear in spec.linears:
                assert torch.equal(held.output_moment(linear.name, CPU), stored.output_moment(linear.name, CPU))
                bands = list(held.gradient_bands(linear.name, CPU))
                assert [band.is_contiguous() for band in bands] == [True] * len(bands)
                assert torch.equal(torch.cat(bands), stored.gradient(linear.name, torch.float32, CPU))
                for band in bands:
                    band.fill_(7)


def test_a_run_without_them_on_disk_gives_the_same_bits(
    tmp_path: Path, spilled: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    create = UnitStore.create

    def noted(units: UnitStore, name: str, **record: Any) -> Any:
        made.append(name)
        return create(units, name, **record)

    monkeypatch.setattr(UnitStore, "create", noted)
    report = streamda.initialize(**held_options(tmp_path))
    assert weights(tmp_path) == spilled
    assert not report.plan["spill_statistics"]
    assert report.bytes["statistics_written"] == 0
    assert not [name for name in made if name.startswith("stats")]
    assert len([name for name in made if name.startswith("solve-")]) == 3


@pytest.mark.parametrize("begins_on_disk", [False, True])
def test_a_run_killed_anywhere_continues_to_the_same_bits(tmp_path: Path, spilled: bytes, begins_on_disk: bool) -> None:
    """At a dozen points, evenly; what one way begins it ends itself, or the other way does, in turn."""
    begun, other = (golden_options, held_options) if begins_on_disk else (held_options, golden_options)
    points = recorded_points(begun(tmp_path / "whole"), tmp_path / "points.json")
    assert len(points) > 30
    for number, point in enumerate(points[:: len(points) // 12]):
        folder = tmp_path / str(number)
        assert run_until(point, begun(folder)) == -signal.SIGKILL, point
        streamda.initialize(**(other if number % 2 else begun)(folder))
        assert weights(folder) == spilled, point


def test_statistics_that_a_killed_run_left_on_disk_are_solved_from_there(
    tmp_path: Path, spilled: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = golden_options(tmp_path)
    units = tmp_path / "adapter.work" / "units"
    for number in range(1, 40):
        assert run_until(f"unit-committed:{number}", options) == -signal.SIGKILL
        if left := [path.parent.name for path in units.glob("stats-*/COMMIT.json")]:
            break
    solved = [path.parent.name.replace("solve", "stats") for path in units.glob("solve-*/COMMIT.json")]
    collected: list[str] = []
    passed = Sweep.backward_block

    def noted(sweep: Sweep, spec: BlockSpec, replays: Sequence[Replay], *args: Any, **kwargs: Any) -> Any:
        if replays:
            collected.append(stats_unit(spec.index))
        return passed(sweep, spec, replays, *args, **kwargs)

    monkeypatch.setattr(Sweep, "backward_block", noted)
    report = streamda.initialize(**held_options(tmp_path))
    assert report.resumed
    assert left
    assert sorted(collected) == sorted({"stats-0000", "stats-0001", "stats-0002"} - {*left, *solved})
    assert weights(tmp_path) == spilled


@pytest.mark.parametrize("options", [{}, {"spill_statistics": True}, {"keep_statistics": True}])
def test_a_codec_that_rounds_rounds_whatever_way_they_take(tmp_path: Path, options: dict[str, Any]) -> None:
    """What is rounded on disk is solved as it was rounded, under every budget."""
    given = held_options(tmp_path) | {"statistics_codec": "bitround"} | options
    report = streamda.initialize(**given)
    assert report.plan["spill_statistics"]


def test_what_is_to_be_kept_goes_to_disk(tmp_path: Path, spilled: bytes) -> None:
    report = streamda.initialize(**held_options(tmp_path, keep_statistics=True))
    assert report.plan["spill_statistics"]
    assert report.bytes["statistics_written"] > 0
    assert weights(tmp_path) == spilled


def test_the_next_block_takes_the_memory_of_the_one_that_is_solved(
    tmp_path: Path, spilled: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels: list[list[torch.Tensor]] = []
    solve = Solver.solve

    def noted(solver: Solver, units: UnitStore, statistics: Any) -> None:
        panels.append(list(statistics._panels.values()))
        solve(solver, units, statistics)

    monkeypatch.setattr(Solver, "solve", noted)
    streamda.initialize(**held_options(tmp_path))
    assert len(panels) == 3
    first, *others = ({id(values) for values in each} for each in panels)  # all of them live here
    assert others == [first, first]
    assert weights(tmp_path) == spilled


def test_memory_that_does_not_fit_the_next_block_is_given_up() -> None:
    wide, narrow = (BlockSpec(0, "h", (LinearSpec("h.w", 6, d_out),), (InputGroup(("h.w",), 6),)) for d_out in (5, 4))
    solved = HeldStatistics(wide)
    freed: dict[str, weakref.ref[torch.Tensor]] = {}
    for panel in block_panels(wide):
        values = solved.new_panel(panel, CPU)
        freed[panel.statistic] = weakref.ref(values.fill_(7))
        solved.write_panel(panel, values)
        del values
    following = HeldStatistics(narrow, solved)
    assert [statistic for statistic, values in freed.items() if values() is not None] == ["input_moment"]
    for panel in block_panels(narrow):
        assert not following.new_panel(panel, CPU).any(), panel
