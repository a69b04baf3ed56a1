"""What the solver is timed on has the spectrum it claims, and both paths solve the same problem."""

import json
from pathlib import Path

import pytest
import torch

from tools import bench_solver


def test_input_moments_have_a_power_law_spectrum() -> None:
    layer = bench_solver.make_layer(256, 40)
    eigenvalues = torch.linalg.eigvalsh(layer.input_moment.double()).flip(0)
    slope = torch.log(eigenvalues[100] / eigenvalues[3]) / torch.log(torch.tensor(101 / 4))
    assert -1.7 < float(slope) < -1.0  # sampling noise of 2 d tokens makes it steeper than the covariance's -1
    off_diagonal = layer.input_moment - layer.input_moment.diagonal().diag()
    assert float(off_diagonal.norm()) > 0.1 * float(layer.input_moment.norm())
    assert layer.gradient.shape == (40, 256)
    assert torch.equal(bench_solver.make_layer(256, 40).gradient, layer.gradient)


def test_bands_are_the_lower_triangle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_solver, "PANEL_ROWS", 4)
    matrix = torch.randn(10, 10)
    bands = bench_solver.BandsOf(matrix)
    assert [tuple(bands.band(index).shape) for index in range(len(bands))] == [(4, 4), (4, 8), (2, 10)]
    assert torch.equal(bands.band(1), matrix[4:8, :8].double())


def test_both_paths_solve_the_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts_file = tmp_path / "facts.json"
    bench_solver.main(["--sizes", "200x100", "--cholesky", "300", "--json", str(facts_file)])
    facts = json.loads(facts_file.read_text())
    (layer,) = facts["layers"]
    assert layer["streamda_error"] < 1e-5
    assert layer["streamda_error"] < layer["dense_error"] < 1e-2
    assert facts["cholesky"][0]["gflops"]["streamda"] > 0
    assert "200x100" in capsys.readouterr().out
