"""The report: the same to a program after a round trip, and nothing in it that a person could not read."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda.bounds import Bounds, Rates
from streamda.methods import SolveStatus
from streamda.methods.solution import SolveStats
from streamda.plan_table import plan_table
from streamda.report import REPORT_FILE, InitReport, format_seconds, read_report, table


def solved(change: float, **other: Any) -> dict[str, Any]:
    return {
        "status": "ok",
        "eigenvalues": [1.0, 0.25],
        "next_eigenvalue": 0.125,
        "residual": 3e-9,
        "steps": 4,
        "damping": 1e-6,
        "output_damping": 1e-6,
        "displacement_norm": 800.5,
        "seconds": 0.5,
        "step_zero_change": change,
        "num_tokens": 500,
        "num_samples": 16,
    } | other


def full_report() -> InitReport:
    """Twelve solved layers, one without gradient, one damped."""
    modules = {f"model.layers.{index}.q_proj": solved(0.001 * (index + 1)) for index in range(12)}
    modules["model.layers.12.v_proj"] = {
        "status": "zero",
        "step_zero_change": 0.0,
        "num_tokens": 500,
        "num_samples": 16,
    }
    modules["model.layers.12.o_proj"] = solved(2e-5, status="damped", damping=1e-3, next_eigenvalue=None)
    return InitReport(
        output_dir="out",
        statistics_dir="stats",
        resumed=True,
        config={"solve": {"rank": 4, "lora_alpha": 16.0, "rslora": True}},
        versions={"torch": "2.13.0"},
        model={"name": "tiny", "revision": None, "num_blocks": 13, "num_layers": 14, "dtype": "float32"},
        data={"source": "rows.jsonl", "num_samples": 16, "num_tokens": 500, "num_truncated": 1, "num_skipped": 2},
        plan={"peaks": {"forward": 120_000_000, "backward": 2_000_000_000}},
        budget_bytes=24_000_000_000,
        peaks={"forward": 100_000_000, "backward": 1_900_000_000, "write": 5_000_000},
        seconds={"forward": 1.5, "backward": 6.0, "write": 0.0},
        wall_seconds=10.0,
        busy={"backward": 5.0, "read weights (prefetch)": 4.0, "commit": 3.5, "write boundary": 0.01},
        bounds=Bounds(Rates(1e12, 1e11, 1e9, 1e9), {"forward": 4 * 10**12, "solve": 10**11}, 10**9, 10**9).to_dict(8.0),
        bytes={"weights_read": 26_000_000_000, "checkpoint": 13_000_000_000},
        loss=2.34567,
        modules=modules,
        notices=["one thing", "another thing"],
    )


def section(lines: list[str], heading: str) -> list[str]:
    """Lines of a report from a heading to the next empty line."""
    start = next(number for number, line in enumerate(lines) if line.startswith(heading))
    length = next((number for number, line in enumerate(lines[start:]) if not line), len(lines) - start)
    return lines[start : start + length]


def test_a_report_is_the_same_after_a_round_trip_through_json() -> None:
    report = full_report()
    again = InitReport.from_dict(json.loads(report.to_json()))
    assert again == report
    assert again.to_json() == report.to_json()
    assert again.to_table() == report.to_table()


def test_an_empty_report_survives_too() -> None:
    assert InitReport.from_dict(json.loads(InitReport().to_json())) == InitReport()
    assert InitReport().to_table() == "streamda: LoRA-DA initialization"


def test_fields_of_another_version_are_passed_over() -> None:
    assert InitReport.from_dict({"loss": 1.5, "invented_later": True}) == InitReport(loss=1.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_cannot_get_into_the_file(value: float) -> None:
    """JSON has no NaN, and readers other than Python's would refuse the whole file."""
    report = full_report()
    report.modules["model.layers.3.q_proj"]["residual"] = value
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.to_json()


def test_it_is_read_from_the_adapter_s_folder(tmp_path: Path) -> None:
    (tmp_path / REPORT_FILE).write_text(full_report().to_json(), encoding="utf-8")
    assert read_report(tmp_path) == full_report()


