"""What a run shows of itself while it goes, and what a phase leaves in the report."""

from __future__ import annotations

import io
import time

import pytest
import torch
from tqdm import tqdm

from streamda.bounds import Rates
from streamda.memory import format_size
from streamda.progress import PassBar, Progress
from streamda.rates import ProductRates
from streamda.report import InitReport
from streamda.stopwatch import RunMeter, Stopwatch
from streamda.timeline import MAIN, PHASES, Timeline

CPU = torch.device("cpu")
SIZE = 64 << 20


def test_the_run_s_peak_outlives_the_phases_that_are_measured_in_between() -> None:
    with RunMeter(CPU, Timeline()) as meter:
        held = torch.ones(SIZE, dtype=torch.uint8)
        assert meter.highest_peak() >= SIZE
        del held
        assert meter.take_peak() >= SIZE  # a look at it has not taken it from the phase
        assert meter.take_peak() < SIZE // 2
        assert meter.highest_peak() >= SIZE


def test_a_phase_is_in_the_report_and_on_the_timeline() -> None:
    timeline, report = Timeline(), InitReport()
    with RunMeter(CPU, timeline) as meter:
        for _ in range(2):
            with Stopwatch(report, "forward", meter), timeline.span("read weights"):
                time.sleep(0.02)
        with pytest.raises(KeyError), Stopwatch(report, "solve", meter):
            raise KeyError
    assert report.seconds["forward"] >= 0.04
    assert list(report.seconds) == list(report.peaks) == ["forward", "solve"]
    shown = [(span.lane, span.name) for span in timeline.spans()]
    assert shown == 2 * [(PHASES, "forward"), (MAIN, "forward"), (MAIN, "read weights")] + [
        (PHASES, "solve"),
        (MAIN, "solve"),
    ]
    busy = timeline.busy()
    assert busy["read weights"] >= 0.04
    assert busy["forward"] < busy["read weights"]  # what no span explains


@pytest.mark.parametrize("tokens", [500, 0])
def test_a_bar_shows_the_rate_if_there_is_one_and_the_highest_peak_so_far(tokens: int) -> None:
    with RunMeter(CPU, Timeline()) as meter, tqdm(total=2, file=io.StringIO()) as bar:
        shown = PassBar(bar, meter, tokens)
        shown.working_on("block 0")
        assert bar.postfix == "block 0"
        held = torch.ones(SIZE, dtype=torch.uint8)
        meter.take_peak()
        del held
        shown.advance()
        shown.working_on("block 1")
        assert bar.postfix.startswith("block 1, ")
        assert bar.postfix.endswith(f", peak {format_size(meter.highest_peak())}")
        assert ("tokens/s" in bar.postfix) == (tokens > 0)


def test_nothing_is_drawn_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        RunMeter(CPU, Timeline()) as meter,
        Progress(meter, quiet=False).pass_over("epilogue", 1, 0, unit="batch") as bar,
    ):
        bar.working_on("head and loss")
        bar.advance()
    assert capsys.readouterr().err == ""


def test_without_a_terminal_a_line_is_written_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with RunMeter(CPU, Timeline()) as meter:
        for quiet in (False, True):
            with Progress(meter, quiet=quiet).pass_over("backward", 5, 1200) as bar:
                for _ in range(5):  # 40 seconds each: the first and the third are too soon, the last ends the pass
                    clock[0] += 40
                    bar.advance()
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == (0 if quiet else 2)
            if not quiet:
                assert lines[0].startswith("backward: 2 of 5 in 1 min, about 2 min to go, 30 tokens/s, peak ")
                assert lines[1].startswith("backward: 4 of 5 in 3 min, about 1 min to go, 30 tokens/s, peak ")


def test_rates_are_measured_when_a_step_is_done_and_it_is_time_to(monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline()
    products = ProductRates(CPU, torch.float32)
    with RunMeter(CPU, timeline, products) as meter, tqdm(total=2, file=io.StringIO()) as bar:
        shown = PassBar(bar, meter, 0)
        shown.advance()
        assert meter.product_rates == Rates()
        monkeypatch.setattr(ProductRates, "is_due", True)
        with Progress(meter, quiet=True).pass_over("epilogue", 1, 0, "batch", measures_rates=False) as batches:
            batches.advance()  # memory is in use
        assert meter.product_rates == Rates()
        shown.advance()
        assert meter.product_rates == products.mean != Rates()
    assert [span.name for span in timeline.spans()] == ["measure rates"]
