"""A run that is killed, at whatever point, is finished by the same command with the same bits."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import streamda
from streamda.errors import ConfigError, MismatchError
from streamda.files import read_json
from streamda.rundir import RunDirectory
from tests.command_line import flags
from tests.golden_options import golden_options
from tests.killed import finish, run_until, weights

# STREAMDA_KILL_AT makes the process kill itself with SIGKILL the N-th time that it reaches a named point
KILLS = [
    "unit-committed:1",  # the first boundary
    "unit-renamed:3",
    "files-synced:5",
    "unit-committed:6",
    "unit-sealed:7",
    "drop-renamed:2",
    "unit-committed:9",
    "drop-removed:4",
    "unit-committed:11",
    "output-built:1",
    "output-renamed:1",
    "run-retired:1",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    streamda.initialize(**golden_options(folder))
    return weights(folder)


def test_a_repeated_run_gives_the_same_bits(tmp_path: Path, uninterrupted: bytes) -> None:
    streamda.initialize(**golden_options(tmp_path))
    assert weights(tmp_path) == uninterrupted


@pytest.mark.parametrize("point", KILLS)
def test_a_killed_run_continues_to_the_same_bits(tmp_path: Path, uninterrupted: bytes, point: str) -> None:
    options = golden_options(tmp_path)
    assert run_until(point, options) == -signal.SIGKILL
    report = streamda.initialize(**options)
    assert report.resumed or report.already_done or not point.startswith("unit-committed")
    assert weights(tmp_path) == uninterrupted
    assert not (tmp_path / "adapter.work").exists() or point == "run-retired:1"


def test_two_kills_in_a_row_lose_nothing(tmp_path: Path, uninterrupted: bytes) -> None:
    options = golden_options(tmp_path)
    assert run_until("unit-committed:7", options) == -signal.SIGKILL
    assert run_until("unit-sealed:1", options) == -signal.SIGKILL
    streamda.initialize(**options)
    assert weights(tmp_path) == uninterrupted


def test_boundaries_lost_with_the_memory_they_were_in_are_made_again(tmp_path: Path, uninterrupted: bytes) -> None:
    options = golden_options(tmp_path, max_host_mem="50MB")
    assert run_until("unit-committed:4", options) == -signal.SIGKILL
    assert not list((tmp_path / "adapter.work" / "units").glob("acts-*"))
    report = streamda.initialize(**options)
    assert report.resumed
    assert weights(tmp_path) == uninterrupted


def test_a_killed_collection_continues_to_the_same_statistics(tmp_path: Path, uninterrupted: bytes) -> None:
    options = golden_options(tmp_path, keep_statistics=True)
    assert run_until("unit-committed:7", golden_options(tmp_path)) == -signal.SIGKILL
    streamda.initialize(**options)
    assert weights(tmp_path) == uninterrupted


def test_sigterm_stops_with_75_and_the_same_command_continues(tmp_path: Path, uninterrupted: bytes) -> None:
    options = golden_options(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "streamda", "init", *flags(options)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    units = tmp_path / "adapter.work" / "units"
    deadline = time.monotonic() + 60
    while not list(units.glob("acts-0001*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "continues from here" in stderr
    streamda.initialize(**options)
    assert weights(tmp_path) == uninterrupted
    assert not units.exists()


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    options = golden_options(tmp_path)
    streamda.initialize(**options)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").stat()
    report = streamda.initialize(**options)
    after = (tmp_path / "adapter" / "adapter_model.safetensors").stat()
    assert report.already_done
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_finished_run_whose_statistics_are_asked_for_too_late_says_so(tmp_path: Path) -> None:
    """They are gone, and "already done" would promise them."""
    options = golden_options(tmp_path)
    streamda.initialize(**options)
    with pytest.raises(ConfigError, match=r"adapter holds the finished .* not kept; `streamda collect` makes them"):
        streamda.initialize(**options, keep_statistics=True)
    # a run that makes both anew has begun, but the adapter that is there is still that of the one before
    assert run_until("unit-committed:7", options | {"keep_statistics": True, "overwrite": True}) == -signal.SIGKILL
    with pytest.raises(ConfigError, match="not kept"):
        streamda.initialize(**options, keep_statistics=True)
    report = streamda.initialize(**options, keep_statistics=True, overwrite=True)
    assert report.statistics_dir == str(tmp_path / "adapter.work")
    for given in ({}, {"keep_statistics": True}, {"keep_statistics": True, "work_dir": str(tmp_path / "other")}):
        assert streamda.initialize(**options, **given).already_done  # now they are there, wherever others would go
    (tmp_path / "adapter.work").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"statistics are no longer in .*adapter\.work"):
        streamda.initialize(**options, keep_statistics=True)


def test_a_run_killed_before_it_cleaned_up_has_no_statistics_either(tmp_path: Path) -> None:
    options = golden_options(tmp_path)
    assert run_until("output-renamed", options) == -signal.SIGKILL
    assert (tmp_path / "adapter.work" / "run.json").is_file()
    with pytest.raises(ConfigError, match="not kept"):
        streamda.initialize(**options, keep_statistics=True)
    assert streamda.initialize(**options).already_done


def test_other_options_are_refused_by_name_and_nothing_is_touched(tmp_path: Path) -> None:
    options = golden_options(tmp_path)
    assert run_until("unit-committed:7", options) == -signal.SIGKILL
    with pytest.raises(MismatchError, match="token_mask"):
        streamda.initialize(**options, token_mask="labels")
    with pytest.raises(ConfigError, match="overwrite"):
        streamda.initialize(**options, resume=False)
    assert read_json(tmp_path / "adapter.work" / "run.json")["parts"]["method"]["token_mask"] == "attention"


def test_solved_blocks_are_not_mixed_with_blocks_solved_otherwise(tmp_path: Path) -> None:
    options = golden_options(tmp_path)
    # by the thirteenth unit the last block is solved and its statistics are freed, and the next one's are committed
    assert run_until("unit-committed:13", options) == -signal.SIGKILL
    assert list((tmp_path / "adapter.work" / "units").glob("solve-*"))
    with pytest.raises(MismatchError, match="other settings of the method"):
        streamda.initialize(**options, rank=4)


def test_overwrite_starts_over(tmp_path: Path, uninterrupted: bytes) -> None:
    options = golden_options(tmp_path)
    assert run_until("unit-committed:8", options) == -signal.SIGKILL
    report = streamda.initialize(**options, overwrite=True)
    assert not report.resumed
    assert weights(tmp_path) == uninterrupted
    assert json.loads((tmp_path / "adapter" / "streamda_report.json").read_text())["modules"]


def test_a_killed_overwrite_is_continued_by_the_same_command(tmp_path: Path, uninterrupted: bytes) -> None:
    options = golden_options(tmp_path) | {"overwrite": True}
    assert run_until("unit-committed:3", golden_options(tmp_path)) == -signal.SIGKILL  # to be thrown away
    assert run_until("unit-committed:8", options) == -signal.SIGKILL
    finish(tmp_path, options, uninterrupted)
    assert not streamda.initialize(**options).resumed  # what is finished is made anew


def test_an_overwrite_with_other_options_starts_over_and_so_does_one_without_resume(tmp_path: Path) -> None:
    options = golden_options(tmp_path) | {"overwrite": True}
    # by the thirteenth unit the last block is solved and its statistics are freed: with another rank it is of no use
    assert run_until("unit-committed:13", options) == -signal.SIGKILL
    assert run_until("unit-committed:2", options | {"rank": 4}) == -signal.SIGKILL
    assert not streamda.initialize(**options | {"rank": 4, "resume": False}).resumed


def test_statistics_kept_of_a_finished_overwrite_are_overwritten_by_the_next(tmp_path: Path) -> None:
    options = golden_options(tmp_path) | {"overwrite": True, "keep_statistics": True}
    assert run_until("unit-committed:4", options) == -signal.SIGKILL
    assert streamda.initialize(**options).resumed
    assert not streamda.initialize(**options).resumed


def test_a_run_that_disappears_before_it_is_locked_is_begun_anew_with_all_its_facts(
    tmp_path: Path, uninterrupted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may finish and remove it after it was looked at."""
    options = golden_options(tmp_path)
    assert run_until("unit-committed:3", options) == -signal.SIGKILL
    opened = RunDirectory.open

    def removed_and_opened(path: Path, *arguments: Any, **others: Any) -> RunDirectory:
        shutil.rmtree(path)
        return opened(path, *arguments, **others)

    monkeypatch.setattr(RunDirectory, "open", removed_and_opened)
    assert not streamda.initialize(**options).resumed
    assert weights(tmp_path) == uninterrupted


