"""The benchmark of few tokens, at a size that takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import bench_few_tokens


def test_the_span_is_nearer_to_the_truth_than_an_exact_solution_of_the_rounded_sums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = tmp_path / "facts.json"
    bench_few_tokens.main(["--layers", "128x64x32", "--threads", "1", "--json", str(facts)])
    (found,) = json.loads(facts.read_text())
    assert found["span"]["steps"] == 1
    assert found["span"]["error"] < 1e-5 < found["dense_error"]
    assert found["long"]["steps"] > 1
    assert "128x64" in capsys.readouterr().out
