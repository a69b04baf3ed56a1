"""Input moments that are summed in float64, of inputs in float32: what float32 sums would cost, and that nothing does.

The damping is 1e-6. A model as transformers initializes it has eigenvalues of its moments as small as the rounding of
float32 sums of its larger ones, whatever the number of tokens; samples with few labels have none at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import streamda
from streamda import setup, solve_stage
from streamda.factors import add_input_moment_, fits_float32, round_to_pairs_, wide_tokens
from streamda.methods import SpannedFactor, prepare_input_factor
from tests.autograd_oracle import oracle_products
from tests.golden_options import products, read_adapter
from tests.models import make_config, make_samples, run_options, write_samples

SETTINGS = {"rank": 4, "population_size": 100}
LENGTHS = range(20, 64, 2)


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt_neox"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and samples of fourteen times as many tokens as its hidden states are wide."""
    folder = tmp_path_factory.mktemp(str(request.param))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_config(str(request.param), hidden_size=64)).save_pretrained(folder / "model")
    write_samples(folder / "samples.jsonl", make_samples(LENGTHS))
    return folder


def options(inputs: Path, output: Path, **given: Any) -> dict[str, Any]:
    return run_options(inputs, output_dir=str(output), **SETTINGS) | given


def worst_error(folder: Path, wanted: dict[str, Tensor]) -> float:
    found = products(read_adapter(folder))
    return max(float((found[name] - product).norm() / product.norm()) for name, product in wanted.items())


def test_every_way_gives_one_answer_as_good_as_float64_and_float32_sums_do_not(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, given in {"held": {}, "spilled": {"spill_statistics": True}, "kept": {"keep_statistics": True}}.items():
        streamda.initialize(**options(inputs, tmp_path / name, **given))
    statistics = str(tmp_path / "kept.work")
    streamda.solve(statistics=statistics, output_dir=str(tmp_path / "solved"), **SETTINGS)
    ways = ("held", "spilled", "kept", "solved")
    assert len({(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ways}) == 1
    names = products(read_adapter(tmp_path / "held"))
    wanted = oracle_products(inputs / "model", make_samples(LENGTHS), names, **SETTINGS)
    error = worst_error(tmp_path / "held", wanted)
    assert error < 1e-3
    monkeypatch.setattr(setup, "moment_bytes", lambda *_: 4)
    streamda.initialize(**options(inputs, tmp_path / "narrow", keep_statistics=True))
    assert worst_error(tmp_path / "narrow", wanted) > 3 * error


def test_few_labels_leave_nothing_to_rounding(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in each sample: fewer than a moment has rows, which is then not factorized but spanned."""
    samples = make_samples(LENGTHS)
    for _, labels in samples:
        labels[:-2] = -100
    write_samples(tmp_path / "samples.jsonl", samples)
    kinds = []
    given = prepare_input_factor

    def noted(*arguments: Any) -> Any:
        kinds.append(given(*arguments))
        return kinds[-1]

    monkeypatch.setattr(solve_stage, "prepare_input_factor", noted)
    few = {"dataset": str(tmp_path / "samples.jsonl"), "token_mask": "labels"}
    streamda.initialize(**options(inputs, tmp_path / "adapter", **few))
    assert SpannedFactor in {type(kind) for kind in kinds}
    names = products(read_adapter(tmp_path / "adapter"))
    wanted = oracle_products(inputs / "model", samples, names, "labels", **SETTINGS)
    assert worst_error(tmp_path / "adapter", wanted) < 1e-4
    monkeypatch.setattr(setup, "moment_bytes", lambda *_: 4)
    streamda.initialize(**options(inputs, tmp_path / "narrow", **few))
    assert worst_error(tmp_path / "narrow", wanted) > 1e-2


def test_products_of_float32_inputs_are_summed_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)) + 30
    for step in (1 << 20, 64, 1):
        monkeypatch.setattr("streamda.factors.WIDE_BYTES", step * 8 * 70)
        assert wide_tokens(70) == step
        total = torch.zeros(40, 60, dtype=torch.float64)
        add_input_moment_(total, x, 20)
        wanted = x.double()[:, 20:60].T @ x.double()[:, :60]
        kept = torch.ones(40, 60, dtype=torch.bool).tril(20)
        assert float((total - wanted)[kept].abs().max()) < 1e-12 * float(wanted.max())


def test_a_pair_of_float32_numbers_holds_48_bits() -> None:
    sums = torch.rand(500, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e6
    pairs = round_to_pairs_(sums.clone())
    assert 0 < float(((pairs - sums) / sums).abs().max()) < 2**-46
    high = pairs.float()
    assert torch.equal(high.double() + (pairs - high).float().double(), pairs)
    assert torch.equal(round_to_pairs_(pairs.clone()), pairs)


def test_sums_that_float32_cannot_hold_are_told() -> None:
    assert fits_float32(torch.full((2, 2), 3e38, dtype=torch.float64))
    assert not fits_float32(torch.full((2, 2), 4e38, dtype=torch.float64))
    assert not fits_float32(torch.full((2, 2), float("nan"), dtype=torch.float64))
    assert not fits_float32(torch.full((2, 2), float("inf")))
