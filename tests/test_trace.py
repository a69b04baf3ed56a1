"""The files of --profile: a trace as its viewers read it, and a drawing that shows what prevailed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from streamda.errors import StorageError
from streamda.gantt import COLUMNS, draw_timeline
from streamda.timeline import MAIN, PHASES, Span
from streamda.trace import DRAWING_FILE, TRACE_FILE, chrome_trace, remove_profile, write_profile

SPANS = [
    Span(PHASES, "forward", 0.0, 60.0),
    Span(MAIN, "forward", 0.0, 60.0),
    Span(MAIN, "read weights", 30.0, 45.0),
    Span("prefetch", "read weights", 45.0, 60.0),
    Span(MAIN, "solve <&>", 90.0, 120.0),
]
SVG = "{http://www.w3.org/2000/svg}"


def bars(document: str) -> list[tuple[str, float, float, float]]:
    """Name, row, left and right end of each bar, in seconds of 120."""
    found = []
    for rect in ElementTree.fromstring(document).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None and title.text is not None:
            left, width = float(rect.attrib["x"]) - 110, float(rect.attrib["width"])
            scale = 120 / COLUMNS
            found.append((title.text.split(",")[0], float(rect.attrib["y"]), left * scale, (left + width) * scale))
    return found


def test_the_trace_has_a_thread_per_lane_and_a_complete_event_per_span() -> None:
    events = json.loads(chrome_trace(SPANS))["traceEvents"]
    lanes = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert list(lanes) == [PHASES, MAIN, "prefetch"]
    assert len(set(lanes.values())) == 3
    complete = [event for event in events if event["ph"] == "X"]
    assert [(event["tid"], event["name"], event["ts"], event["dur"]) for event in complete] == [
        (lanes[span.lane], span.name, span.start * 1e6, (span.stop - span.start) * 1e6) for span in SPANS
    ]


def test_lanes_are_rows_and_inner_spans_cut_outer_ones() -> None:
    found = bars(draw_timeline(SPANS, "a run"))
    rows = sorted({row for _, row, _, _ in found})
    by_row = [[(name, left, right) for name, row, left, right in found if row == wanted] for wanted in rows]
    assert by_row == [
        [("forward", 0, 60)],
        [("forward", 0, 30), ("read weights", 30, 45), ("forward", 45, 60), ("solve <&>", 90, 120)],
        [("read weights", 45, 60)],
    ]


def test_what_is_shorter_than_a_pixel_merges_into_what_prevails() -> None:
    """A hundred thousand spans: three milliseconds of work in each four, then as much of nothing."""
    spans = [Span(MAIN, "work", index * 0.004, index * 0.004 + 0.003) for index in range(50_000)]
    spans += [Span(MAIN, "rare", 200 + index * 0.004, 200 + index * 0.004 + 0.001) for index in range(50_000)]
    document = draw_timeline([*spans, Span(MAIN, "end", 399.9, 400.0)], "long")
    assert len(document) < 5000
    ((name, _, left, right),) = bars(document)
    assert (name, left, right) == ("work", 0, 60)  # of 120, which is half
    assert "rare, 50 s" in document  # the legend has it all the same


def test_the_drawing_says_what_how_long_and_in_which_unit() -> None:
    document = draw_timeline(SPANS, "init of <model> & more")
    texts = [element.text for element in ElementTree.fromstring(document).iter(f"{SVG}text")]
    assert texts[0] == "init of <model> & more"
    assert {"phase", "main", "prefetch", "seconds", "0", "100", "120"} <= set(texts)
    assert {"forward, 45 s", "read weights, 30 s", "solve <&>, 30 s"} <= set(texts)  # work, not phases as well
    assert not re.search(r"href|url\(|<script", document)


@pytest.mark.parametrize("end", [1e-4, 0.7, 9.0, 100.0, 3600.0, 250_000.0])
def test_any_run_has_a_readable_axis(end: float) -> None:
    document = draw_timeline([Span(MAIN, "work", 0.0, end)], "a run")
    ticks = [float(text) for text in re.findall(r'middle">([\d.e+-]+)</text>', document)]
    assert 5 <= len(ticks) <= 13
    assert ticks == sorted(set(ticks))
    assert ticks[0] == 0
    assert ticks[-1] <= end * (1 + 1e-9)


def test_a_run_without_spans_is_drawn_too() -> None:
    assert ElementTree.fromstring(draw_timeline([], "nothing")).tag == f"{SVG}svg"


def test_files_are_written_replaced_and_removed_by_name(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("stays")
    remove_profile(tmp_path)  # nothing is there
    remove_profile(tmp_path / "nowhere")
    write_profile(tmp_path, SPANS[:1], "first")
    write_profile(tmp_path, SPANS, "second")
    assert (tmp_path / TRACE_FILE).read_text() == chrome_trace(SPANS)
    assert (tmp_path / DRAWING_FILE).read_text() == draw_timeline(SPANS, "second")
    remove_profile(tmp_path)
    assert list(tmp_path.iterdir()) == [other]
    with pytest.raises(StorageError):
        write_profile(tmp_path / "nowhere", SPANS, "third")
