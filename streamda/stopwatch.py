"""Seconds and memory peak of a phase, written into the report."""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType

import torch

from streamda.bounds import Rates
from streamda.memory import PeakMeter
from streamda.rates import ProductRates
from streamda.report import InitReport
from streamda.timeline import MAIN, PHASES, Timeline


class RunMeter:
    """Measures a run: its memory by a `PeakMeter`, whose peaks it keeps, and its time by a `Timeline`."""

    def __init__(self, device: torch.device, timeline: Timeline, products: ProductRates | None = None) -> None:
        """Starts measuring.

        Args:
            device: whose memory is measured.
            timeline: of the run.
            products: rates that are measured while it goes on; None for none.
        """
        self.timeline = timeline
        self._products = products
        self._meter = PeakMeter(device)
        self._peak = self._highest = 0

    def __enter__(self) -> RunMeter:
        self._meter.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._meter.__exit__(kind, error, trace)

    def between_blocks(self) -> None:
        """Measures the rates of products if it is time to; no block is to compute meanwhile."""
        if self._products is not None and self._products.is_due:
            with self.timeline.span("measure rates"):
                self._products.sample()

    @property
    def product_rates(self) -> Rates:
        """As far as they were measured."""
        return Rates() if self._products is None else self._products.mean

    def take_peak(self) -> int:
        """Peak in bytes since the last call, and starts a new period."""
        self.highest_peak()
        peak, self._peak = self._peak, 0
        return peak

    def highest_peak(self) -> int:
        """Peak in bytes of the run so far: the number to hold against the budget."""
        self._peak = max(self._peak, self._meter.take_peak())
        self._highest = max(self._highest, self._peak)
        return self._highest


class Stopwatch:
    """Adds the time of its block to a phase of the report, and raises the phase's peak to what was measured.

    On the timeline the phase is also the main thread's work wherever no span within it says what that was.
    """

    def __init__(self, report: InitReport, phase: str, meter: RunMeter) -> None:
        self._report, self._phase, self._meter = report, phase, meter
        self._spans = ExitStack()

    def __enter__(self) -> Stopwatch:
        self._meter.take_peak()
        for lane in (PHASES, MAIN):
            self._spans.enter_context(self._meter.timeline.span(self._phase, lane))
        self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds, peaks = self._report.seconds, self._report.peaks
        seconds[self._phase] = seconds.get(self._phase, 0.0) + time.monotonic() - self._started
        peaks[self._phase] = max(peaks.get(self._phase, 0), self._meter.take_peak())
        self._spans.close()
