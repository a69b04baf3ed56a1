"""Spans: what was done when, from any thread, and whose time it is where they are nested."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda.timeline import MAIN, PHASES, Span, Timeline, innermost


def test_a_span_lasts_as_long_as_its_block_however_it_is_left() -> None:
    timeline = Timeline()
    with timeline.span("work"):
        time.sleep(0.02)
    with pytest.raises(KeyError), timeline.span("broken"):
        raise KeyError
    work, broken = timeline.spans()
    assert (work.lane, work.name, broken.name) == (MAIN, "work", "broken")
    assert 0.02 <= work.stop - work.start < 1
    assert 0 <= work.start <= work.stop <= broken.start <= broken.stop <= timeline.now()


def test_spans_come_from_many_threads_and_none_is_lost() -> None:
    timeline = Timeline()

    def record(lane: str) -> None:
        for _ in range(200):
            with timeline.span("read", lane):
                pass

    threads = [threading.Thread(target=record, args=(f"thread {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = timeline.spans()
    assert len(spans) == 800
    assert [span.start for span in spans] == sorted(span.start for span in spans)
    assert set(timeline.busy()) == {f"read (thread {number})" for number in range(4)}


def test_a_span_costs_next_to_nothing() -> None:
    timeline = Timeline()
    started = time.perf_counter()
    for _ in range(1000):
        with timeline.span("work"):
            pass
    assert time.perf_counter() - started < 0.1  # 100 microseconds each; they take about two


def test_leaving_a_context_is_recorded_and_what_it_raises_comes_through() -> None:
    seen: list[str] = []

    @contextmanager
    def unit(fails: bool) -> Iterator[str]:
        try:
            yield "draft"
        except ValueError:
            seen.append("told of the error")
            raise
        time.sleep(0.02)
        if fails:
            raise OSError("disk full")
        seen.append("committed")

    timeline = Timeline()
    with timeline.at_exit("commit", unit(False)) as draft:
        assert draft == "draft"
    (span,) = timeline.spans()
    assert span.name == "commit"
    assert span.stop - span.start >= 0.02
    with pytest.raises(ValueError, match="in the block"), timeline.at_exit("commit", unit(False)):
        raise ValueError("in the block")
    with pytest.raises(OSError, match="disk full"), timeline.at_exit("commit", unit(True)):
        pass
    assert seen == ["committed", "told of the error"]


def test_nested_time_counts_for_the_innermost_span() -> None:
    spans = [
        Span(MAIN, "forward", 0.0, 10.0),
        Span(MAIN, "read", 1.0, 3.0),
        Span("prefetch", "read", 2.0, 8.0),
        Span(MAIN, "write", 5.0, 10.0),
        Span(MAIN, "sync", 6.0, 7.0),
        Span(MAIN, "solve", 12.0, 13.0),
    ]
    pieces = innermost(spans)
    assert [(p.name, p.start, p.stop) for p in pieces if p.lane == MAIN] == [
        ("forward", 0, 1),
        ("read", 1, 3),
        ("forward", 3, 5),
        ("write", 5, 6),
        ("sync", 6, 7),
        ("write", 7, 10),
        ("solve", 12, 13),
    ]
    assert [p for p in pieces if p.lane == "prefetch"] == [Span("prefetch", "read", 2, 8)]


def test_busy_leaves_the_phases_out_and_names_other_threads() -> None:
    timeline = Timeline()
    with timeline.span("backward", PHASES), timeline.span("backward"):
        time.sleep(0.03)
        with timeline.span("read"):
            time.sleep(0.01)
    with timeline.span("read", "prefetch"):
        pass
    busy = timeline.busy()
    assert list(busy) == ["backward", "read", "read (prefetch)"]
    assert busy["backward"] + busy["read"] <= timeline.now()
    assert busy["backward"] >= 0.03 > busy["read"] >= 0.01


@st.composite
def nested(draw: st.DrawFn, start: int = 0, stop: int = 64, depth: int = 3) -> list[Span]:
    """Spans within an interval, side by side or inside one another."""
    cuts = draw(st.lists(st.integers(start, stop), max_size=6).map(sorted))
    spans = []
    for left, right in zip(cuts[::2], cuts[1::2], strict=False):
        spans.append(Span(MAIN, f"{depth}", float(left), float(right)))
        if depth:
            spans += draw(nested(left, right, depth - 1))
    return spans


@settings(max_examples=60, deadline=None, derandomize=True)
@given(nested())
def test_pieces_cover_each_moment_once_by_the_innermost_span(spans: list[Span]) -> None:
    """Against looking at every moment by itself; of nested spans the inner one has the smaller number."""
    spans = sorted(spans, key=lambda span: (span.start, -span.stop))  # stable: an outer one of equal ends stays first
    pieces = innermost(spans)
    for moment in range(64):
        inside = [span.name for span in spans if span.start <= moment < span.stop]
        found = [piece.name for piece in pieces if piece.start <= moment < piece.stop]
        assert found == ([min(inside)] if inside else [])
