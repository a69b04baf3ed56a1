"""The next weights, read by a thread while the current ones are in use.

Into memory where there is room, else into the system's page cache, unless they are read past that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from streamda.checkpoint import Checkpoint, ReadWeights
from streamda.timeline import Timeline
from streamda.workers import one_core_worker

LANE = "prefetch"


class Prefetcher:
    """Hands weights to the model in the order that they were announced in.

    Close it whatever happened: the thread ends with it.
    """

    def __init__(self, checkpoint: Checkpoint, timeline: Timeline, *, in_memory: bool) -> None:
        """Starts the thread; reads nothing yet.

        Args:
            checkpoint: where weights come from.
            timeline: takes what the thread did when.
            in_memory: whether there is room for them beside what is in use. If not, the system is asked to read them
                into its page cache, which no budget counts; where weights are read past that, nothing is read ahead.
        """
        self._checkpoint, self._timeline = checkpoint, timeline
        self._in_memory = in_memory
        self._executor = one_core_worker("streamda-prefetch")
        self._started: tuple[tuple[str, ...], bool] | None = None
        self._future: Future[ReadWeights] | None = None
        self._hint_dropped = threading.Event()

    def start(
        self, names: Sequence[str], *, keep_stored: bool = False, before: Callable[[], None] | None = None
    ) -> None:
        """Announces what `take` will want next; names as in `Checkpoint.load`.

        Before it reads, the thread calls what is given as such.
        """
        self._forget()
        if before is not None:
            self._executor.submit(before)
        if not self._in_memory:
            self._hint_dropped = threading.Event()
            self._executor.submit(self._checkpoint.announce, tuple(names), self._hint_dropped)
            return
        self._started = (tuple(names), keep_stored)
        self._future = self._executor.submit(self._read, tuple(names), keep_stored)

    def take(self, names: Sequence[str], *, keep_stored: bool = False) -> None:
        """Places weights in the model: those announced, else by reading them now.

        Raises:
            ModelError: a tensor cannot be read, or holds NaN or Inf; also what the thread came upon.
        """
        future, self._future = self._future, None
        if future is not None and self._started == (tuple(names), keep_stored):
            self._checkpoint.place(future.result())
            return
        if future is not None:  # its memory must be free before other weights are read
            _discard(future)
            del future  # it holds what it has read
        self._checkpoint.load(names, keep_stored=keep_stored)

    def close(self) -> None:
        """Ends the thread; what it has read is dropped."""
        self._forget()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _read(self, names: Sequence[str], keep_stored: bool) -> ReadWeights:
        with self._timeline.span("read weights", LANE):
            return self._checkpoint.read(names, keep_stored=keep_stored)

    def _forget(self) -> None:
        future, self._future = self._future, None
        if future is not None:
            _discard(future)
        self._hint_dropped.set()  # its errors are nobody's: they meet whoever loads


def _discard(future: Future[ReadWeights]) -> None:
    if not future.cancel():
        future.exception()  # waits; an error of weights that nobody wants is none
