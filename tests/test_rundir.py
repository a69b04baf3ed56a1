"""The run directory: one user at a time, never another run's, and nothing lost whenever the process or the disk fails.

Crashes are process kills: the page cache survives them. What a power cut would do is covered only by the order of
fsyncs, which `test_units` asserts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from streamda import files, folder_lock, rundir, units
from streamda.errors import (
    ConfigError,
    DamagedError,
    LockedError,
    MismatchError,
    StorageError,
    StreamdaError,
)
from streamda.run_parts import canonical_digest
from streamda.rundir import RunDirectory
from tests.killed import noting_commits, tracking_units

PARTS: dict[str, dict[str, Any]] = {"model": {"id": "m", "sizes": (1, 2)}, "method": {"rank": 8, "seed": 0}}
PACKAGE = Path(files.__file__).parent

WORKER = """
import hashlib, json, sys, types
from pathlib import Path

if "streamda" not in sys.modules:  # in a process of its own, without the real package, whose import takes seconds
    package = types.ModuleType("streamda")
    package.__path__ = [sys.argv[1]]
    sys.modules["streamda"] = package

from streamda.rundir import RunDirectory


def advance(run):
    # Three units, each computed from the one before, which is dropped in the end; a result beside the first.
    for index in range(3):
        if any(f"state-{later}" in run.units for later in range(index, 3)):
            continue
        before = b""
        if index:
            run.units.verify(f"state-{index - 1}")
            before = (run.units.path(f"state-{index - 1}") / "deep" / "data").read_bytes()
        if "result" not in run.units:
            with run.units.create("result", fingerprint="other") as draft:
                (draft.path / "data").write_bytes(b"result")
                draft.metadata["index"] = index
        with run.units.create(f"state-{index}") as draft:
            (draft.path / "deep").mkdir()
            (draft.path / "deep" / "data").write_bytes(hashlib.sha256(before).digest() * 99)
            (draft.path / "small").write_bytes(b"")
    for index in range(2):
        if f"state-{index}" in run.units:
            run.units.drop(f"state-{index}")


def work(path, parts, mode):
    with RunDirectory.open(path, parts, settings={"mode": mode}, restart=mode == "restart") as run:
        advance(run)
        if mode == "remove":
            (run.path / "model").mkdir(exist_ok=True)
            (run.path / "model" / "config.json").write_bytes(b"{}")
            run.remove()


if __name__ == "__main__":
    _, _, path, parts, mode, log = sys.argv
    if log:
        from streamda import files, rundir, units

        points = []
        for module in (files, rundir, units):
            module.reached = points.append
    work(Path(path), json.loads(parts), mode)
    if log:
        Path(log).write_text(json.dumps(points))
