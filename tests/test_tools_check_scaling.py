"""Runs over layers and samples: one small series, and peaks that lie too far apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models import TINY_SHAPE
from tools import check_scaling


def test_whole_runs_are_measured_and_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_scaling, "SHAPE", TINY_SHAPE)
    monkeypatch.setattr(check_scaling, "MAX_SPREAD", 1e9)  # so small a model's peak is all noise
    facts, work = tmp_path / "facts.json", tmp_path / "work"
    arguments = ["--layers", "1", "2", "--samples", "2", "3", "--tokens", "8", "--work-dir", str(work)]
    check_scaling.main([*arguments, "--json", str(facts)])
    found = json.loads(facts.read_text())
    assert [(each["layers"], each["samples"]) for each in found["layers"]] == [(1, 2), (2, 2)]
    assert [each["tokens"] for each in found["tokens"]] == [16, 24]
    assert all(each["seconds"] > 0 and each["peak_bytes"] > 0 for each in found["layers"] + found["tokens"])
    assert "x layers" in capsys.readouterr().out
    assert not list(work.glob("tmp*"))  # adapters of the runs are gone


def test_peaks_that_grow_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def growing(layers: int, samples: int, tokens: int, folder: Path) -> dict[str, float]:
        return {
            "layers": layers,
            "samples": samples,
            "tokens": samples * tokens,
            "peak_bytes": 1000 + 10 * layers,
            "seconds": layers,
        }

    monkeypatch.setattr(check_scaling, "measure", growing)
    with pytest.raises(SystemExit) as failed:
        check_scaling.main(["--work-dir", str(tmp_path)])
    assert failed.value.code == 1


def test_a_straight_line_is_found() -> None:
    slope, intercept = check_scaling.line_through([(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)])
    assert (slope, intercept) == pytest.approx((2.0, 3.0))