def test_another_budget_continues_the_same_run(tmp_path: Path, uninterrupted: bytes) -> None:
    assert run_until("unit-committed:7", golden_options(tmp_path)) == -signal.SIGKILL
    report = streamda.initialize(**golden_options(tmp_path, max_gpu_mem="900MB"))
    assert report.resumed
    assert weights(tmp_path) == uninterrupted


def test_statistics_asked_for_on_resume_are_there_for_all_blocks(tmp_path: Path, uninterrupted: bytes) -> None:
    """Blocks whose statistics were freed before the kill are collected again."""
    assert run_until("unit-committed:13", golden_options(tmp_path)) == -signal.SIGKILL
    streamda.initialize(**golden_options(tmp_path, keep_statistics=True))
    assert weights(tmp_path) == uninterrupted
    streamda.solve(statistics=str(tmp_path / "adapter.work"), output_dir=str(tmp_path / "again"))
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == uninterrupted


def test_kept_statistics_outlive_a_run_that_does_not_ask_for_them(tmp_path: Path) -> None:
    streamda.initialize(**golden_options(tmp_path, keep_statistics=True))
    assert streamda.initialize(**golden_options(tmp_path)).already_done
    streamda.collect(
        **{k: v for k, v in golden_options(tmp_path).items() if k != "output_dir"}, statistics=str(tmp_path / "s")
    )
    streamda.initialize(**golden_options(tmp_path, output_dir=str(tmp_path / "b"), work_dir=str(tmp_path / "s")))
    for folder in ("adapter.work", "s"):
        with streamda.open_statistics(tmp_path / folder) as statistics:
            assert len(statistics) == 21


def test_folders_inside_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beside each other"):
        streamda.initialize(**golden_options(tmp_path, work_dir=str(tmp_path / "adapter" / "work")))
