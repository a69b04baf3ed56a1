"""The files of ``--profile``: a trace that Perfetto and chrome://tracing open, and the drawing of `streamda.gantt`.

They join the adapter once it is in place, so that its writing is in them, and go with it when it is overwritten.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from streamda import files
from streamda.gantt import draw_timeline
from streamda.timeline import Span

TRACE_FILE = "streamda_trace.json"
DRAWING_FILE = "streamda_timeline.svg"
PROFILE_FILES = (TRACE_FILE, DRAWING_FILE)


def chrome_trace(spans: Sequence[Span]) -> str:
    """Spans as Chrome's trace event format: complete events in microseconds, one thread per lane.

    Args:
        spans: in the order of `Timeline.spans`.
    """
    lanes = {lane: number for number, lane in enumerate(dict.fromkeys(span.lane for span in spans), start=1)}
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane}}
        for lane, number in lanes.items()
    ]
    events += [
        {
            "ph": "X",
            "name": span.name,
            "cat": span.lane,
            "pid": 1,
            "tid": lanes[span.lane],
            "ts": round(span.start * 1e6, 1),
            "dur": round((span.stop - span.start) * 1e6, 1),
        }
        for span in spans
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False) + "\n"


def write_profile(folder: Path, spans: Sequence[Span], title: str) -> None:
    """Writes trace and drawing into a folder, replacing those that are there.

    Raises:
        StorageError: the folder cannot be written.
    """
    remove_profile(folder)
    for name, text in ((TRACE_FILE, chrome_trace(spans)), (DRAWING_FILE, draw_timeline(spans, title))):
        with files.FileWriter(folder / name) as file:
            file.write(text.encode())


def remove_profile(folder: Path) -> None:
    """Removes what `write_profile` wrote, if it is there.

    Raises:
        StorageError: it cannot be removed.
    """
    for name in PROFILE_FILES:
        with files.storage_errors("remove", folder / name), suppress(FileNotFoundError, NotADirectoryError):
            files.system_calls.unlink(folder / name)
