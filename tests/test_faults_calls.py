"""A whole run in which one system call fails, whichever it is: the right error, and nothing committed is lost.

Covered: every call that streamda makes itself, the writes of Zarr, a limit on file sizes, and a disk
that is full indeed where one can be mounted. Reads of what is not committed, such as the model's, are elsewhere.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zarr.storage._local as zarr_local

import streamda
from streamda import disk_space, files, solutions
from streamda.errors import DamagedError, StorageError, StreamdaError
from tests.killed import finish, noting_commits, run_command, tracking_units, weights, whole_units

CODES = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)
SOME_CODES = [errno.EIO, *(pytest.param(code, marks=pytest.mark.faults) for code in CODES if code != errno.EIO)]
CHANGING = ("open", "write", "ftruncate", "fsync", "flock", "replace", "rename", "mkdir", "unlink", "rmdir", "statvfs")
READING = ("open", "read", "preadv", "listdir", "lstat")
PARTS = 8  # of a sweep, so that it can be spread over processes


class FailingCalls(files.SystemCalls):
    """The real system calls, of which the N-th of some kinds fails. Two threads may call at a time.

    A file that is opened to be read is not among the calls that change the disk.
    """

    def __init__(self, kinds: tuple[str, ...], fail_at: int, code: int) -> None:
        self.count = 0
        self.failed = ""
        self._kinds = kinds
        self._lock = threading.Lock()
        for name in kinds:
            setattr(self, name, partial(self._called, name, fail_at, code))

    def _called(self, name: str, fail_at: int, code: int, *args: Any) -> Any:
        counts = name != "open" or bool(args[1] & os.O_CREAT) == (self._kinds == CHANGING)
        with self._lock:
            self.count += counts
            fails = counts and self.count == fail_at
        if fails:
            self.failed = name
            raise OSError(code, os.strerror(code))
        return getattr(files.SystemCalls, name)(*args)


def run_with(double: files.SystemCalls, options: dict[str, Any]) -> StreamdaError | None:
    """What a run raises with these system calls; anything else but a `StreamdaError` comes out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "system_calls", double)
        try:
            streamda.initialize(**options)
        except StreamdaError as error:
            return error
    return None


def num_calls(kinds: tuple[str, ...], tiny: dict[str, Any], folder: Path) -> int:
    double = FailingCalls(kinds, 0, 0)
    assert run_with(double, tiny | {"output_dir": str(folder / "adapter")}) is None
    shutil.rmtree(folder / "adapter")
    return double.count


def fails_at(
    number: int, code: int, kinds: tuple[str, ...], folder: Path, tiny: dict[str, Any], expected: bytes
) -> str:
    """Fails the n-th call of a run, and finishes it; the name of a call that failed without an error, else nothing."""
    folder.mkdir()
    options = tiny | {"output_dir": str(folder / "adapter")}
    double = FailingCalls(kinds, number, code)
    with tracking_units() as kept:
        error = run_with(double, options)
    if error is not None:
        assert kept <= whole_units(folder / "adapter.work")
        assert len(str(error).splitlines()) == 1
        assert os.strerror(code) in str(error), error
        damage = code == errno.EIO and double.failed in READING and kinds == READING
        assert error.exit_code in ((7, 10) if damage else (7,)), error
        finish(folder, options, expected)
        return ""
    assert weights(folder) == expected
    assert streamda.initialize(**options).already_done
    return double.failed


def test_a_run_survives_some_failing_calls(tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes) -> None:
    total = num_calls(CHANGING, tiny, tmp_path)
    assert total > 150
    for code, number in zip((errno.ENOSPC, errno.EIO), random.Random(0).sample(range(1, total), 2), strict=True):
        fails_at(number, code, CHANGING, tmp_path / str(number), tiny, uninterrupted)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.__getitem__)
