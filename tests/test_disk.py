"""Little disk: fewer boundaries are kept, the others are made again to the same bits, inside the size as planned."""

from __future__ import annotations

import contextlib
import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

import streamda
from streamda import files, units
from streamda.config import RunConfig
from streamda.disk_space import START_RESERVE_BYTES, UNIT_RESERVE_BYTES
from streamda.errors import StorageError
from streamda.pipeline import plan as plan_run
from streamda.plan import Plan
from streamda.solve_stage import Solver
from streamda.sweep import Sweep
from streamda.units import UnitStore
from tests.killed import run_until, weights
from tests.models import make_samples, write_checkpoint, write_samples

NUM_BLOCKS = 9


@dataclass
class Case:
    """A model of nine blocks whose boundary states are larger than its statistics."""

    folder: Path

    def options(self, folder: Path, **options: Any) -> dict[str, Any]:
        return {
            "model": str(self.folder / "model"),
            "dataset": str(self.folder / "samples.jsonl"),
            "output_dir": str(folder / "adapter"),
            "max_gpu_mem": "400MB",
            "device": "cpu",
            "rank": 2,
            "target_modules": "down_proj",  # one layer per block, which is quick
            "micro_batch_tokens": "120",
            "spill_statistics": True,
        } | options

    def plan(self, **options: Any) -> Plan:
        return plan_run(RunConfig.from_options(self.options(self.folder, **options)))[0]

    @cached_property
    def limits(self) -> dict[int, int]:
        """The disk that each stride needs, of those that are ever chosen."""
        limits: dict[int, int] = {}
        made = self.plan()
        while made.boundary_stride not in limits:
            limits[made.boundary_stride] = made.disk_bytes
            try:
                made = self.plan(max_disk=made.disk_bytes - 1)
            except StorageError:
                break
        return limits

    @cached_property
    def adapter(self) -> bytes:
        """Of a run with all the disk that it wants."""
        streamda.initialize(**self.options(self.folder))
        return weights(self.folder)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"), "llama")


def make_case(folder: Path, family: str) -> Case:
    write_checkpoint(folder / "model", family, num_hidden_layers=NUM_BLOCKS)
    write_samples(folder / "samples.jsonl", make_samples([57, 60, 41, 60] * 12))
    return Case(folder)


class Watched:
    """The size of a work directory at every commit, before anything that it replaces is removed."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self.peak = 0

    def look(self, point: str) -> None:
        if point not in ("unit-sealed", "unit-committed"):
            return
        # commits of two threads meet here, and one of them may be removing what the other looks at
        with contextlib.suppress(FileNotFoundError):
            sizes = [path.lstat().st_size for path in self._work.rglob("*") if not path.is_dir()]
            self.peak = max(self.peak, sum(sizes))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Watched]:
    def start(work: Path) -> Watched:
        watched = Watched(work)
        monkeypatch.setattr(units, "reached", watched.look)
        return watched

    return start


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Has the file system say what it has free."""

    def set_free(free: Callable[[], int]) -> None:
        class Answer:
            f_frsize = 1

            @property
            def f_bavail(self) -> int:
                return free()

        monkeypatch.setattr(files.SystemCalls, "statvfs", staticmethod(lambda _path: Answer()))

    return set_free


def require_as_planned(report: streamda.InitReport, made: Plan) -> None:
    moved = report.bytes
    assert moved["weights_read"] == made.weight_bytes_read
    assert moved["boundaries_written"] == made.bytes_written["boundaries"] + made.bytes_written["gradients"]
    assert moved["boundaries_read"] == made.bytes_read["boundaries"] + made.bytes_read["gradients"]
    written, planned = moved["statistics_written"], made.bytes_written["statistics"]
    # what describes the arrays is not planned as statistics
    assert (0 < written - planned < NUM_BLOCKS * 8192) if made.spill_statistics else written == planned == 0


