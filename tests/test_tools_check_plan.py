"""The grid of plans against measurements: one small run of it, and a plan that is too low."""

from __future__ import annotations

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
    (found,) = run_grid(tmp_path, monkeypatch)
    assert 0 < found["measured_peak"] <= found["planned_peak"] <= found["budget"]
    assert found["above"] == []
    assert "7b" in capsys.readouterr().out
    assert not list((tmp_path / "work").glob("tmp*"))  # adapters of the runs are gone


def test_a_plan_below_the_measurement_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = {
        "plan": {"peaks": {"forward": 5}, "peak_bytes": 5, "replays": [1]},
        "peaks": {"forward": 6},
        "seconds": 1,
    }
    monkeypatch.setattr(check_plan, "run", lambda *_: planned)
    with pytest.raises(SystemExit) as failed:
        run_grid(tmp_path, monkeypatch)
    assert failed.value.code == 1
    assert json.loads((tmp_path / "facts.json").read_text())[0]["above"] == ["forward"]
