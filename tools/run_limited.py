"""Runs a command under a memory limit that the kernel enforces, and says how close to it the command came.

    python -m tools.run_limited --memory 6GB [--watch-disk DIR]... [--cold DIR]... [--json FILE] -- COMMAND ...
    python -m tools.run_limited --memory 6GB --watch-disk adapter.work -- streamda init --max-gpu-mem 4GB ...

The command gets a memory cgroup of its own (version 1 or 2), swap included in the limit where the kernel counts it. All
its memory is charged there, page cache too: a command that reads more than fits has its own cached pages dropped and
lives; one that needs more private memory is killed. Pages of files that were cached before are charged to whoever read
or wrote them first; `--cold` drops those of a folder beforehand, so that reading is charged here, and is from disk.

At the end, on stderr: the limit; the cgroup's peak; how often the limit was hit and how many processes it killed; the
peak of private memory (sampled every 50 ms); seconds; the peak size of each watched folder (sampled every second). The
exit code is the command's (128 + signal where it was killed, 127 where there is no such command), or 125 where no
cgroup can be made.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamda.errors import StreamdaError
from streamda.memory import format_size, parse_size

MEMORY_INTERVAL_SECONDS = 0.05
DISK_INTERVAL_SECONDS = 1.0
SWAP_BYTES = 1 << 20
NO_CGROUP = 125


class NoCgroupError(Exception):
    """This process may not make a memory cgroup here."""


@dataclass(frozen=True)
class MemoryCgroup:
    """A folder of the cgroup file system, made for one command."""

    folder: Path
    version: int

    @property
    def procs(self) -> Path:
        """File of the member processes."""
        return self.folder / "cgroup.procs"

    def limit(self, limit_bytes: int) -> None:
        """Sets the limit of memory; swap adds nothing to it."""
        if self.version == 1:
            (self.folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
            # memory and swap together; at the very limit it would be hit first, and recent kernels do not count that
            swap, swap_limit = self.folder / "memory.memsw.limit_in_bytes", limit_bytes + SWAP_BYTES
        else:
            (self.folder / "memory.max").write_text(str(limit_bytes))
            swap, swap_limit = self.folder / "memory.swap.max", 0
        if swap.exists():
            swap.write_text(str(swap_limit))

    def private_bytes(self) -> int:
        """Anonymous memory of all processes now."""
        key = "total_rss" if self.version == 1 else "anon"
        return _number(self.folder / "memory.stat", key)

    def peak_bytes(self) -> int:
        """Highest charge so far, page cache included; 0 where the kernel does not keep it (before 5.19)."""
        path = self.folder / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        return int(path.read_text()) if path.exists() else 0

    def limit_hits(self) -> int:
        """How often memory had to be reclaimed to stay under the limit, or could not be."""
        if self.version == 1:
            return int((self.folder / "memory.failcnt").read_text())
        return _number(self.folder / "memory.events", "max")

    def kills(self) -> int:
        """Processes that the limit killed."""
        return _number(self.folder / ("memory.oom_control" if self.version == 1 else "memory.events"), "oom_kill")

    def remove(self) -> None:
        """Ends what still runs in it, and removes it."""
        for _ in range(100):
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            with contextlib.suppress(OSError):
                for pid in self.procs.read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        print(f"run_limited: {self.folder} could not be removed", file=sys.stderr)


def _number(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _parents() -> Iterator[tuple[Path, int]]:
    """Cgroups below which one might be made: the top of what is mounted, else this process's own."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.lstrip("/")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            candidates = [Path(mount)]
            candidates += [Path(mount) / path for names, path in own.items() if "memory" in names.split(",")]
            yield from ((candidate, 1) for candidate in candidates)
        elif kind == "cgroup2":
            top, mine = Path(mount), Path(mount) / own.get("", "")
            for candidate in (top, mine, mine.parent):
                delegated = candidate / "cgroup.subtree_control"
                if delegated.is_file() and "memory" in delegated.read_text().split():
                    yield candidate, 2


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """A fresh cgroup with a limit, gone afterwards.

    Raises:
        NoCgroupError: none can be made.
    """
    reasons = []
    for parent, version in _parents():
        cgroup = MemoryCgroup(parent / f"streamda-limited-{os.getpid()}", version)
        try:
            cgroup.folder.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        try:
            try:
                cgroup.limit(limit_bytes)
                cgroup.private_bytes()
            except OSError as error:
                reasons.append(f"{cgroup.folder}: {error.strerror}")
                continue
            yield cgroup
        finally:
            cgroup.remove()
        return
    raise NoCgroupError("; ".join(dict.fromkeys(reasons)) or "no memory controller is mounted or delegated")


