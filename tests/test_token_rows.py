"""Whole runs on few tokens: their rows stand for the sums, from the passes to the adapter.

What is solved from rows is in test_token_span.py, what the hooks keep in test_hooks.py.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

import streamda
from streamda import panels, plan, solve_bytes, store, token_basis, workload
from streamda.config import RunConfig
from streamda.errors import DamagedError
from streamda.inspection import inspect_folder
from streamda.layers import BlockSpec
from streamda.panels import Replay
from streamda.pipeline import plan as plan_run
from streamda.rundir import RunDirectory
from streamda.solve_stage import Solver
from streamda.store import BlockStatisticsReader
from streamda.sweep import Sweep
from tests.autograd_oracle import load_model, oracle_products, oracle_statistics
from tests.golden_options import products, read_adapter
from tests.killed import recorded_points, run_until, weights
from tests.models import make_samples, run_options, write_checkpoint, write_samples
from tests.oracles import dense_lora_da

LENGTHS = (7, 4, 7, 5)
ROWS = {"input_rows", "output_rows"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks and few tokens, some of them padded in their micro-batch."""
    folder = tmp_path_factory.mktemp("few")
    write_checkpoint(folder / "model", "llama", num_hidden_layers=3)
    write_samples(folder / "samples.jsonl", make_samples(LENGTHS))
    return folder


def options(inputs: Path, folder: Path, **given: Any) -> dict[str, Any]:
    own = {"rank": 4, "micro_batch_tokens": "14", "population_size": 100, "output_dir": str(folder / "adapter")}
    return run_options(inputs, **own) | given


