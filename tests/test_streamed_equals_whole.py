"""What is collected block by block is what autograd gives on the whole model, for every family that is supported.

The oracle (`autograd_oracle`) loads the same checkpoint whole, in float64, and takes one sample at a time. Not
covered here: CUDA, memory (test_memory_bound.py), interruption.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import streamda
from streamda import plan, workload
from streamda.checkpoint import Checkpoint
from streamda.config import RunConfig
from streamda.errors import ConfigError, ModelError
from streamda.pipeline import plan as plan_run
from tests.autograd_oracle import OracleStatistics, load_model, oracle_statistics
from tests.models import FAMILIES, LENGTHS, REFUSED, SIMILAR, TARGETS, make_samples, write_checkpoint, write_samples
from tests.test_store import set_tile

TOLERANCE = 1e-4
MANY_LENGTHS = (17, 5, 16, 2, 9, 20, 20, 19, 13, 12, 7, 20, 18, 11, 8, 15)
Statistics = dict[str, streamda.LayerStatistics]
Samples = list[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint and samples on disk, and a place for results."""

    folder: Path
    samples: Samples

    def options(self, **options: Any) -> dict[str, Any]:
        return {
            "model": str(self.folder / "model"),
            "dataset": str(self.folder / "samples.jsonl"),
            "max_gpu_mem": "400MB",
            "device": "cpu",
            "rank": 1,  # some families have a gate of one output
            "micro_batch_tokens": "40",  # auto tries many sizes
        } | options

    def collect(self, name: str, **options: Any) -> tuple[Statistics, streamda.InitReport]:
        where = self.folder / name
        report = streamda.collect(**self.options(statistics=str(where), **options))
        with streamda.open_statistics(where) as statistics:
            return dict(statistics), report

    def initialize(self, name: str, **options: Any) -> dict[str, Tensor]:
        """B A of every layer."""
        where = self.folder / name
        streamda.initialize(**self.options(output_dir=str(where), **options))
        return products(load_file(where / "adapter_model.safetensors"))

    def oracle(self, token_mask: str = "attention") -> tuple[dict[str, OracleStatistics], float]:
        model = load_model(self.folder / "model")
        return oracle_statistics(model, self.samples, adaptable_layers(model), token_mask)


