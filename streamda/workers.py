"""Threads that work beside the main one, each on one core.

OpenMP gives a team of threads to every thread that computes. Once all teams together count more threads than the
machine has cores, libgomp stops spinning at the end of a parallel region and lets the kernel wake its threads, and
every small product of the main thread pays for it: casting the next block's weights in a thread beside it made the
solution of a 135M model take half as long again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")
_END = object()


def settle_threads() -> None:
    """Sets torch's number of threads to what it is.

    Setting it, to whatever number, forbids MKL to use fewer, for the rest of the process. `one_core_worker` must set
    it, and a run without one is to compute with the same bits.
    """
    torch.set_num_threads(torch.get_num_threads())


def one_core_worker(name: str) -> ThreadPoolExecutor:
    """A thread that computes on one core; all others compute with as many as before.

    Another thread that begins in the same moment may take over the one core as its own default.

    Args:
        name: prefix of its name.
    """
    default = torch.get_num_threads()
    worker = ThreadPoolExecutor(1, name, _compute_alone)
    try:
        worker.submit(int).result()  # until then it has not begun
    except BaseException:  # a stop, too, leaves no thread behind; it is raised again
        worker.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(default)
    return worker


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread takes the default over when it first asks, which must not be later
    torch.set_num_threads(1)  # of this thread, and the default of later ones: the caller puts that back


def taken_ahead(items: Iterator[T], name: str) -> Iterator[T]:
    """What an iterator gives, each item made in a thread while the one before is in use.

    Whoever has taken an item holds it alone. Errors arrive where their item would have. The thread ends with the
    iteration, or when that is given up.

    Args:
        items: from here on the thread's alone.
        name: of the thread.
    """
    with one_core_worker(name) as worker:
        made = [worker.submit(next, items, _END)]  # lists, because what is popped of them no name here holds
        while (item := [made.pop().result()])[0] is not _END:
            made.append(worker.submit(next, items, _END))
            yield item.pop()  # type: ignore[misc]  # no type says that it is not the end


class DoneBehind:
    """Does things in a thread, in order: while the main one makes the next, no more than one is unfinished."""

    def __init__(self, name: str) -> None:
        """Begins the thread, which ends with the context; its name is given."""
        self._worker = one_core_worker(name)
        self._unfinished: Future[object] | None = None

    def __enter__(self) -> DoneBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            self._worker.shutdown(wait=True, cancel_futures=True)

    def do(self, work: Callable[[], object]) -> None:
        """Leaves something to the thread, once what was left to it before is done; raises what that raised."""
        self._wait()
        self._unfinished = self._worker.submit(work)

    def _wait(self) -> None:
        unfinished, self._unfinished = self._unfinished, None
        try:
            if unfinished is not None:
                unfinished.result()
        finally:
            del unfinished  # an error leads to this frame, which would lead back to it
