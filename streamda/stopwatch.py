"""Seconds and memory peak of a phase, written into the report."""

from __future__ import annotations

import time
from types import TracebackType

from streamda.memory import PeakMeter
from streamda.report import InitReport


class Stopwatch:
    """Adds the time of its block to a phase of the report, and raises the phase's peak to what was measured."""

    def __init__(self, report: InitReport, phase: str, meter: PeakMeter) -> None:
        self._report, self._phase, self._meter = report, phase, meter

    def __enter__(self) -> Stopwatch:
        self._meter.take_peak()
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds, peaks = self._report.seconds, self._report.peaks
        seconds[self._phase] = seconds.get(self._phase, 0.0) + time.monotonic() - self._started
        peaks[self._phase] = max(peaks.get(self._phase, 0), self._meter.take_peak())