class TestTable:
    lines = full_report().to_table().splitlines()

    def test_it_says_what_where_and_how_long(self) -> None:
        text = "\n".join(self.lines)
        for fact in (
            "tiny",
            "13 blocks",
            "float32",
            "rows.jsonl",
            "16 samples",
            "500 tokens",
            "1 cut",
            "2 skipped",
            "2.3457",
        ):
            assert fact in text
        assert "adapter      out" in text
        assert "statistics   stats" in text
        assert "method       rank 4, alpha 16 (rank-stabilized, scaling 8), 14 layers" in text
        assert "(an earlier process did a part of it: memory, times and bytes are of the last one)" in text
        assert "weights read 26.00 GB, 2.00 times the checkpoint" in text
        assert self.lines[-2:] == ["note: one thing", "note: another thing"]

    def test_planned_and_measured_peaks_stand_side_by_side(self) -> None:
        heading, header, _, *rows = section(self.lines, "memory")
        assert heading == "memory  (budget 24.00 GB)"
        assert header.split("  ")[1:2] == ["phase"]
        assert [row.split() for row in rows] == [
            ["forward", "120", "MB", "100", "MB"],
            ["backward", "2.00", "GB", "1.90", "GB"],
            ["write", "5.00", "MB"],  # nothing was planned for it
        ]

    def test_the_longest_phase_has_the_longest_bar(self) -> None:
        bars = {row.split()[0]: row.count("#") for row in section(self.lines, "time")[3:-1]}
        assert bars == {"forward": 6, "backward": 24, "write": 0}

    def test_work_is_shown_with_its_share_of_the_wall_clock_and_what_is_left_of_it(self) -> None:
        heading, _, _, *rows = section(self.lines, "work")
        assert heading == "work  (of 10.0 s)"
        assert [row.split("  ")[1] for row in rows[:4]] == [
            "backward",
            "read weights (prefetch)",
            "commit",
            "everything else",
        ]
        # what another thread did was done beside the rest, and what is next to nothing is not shown
        assert [row.split()[-2] for row in rows[:4]] == ["50", "40", "35", "15"]
        assert rows[4] == "  (in brackets: the thread that did it beside the rest)"

    def test_one_line_says_how_near_the_limit_the_run_was(self) -> None:
        assert "  wall 8 s = 1.6 x the compute bound (5 s); disk bound 2 s" in self.lines

    def test_layers_are_counted_by_status_and_each_unusual_status_is_explained(self) -> None:
        heading, *rest = section(self.lines, "layers")
        assert heading == "layers  (1 damped, 12 ok, 1 zero)"
        assert f"  zero: {SolveStatus.ZERO.advice}" in rest
        assert f"  damped: {SolveStatus.DAMPED.advice}" in rest
        assert not any(SolveStatus.OK.advice in line for line in rest)

    def test_unusual_layers_come_first_then_the_most_and_the_least_changed(self) -> None:
        shown = [line.split()[0] for line in section(self.lines, "layers") if line.startswith("  model.")]
        largest = [f"model.layers.{index}.q_proj" for index in (11, 10, 9, 8, 7)]
        assert shown == ["model.layers.12.v_proj", "model.layers.12.o_proj", *largest]
        assert section(self.lines, "layers")[-1] == f"  ... 7 more in {REPORT_FILE}"

    def test_a_layer_that_was_not_solved_has_empty_cells_and_no_nan(self) -> None:
        text = "\n".join(self.lines).lower()
        assert "nan" not in text
        assert "none /" not in text
        zero = next(line for line in self.lines if "12.v_proj" in line)
        assert zero.split() == ["model.layers.12.v_proj", "zero", "0.00e+00"]
        whole = next(line for line in self.lines if "12.o_proj" in line)
        assert whole.split() == [
            "model.layers.12.o_proj",
            "damped",
            "2.00e-05",
            "2.50e-01",
            "/",
            "none",
            "3e-09",
            "1e-03",
        ]

    def test_no_line_ends_in_blanks(self) -> None:
        assert all(line == line.rstrip() for line in self.lines)


