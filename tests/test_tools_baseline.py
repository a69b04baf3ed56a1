"""The baseline computes the same thing, or a comparison with it would say nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streamda.config import DataConfig
from tests.autograd_oracle import load_model, oracle_statistics
from tests.models import make_samples, write_checkpoint, write_samples
from tests.oracles import dense_lora_da
from tools import baseline, compare_speed

RANK = 2


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("baseline")
    model = write_checkpoint(folder / "model", "llama", num_hidden_layers=3)
    return model, write_samples(folder / "data.jsonl", make_samples())


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("layers_per_pass", [1, 2, None])
def test_statistics_are_those_of_autograd(
    model_and_data: tuple[Path, Path], layers_per_pass: int | None, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = model_and_data
    found = []

    def keep(*statistics: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
        found.append([each.clone() for each in statistics])
        return torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr(baseline, "solve_dense", keep)
    result = baseline.run(model, DataConfig(dataset=str(data)), layers_per_pass, short=short)
    expected, _ = oracle_statistics(load_model(model), make_samples(), result.adapters, "attention")
    assert len(found) == len(result.adapters) == 21
    for (gradient, input_moment, output_moment), name in zip(found, result.adapters, strict=True):
        assert relative_error(gradient, expected[name].gradient) < 1e-4, name
        assert relative_error(input_moment, expected[name].input_moment) < 1e-4, name
        assert relative_error(output_moment, expected[name].output_moment) < 1e-4, name
    assert set(result.seconds) == {"load", "gradient", "fisher", "solve"}
    assert result.total_seconds >= sum(result.seconds.values())


@pytest.mark.parametrize("d_in", [5, 60])  # too small for LOBPCG, and not
def test_a_well_conditioned_layer_is_solved(d_in: int) -> None:
    d_out, rank = 20, 2
    inputs = torch.randn(500, d_in) * torch.linspace(0.5, 2, d_in)
    gradient = (
        torch.outer(torch.randn(d_out), torch.randn(d_in)) + torch.outer(torch.randn(d_out), torch.randn(d_in)) / 2
    )
    gradient += 1e-3 * torch.randn(d_out, d_in)
    moment, output_moment = inputs.T @ inputs / 500, torch.rand(d_out) + 0.5
    lora_a, lora_b = baseline.solve_dense(gradient, moment.clone(), output_moment, rank=rank, population_size=1000)
    expected = dense_lora_da(gradient, moment, output_moment, rank=rank, population_size=1000)
    assert relative_error(lora_b @ lora_a, expected.product) < 1e-3


@pytest.mark.parametrize("passes", ["whole", "short"])
def test_command_line_writes_adapters_and_figures(
    model_and_data: tuple[Path, Path], passes: str, tmp_path: Path
) -> None:
    model, data = model_and_data
    adapters, facts = tmp_path / "adapters.safetensors", tmp_path / "facts.json"
    arguments = [str(model), str(data), "--rank", str(RANK), "--layers-per-pass", "all", "--passes", passes]
    baseline.main([*arguments, "--output", str(adapters), "--json", str(facts)])
    tensors = load_file(adapters)
    assert len(tensors) == 2 * 21
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert json.loads(facts.read_text())["peak_bytes"] >= 0


def test_the_comparison_names_ratios() -> None:
    facts = {
        "streamda": {"total_seconds": 10.0, "peak_bytes": 100_000_000, "seconds": {"collect": 7.0, "solve": 3.0}},
        "baseline": {"total_seconds": 35.0, "peak_bytes": 800_000_000, "seconds": {"fisher": 20.0, "solve": 15.0}},
    }
    text = compare_speed.describe(facts)
    assert "3.50" in text
    assert "8.00" in text
    assert "fisher 20.0" in text