@pytest.fixture(scope="module")
def held(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run that keeps all in memory."""
    folder = tmp_path_factory.mktemp("held")
    with noting_panels() as kinds:
        report = streamda.initialize(**options(inputs, folder))
    assert kinds == ROWS | {"output_moment"}
    assert not report.plan["spill_statistics"]
    assert report.bytes["statistics_written"] == 0
    assert {facts["statistics"] for facts in report.modules.values()} == {"rows"}
    return weights(folder)


@contextmanager
def noting_panels() -> Iterator[set[str]]:
    """Kinds of statistics that are accumulated meanwhile."""
    kinds: set[str] = set()
    passed = Sweep.backward_block

    def noted(sweep: Sweep, spec: BlockSpec, replays: Sequence[Replay], *args: Any, **kwargs: Any) -> Any:
        kinds.update(panel.statistic for replay in replays for panel in replay.panels)
        return passed(sweep, spec, replays, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "backward_block", noted)
        yield kinds


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "phi", "gemma2", "olmo2"])
def test_an_adapter_from_rows_is_that_of_dense_statistics_and_hardly_worse_than_from_sums(
    family: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "model", family)
    samples = make_samples(LENGTHS)
    write_samples(tmp_path / "samples.jsonl", samples)
    found: dict[str, dict[str, Tensor]] = {}
    for name, given in {"rows": {}, "sums": {"keep_statistics": True}}.items():
        with noting_panels() as kinds:
            streamda.initialize(**options(tmp_path, tmp_path / name, **given))
        assert (kinds >= ROWS) == (name == "rows")
        found[name] = products(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    expected = oracle_products(tmp_path / "model", samples, found["rows"], rank=4, population_size=100)
    errors: dict[str, list[float]] = {"rows": [], "sums": []}
    for module, wanted in expected.items():
        for way, each in errors.items():
            each.append(float((found[way][module] - wanted).norm() / wanted.norm()))
    assert max(errors["rows"]) < 2e-3
    # the model's own rounding in float32 is in both, and as likely larger in either
    assert max(errors["rows"]) < 2 * max(errors["sums"]) + 1e-5


@pytest.mark.parametrize(
    "given",
    [{"spill_statistics": True}, {"spill_statistics": True, "statistics_codec": "zstd"}, {"max_host_mem": "10MB"}],
    ids=str,
)
def test_wherever_they_lie_the_bits_are_the_same(
    given: dict[str, Any], inputs: Path, held: bytes, tmp_path: Path
) -> None:
    with noting_panels() as kinds:
        report = streamda.initialize(**options(inputs, tmp_path, **given))
    assert kinds >= ROWS
    assert bool(report.bytes["statistics_written"]) == report.plan["spill_statistics"] == ("spill_statistics" in given)
    assert weights(tmp_path) == held


def test_several_replays_give_the_same_bits(
    inputs: Path, held: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "WORKSPACE_BYTES", 0)
    monkeypatch.setattr(workload, "CAST_CHUNK_BYTES", 0)
    monkeypatch.setattr(plan, "solve_layouts", lambda *_: [])
    smallest = plan_run(RunConfig.from_options(options(inputs, tmp_path)))[1]["smallest_budget_bytes"]
    report = streamda.initialize(**options(inputs, tmp_path, max_gpu_mem=str(smallest)))
    assert min(report.plan["replays"]) >= 2
    assert weights(tmp_path) == held


@pytest.fixture
def along_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """What thousands of tokens do: panels hold some of them, and they are solved along a basis of theirs."""
    monkeypatch.setattr(solve_bytes, "FEW_TOKENS", 8)
    monkeypatch.setattr(token_basis, "PANEL_ROWS", 10)
    for module in (panels, store):
        monkeypatch.setattr(module, "panel_tokens", lambda *_: 8)


@pytest.mark.usefixtures("along_bases")
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("lengths", [LENGTHS, (9, 8, 10, 7, 9)], ids=["fewer than inputs", "not many more"])
def test_along_a_basis_they_give_the_adapter_of_dense_statistics(
    lengths: Sequence[int], family: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "model", family)
    samples = make_samples(lengths)
    write_samples(tmp_path / "samples.jsonl", samples)
    with noting_panels() as kinds:
        streamda.initialize(**options(tmp_path, tmp_path))
    assert kinds >= ROWS
    found = products(read_adapter(tmp_path / "adapter"))
    statistics, _ = oracle_statistics(load_model(tmp_path / "model"), samples, list(found), "attention")
    for module, layer in statistics.items():
        wanted = dense_lora_da(
            layer.gradient, layer.input_moment, layer.output_moment, rank=4, population_size=100
        ).product
        assert float((found[module] - wanted).norm() / wanted.norm()) < 2e-3


@pytest.mark.usefixtures("along_bases")
def test_along_a_basis_the_bits_are_the_same_in_memory_on_disk_and_after_a_kill(inputs: Path, tmp_path: Path) -> None:
    streamda.initialize(**options(inputs, tmp_path / "held"))
    streamda.initialize(**options(inputs, tmp_path / "spilled", spill_statistics=True))
    assert weights(tmp_path / "spilled") == weights(tmp_path / "held")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "WORKSPACE_BYTES", 0)
        patch.setattr(workload, "CAST_CHUNK_BYTES", 0)
        patch.setattr(plan, "solve_layouts", lambda *_: [])
        smallest = plan_run(RunConfig.from_options(options(inputs, tmp_path)))[1]["smallest_budget_bytes"]
        report = streamda.initialize(**options(inputs, tmp_path / "cut", max_gpu_mem=str(smallest)))
    assert min(report.plan["replays"]) >= 3
    assert weights(tmp_path / "cut") == weights(tmp_path / "held")


@pytest.mark.usefixtures("along_bases")
def test_along_a_basis_they_are_on_disk_in_panels_and_read_in_parts(inputs: Path, tmp_path: Path) -> None:
    given = options(inputs, tmp_path, spill_statistics=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Solver, "solve", lambda *_: stop_here())
        with pytest.raises(KeyboardInterrupt):
            streamda.initialize(**given)
    work = tmp_path / "adapter.work"
    streamda.verify(work)
    with RunDirectory.open_existing(work, exclusive=False) as run:
        unit = next(name for name in run.units.names() if name.startswith("stats-"))
        reader = BlockStatisticsReader(run.units, int(unit.removeprefix("stats-")))
        group = reader.spec.groups[0]
        whole = reader.token_rows(group.name, "input_rows")
        assert whole.shape == (sum(LENGTHS), group.d_in)
        parts = [reader.token_rows(group.name, "input_rows", slice(row, row + 7)) for row in range(0, 23, 7)]
        assert torch.equal(torch.cat(parts), whole)
        width = reader.spec.linear(group.name).d_out
        assert len(list(work.glob("units/stats-*/**/input_rows/c/*"))) >= 3
        assert reader.token_rows(group.name, "output_rows", slice(3, 9), slice(2, 5)).shape == (6, min(3, width - 2))


def stop_here() -> None:
    """As Ctrl-C does."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "given", [{"keep_statistics": True}, {"token_mask": "labels"}, {"statistics_codec": "bitround"}], ids=str
)
def test_what_is_kept_masked_or_rounded_is_summed_up(given: dict[str, Any], inputs: Path, tmp_path: Path) -> None:
    with noting_panels() as kinds:
        streamda.initialize(**options(inputs, tmp_path, **given))
    assert kinds == {"gradient", "input_moment", "output_moment"}


@pytest.mark.parametrize(
    ("given", "warns"), [({}, False), ({"keep_statistics": True}, False), ({"dtype": "bfloat16"}, True)], ids=str
)
def test_a_run_says_where_rounding_may_be_most_of_what_layers_get(
    given: dict[str, Any], warns: bool, inputs: Path, tmp_path: Path
) -> None:
    report = streamda.initialize(**options(inputs, tmp_path, **given))
    (note,) = (notice for notice in report.notices if "23 tokens are fewer than the inputs of 21 layers" in notice)
    assert ("21 layers are solved from sums" in note) == warns


def test_collected_statistics_are_sums(inputs: Path, tmp_path: Path) -> None:
    given = options(inputs, tmp_path, statistics=str(tmp_path / "s"))
    del given["output_dir"]
    with noting_panels() as kinds:
        streamda.collect(**given)
    assert kinds == {"gradient", "input_moment", "output_moment"}