CELLS = st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=12)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.integers(1, 5).flatmap(
        lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1, max_size=6)
    )
)
def test_columns_of_a_table_are_aligned(rows: list[list[str]]) -> None:
    """Every cell begins where its column's rule of dashes begins, and no cell is wider."""
    header, body = ["h" + cell for cell in rows[0]], rows[1:]
    lines = table(header, body)
    assert len(lines) == 2 + len(body)
    rule = lines[1]
    starts = [place for place in range(len(rule)) if rule[place] == "-" and rule[place - 1] == " "]
    assert len(starts) == len(header)
    edges = [*starts[1:], len(rule) + 2]
    for line, row in zip([lines[0], *lines[2:]], [header, *body], strict=True):
        padded = line.ljust(len(rule) + 2)
        assert [padded[start : edge - 2].rstrip() for start, edge in zip(starts, edges, strict=True)] == row


def test_every_number_of_a_solved_layer_is_plain_json() -> None:
    stats = SolveStats((1.0, 0.5), None, 1e-9, 4, 1e-6, 1e-6, 3.5, 0.25)
    from streamda.methods import LayerSolution

    summary = LayerSolution("layer", None, None, SolveStatus.OK, stats).summary()
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary | {"eigenvalues": [1.0, 0.5]}
    assert summary["status"] == "ok"
    assert summary["next_eigenvalue"] is None


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "unknown"),
        (0.0, "0 s"),
        (0.0123, "0.012 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "1.7 min"),
        (5999, "100.0 min"),
        (36_000, "10.0 h"),
    ],
)
def test_times_are_shown_in_units_that_fit(seconds: float | None, shown: str) -> None:
    assert format_seconds(seconds) == shown


def test_a_plan_is_shown_with_all_its_phases() -> None:
    plan = {
        "micro_batch_tokens": 1024,
        "replays": [2, 3, 0, 2],
        "boundaries_in_memory": 5,
        "boundary_stride": 3,
        "spill_statistics": True,
        "weight_passes": 2.875,
        "disk_bytes": 13_000_000_000,
        "weight_bytes_read": 26_000_000_000,
        "peaks": {"forward": 1_000_000_000, "solve": 2_000_000_000},
        "flops": {"forward": 3 * 10**12, "solve": 10**10},
    }
    facts = {
        "notices": ["31 tokens are few"],
        "model": "tiny",
        "num_blocks": 4,
        "num_layers": 21,
        "num_layers_from_rows": 0,
        "dtype": "bfloat16",
        "budget_bytes": 24 * 10**9,
        "smallest_budget_bytes": 10**9,
        "num_samples": 256,
        "num_tokens": 50_000,
        "num_rows": 52_000,
        "bounds": Bounds(Rates(10**11, 10**9, 10**9, None), plan["flops"], 5 * 10**9, 10**9).to_dict(),
    }
    text = plan_table(plan, facts)
    assert "stand for the sums" not in text
    some = plan_table(plan | {"spill_statistics": False}, facts | {"num_layers_from_rows": 7})
    assert re.search(r"statistics +stay in memory .*; few tokens: their rows stand for the sums of 7 layers\n", some)
    for fact in (
        "tiny",
        "21 adapted layers",
        "24.00 GB",
        "1.00 GB",
        "2 to 3",
        "52000",
        "1024 tokens",
        "13.00 GB",
        "statistics         go to disk",
        "boundaries kept    every 3rd; weights are read 2.9 times (26.00 GB)",
        "time at full rates unknown with disk and compute overlapped, unknown one after the other",
        "compute          40 s at 100 GFLOP/s, 1 GFLOP/s in float64",
        "reading          5 s: 5.00 GB at 1.00 GB/s",
        "writing          unknown: 1.00 GB at an unknown rate",
        "note: 31 tokens are few",
    ):
        assert fact in text
    rows = [line.split() for line in text.splitlines()]
    assert ["forward", "1.00", "GB"] in rows
    assert ["solve", "2.00", "GB"] in rows
    assert ["forward", "3", "bfloat16", "30", "s"] in rows
    assert ["solve", "0.01", "float64", "10", "s"] in rows
    known = Bounds(Rates(10**11, 10**9, 10**9, 10**8), plan["flops"], 5 * 10**9, 10**9).to_dict()
    times = "time at full rates 40 s with disk and compute overlapped, 55 s one after the other"
    assert times in plan_table(plan, facts | {"bounds": known})
    assert "replays per block  2\n" in plan_table(plan | {"replays": [2, 2, 0]}, facts)