"""

worker: dict[str, Any] = {"__name__": "worker"}
exec(WORKER, worker)  # the same source in this process, for the faults that a test double injects


def run_worker(path: Path, mode: str = "work", kill_at: str = "", parts: Any = PARTS, log: Path | None = None) -> int:
    command = [sys.executable, "-c", WORKER, str(PACKAGE), str(path), json.dumps(parts), mode, str(log or "")]
    environment = {**os.environ, "STREAMDA_KILL_AT": kill_at}
    # Compiled once a test and not for each process, whatever the environment says, and away from the sources.
    environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(path.parent / "pyc")}
    return subprocess.run(command, env=environment, check=False).returncode


def content_of(path: Path) -> dict[str, str]:
    """Digests of all files of a finished run, without the date in run.json."""
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    record = json.loads(found.pop("run.json"))
    found["parts"] = json.dumps(record["parts"]).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def verified_units(path: Path) -> list[str]:
    """The units that a killed process left committed, all of them whole."""
    if not (path / "run.json").exists() or not (path / "units").exists():
        return []
    fingerprint = canonical_digest(json.loads((path / "run.json").read_bytes())["parts"])
    store = units.UnitStore(path / "units", fingerprint)
    for name in store.names():
        store.verify(name)
    return store.names()


def numbered(points: list[str]) -> list[str]:
    """Each point with the how-many-th time it is reached: what STREAMDA_KILL_AT understands."""
    return [f"{point}:{points[: index + 1].count(point)}" for index, point in enumerate(points)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    assert run_worker(path) == 0
    assert verified_units(path) == ["result", "state-2"]
    return path


def recorded_points(folder: Path, mode: str, start: Path | None = None) -> list[str]:
    if start is not None:
        shutil.copytree(start, folder / "recorded")
    assert run_worker(folder / "recorded", mode, log=folder / "points") == 0
    points: list[str] = json.loads((folder / "points").read_text())
    return points


def in_parallel(call: Callable[[int], None], count: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(count)))


def test_killed_anywhere_once_or_twice_the_next_run_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    """At every named point; the second kill falls on some point of the recovery."""
    points = numbered(recorded_points(tmp_path, "work"))
    second = random.Random(0).sample(points, len(points))
    second_kills = []

    def check(index: int) -> None:
        path = tmp_path / str(index)
        assert run_worker(path, kill_at=points[index]) == -signal.SIGKILL
        committed = verified_units(path)
        if index % 2:  # every other one, to spare time
            second_kills.append(run_worker(path, kill_at="sweep-found" if index % 4 == 1 else second[index]))
            assert second_kills[-1] in (0, -signal.SIGKILL)
            assert ("result" in committed) <= ("result" in verified_units(path))
        assert run_worker(path) == 0
        assert content_of(path) == content_of(finished)

    in_parallel(check, len(points))
    assert second_kills.count(-signal.SIGKILL) > len(points) // 8


@pytest.mark.parametrize("mode", ["restart", "remove"])
def test_killed_while_starting_over_or_removing_the_run_is_the_old_one_or_a_new_one(
    finished: Path, tmp_path: Path, mode: str
) -> None:
    points = numbered(recorded_points(tmp_path, mode, finished))
    # From where the fresh run begins, the sweep above has been here.
    stop = next((i for i, p in enumerate(points) if p.startswith("draft-made")), len(points))

    def check(index: int) -> None:
        path = tmp_path / str(index)
        shutil.copytree(finished, path)
        assert run_worker(path, mode, kill_at=points[index]) == -signal.SIGKILL
        # Whole, or none: half of an old run would be taken for progress.
        assert verified_units(path) in ([], ["result", "state-2"])
        assert run_worker(path) == 0
        assert content_of(path) == content_of(finished) | {
            name: digest for name, digest in content_of(path).items() if name.startswith("model/")
        }

    in_parallel(check, stop)


def test_the_sweeps_above_reach_every_point_there_is(finished: Path, tmp_path: Path) -> None:
    named = set()
    for module in (files, units, rundir):
        named |= set(re.findall(r'reached\("([a-z-]+)"\)', Path(module.__file__).read_text("utf-8")))
    assert run_worker(tmp_path / "killed", kill_at="unit-sealed") == -signal.SIGKILL
    reached = {*recorded_points(tmp_path, "remove"), "sweep-found"}
    assert run_worker(tmp_path / "killed", kill_at="sweep-found") == -signal.SIGKILL
    assert named == reached


def error_of(call: Callable[[], Any]) -> StreamdaError | None:
    try:
        call()
    except StreamdaError as error:
        return error
    return None


class Failing(files.SystemCalls):
    """The real system calls, of which the N-th fails, once or from then on; fsync is only counted."""

    reading = ("read", "preadv", "listdir", "lstat")

    def __init__(self, fail_at: int, code: int, once: bool) -> None:
        self.count = 0
        self.failed = ""
        for name in vars(files.SystemCalls):
            if not name.startswith("_") and not (code == errno.ENOSPC and name in (*self.reading, "close", "unlink")):
                setattr(self, name, self._wrapped(name, fail_at, code, once))

    def _wrapped(self, name: str, fail_at: int, code: int, once: bool) -> Callable[..., Any]:
        real = getattr(files.SystemCalls, name)

        def call(*args: Any) -> Any:
            self.count += 1
            failing = self.count == fail_at or (self.count > fail_at and not once)
            if name == "open" and code == errno.ENOSPC and not args[1] & os.O_CREAT:
                failing = False
            result = real(*args) if name == "close" or (not failing and name != "fsync") else None
            if failing:
                self.failed = self.failed or name
                raise OSError(code, os.strerror(code))
            return result

        return call


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_whichever_system_call_fails_nothing_committed_is_lost_and_the_next_run_succeeds(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, once: bool
) -> None:
    outcomes: dict[str, int] = {}
    for fail_at in range(1, 10_000, 1 if once else 3):
        path = tmp_path / str(fail_at)
        double = Failing(fail_at, code, once)
        monkeypatch.setattr(files, "system_calls", double)
        with tracking_units() as kept:
            raised = error_of(lambda path=path: worker["work"](path, PARTS, "work"))
        monkeypatch.setattr(files, "system_calls", Failing(0, code, once=True))
        if fail_at > double.count:
            break
        if raised is not None:
            assert len(str(raised).splitlines()) == 1
            assert os.strerror(code) in str(raised)
            assert isinstance(raised, StorageError if code == errno.ENOSPC else (StorageError, DamagedError))
        outcome = type(raised).__name__
        outcomes[outcome] = outcomes.get(outcome, 0) + bool(double.failed)
        committed = set(verified_units(path))
        assert kept <= committed
        with noting_commits() as again:
            worker["work"](path, PARTS, "work")
        assert not committed & set(again)
        assert content_of(path) == content_of(finished)
        shutil.rmtree(path)
    assert outcomes["StorageError"] > 30
    # What may fail unseen: looking for what is left of a draft after its commit, and clearing and closing LOCK.
    assert outcomes.get("NoneType", 0) <= 4 + 2


@pytest.mark.parametrize("mode", ["restart", "remove"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_whichever_system_call_fails_starting_over_or_removing_can_be_repeated(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, mode: str
) -> None:
    def act(path: Path) -> None:
        with RunDirectory.open(path, PARTS, settings={}, restart=mode == "restart") as run:
            if mode == "remove":
                run.remove()

    failures = 0
    for fail_at in range(1, 10_000):
        path = tmp_path / str(fail_at)
        shutil.copytree(finished, path)
        double = Failing(fail_at, code, once=True)
        monkeypatch.setattr(files, "system_calls", double)
        raised = error_of(lambda path=path: act(path))
        monkeypatch.setattr(files, "system_calls", Failing(0, code, once=True))
        if fail_at > double.count:
            break
        failures += raised is not None
        assert verified_units(path) in ([], ["result", "state-2"])
        act(path)
        assert path.exists() == (mode == "restart")
        worker["work"](path, PARTS, "work")
        assert content_of(path) == content_of(finished)
        shutil.rmtree(path)
    assert failures >= 7


@pytest.fixture(name="holder")
def _holder(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a process that opens the run with the given expression, says so, and waits."""
    started: list[subprocess.Popen[bytes]] = []

    def start(expression: str) -> subprocess.Popen[bytes]:
        script = WORKER.replace('if __name__ == "__main__":', "if False:") + (
            f"\nimport os\npath = Path(sys.argv[2])\nparts = json.loads(sys.argv[3])\nrun = {expression}\n"
            "print('ready', flush=True)\nsys.stdin.read()\n"
        )
        command = [sys.executable, "-c", script, str(PACKAGE), str(tmp_path / "run"), json.dumps(PARTS)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


OPEN = "RunDirectory.open(path, parts, settings={})"


def test_a_run_in_use_is_refused_at_once_with_pid_host_and_since(
    tmp_path: Path, holder: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    process = holder(OPEN)
    before = content_of(tmp_path / "run")
    start = time.monotonic()
    for restart in False, True:
        with pytest.raises(LockedError, match=rf"process {process.pid} on {os.uname().nodename} since \d{{4}}-"):
            RunDirectory.open(tmp_path / "run", PARTS, settings={}, restart=restart)
    for exclusive in False, True:
        with pytest.raises(LockedError, match=f"in use by process {process.pid}"):
            RunDirectory.open_existing(tmp_path / "run", exclusive=exclusive)
    assert time.monotonic() - start < 2
    assert content_of(tmp_path / "run") == before
    process.kill()
    process.wait()
    with RunDirectory.open(tmp_path / "run", PARTS, settings={}):  # the file is still there, the lock is not
        pass


def test_readers_share_a_run_and_keep_a_writer_out(
    tmp_path: Path, holder: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    path = tmp_path / "run"
    RunDirectory.open(path, PARTS, settings={"a": 1}).close()
    (path / "units" / "x.part").mkdir()
    holder("RunDirectory.open_existing(path, exclusive=False)")
    with RunDirectory.open_existing(path, exclusive=False) as run:
        assert run.settings == {"a": 1}
        for call in (run.remove, lambda: run.update_settings({"a": 2})):
            with pytest.raises(ValueError, match="reading only"):
                call()
    assert (path / "units" / "x.part").exists()  # a reader changes nothing
    with pytest.raises(LockedError, match="in use by another process; wait"):
        RunDirectory.open(path, PARTS, settings={})


def test_a_forked_child_does_not_keep_the_lock_of_a_dead_parent(
    tmp_path: Path, holder: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    # The child says that it lives and waits on a pipe that only this test's end closes; the parent is killed.
    child = "os.fork() or (os.write(pipe[1], b'x'), sys.stdin.read(), os._exit(0))"
    process = holder(f"({OPEN}, pipe := os.pipe(), {child}, os.read(pipe[0], 1))")
    process.kill()
    process.wait()
    with RunDirectory.open(tmp_path / "run", PARTS, settings={}) as run:
        assert run.units.names() == []


def test_one_process_cannot_open_a_run_twice_and_a_lock_on_a_removed_file_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = RunDirectory.open(path, PARTS, settings={})
    with pytest.raises(LockedError):
        RunDirectory.open(path, PARTS, settings={})
    run.remove()
    run.close()
    assert not path.exists()

    # Another process opened LOCK before it was removed, and gets the lock afterwards.
    run = RunDirectory.open(path, PARTS, settings={})
    opened, removed = threading.Event(), threading.Event()

    class Slow(files.SystemCalls):
        @staticmethod
        def flock(descriptor: int, kind: int) -> None:
            if threading.current_thread() is not threading.main_thread() and not removed.is_set():
                opened.set()
                removed.wait(10)
            files.SystemCalls.flock(descriptor, kind)

    found: list[RunDirectory] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "system_calls", Slow())
        thread = threading.Thread(target=lambda: found.append(RunDirectory.open(path, PARTS, settings={"late": 1})))
        thread.start()
        assert opened.wait(10)
        (path / "foreign").write_bytes(b"")  # keeps the folder, so that only LOCK is another file now
        run.remove()
        (path / "foreign").unlink()
        removed.set()
        thread.join()
    assert found[0].settings == {"late": 1}
    with pytest.raises(LockedError):
        RunDirectory.open(path, PARTS, settings={})
    found[0].close()


def test_a_run_is_continued_with_what_it_was_started_with(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / "run"
    with RunDirectory.open(path, PARTS, settings={"budget": 1, "keep": True}) as run:
        assert sorted(os.listdir(path)) == ["LOCK", "run.json", "units"]
        assert run.parts == {"model": {"id": "m", "sizes": [1, 2]}, "method": {"rank": 8, "seed": 0}}
        assert run.fingerprint == run.units.fingerprint == canonical_digest(PARTS)
        with run.units.create("one"):
            pass
        (path / "units" / "two.part").mkdir()
        (path / "run.json.0123abcd.tmp").write_bytes(b"")
    created = json.loads((path / "run.json").read_bytes())["created"]
    moved = path.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)  # the directory itself may be behind a link
    with RunDirectory.open(str(tmp_path / "link"), PARTS, settings={"budget": 2}) as run:
        assert run.path == moved
        assert run.units.names() == ["one"]
        assert sorted(os.listdir(moved)) == ["LOCK", "run.json", "units"]
        assert os.listdir(moved / "units") == ["one"]
        run.update_settings({"done": [1.5]})
        assert run.settings == {"budget": 2, "keep": True, "done": [1.5]}
    with RunDirectory.open_existing(moved, exclusive=True) as run:
        assert run.settings == {"budget": 2, "keep": True, "done": [1.5]}
        assert run.units.names() == ["one"]
    record = json.loads((moved / "run.json").read_bytes())
    assert (record["format"], record["version"], record["created"]) == ("streamda-run", 1, created)
    with pytest.raises(ConfigError, match="holds a run"):
        RunDirectory.open(moved, PARTS, settings={}, resume=False)
    with RunDirectory.open(tmp_path / "fresh", PARTS, settings={}, resume=False) as run:
        assert run.units.names() == []


def test_other_parts_are_refused_with_fields_and_both_values_unless_ignored_or_started_over(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDirectory.open(path, PARTS, settings={"old": 1}) as run, run.units.create("one"):
        pass
    before = content_of(path)
    long = "x" * 40 + "\n" + "y" * 60
    other = {"model": {"id": long, "revision": True}, "method": {"rank": 8.0, "seed": 0}, "data": {"rows": 1}}
    with pytest.raises(MismatchError) as caught:
        RunDirectory.open(path, other, settings={"new": 1})
    message = str(caught.value)
    assert 'data was absent and is now {"rows":1}' in message
    assert "method.rank was 8 and is now 8.0" in message
    assert f'model.id was "m" and is now "{"x" * 29}...{"y" * 29}"' in message
    assert "model.revision was absent and is now true" in message
    assert "model.sizes was [1,2] and is now absent; choose another folder, or --overwrite to start over" in message
    assert len(message.splitlines()) == 1
    RunDirectory.open(tmp_path / "nine", {"p": dict.fromkeys("abcdefghi", 0)}, settings={}).close()
    with pytest.raises(MismatchError, match=r"p\.e was 0 and is now 1 and 4 more; choose"):
        RunDirectory.open(tmp_path / "nine", {"p": dict.fromkeys("abcdefghi", 1)}, settings={})
    assert content_of(path) == before
    with RunDirectory.open(path, other, settings={}, ignore_parts=["model", "method", "data"]) as run:
        assert run.fingerprint == canonical_digest(PARTS)
        run.units.verify("one")
    (path / "model").mkdir()
    with RunDirectory.open(path, other, settings={"new": 1}, restart=True) as run:
        assert run.fingerprint == canonical_digest(other)
        assert run.units.names() == []
        assert run.settings == {"new": 1}
    assert sorted(os.listdir(path)) == ["LOCK", "run.json", "units"]


def snapshot(path: Path) -> dict[str, Any]:
    return {str(p): p.read_bytes() if p.is_file() else os.path.islink(p) for p in sorted(path.rglob("*"))}


def refused(path: Path, error: type[StreamdaError], match: str) -> None:
    """Neither resuming, restarting nor reading is possible, and nothing in the folder changes."""
    before = snapshot(path)
    for restart in False, True:
        with pytest.raises(error, match=match) as caught:
            RunDirectory.open(path, PARTS, settings={}, restart=restart)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises((error, ConfigError)):
        RunDirectory.open_existing(path, exclusive=True)
    assert snapshot(path) == before


@pytest.mark.parametrize(
    "content",
    [
        {"file": b""},
        {".hidden": b""},
        {"LOCK": b"", "file": b""},
        {"LOCK": b"not ours"},
        {"units/one/data": b""},
        {"units/file": b"", "LOCK": b""},
        {"run.json": b"{}"},
        {"run.json": b'{"runs": 3}', "LOCK": b""},
        {"run.json.bak.tmp": b""},
        {"model/config.json": b""},
    ],
)
def test_a_folder_that_is_not_ours_is_refused_untouched(tmp_path: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    refused(tmp_path, ConfigError, "is not a streamda run directory")


@pytest.mark.parametrize(("field", "value"), [("format", "other"), ("version", 2), ("version", "1"), ("version", None)])
def test_other_formats_and_versions_are_refused_untouched(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "run"
    RunDirectory.open(path, PARTS, settings={}).close()
    record = json.loads((path / "run.json").read_bytes())
    record[field] = value
    (path / "run.json").write_text(json.dumps(record))
    refused(path, MismatchError, f"{value!r}.* this streamda reads 'streamda-run' version 1")


def test_a_damaged_record_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunDirectory.open(path, PARTS, settings={}).close()
    good = (path / "run.json").read_bytes()
    damaged = [b"", good[:-1], good + b" ", b"\0" * len(good), good.replace(b'"rank": 8', b'"rank": 9')]
    for bit in random.Random(0).sample(range(8 * len(good)), 50):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for raw in damaged:
        (path / "run.json").write_bytes(raw)
        before = snapshot(path)
        # A flip in "format" or "version" makes it another format, and one in the word "format" nobody's.
        with pytest.raises((DamagedError, MismatchError, ConfigError), match=r"run\.json|reads|not a streamda"):
            RunDirectory.open(path, PARTS, settings={})
        assert snapshot(path) == before
    for raw in damaged[:5]:
        (path / "run.json").write_bytes(raw)
        refused(path, DamagedError, r"run\.json")
    (path / "run.json").write_bytes(good)
    (path / "units").rmdir()
    refused(path, DamagedError, "units is missing")


@pytest.mark.parametrize("name", ["LOCK", "run.json", "units"])
def test_symbolic_links_inside_are_refused_untouched(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run"
    RunDirectory.open(path, PARTS, settings={}).close()
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    refused(path, DamagedError, f"{name} is a symbolic link")


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"LOCK": b""},
        {"LOCK": b'{"form'},
        {"LOCK": b'{"format":"streamda-lock","host":"h","pid":1,"since":"2'},
        {"LOCK": b"", "run.json.0123abcd.tmp": b"{"},
        {"probe.0123abcd.part/file": b""},
        {"LOCK": b"", "run.json.0123abcd.trash": b"{", "units/one.0123abcd.trash/data": b"", "model/x": b""},
    ],
)
def test_what_a_killed_creation_or_removal_left_is_made_anew(tmp_path: Path, left: dict[str, bytes]) -> None:
    for name, data in left.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match="there is no streamda run"):
        RunDirectory.open_existing(tmp_path, exclusive=True)
    with RunDirectory.open(tmp_path, PARTS, settings={}, resume=False) as run:
        assert run.units.names() == []
    assert sorted(os.listdir(tmp_path)) == ["LOCK", "run.json", "units"]


def test_finishing_a_removal_takes_what_a_run_left_and_no_empty_folder(tmp_path: Path) -> None:
    RunDirectory.finish_removal(tmp_path)
    assert os.listdir(tmp_path) == []
    for left in ({"LOCK": b""}, {"LOCK": b"", "run.json.0123abcd.trash": b"{", "units/one/data": b""}):
        path = tmp_path / "run"
        for name, data in left.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        RunDirectory.finish_removal(path)
        assert not path.exists()


def test_many_locks_leave_no_hook_in_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []  # what is registered for forks is never let go
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: registered.append(hooks))
    for exclusive in (True, False):
        folder_lock.FolderLock(tmp_path / "LOCK", exclusive=exclusive).release()
    assert not registered


def test_removing_keeps_what_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDirectory.open(path, PARTS, settings={}) as run:
        with run.units.create("one"):
            pass
        (path / "model").mkdir()
        (path / "model" / "config.json").write_bytes(b"{}")
        (path / "mine.txt").write_bytes(b"mine")
        run.remove()
    assert os.listdir(path) == ["mine.txt"]
    refused(path, ConfigError, "not a streamda run directory")


def test_a_place_that_cannot_be_used_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300), tmp_path / "loop"):
        with pytest.raises(StorageError, match="cannot "):
            RunDirectory.open(path, PARTS, settings={})


def test_nothing_depends_on_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(rundir.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return rundir.datetime(1970, 1, 1, tzinfo=tz)

    with RunDirectory.open(tmp_path / "run", PARTS, settings={}) as run, run.units.create("one"):
        pass
    for module in (rundir, folder_lock):
        monkeypatch.setattr(module, "datetime", Clock)
    for each in (tmp_path / "run").rglob("*"):
        os.utime(each, (2**33, 2**33))
    with RunDirectory.open(tmp_path / "run", PARTS, settings={}) as run:
        run.units.verify("one")


def test_the_digest_is_that_of_the_value_and_not_of_its_spelling() -> None:
    assert canonical_digest({"b": (1, 2), "a": "é\udcff"}) == canonical_digest({"a": "é\udcff", "b": [1, 2]})
    digests = {canonical_digest(value) for value in ({"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None}, {})}
    assert len(digests) == 6
    assert canonical_digest({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