def folder_bytes(folder: Path) -> int:
    """Disk space in use below a folder, 0 if it is not there; files may come and go meanwhile."""
    total, seen, waiting = 0, set(), [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        facts = entry.stat(follow_symlinks=False)
                        if (facts.st_dev, facts.st_ino) not in seen:
                            seen.add((facts.st_dev, facts.st_ino))
                            total += facts.st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
        except OSError:
            continue
    return total


def drop_cached_pages(folder: Path) -> None:
    """Asks the kernel to forget the cached pages of all files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # dirty pages stay otherwise
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class Peaks:
    """Largest values seen by the sampling threads."""

    private_bytes: int = 0
    folder_bytes: dict[str, int] = field(default_factory=dict)


def _sample_memory(cgroup: MemoryCgroup, peaks: Peaks, done: threading.Event) -> None:
    while not done.wait(MEMORY_INTERVAL_SECONDS):
        peaks.private_bytes = max(peaks.private_bytes, cgroup.private_bytes())


def _sample_disk(folders: Sequence[Path], peaks: Peaks, done: threading.Event) -> None:
    while True:
        for folder in folders:
            peaks.folder_bytes[str(folder)] = max(peaks.folder_bytes.get(str(folder), 0), folder_bytes(folder))
        if done.wait(DISK_INTERVAL_SECONDS):
            return


def run(command: Sequence[str], limit_bytes: int, watched: Sequence[Path] = ()) -> dict[str, Any]:
    """Runs a command under a limit.

    Returns:
        exit_code, limit_bytes, cgroup_peak_bytes, limit_hits, kills, private_peak_bytes, seconds, folder_peak_bytes.

    Raises:
        NoCgroupError: none can be made.
    """
    with memory_cgroup(limit_bytes) as cgroup:
        peaks, done = Peaks(), threading.Event()
        started = time.monotonic()
        # the shell joins before it becomes the command, so every page is charged; a Python function between fork and
        # exec would do the same, but is unsafe in a process with threads
        joined = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.procs), *command]
        process = subprocess.Popen(joined)
        threads = [threading.Thread(target=_sample_memory, args=(cgroup, peaks, done), daemon=True)]
        if watched:
            threads.append(threading.Thread(target=_sample_disk, args=(watched, peaks, done), daemon=True))
        for thread in threads:
            thread.start()

        def forward(number: int, _frame: object) -> None:
            process.send_signal(number)

        # a terminal sends ^C to the command as well; what is forwarded is what only this process was sent
        before = {signal.SIGTERM: signal.signal(signal.SIGTERM, forward)}
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            done.set()
            for thread in threads:
                thread.join()
        return {
            "exit_code": code if code >= 0 else 128 - code,
            "limit_bytes": limit_bytes,
            "cgroup_peak_bytes": cgroup.peak_bytes(),
            "limit_hits": cgroup.limit_hits(),
            "kills": cgroup.kills(),
            "private_peak_bytes": peaks.private_bytes,
            "seconds": time.monotonic() - started,
            "folder_peak_bytes": peaks.folder_bytes,
        }


def describe(facts: dict[str, Any]) -> str:
    """What happened, in a few lines."""
    lines = [
        f"limit           {format_size(facts['limit_bytes'])}, hit {facts['limit_hits']} times, "
        f"{facts['kills']} processes killed by it",
        f"peak            {format_size(facts['cgroup_peak_bytes'])} with page cache",
        f"private memory  {format_size(facts['private_peak_bytes'])} at most",
        f"wall            {facts['seconds']:.1f} s, exit code {facts['exit_code']}",
    ]
    lines += [
        f"disk            {format_size(size)} at most in {name}" for name, size in facts["folder_peak_bytes"].items()
    ]
    return "\n".join("run_limited: " + line for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", required=True, help="limit, such as 6GB")
    parser.add_argument("--watch-disk", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--cold", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same facts for programs")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command is given after --")
    for folder in options.cold:
        drop_cached_pages(folder)
    try:
        facts = run(command, parse_size(options.memory, "--memory"), options.watch_disk)
    except StreamdaError as error:
        parser.error(str(error))
    except NoCgroupError as error:
        print(f"run_limited: no memory cgroup can be made here ({error}); run it as root", file=sys.stderr)
        return NO_CGROUP
    print(describe(facts), file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return int(facts["exit_code"])


if __name__ == "__main__":
    sys.exit(main())
