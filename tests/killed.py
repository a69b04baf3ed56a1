"""Runs in a process of their own that are killed, signalled or starved at a chosen moment, and what they leave."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import streamda
from streamda import cli, files
from streamda.run_parts import canonical_digest
from streamda.rundir import RunDirectory
from streamda.units import UnitDraft, UnitStore
from tests.models import run_options, write_inputs

# a server that has streamda imported forks a process per kill, which spares each its six seconds of imports
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["streamda", "tests.killed"])

LEFTOVER = re.compile(r"\.(part|trash|tmp|partial)$")

Action = Callable[[], object]


def run_until(point: str, options: dict[str, Any], log: Path | None = None) -> int | None:
    """Runs `initialize` in a process of its own that kills itself at a point; its exit code. `log` takes commits."""
    return _exit_code(_run_until, point, options, log)


def run_for(seconds: float, options: dict[str, Any], log: Path | None = None) -> int | None:
    """Runs `initialize` in a process of its own that is killed after some seconds of work; its exit code."""
    beginning, begun = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_run_noted, args=(begun, options, log))
    process.start()
    beginning.recv()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def recorded_points(options: dict[str, Any], log: Path) -> list[str]:
    """Every named point of an uninterrupted run with the how-many-th time it is reached: what `run_until` takes."""
    assert _exit_code(_record_points, options, log) == 0
    points: list[str] = json.loads(log.read_text())
    return [f"{point}:{points[: index + 1].count(point)}" for index, point in enumerate(points)]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    stdout: str
    stderr: str


def run_command(
    folder: Path, options: dict[str, Any], *, before: Action | None = None, at: str = "", act: Action | None = None
) -> Ended:
    """Runs ``streamda init`` in a process of its own.

    Args:
        folder: takes what it prints.
        options: of `streamda.initialize`.
        before: called in the process first.
        at: a point with its number, see `recorded_points`.
        act: called in the process there.
    """
    arguments = ["init", *(part for name, value in options.items() for part in _option(name, value))]
    code = _exit_code(_run_command, folder, arguments, before, at, act)
    return Ended(code, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def weights(folder: Path) -> bytes:
    """The file of the adapter that a run made below a folder."""
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def write_tiny(folder: Path) -> dict[str, Any]:
    """A checkpoint and samples of a run that takes less than a second; options but for the output."""
    # with all that a run can have on disk
    return run_options(write_inputs(folder), target_modules="o_proj,down_proj", spill_statistics=True)


def whole_units(work: Path) -> set[str]:
    """The units that are committed in a run's folder, every byte of them checked."""
    if not (work / "run.json").exists() or not (work / "units").exists():
        return set()
    store = UnitStore(work / "units", canonical_digest(json.loads((work / "run.json").read_bytes())["parts"]))
    for name in store.names():
        store.verify(name)
    return set(store.names())


@contextmanager
def noting_commits(log: Path | None = None) -> Iterator[list[str]]:
    """The units whose commit is begun meanwhile in this process; also, one a line, in a file."""
    names: list[str] = []
    commit = UnitStore.commit

    def noted(self: UnitStore, draft: UnitDraft) -> None:
        names.append(draft.name)
        if log is not None:
            with log.open("a") as file:
                file.write(f"{draft.name}\n")
        commit(self, draft)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitStore, "commit", noted)
        yield names


@contextmanager
def tracking_units() -> Iterator[set[str]]:
    """The units that are committed in this process and not dropped, or given back with the whole run, since."""
    kept: set[str] = set()
    commit, drop, remove = UnitStore.commit, UnitStore.drop, RunDirectory.remove

    def noted_commit(self: UnitStore, draft: UnitDraft) -> None:
        commit(self, draft)
        kept.add(draft.name)

    def noted_drop(self: UnitStore, name: str) -> None:
        kept.discard(name)
        drop(self, name)

    def noted_remove(self: RunDirectory) -> None:
        kept.clear()
        remove(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitStore, "commit", noted_commit)
        patch.setattr(UnitStore, "drop", noted_drop)
        patch.setattr(RunDirectory, "remove", noted_remove)
        yield kept


def finish(folder: Path, options: dict[str, Any], expected: bytes) -> None:
    """Runs to the end what was stopped in some way: nothing that is committed is done again, and the bits are those."""
    committed = whole_units(folder / "adapter.work")
    with noting_commits() as again:
        streamda.initialize(**options)
    assert not committed & set(again)
    assert weights(folder) == expected
    assert not [path for path in folder.rglob("*") if LEFTOVER.search(path.name)]
    # killed between its last file and the folder itself, a run leaves that empty, as a user's own might be
    assert not any((folder / "adapter.work").glob("*"))


def watch_points(called: Callable[[str], object]) -> None:
    """From now on calls this at every named point of this process."""
    for name, module in list(sys.modules.items()):
        if name.startswith("streamda") and getattr(module, "reached", None) is files.reached and module is not files:
            module.reached = called
    files.reached = called


def _exit_code(function: Callable[..., None], *arguments: Any) -> int | None:
    process = PROCESSES.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def _run_until(point: str, options: dict[str, Any], log: Path | None) -> None:
    os.environ["STREAMDA_KILL_AT"] = point
    with noting_commits(log):
        streamda.initialize(**options)


def _run_noted(begun: Any, options: dict[str, Any], log: Path | None) -> None:
    begun.send(None)
    with noting_commits(log):
        streamda.initialize(**options)


def _record_points(options: dict[str, Any], log: Path) -> None:
    points: list[str] = []
    watch_points(points.append)
    streamda.initialize(**options)
    log.write_text(json.dumps(points))


def _option(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, str(value)]


def _run_command(folder: Path, arguments: list[str], before: Action | None, at: str, act: Action | None) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if act is not None:
        point, _, times = at.partition(":")
        count = 0

        def called(reached: str) -> None:
            nonlocal count
            count += reached == point
            if reached == point and count == int(times or 1):
                act()

        watch_points(called)
    sys.argv = ["streamda", *arguments]
    if before is not None:
        before()
    cli.main()