class TestStrides:
    def test_a_tied_head_is_read_once_more_and_planned_so(self, tmp_path: Path) -> None:
        tied = make_case(tmp_path, "llama-tied")
        require_as_planned(streamda.initialize(**tied.options(tmp_path)), tied.plan())

    @pytest.mark.parametrize(
        ("stride", "host"),
        [(1, None), (2, None), (3, None), (1, "500kB"), (3, "500kB")],
        ids=["1", "2", "3", "1, some in memory", "3, some in memory"],
    )
    def test_every_stride_gives_the_same_bits_and_moves_the_bytes_that_were_planned(
        self, case: Case, tmp_path: Path, watch: Callable[[Path], Watched], stride: int, host: str | None
    ) -> None:
        options: dict[str, Any] = {"max_disk": case.limits[stride]}
        made = case.plan(**options)
        if host is not None:
            options = {
                "max_host_mem": host,
                "max_disk": made.disk_bytes - made.bytes_written["gradients"] // NUM_BLOCKS,
            }
            made = case.plan(**options)
            assert made.boundaries_in_memory > 0
        assert made.boundary_stride == stride
        watched = watch(tmp_path / "adapter.work")
        report = streamda.initialize(**case.options(tmp_path, **options))
        assert weights(tmp_path) == case.adapter
        assert report.plan["boundary_stride"] == stride
        require_as_planned(report, made)
        assert watched.peak <= made.disk_bytes <= options["max_disk"]
        # the rest is room for what describes the run, which is little beside a real model's states
        assert watched.peak > made.disk_bytes - 2_000_000
        said = [notice for notice in report.notices if "boundaries kept" in notice]
        assert bool(said) == (stride > 1)

    @pytest.mark.parametrize("stride", [1, 3])
    def test_blocks_below_the_lowest_adapted_one_are_never_made_again(
        self, case: Case, tmp_path: Path, watch: Callable[[Path], Watched], stride: int
    ) -> None:
        options = {"target_modules": r".*layers\.[3-8]\.mlp\.down_proj"}
        need = case.plan(**options).disk_bytes
        made = case.plan(**options, max_disk=need - (stride > 1))
        assert (made.boundary_stride > 1) == (stride > 1)
        watched = watch(tmp_path / "adapter.work")
        report = streamda.initialize(**case.options(tmp_path, **options, max_disk=made.disk_bytes))
        require_as_planned(report, made)
        assert watched.peak <= made.disk_bytes
        streamda.initialize(**case.options(tmp_path, **options, output_dir=str(tmp_path / "other" / "adapter")))
        assert weights(tmp_path) == weights(tmp_path / "other")

    @pytest.mark.parametrize("stride", [1, 3])
    def test_without_statistics_on_disk_the_bytes_are_those_that_were_planned(
        self, case: Case, tmp_path: Path, watch: Callable[[Path], Watched], stride: int
    ) -> None:
        need = case.plan(spill_statistics=False).disk_bytes
        options = {"spill_statistics": False, "max_disk": need - (stride > 1)}
        made = case.plan(**options)
        assert not made.spill_statistics
        assert (made.boundary_stride > 1) == (stride > 1)
        watched = watch(tmp_path / "adapter.work")
        report = streamda.initialize(**case.options(tmp_path, **options))
        assert weights(tmp_path) == case.adapter
        require_as_planned(report, made)
        assert made.disk_bytes - 2_000_000 < watched.peak <= made.disk_bytes

    def test_no_solved_statistics_are_in_memory_while_boundaries_are_made_again(
        self, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No plan has room for them there."""
        solved: list[weakref.ref[torch.Tensor]] = []
        alive: list[int] = []
        solve, forward = Solver.solve, Sweep.forward

        def noted(solver: Solver, units: UnitStore, statistics: Any) -> None:
            solved.extend(weakref.ref(values) for values in statistics._panels.values())
            solve(solver, units, statistics)

        def watched(sweep: Sweep, *args: Any) -> None:
            alive.append(sum(values() is not None for values in solved))
            forward(sweep, *args)

        monkeypatch.setattr(Solver, "solve", noted)
        monkeypatch.setattr(Sweep, "forward", watched)
        need = case.plan(spill_statistics=False).disk_bytes
        report = streamda.initialize(**case.options(tmp_path, spill_statistics=False, max_disk=need - 1))
        assert report.plan["boundary_stride"] > 1
        assert len(alive) > 2
        assert not any(alive)
        assert solved

    @pytest.mark.parametrize("keeps", ["collect", "init"])
    def test_statistics_that_are_kept_are_planned_for(
        self, case: Case, tmp_path: Path, watch: Callable[[Path], Watched], keeps: str
    ) -> None:
        options = {"max_host_mem": "50MB", "keep_statistics": True}  # so that statistics are what the disk holds
        if keeps == "init":
            made = case.plan(**options)
            watched = watch(tmp_path / "adapter.work")
            report = streamda.initialize(**case.options(tmp_path, **options))
        else:
            given = case.options(tmp_path, max_host_mem="50MB", statistics=str(tmp_path / "statistics"))
            del given["output_dir"]
            watched = watch(tmp_path / "statistics")
            report = streamda.collect(**given)
            made = None
        planned = report.plan["disk_bytes"]
        assert planned - 2_000_000 < watched.peak <= planned
        assert watched.peak > report.bytes["statistics_written"]
        if made is not None:
            require_as_planned(report, made)


class TestResume:
    # with every third boundary of nine kept, units 1 to 10 go up, 11 is the loss, 12 to 20 the top three blocks
    @pytest.mark.parametrize(
        ("point", "then"),
        [
            ("unit-committed:3", 3),  # a boundary that is not to be kept
            ("drop-renamed:2", 1),
            ("unit-committed:13", 3),
            ("unit-committed:21", 3),  # one of a lower segment, made again
            ("unit-renamed:22", 1),
            ("drop-renamed:16", 3),
            ("unit-committed:31", 1),
        ],
    )
    def test_a_killed_run_continues_to_the_same_bits_with_the_same_and_with_another_stride(
        self, case: Case, tmp_path: Path, watch: Callable[[Path], Watched], point: str, then: int
    ) -> None:
        assert run_until(point, case.options(tmp_path, max_disk=case.limits[3])) == -signal.SIGKILL
        watched = watch(tmp_path / "adapter.work")
        report = streamda.initialize(**case.options(tmp_path, max_disk=case.limits[then]))
        assert report.resumed
        assert report.plan["boundary_stride"] == then
        assert weights(tmp_path) == case.adapter
        assert watched.peak <= case.limits[then]

    @pytest.mark.parametrize("point", ["unit-committed:4", "unit-committed:10", "drop-removed:9"])
    def test_a_run_that_kept_all_boundaries_continues_with_less_disk(
        self, case: Case, tmp_path: Path, point: str
    ) -> None:
        assert run_until(point, case.options(tmp_path)) == -signal.SIGKILL
        report = streamda.initialize(**case.options(tmp_path, max_disk=case.limits[3]))
        assert report.plan["boundary_stride"] == 3
        assert weights(tmp_path) == case.adapter

    @pytest.mark.parametrize("point", ["unit-committed:3", "unit-committed:14"])
    def test_boundaries_lost_with_the_memory_they_were_in_are_made_again(
        self, case: Case, tmp_path: Path, point: str
    ) -> None:
        options = case.options(tmp_path, max_disk=case.limits[3], max_host_mem="500kB")
        assert run_until(point, options) == -signal.SIGKILL
        streamda.initialize(**options)
        assert weights(tmp_path) == case.adapter


class TestFreeSpace:
    def test_what_is_free_decides_the_stride(
        self, case: Case, tmp_path: Path, disk: Callable[[Callable[[], int]], None]
    ) -> None:
        for stride in case.limits:
            disk(lambda stride=stride: START_RESERVE_BYTES + case.limits[stride])
            work = tmp_path / str(stride)
            report = streamda.initialize(**case.options(work))
            assert report.plan["boundary_stride"] == stride
            assert weights(work) == case.adapter

    def test_the_smaller_of_it_and_what_is_allowed_counts(
        self, case: Case, tmp_path: Path, disk: Callable[[Callable[[], int]], None]
    ) -> None:
        disk(lambda: START_RESERVE_BYTES + case.limits[2])
        report = streamda.initialize(**case.options(tmp_path, max_disk=case.limits[3]))
        assert report.plan["boundary_stride"] == 3

    def test_nothing_is_begun_that_no_stride_fits(
        self, case: Case, tmp_path: Path, disk: Callable[[Callable[[], int]], None]
    ) -> None:
        disk(lambda: START_RESERVE_BYTES + min(case.limits.values()) - 1)
        with pytest.raises(StorageError, match=r"the run needs .* keeps every 3rd, .* free: give --work-dir") as caught:
            streamda.initialize(**case.options(tmp_path))
        assert caught.value.exit_code == 7
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(StorageError, match=r"the run needs .* keeps every 3rd, and --max-disk allows"):
            streamda.initialize(**case.options(tmp_path, max_disk=min(case.limits.values()) - 1))
        assert list(tmp_path.iterdir()) == []

    # two looks before the start, and one before each unit
    @pytest.mark.parametrize(
        ("looks", "refused"),
        [
            (4, "boundary acts-0001"),
            (12, "boundary acts-0009"),
            (14, "the statistics of block 8"),
            (15, "boundary grads-0008"),
            (16, "the statistics of block 7"),
            (18, "the solution of block 8"),
        ],
    )
    def test_a_disk_that_others_fill_stops_the_run_between_two_units_and_nothing_is_lost(
        self, case: Case, tmp_path: Path, disk: Callable[[Callable[[], int]], None], looks: int, refused: str
    ) -> None:
        left, expected = looks, case.adapter  # made, if need be, while the disk is large

        def free() -> int:
            nonlocal left
            left -= 1
            return 10**12 if left > 0 else UNIT_RESERVE_BYTES

        disk(free)
        with pytest.raises(
            StorageError, match=f"200 MB free; {refused} needs .* a reserve of 200 MB; nothing .* lost: .* continues"
        ) as caught:
            streamda.initialize(**case.options(tmp_path))
        assert caught.value.exit_code == 7
        held = {path.name for path in (tmp_path / "adapter.work" / "units").iterdir()}
        assert not [name for name in held if name.endswith(".part")]
        # what is free now is less than a run needs that begins; this one has begun, and most of it may be behind it
        disk(lambda: UNIT_RESERVE_BYTES + 2_000_000)
        report = streamda.initialize(**case.options(tmp_path))
        assert report.resumed == bool(held)
        assert weights(tmp_path) == expected