def test_a_run_survives_any_failing_call_that_changes_the_disk(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes, code: int, part: int
) -> None:
    unseen = [
        fails_at(number, code, CHANGING, tmp_path / str(number), tiny, uninterrupted)
        for number in range(1 + part, num_calls(CHANGING, tiny, tmp_path) + 1, PARTS)
    ]
    # what may fail without being told: clearing LOCK, and clearing away what crashes left beside the adapter
    assert {name for name in unseen if name} <= {"ftruncate", "open", "flock", "unlink", "rmdir"}
    assert len([name for name in unseen if name]) < 0.1 * len(unseen) + 2


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_survives_any_failing_read_of_its_own_files(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes, part: int
) -> None:
    total = num_calls(READING, tiny, tmp_path)
    for number in range(1 + part, total + 1, 4 * PARTS):
        fails_at(number, errno.EIO, READING, tmp_path / str(number), tiny, uninterrupted)


@pytest.mark.parametrize("code", SOME_CODES, ids=errno.errorcode.__getitem__)
def test_a_run_survives_a_failing_write_of_zarr(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    options = tiny | {"output_dir": str(tmp_path / "adapter")}
    put, count = zarr_local._put, iter(range(9))

    def failing(path: Path, *args: Any, **kwargs: Any) -> Any:
        if next(count, None) is None:
            raise OSError(code, os.strerror(code), *([str(path)] if code == errno.EACCES else []))
        return put(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(zarr_local, "_put", failing)
        with pytest.raises(StorageError, match=os.strerror(code)):
            streamda.initialize(**options)
    assert next(count, None) is None
    finish(tmp_path, options, uninterrupted)


def test_a_committed_solution_that_cannot_be_read_is_damage(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tiny | {"output_dir": str(tmp_path / "adapter")}

    def failing(_path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(solutions, "load_file", failing)
        with pytest.raises(DamagedError, match=r"factors\.safetensors cannot be read: Input/output error"):
            streamda.initialize(**options)
    finish(tmp_path, options, uninterrupted)


def limit_file_sizes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))


def test_a_limit_on_file_sizes_is_named(tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes) -> None:
    options = tiny | {"output_dir": str(tmp_path / "adapter")}
    ended = run_command(tmp_path, options, before=limit_file_sizes)
    assert ended.code == 7
    assert "File too large" in ended.stderr
    assert "ulimit -f" in ended.stderr
    finish(tmp_path, options, uninterrupted)


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MB; skips where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Leaves no byte free."""
    with suppress(OSError), (disk / "other").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))


def want_no_reserve() -> None:
    """So that the run does not refuse a small disk before it begins."""
    disk_space.START_RESERVE_BYTES = disk_space.UNIT_RESERVE_BYTES = 0


@pytest.mark.parametrize(
    "point",
    [
        "folders-synced:5",
        *(pytest.param(p, marks=pytest.mark.faults) for p in ("run-recorded:1", "draft-made:2", "draft-made:8")),
    ],
)
def test_a_full_disk_stops_the_run_and_the_same_command_finishes_it_when_there_is_room(
    tmp_path: Path, small_disk: Path, tiny: dict[str, Any], uninterrupted: bytes, point: str
) -> None:
    options = tiny | {"output_dir": str(small_disk / "adapter")}
    ended = run_command(tmp_path, options, before=want_no_reserve, at=point, act=partial(fill, small_disk))
    assert ended.code == 7, ended.stderr
    assert "free" in ended.stderr.splitlines()[-1]
    committed = whole_units(small_disk / "adapter.work")
    assert run_command(tmp_path, options, before=want_no_reserve).code == 7  # again, and nothing is lost by it
    assert committed == whole_units(small_disk / "adapter.work")
    (small_disk / "other").unlink()
    with noting_commits() as again, pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamda.disk_space.START_RESERVE_BYTES", 0)
        patch.setattr("streamda.disk_space.UNIT_RESERVE_BYTES", 0)
        streamda.initialize(**options)
    assert not committed & set(again)
    assert weights(small_disk) == uninterrupted


def test_a_disk_that_is_too_small_is_refused_before_any_work(small_disk: Path, tiny: dict[str, Any]) -> None:
    with pytest.raises(StorageError, match=r"needs .* of disk.* free: give --work-dir on a larger disk"):
        streamda.initialize(**tiny, output_dir=str(small_disk / "adapter"))
    assert not (small_disk / "adapter.work").exists()