def test_a_run_killed_anywhere_continues_to_the_same_bits(inputs: Path, held: bytes, tmp_path: Path) -> None:
    given = {"spill_statistics": True}
    points = recorded_points(options(inputs, tmp_path / "whole", **given), tmp_path / "points.json")
    for number, point in enumerate(points[:: len(points) // 6]):
        folder = tmp_path / str(number)
        assert run_until(point, options(inputs, folder, **given)) == -signal.SIGKILL, point
        # what one way begins the other one may end
        streamda.initialize(**options(inputs, folder, **(given if number % 2 else {})))
        assert weights(folder) == held, point


@pytest.fixture
def stopped(inputs: Path, tmp_path: Path) -> Path:
    """The directory of a run that was killed with rows on disk."""
    work = tmp_path / "adapter.work"
    for number in range(1, 40):
        point = f"unit-committed:{number}"
        assert run_until(point, options(inputs, tmp_path, spill_statistics=True)) == -signal.SIGKILL
        if list(work.glob("units/stats-*/COMMIT.json")):
            break
    return work


def test_a_run_whose_statistics_stay_in_memory_shows_what_is_solved(inputs: Path, tmp_path: Path) -> None:
    work = tmp_path / "adapter.work"
    for number in range(1, 40):
        assert run_until(f"unit-committed:{number}", options(inputs, tmp_path)) == -signal.SIGKILL
        if solved := list(work.glob("units/solve-*/COMMIT.json")):
            break
    facts = inspect_folder(work)[0]
    assert len(facts["solved_blocks"]) == len(solved)
    assert facts["collected_blocks"] == facts["solved_blocks"]  # as `verify` says of them


def test_rows_on_disk_are_read_as_what_they_stand_for(stopped: Path, inputs: Path) -> None:
    streamda.verify(stopped)
    model = load_model(inputs / "model")
    with RunDirectory.open_existing(stopped, exclusive=False) as run:
        unit = next(name for name in run.units.names() if name.startswith("stats-"))
        reader = BlockStatisticsReader(run.units, int(unit.removeprefix("stats-")))
        names = [linear.name for linear in reader.spec.linears]
        wanted, _ = oracle_statistics(model, make_samples(LENGTHS), names, "attention")
        cpu = torch.device("cpu")
        for group in reader.spec.groups:
            assert group.token_rows == sum(LENGTHS)
            assert reader.token_rows(group.name, "input_rows").shape == (sum(LENGTHS), group.d_in)
            moment = reader.input_moment(group, torch.float64, cpu).tril()
            torch.testing.assert_close(moment, wanted[group.name].input_moment.tril(), rtol=1e-4, atol=1e-5)
            for name in group.modules:
                gradient = reader.gradient(name, torch.float64, cpu)
                torch.testing.assert_close(gradient, wanted[name].gradient, rtol=1e-3, atol=1e-6)


def test_what_was_made_from_rows_does_not_stay_where_statistics_are_to_be_kept(
    stopped: Path, inputs: Path, tmp_path: Path
) -> None:
    """A run goes on with --keep-statistics: all that it keeps are sums, and all layers are solved from them."""
    streamda.initialize(**options(inputs, tmp_path, keep_statistics=True))
    with RunDirectory.open_existing(stopped, exclusive=False) as run:
        for index in range(3):
            assert not any(group.token_rows for group in BlockStatisticsReader(run.units, index).spec.groups)
    whole = tmp_path / "whole"
    streamda.initialize(**options(inputs, whole, keep_statistics=True))
    assert weights(tmp_path) == weights(whole)


def test_rows_that_were_damaged_on_disk_are_found(stopped: Path) -> None:
    chunk = next(path for path in sorted(stopped.glob("units/stats-*/**/input_rows/c/**/*")) if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DamagedError):
        streamda.verify(stopped)
    unit, folder = chunk.relative_to(stopped / "units").parts[0], chunk.parents[3].name
    with RunDirectory.open_existing(stopped, exclusive=False) as run:
        reader = BlockStatisticsReader(run.units, int(unit.removeprefix("stats-")))
        module = next(each.name for each in reader.spec.groups if each.name.endswith(folder.partition(".")[2]))
        with pytest.raises(DamagedError):
            reader.token_rows(module, "input_rows")


@pytest.mark.parametrize("at_once", [False, True])
def test_a_layer_that_sees_each_token_twice_is_summed_up(at_once: bool, inputs: Path, tmp_path: Path) -> None:
    """How many rows it sees is not the number of tokens."""
    plain = LlamaMLP.forward

    def twice(self: LlamaMLP, x: Tensor) -> Tensor:
        if at_once:
            inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(torch.stack((inner, 2 * inner))).sum(dim=0)
        return plain(self, x) + self.down_proj(self.act_fn(self.up_proj(x)))

    with pytest.MonkeyPatch.context() as patch, noting_panels() as kinds:
        patch.setattr(LlamaMLP, "forward", twice)
        # one sample at a time: without padding, which could not be told apart in twice as many rows
        streamda.initialize(**options(inputs, tmp_path, micro_batch_tokens="1"))
    assert kinds == ROWS | {"gradient", "input_moment", "output_moment"}
