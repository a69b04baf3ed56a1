"""The grid of plans against measurements: one small run of it, and plans that are too low and too high."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import TINY_SHAPE
from tools import check_plan


def run_grid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setitem(check_plan.SHAPES, "7b", TINY_SHAPE)
    facts = folder / "facts.json"
    arguments = ["--shapes", "7b", "--budgets", "2", "--samples", "3x16", "--work-dir", str(folder / "work")]
    check_plan.main([*arguments, "--json", str(facts)])
    found: list[dict[str, Any]] = json.loads(facts.read_text())
    return found


def test_a_run_is_held_against_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_plan, "LEAST_SHARE", 0.0)  # the plan's allowances dwarf a run so small
    (found,) = run_grid(tmp_path, monkeypatch)
    assert 0 < found["measured_peak"] <= found["planned_peak"] <= found["budget"]
    assert found["above"] == []
    assert "7b" in capsys.readouterr().out
    assert not list((tmp_path / "work").glob("tmp*"))  # adapters of the runs are gone


@pytest.mark.parametrize(("measured", "code"), [(6, 1), (5, 0), (4, 0), (3, 1)])
def test_a_plan_below_or_far_above_the_measurement_fails(
    measured: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = {
        "plan": {"peaks": {"forward": 5}, "peak_bytes": 5, "replays": [1]},
        "peaks": {"forward": measured},
        "seconds": 1,
    }
    monkeypatch.setattr(check_plan, "run", lambda *_: planned)
    with pytest.raises(SystemExit) if code else contextlib.nullcontext() as failed:
        run_grid(tmp_path, monkeypatch)
    assert failed is None or failed.value.code == code
    above = json.loads((tmp_path / "facts.json").read_text())[0]["above"]
    assert above == (["forward"] if measured > 5 else [])
