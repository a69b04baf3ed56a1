"""What a run was doing when: named spans in lanes, one lane per thread of work.

A span costs two readings of a clock and one append to a list, so the recorder always runs. Spans of a lane may be
nested, never partly overlap; where they are nested, time counts for the innermost one. What an accelerator does shows
where the host waits for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple, TypeVar

T = TypeVar("T")

MAIN = "main"
"""The lane of the thread that computes."""
PHASES = "phase"
"""The lane of the run's phases, drawn above the others; it says nothing about who was busy."""


class Span(NamedTuple):
    """One piece of work; seconds since the timeline began."""

    lane: str
    name: str
    start: float
    stop: float


class Timeline:
    """Records the spans of a run, from any thread."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._spans: list[Span] = []  # append is atomic, so threads need no lock

    @contextmanager
    def span(self, name: str, lane: str = MAIN) -> Iterator[None]:
        """Records what its block takes, however it is left.

        Args:
            name: of the work, the same for every block of the model.
            lane: of the thread; a lane belongs to one thread at a time.
        """
        start = self.now()
        try:
            yield
        finally:
            self._spans.append(Span(lane, name, start, self.now()))

    @contextmanager
    def at_exit(self, name: str, context: AbstractContextManager[T], lane: str = MAIN) -> Iterator[T]:
        """Enters a context, and records what leaving it takes: that is where a unit is committed.

        Args:
            name: of the work at the end.
            context: whose value this gives.
            lane: of the thread that leaves it.
        """
        with ExitStack() as stack:
            value = stack.enter_context(context)
            yield value
            with self.span(name, lane):  # on an error the stack's own exit tells the context of it
                stack.close()

    def now(self) -> float:
        """Seconds since the timeline began."""
        return time.monotonic() - self._began

    def spans(self) -> list[Span]:
        """All spans that have ended, by their start; one that contains others comes before them."""
        return sorted(self._spans.copy(), key=lambda span: (span.start, -span.stop))

    def busy(self) -> dict[str, float]:
        """Seconds of work by name, longest first; other threads' work has the lane behind it: ``read weights (disk)``.

        Of nested spans each counts for the time that no inner one covers, so the work of a lane never exceeds the wall
        clock.
        """
        sums: dict[str, float] = {}
        for span in innermost(self.spans()):
            if span.lane != PHASES:
                name = span.name if span.lane == MAIN else f"{span.name} ({span.lane})"
                sums[name] = sums.get(name, 0.0) + span.stop - span.start
        return dict(sorted(sums.items(), key=lambda entry: -entry[1]))


def innermost(spans: Sequence[Span]) -> list[Span]:
    """Cuts nested spans into pieces that do not overlap within a lane: at each moment the innermost span.

    Args:
        spans: in the order of `Timeline.spans`.

    Returns:
        The pieces, lane by lane in order of time.
    """
    pieces: list[Span] = []
    for lane in dict.fromkeys(span.lane for span in spans):
        opened: list[Span] = []
        reached = -math.inf  # where the pieces end so far
        for span in [*(span for span in spans if span.lane == lane), Span(lane, "", math.inf, math.inf)]:
            while opened and opened[-1].stop <= span.start:
                inner = opened.pop()
                if inner.stop > reached:
                    pieces.append(inner._replace(start=max(reached, inner.start)))
                    reached = inner.stop
            if opened and span.start > max(reached, opened[-1].start):
                pieces.append(opened[-1]._replace(start=max(reached, opened[-1].start), stop=span.start))
            reached = max(reached, span.start)
            opened.append(span)
    return pieces
