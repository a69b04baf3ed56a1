"""A whole run, killed at every point that has a name and at moments that have none, ends with the same bits.

SIGKILL leaves the page cache; what a power cut would take of it is in `test_faults_crash`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import streamda
from tests.killed import finish, recorded_points, run_command, run_for, run_until, weights, whole_units

KILLED = -signal.SIGKILL
PARTS = 8  # of the sweep over points, so that it can be spread over processes
RANDOM_KILLS = 200
RANDOM_TESTS = 10


@pytest.fixture(scope="module")
def points(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("points")
    return recorded_points(tiny | {"output_dir": str(folder / "adapter")}, folder / "points.json")


def killed_at(points: Sequence[str], folder: Path, tiny: dict[str, Any], expected: bytes) -> None:
    """Kills a run at a point, perhaps once more while it continues, and finishes it."""
    folder.mkdir(exist_ok=True)
    options = tiny | {"output_dir": str(folder / "adapter")}
    committed: set[str] = set()
    for number, point in enumerate(points):
        log = folder / f"{number}.log"
        ended = run_until(point, options, log)
        assert ended == KILLED or (number > 0 and ended == 0), point  # not every point is on the way of a recovery
        assert not log.exists() or not committed & set(log.read_text().split())
        committed = whole_units(folder / "adapter.work")
    finish(folder, options, expected)


def killed_after(seconds: Sequence[float], folder: Path, tiny: dict[str, Any], expected: bytes) -> int:
    """Kills a run, and each that continues it, after some seconds, and finishes it; how many were killed."""
    folder.mkdir()
    options = tiny | {"output_dir": str(folder / "adapter")}
    committed: set[str] = set()
    killed = 0
    for number, duration in enumerate(seconds):
        log = folder / f"{number}.log"
        killed += run_for(duration, options, log) == KILLED
        assert not log.exists() or not committed & set(log.read_text().split())
        committed = whole_units(folder / "adapter.work")
    finish(folder, options, expected)
    return killed


def test_a_run_killed_at_some_of_its_points_ends_with_the_same_bits(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes, points: list[str]
) -> None:
    assert len(points) > 100
    for number, point in enumerate(random.Random(1).sample(points, 2)):
        twice = ["sweep-found"] if number == 1 else []
        killed_at([point, *twice], tmp_path / str(number), tiny, uninterrupted)


@pytest.mark.parametrize(
    "point",
    [
        "run-retired:1",
        pytest.param("run-cleared:1", marks=pytest.mark.faults),
        pytest.param("run-lock-removed:1", marks=pytest.mark.faults),
    ],
)
def test_a_removal_that_was_cut_short_is_finished_by_the_same_command(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes, point: str
) -> None:
    killed_at([point], tmp_path / "run", tiny, uninterrupted)


@pytest.mark.parametrize(
    "point",
    [
        "unit-committed:5",
        pytest.param("run-retired:1", marks=pytest.mark.faults),
        pytest.param("run-cleared:1", marks=pytest.mark.faults),
        pytest.param("run-units-made:1", marks=pytest.mark.faults),
        pytest.param("run-recorded:1", marks=pytest.mark.faults),
        pytest.param("run-recorded:2", marks=pytest.mark.faults),
        pytest.param("output-displaced:1", marks=pytest.mark.faults),
    ],
)
def test_an_overwrite_that_was_killed_is_continued_by_the_same_command(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes, point: str
) -> None:
    """An adapter and a half-finished run are there; once the new run is begun, nothing of it is made again."""
    options = tiny | {"output_dir": str(tmp_path / "run" / "adapter")}
    streamda.initialize(**options, rank=4)
    assert run_until("unit-committed:3", options | {"overwrite": True, "rank": 4}) == KILLED
    killed_at([point, "unit-committed:1"], tmp_path / "run", tiny | {"overwrite": True}, uninterrupted)


def test_a_run_killed_at_a_moment_without_a_name_ends_with_the_same_bits(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes
) -> None:
    moments = random.Random(2)
    killed_after([moments.uniform(0.1, 0.6), moments.uniform(0.1, 0.4)], tmp_path / "run", tiny, uninterrupted)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_at_any_of_its_points_ends_with_the_same_bits(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes, points: list[str], part: int
) -> None:
    """At every point, each time that it is reached; every third run is killed once more while it continues."""
    later = random.Random(part)
    for number in range(part, len(points), PARTS):
        twice = [("sweep-found", later.choice(points))[number % 2]] if number % 3 == 0 else []
        killed_at([points[number], *twice], tmp_path / str(number), tiny, uninterrupted)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(RANDOM_TESTS))
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes, seed: int
) -> None:
    """Every fourth run is killed twice, the second time while it recovers."""
    moments = random.Random(seed)
    options = tiny | {"output_dir": str(tmp_path / "whole" / "adapter")}
    begun = time.monotonic()
    assert run_for(60, options) == 0
    whole = time.monotonic() - begun
    killed = number = 0
    while killed < RANDOM_KILLS // RANDOM_TESTS:
        seconds = [moments.uniform(0, whole) for _ in range(2 if number % 4 == 0 else 1)]
        landed = killed_after(seconds, tmp_path / str(number), tiny, uninterrupted)
        killed += landed
        if not landed:  # the machine was busier when the whole run was timed
            whole *= 0.8
        number += 1


def be_stopped() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_next_start_says_where_it_continues_and_whether_the_last_process_was_killed(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes
) -> None:
    options = tiny | {"output_dir": str(tmp_path / "adapter")}
    assert run_until("unit-committed:2", options) == KILLED
    ended = run_command(tmp_path, options, at="unit-committed:2", act=be_stopped)
    assert ended.code == 75
    assert "note: continuing at block 1 of the forward pass; the last process here was killed" in ended.stderr
    assert "--max-gpu-mem" in ended.stderr
    ended = run_command(tmp_path, options)
    assert ended.code == 0
    assert "note: continuing at block 1 of the backward pass\n" in ended.stderr
    assert weights(tmp_path) == uninterrupted
