"""A whole run in which the power fails: what was not synced is lost, kept or torn, each by chance, and nothing else.

The model is that of a file system which promises no more than POSIX does. The bytes of a file are safe once the file
is synced; until then it may have all of them, none, or the first few. A name in a folder is safe once the folder is
synced; until then each name that is new, gone or another's may be as it was or as it is, but a rename happens whole.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import streamda
from streamda import files
from streamda.rundir import RunDirectory
from tests.killed import finish, tracking_units, weights, whole_units

CHANGING = ("write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
PARTS = 8  # of the sweep, so that it can be spread over processes


def listed(folder: Path) -> dict[str, tuple[int, bool]]:
    """Inode, and whether it is a folder, of each name."""
    return {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in os.scandir(folder)}


class UnsyncedDisk(files.SystemCalls):
    """The real system calls, with a note of what is safe on the disk at each moment.

    Args:
        top: all that counts lies below it. Its own name is safe.
        before: called before each call that changes the disk, with its number.
    """

    def __init__(self, top: Path, before: Callable[[int], None]) -> None:
        self.top = top
        self.count = 0
        self._before = before
        self._lock = threading.RLock()
        self._bytes: dict[int, bytes] = {}  # of files by inode, as they were last synced
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}  # of folders by inode: inode, and whether a folder
        self._held: dict[int, int] = {}  # open descriptors by inode: one in use is given to no other file
        for name in CHANGING:
            setattr(self, name, self._noted(name))
        self._note_folder(top)

    def let_go(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)

    def write_crashed(self, target: Path, chance: random.Random) -> None:
        """Writes one of the states that the disk may have after a crash at this moment."""
        self._write_folder(self.top.stat().st_ino, self._present(), target, chance)

    def _noted(self, name: str) -> Callable[..., Any]:
        real = getattr(files.SystemCalls, name)

        def call(*args: Any) -> Any:
            with self._lock:  # one thing at a time, or a state would have parts of two moments
                self.count += 1
                self._before(self.count)
                result = real(*args)
                if name == "fsync":
                    self._note(args[0])
                return result

        return call

    def _note(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if stat.S_ISDIR(status.st_mode):
            self._note_folder(path)
            return
        self._hold(path, status.st_ino)
        self._bytes[status.st_ino] = path.read_bytes()

    def _note_folder(self, path: Path) -> None:
        inode = path.stat().st_ino
        self._hold(path, inode)
        self._names[inode] = listed(path)
        for name, (entry, _) in self._names[inode].items():
            self._hold(path / name, entry)

    def _hold(self, path: Path, inode: int) -> None:
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)

    def _present(self) -> dict[int, Path]:
        """Where each inode is now."""
        found = {self.top.stat().st_ino: self.top}
        for folder, folders, names in os.walk(self.top):
            for name in (*folders, *names):
                path = Path(folder, name)
                found[path.lstat().st_ino] = path
        return found

    def _write_folder(self, inode: int, present: dict[int, Path], target: Path, chance: random.Random) -> None:
        target.mkdir()
        before = self._names.get(inode, {})
        now = listed(present[inode]) if inode in present else {}
        for name, (entry, is_folder) in self._surviving(before, now, chance).items():
            if is_folder:
                self._write_folder(entry, present, target / name, chance)
            else:
                (target / name).write_bytes(self._surviving_bytes(entry, present, chance))

    @staticmethod
    def _surviving(
        before: dict[str, tuple[int, bool]], now: dict[str, tuple[int, bool]], chance: random.Random
    ) -> dict[str, tuple[int, bool]]:
        """Of each file or folder the name that it had or the one that it has."""
        old_names = {entry: name for name, entry in before.items()}
        new_names = {entry: name for name, entry in now.items()}
        replaced = {entry for name, entry in before.items() if entry not in new_names and name in now}
        result = {}
        for entry in sorted({*old_names, *new_names} - replaced):
            name = old_names.get(entry) if chance.random() < 0.5 else new_names.get(entry)
            if name is not None:
                result[name] = entry
        # what another took the name of is there as long as the other does not have that name
        for entry in replaced:
            result.setdefault(old_names[entry], entry)
        return result

    def _surviving_bytes(self, inode: int, present: dict[int, Path], chance: random.Random) -> bytes:
        synced = self._bytes.get(inode)
        current = present[inode].read_bytes() if inode in present else synced
        if synced is not None and synced == current:
            return synced
        current, kept = current or b"", synced or b""
        torn = current[: chance.randint(0, len(current))]
        return chance.choice([current, kept, b"", torn, torn + bytes(len(current) - len(torn))])


@dataclass(frozen=True)
class Crash:
    """A state that a power failure may have left."""

    folder: Path
    committed: frozenset[str]
    """Units whose commit had ended."""
    is_done: bool
    """Whether the adapter was in place."""


def crashes(tiny: dict[str, Any], folder: Path, moments: Callable[[int], bool], num_states: int) -> list[Crash]:
    """What a run may leave if the power fails at some of its calls, several states of each moment."""
    top = folder / "top"
    top.mkdir()
    found: list[Crash] = []
    done: list[None] = []
    remove = RunDirectory.remove

    def crash(count: int) -> None:
        if moments(count):
            for number in range(num_states):
                found.append(Crash(folder / f"{count}-{number}", frozenset(committed), bool(done)))
                disk.write_crashed(found[-1].folder, random.Random(f"{count} {number}"))

    def noted_remove(self: RunDirectory) -> None:
        done.append(None)  # nothing may go before the adapter is in place
        remove(self)

    disk = UnsyncedDisk(top, crash)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        stack.callback(disk.let_go)
        patch.setattr(files, "system_calls", disk)
        patch.setattr(RunDirectory, "remove", noted_remove)
        committed = stack.enter_context(tracking_units())
        streamda.initialize(**tiny, output_dir=str(top / "adapter"))
    assert disk.count > 150
    return found


def recovers(crash: Crash, tiny: dict[str, Any], expected: bytes) -> None:
    """Every unit is as before or as after, what was committed is there, and the run is finished from it."""
    assert crash.committed <= whole_units(crash.folder / "adapter.work")
    if crash.is_done:
        assert weights(crash.folder) == expected
    finish(crash.folder, tiny | {"output_dir": str(crash.folder / "adapter")}, expected)
    shutil.rmtree(crash.folder)


def test_a_run_recovers_from_some_power_failures(tmp_path: Path, tiny: dict[str, Any]) -> None:
    chosen = random.Random(3)
    found = crashes(tiny, tmp_path, lambda _count: chosen.random() < 0.1, 1)
    expected = weights(tmp_path / "top")
    for crash in random.Random(4).sample(found, 3):
        recovers(crash, tiny, expected)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_recovers_from_a_power_failure_at_any_call(tmp_path: Path, tiny: dict[str, Any], part: int) -> None:
    found = crashes(tiny, tmp_path, lambda count: count % PARTS == part, 2)
    expected = weights(tmp_path / "top")
    for crash in found:
        recovers(crash, tiny, expected)


def test_the_model_of_a_disk_loses_what_is_not_synced_and_keeps_the_rest(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    disk = UnsyncedDisk(top, lambda _count: None)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        stack.callback(disk.let_go)
        patch.setattr(files, "system_calls", disk)
        files.write_json_atomic(top / "old.json", 1)
        files.make_folders(top / "deep")
        (top / "deep" / "unsynced").write_bytes(b"abc")
        (top / "new").write_bytes(b"12345678")
        with files.FileWriter(top / "replacing") as file:
            file.write(b"2\n")
        files.replace(top / "replacing", top / "old.json")
        seen: dict[str, set[bytes | None]] = {"old.json": set(), "new": set(), "deep/unsynced": set()}
        for number in range(60):
            disk.write_crashed(tmp_path / str(number), random.Random(number))
            assert (tmp_path / str(number) / "deep").is_dir()
            for name, contents in seen.items():
                path = tmp_path / str(number) / name
                contents.add(path.read_bytes() if path.exists() else None)
    assert seen["old.json"] == {b"1\n", b"2\n"}
    assert {None, b"", b"12345678"} < seen["new"]
    assert {None, b"abc"} < seen["deep/unsynced"]
