"""What the system grants this process, and running into it told in one line: memory, threads, open files.

A limit shows as whatever the library that met it raises. `limit_errors` recognizes it anywhere in a chain of errors
and names it, with the option or the shell's command that moves it.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from streamda.errors import BudgetError, StoppedError, StorageError, StreamdaError
from streamda.memory import MemoryBudget, anonymous_bytes, format_size, free_device_bytes, total_device_bytes

_NO_LIMIT_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63; nobody has an exabyte
_MEMORY_TEXT = (
    *("can't allocate memory", "cannot allocate memory", "cuda error: out of memory", "not enough memory"),
    # of cuBLAS, cuSOLVER and their like, which also call a handle so that they had no memory for; of C++
    *("status_alloc_failed", "status_not_initialized", "std::bad_alloc"),
)


def memory_limit(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process and its cgroup may use at most: RAM, or less; None where neither is known.

    Args:
        proc: the process file system.
        cgroups: where cgroups are mounted, of version 1 or 2.
    """
    total = memory_of_machine("MemTotal", proc)
    limits = [*_cgroup_limits(proc, cgroups)] + ([] if total is None else [total])
    return min(limits, default=None)


def memory_of_machine(field: str, proc: Path = Path("/proc")) -> int | None:
    """Bytes that the kernel gives for a field of its table of memory, such as ``MemAvailable``; None if it does not."""
    with suppress(OSError, ValueError, IndexError):
        for line in (proc / "meminfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def bounded_budget(
    budget: MemoryBudget, device: torch.device, limit_bytes: int | None
) -> tuple[MemoryBudget, list[str]]:
    """A budget that is no larger than what there is, and a notice for each part of it that was.

    Args:
        budget: as asked for.
        device: where the model computes.
        limit_bytes: of `memory_limit`.
    """
    notices: list[str] = []

    def bounded(name: str, asked: int, limit: int, what: str) -> int:
        if asked <= limit:
            return asked
        notices.append(f"{name} is {format_size(asked)}, but {what}: {format_size(limit)} are used instead")
        return limit

    if device.type == "cuda":
        free = free_device_bytes(device)
        what = f"of the device's {format_size(total_device_bytes(device))} no more are free"
        budget = replace(budget, device_bytes=bounded("--max-gpu-mem", budget.device_bytes, free, what))
        if limit_bytes is not None:
            host = bounded("--max-host-mem", budget.host_bytes, limit_bytes, "this machine or its cgroup allows less")
            budget = replace(budget, host_bytes=host)
    elif limit_bytes is not None:
        left = max(1, limit_bytes - anonymous_bytes())
        what = f"this machine or its cgroup has {format_size(limit_bytes)} in all"
        budget = replace(budget, device_bytes=bounded("--max-gpu-mem", budget.device_bytes, left, what))
    return budget, notices


@contextmanager
def limit_errors(budget_bytes: int | None = None, need_bytes: int | None = None) -> Iterator[None]:
    """Turns what libraries raise at a limit of the system within the block into one line that names it.

    Args:
        budget_bytes: of the run's memory, if that is settled.
        need_bytes: of the plan, if there is one.

    Raises:
        BudgetError: out of memory, on the device or the host, or out of threads.
        StorageError: out of file descriptors.
    """
    try:
        yield
    except (BudgetError, StorageError, StoppedError):
        raise
    except (MemoryError, RuntimeError, OSError, StreamdaError) as error:
        reason = _named(error, budget_bytes, need_bytes)
        if reason is None:
            raise
        raise reason from error


def _named(error: BaseException, budget_bytes: int | None, need_bytes: int | None) -> StreamdaError | None:
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        code = cause.errno if isinstance(cause, OSError) else None
        if code in (errno.EMFILE, errno.ENFILE) or "too many open files" in text:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return StorageError(
                f"no more files can be opened: this process may have {soft} open at a time; raise the limit "
                "(ulimit -n 1024) and run the same command again"
            )
        if "can't start new thread" in text or "can't start a new thread" in text:
            return BudgetError(
                f"the system refuses another thread{_granted()}; raise the limit on processes (ulimit -u) or on "
                "address space (ulimit -v), and run the same command again"
            )
        if (
            isinstance(cause, (MemoryError, torch.OutOfMemoryError))
            or code == errno.ENOMEM
            or any(words in text for words in _MEMORY_TEXT)
        ):
            budget = "" if budget_bytes is None else f" with a budget of {format_size(budget_bytes)}"
            need = "" if need_bytes is None else f", of which the plan needs {format_size(need_bytes)}"
            return BudgetError(
                f"out of memory{budget}{need}{_granted()}: the system gave less; free some, or use a smaller "
                "--max-gpu-mem or --max-length, and run the same command again, which continues from here"
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _granted() -> str:
    """The limits that are in force, for a message."""
    names = {resource.RLIMIT_AS: "ulimit -v", resource.RLIMIT_DATA: "ulimit -d"}
    found = [
        f"{name} is {format_size(soft)}"
        for kind, name in names.items()
        if (soft := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY
    ]
    limit = memory_limit()
    if limit is not None:
        found.append(f"machine or cgroup allow {format_size(limit)}")
    return f" ({', '.join(found)})" if found else ""


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """Limits of this process's memory cgroup and of all above it, as far as they can be seen from here."""
    with suppress(OSError):
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            _, controllers, path = [*line.split(":", 2), "", ""][:3]
            if not controllers:
                top, name = cgroups, "memory.max"
            elif "memory" in controllers.split(","):
                top, name = cgroups / "memory", "memory.limit_in_bytes"
            else:
                continue
            inner = Path(*(part for part in path.split("/") if part not in ("", "..")))
            for folder in (inner, *inner.parents):
                with suppress(OSError, ValueError):  # not mounted here, or "max"
                    limit = int((top / folder / name).read_text(encoding="ascii"))
                    if 0 < limit < _NO_LIMIT_BYTES:
                        yield limit