def make_case(
    folder: Path, family: str, samples: Samples | None = None, *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Case:
    samples = make_samples() if samples is None else samples
    write_checkpoint(folder / "model", family, dtype=dtype, **overrides)
    write_samples(folder / "samples.jsonl", samples)
    return Case(folder, samples)


def adaptable_layers(model: nn.Module) -> list[str]:
    """Linear layers in numbered blocks; a router may be one by its class, but gives more than a product."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and re.search(r"\.\d+\.", name)
        and not type(module).__name__.endswith("Router")
    ]


def products(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    error, scale = (actual.double() - expected.double()).norm().item(), expected.norm().item()
    if scale < 1e-12:  # exactly zero but for float64's rounding; float32 leaves more of it
        return 0.0 if error < 1e-6 else math.inf
    return error / scale


def require_equal(
    actual: Statistics,
    expected: Mapping[str, OracleStatistics] | Mapping[str, streamda.LayerStatistics],
    tolerance: float = TOLERANCE,
) -> None:
    assert set(actual) == set(expected)
    for name, statistics in expected.items():
        assert actual[name].num_tokens == statistics.num_tokens, name
        for kind in ("gradient", "input_moment", "output_moment"):
            ours, theirs = getattr(actual[name], kind), getattr(statistics, kind)
            assert ours.shape == theirs.shape, (name, kind)
            assert relative_error(ours, theirs) < tolerance, (name, kind)


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.slow if family in SIMILAR else ()) for family in FAMILIES]
)
def test_every_statistic_of_every_layer_equals_the_oracle(family: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, family)
    statistics, report = case.collect("statistics", target_modules=TARGETS.get(family, "all-linear"))
    oracle, loss = case.oracle()
    if family in TARGETS:
        chosen = tuple(TARGETS[family].split(","))
        oracle = {name: layer for name, layer in oracle.items() if name.endswith(chosen)}
    called = [layer for layer in oracle.values() if layer.num_tokens]
    assert len(called) >= 2
    assert all(layer.gradient.norm() > 1e-4 and layer.output_moment.norm() > 1e-9 for layer in called)
    require_equal(statistics, oracle)
    assert all(layer.num_samples == len(LENGTHS) for layer in statistics.values())
    assert report.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("gpt2", {}),
        ("gemma3_text", {}),
        ("mixtral", {}),
        ("gpt_oss", {}),
        ("olmo", {"clip_qkv": 0.5}),  # changes the output of a linear layer in place
    ],
)
def test_products_by_pieces_change_no_statistic(
    family: str, overrides: dict[str, Any], tmp_path: Path, small_pieces: list[int]
) -> None:
    case = make_case(tmp_path, family, **overrides)
    statistics, report = case.collect("statistics")
    oracle, loss = case.oracle()
    assert small_pieces[0] > 100
    require_equal(statistics, oracle)
    assert report.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bloom", "mixtral", "lfm2"])
def test_label_tokens_alone_enter_the_moments_if_asked_for(family: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, family)
    statistics, _ = case.collect("statistics", token_mask="labels")
    oracle, _ = case.oracle("labels")
    assert all(layer.num_tokens < sum(LENGTHS) for layer in oracle.values())
    require_equal(statistics, oracle)


@pytest.mark.parametrize("family", REFUSED)
def test_blocks_that_exchange_more_than_hidden_states_are_refused_in_one_line(family: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, family)
    with pytest.raises(ModelError, match=r"cannot be streamed: its blocks exchange") as caught:
        case.collect("statistics")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "statistics").exists()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba2", r"^PEFT refuses to adapt these layers: .*'out_proj' is incompatible"),
        ("deepseek_v3", r"^PEFT takes gate_proj, up_proj, down_proj of this model .* use --target-modules q_a_proj,"),
    ],
)
def test_layers_that_peft_does_not_adapt_are_refused_before_any_work(family: str, reason: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, family)
    with pytest.raises(ConfigError, match=reason) as caught:
        case.initialize("adapter")
    assert "\n" not in str(caught.value)
    assert {file.name for file in tmp_path.iterdir()} == {"model", "samples.jsonl"}


@pytest.mark.parametrize(
    "family", ["gpt2", "opt-projected", "phimoe", "deepseek_v3", "qwen2_moe", "mamba", "recurrent_gemma"]
)
def test_an_adapter_has_the_layers_whose_statistics_were_collected(family: str, tmp_path: Path) -> None:
    """`initialize` loads the adapter with PEFT before it lets it stand; unusual names are where that could fail."""
    case = make_case(tmp_path, family)
    targets = TARGETS.get(family, "all-linear")
    statistics, _ = case.collect("statistics", target_modules=targets)
    adapter = case.initialize("adapter", target_modules=targets)
    assert set(adapter) == {f"base_model.model.{name}" for name in statistics}
    assert all(product.any() for product in adapter.values())


@pytest.mark.parametrize("family", ["openai-gpt", "ctrl", "llama"])
def test_samples_have_more_labels_together_than_the_model_has_positions(family: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, family, make_samples((40, 40, 40, 64)))
    statistics, report = case.collect("statistics")
    oracle, loss = case.oracle()
    require_equal(statistics, oracle)
    assert report.loss == pytest.approx(loss, rel=1e-5)


def test_a_layer_that_is_never_called_has_no_tokens_and_no_gradient(tmp_path: Path) -> None:
    """Jamba reads the weight of dt_proj behind the module's back, where an adapter would have no effect either."""
    statistics, _ = make_case(tmp_path, "jamba").collect("statistics")
    silent = {name: layer for name, layer in statistics.items() if name.endswith("dt_proj")}
    assert silent
    for layer in silent.values():
        assert layer.num_tokens == 0
        assert not layer.gradient.any()
        assert not layer.input_moment.any()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    # several times more tokens than the widest layer has inputs, so that solutions are well posed
    return make_case(tmp_path_factory.mktemp("llama"), "llama", make_samples(MANY_LENGTHS), num_hidden_layers=3)


@pytest.fixture(scope="module")
def collected(llama: Case) -> Statistics:
    """Statistics at the default settings."""
    return llama.collect("default")[0]


@pytest.fixture(scope="module")
def solved(llama: Case) -> dict[str, Tensor]:
    """B A at the default settings and rank 4."""
    return llama.initialize("default-adapter", rank=4)


VARIANTS: dict[str, dict[str, Any]] = {
    "one sample at a time": {"micro_batch_tokens": "1"},
    "three or four samples at a time": {"micro_batch_tokens": "64"},
    "as many samples at a time as padding allows": {"micro_batch_tokens": "auto"},
    "boundary states in memory": {"max_host_mem": "10MB"},
    "some boundary states in memory": {"max_host_mem": "64kB"},
    "compressed": {"statistics_codec": "zstd"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_how_the_work_is_cut_does_not_change_the_statistics(variant: str, llama: Case, collected: Statistics) -> None:
    statistics, _ = llama.collect(variant, **VARIANTS[variant])
    require_equal(statistics, collected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_how_the_work_is_cut_does_not_change_the_adapter(variant: str, llama: Case, solved: dict[str, Tensor]) -> None:
    again = llama.initialize(f"{variant} adapter", rank=4, **VARIANTS[variant])
    assert set(again) == set(solved)
    assert max(relative_error(again[name], solved[name]) for name in solved) < TOLERANCE
    assert all(product.any() for product in solved.values())


def test_boundary_states_go_where_the_options_say(llama: Case) -> None:
    _, on_disk = llama.collect("on disk")
    _, in_memory = llama.collect("in memory", max_host_mem="10MB")
    boundary = on_disk.data["num_rows"] * 32 * 4
    _, mixed = llama.collect("mixed", max_host_mem=str(2 * boundary + 1))
    gradients = 3  # of the boundaries above blocks 0, 1 and 2: always on disk
    assert boundary >= sum(MANY_LENGTHS) * 32 * 4
    assert on_disk.bytes["boundaries_written"] == (4 + gradients) * boundary
    assert mixed.bytes["boundaries_written"] == (2 + gradients) * boundary
    assert in_memory.bytes["boundaries_written"] == gradients * boundary


def test_the_order_of_the_samples_does_not_change_the_statistics(
    llama: Case, collected: Statistics, tmp_path: Path
) -> None:
    turned = write_samples(tmp_path / "turned.jsonl", llama.samples[::-1])
    statistics, _ = llama.collect("turned", dataset=str(turned))
    require_equal(statistics, collected)


def test_a_small_budget_costs_replays_and_changes_nothing(
    llama: Case, collected: Statistics, solved: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # what a run takes beside its tensors hides the tensors of so tiny a model; nothing here measures memory
    monkeypatch.setattr(plan, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(workload, "CAST_CHUNK_BYTES", 0)
    set_tile(monkeypatch, 32)
    monkeypatch.setattr(plan, "solve_layouts", lambda *_: [])
    options = llama.options(output_dir=str(llama.folder / "unused"))
    _, facts = plan_run(RunConfig.from_options(options))
    smallest = facts["smallest_budget_bytes"]
    statistics, report = llama.collect("replayed", max_gpu_mem=str(smallest))
    assert min(report.plan["replays"]) >= 3
    assert report.plan["peak_bytes"] <= smallest
    require_equal(statistics, collected)
    again = llama.initialize("replayed adapter", rank=4, max_gpu_mem=str(2 * smallest))
    assert max(relative_error(again[name], solved[name]) for name in solved) < TOLERANCE


def test_the_same_run_gives_the_same_bits(llama: Case, collected: Statistics) -> None:
    again, _ = llama.collect("again")
    for name, layer in collected.items():
        for kind in ("gradient", "input_moment", "output_moment"):
            assert torch.equal(getattr(again[name], kind), getattr(layer, kind)), (name, kind)
    adapters = []
    for name in ("first", "second"):
        llama.initialize(name, rank=4)
        adapters.append((llama.folder / name / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("target_modules", "pattern"),
    [
        ("q_proj,k_proj,v_proj,o_proj", r".*self_attn\..*"),
        ("gate_proj, up_proj, down_proj", r".*mlp\..*"),
        ("v_proj", r".*v_proj"),
        (r"model\.layers\.[12]\.mlp\.up_proj", r"model\.layers\.[12]\.mlp\.up_proj"),
    ],
)
def test_a_choice_of_layers_is_collected_as_with_all(
    target_modules: str, pattern: str, llama: Case, collected: Statistics
) -> None:
    statistics, _ = llama.collect(f"only {pattern[-12:]}".replace("\\", ""), target_modules=target_modules)
    expected = {name: layer for name, layer in collected.items() if re.fullmatch(pattern, name)}
    assert expected
    require_equal(statistics, expected)


def test_blocks_below_the_lowest_adapted_one_are_not_visited_on_the_way_down(
    llama: Case, collected: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    read = Checkpoint.read

    def watched(checkpoint: Checkpoint, names: Any, **options: Any) -> Any:
        names = list(names)
        loaded.extend(names)
        return read(checkpoint, names, **options)

    monkeypatch.setattr(Checkpoint, "read", watched)
    statistics, _ = llama.collect("upper", target_modules=r"model\.layers\.2\..*")
    require_equal(statistics, {name: layer for name, layer in collected.items() if ".2." in name})
    blocks = [name for name in loaded if re.fullmatch(r"model\.layers\.\d", name)]
    assert blocks == [*(f"model.layers.{index}" for index in (0, 1, 2)), "model.layers.2"]


@pytest.mark.parametrize("rank", [1, 2, 8, 16])
def test_the_adapter_has_the_rank_that_is_asked_for(rank: int, llama: Case) -> None:
    llama.initialize(f"rank {rank}", rank=rank)
    tensors = load_file(llama.folder / f"rank {rank}" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 7
    for name, tensor in tensors.items():
        assert tensor.shape[0 if "lora_A" in name else 1] == rank, name


def test_a_rank_above_the_smaller_side_is_refused_by_the_module_s_name(llama: Case) -> None:
    with pytest.raises(ConfigError, match=r"rank 17 .*model\.layers\.0\.self_attn\.k_proj \[16, 32\]") as caught:
        llama.initialize("rank 17", rank=17)
    assert caught.value.exit_code == 2
    assert not (llama.folder / "rank 17").exists()


def test_the_head_of_its_own_and_the_tied_one_are_different_models(tmp_path: Path) -> None:
    """Without this the comparison of both with the oracle could be of one and the same."""
    (tmp_path / "own").mkdir()
    (tmp_path / "tied").mkdir()
    own, _ = make_case(tmp_path / "own", "llama").collect("statistics")
    tied, _ = make_case(tmp_path / "tied", "llama-tied").collect("statistics")
    name = "model.layers.1.mlp.down_proj"
    assert relative_error(own[name].gradient, tied[name].gradient) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_is_computed_in_single(dtype: torch.dtype, tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", dtype=dtype)
    statistics, _ = case.collect("statistics")
    require_equal(statistics, case.oracle()[0])


def test_bfloat16_compute_is_near(tmp_path: Path) -> None:
    """Sums stay in float32, so the error is that of the passes, not of the number of tokens."""
    case = make_case(tmp_path, "llama")
    statistics, _ = case.collect("statistics", dtype="bfloat16")
    oracle, _ = case.oracle()
    require_equal(statistics, oracle, tolerance=0.05)
    name = "model.layers.0.mlp.down_proj"
    assert relative_error(statistics[name].gradient, oracle[name].gradient) > TOLERANCE  # it did compute in bfloat16


@pytest.mark.parametrize("lengths", [(9,), (2, 2, 2), (2,), (3, 64)], ids=str)
def test_few_and_short_samples_are_no_special_case(lengths: tuple[int, ...], tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", make_samples(lengths))
    statistics, _ = case.collect("statistics")
    require_equal(statistics, case.oracle()[0])
