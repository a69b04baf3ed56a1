"""Samples and layers that become NaN or Inf: named errors, or left out whole where that was asked for.

A marked token sets the fault off inside the model (`faulty`), so that a sample carries it through everything that a run
does with samples. What is left out must leave nothing behind: the truth is the run on data without it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from typer.testing import CliRunner

import streamda
from streamda import cli, collect_stage
from streamda.blocks import DecoderStack
from streamda.errors import ConfigError, MismatchError, ModelError, NumericalError
from streamda.nonfinite import bad_samples
from tests.models import make_config, make_model, make_samples, run_options, write_samples

MARKED = 7  # the token that sets a fault off
LENGTHS = (9, 12, 9, 12, 6, 9)
BAD = (1, 2)  # each shares its micro-batch with a good sample
FAULTY_BLOCK = 1
SIGN = 0.140625  # in a weight of the faulty block, to know it by
OVERFLOW = 2.0**83  # its square is beyond float32; a power of two costs no bits on the way back

# kind of fault -> what the error says of it
KINDS = {
    "forward": rf"model\.layers\.{FAULTY_BLOCK}\.mlp gives NaN or Inf",
    "backward": rf"the gradient of what model\.layers\.{FAULTY_BLOCK}\.post_attention_layernorm gives holds NaN",
    "moment": rf"model\.layers\.{FAULTY_BLOCK}\.mlp\.down_proj receives values whose squares overflow float32",
}


class PoisonBack(torch.autograd.Function):
    """Identity whose gradient is NaN where the mask says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, torch.nan, gradients[0]), None


@contextmanager
def faulty(kind: str, *, everywhere: bool = False) -> Iterator[None]:
    """Within the block, the MLP of one block goes wrong at marked tokens (or at all)."""
    plain = LlamaMLP.forward

    def forward(self: LlamaMLP, x: Tensor) -> Tensor:
        # what it does with its results has to be seen on fakes as well
        if not (x.is_meta or isinstance(x, FakeTensor)) and float(self.gate_proj.weight[0, 0]) != SIGN:
            return plain(self, x)
        mask = torch.ones_like(x[..., :1], dtype=torch.bool) if everywhere else x[..., :1] > 4.5
        if kind == "forward":
            return torch.where(mask, torch.nan, plain(self, x))
        if kind == "backward":
            return plain(self, PoisonBack.apply(x, mask))
        scale = torch.where(mask, OVERFLOW, 1.0)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * scale) / scale

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", forward)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose marked token is seen in every block, and samples with and without the bad ones."""
    where = tmp_path_factory.mktemp("bad")
    model = make_model(make_config("llama", num_hidden_layers=3))
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 0.0
        model.get_input_embeddings().weight[MARKED, 0] = 60.0
        model.model.layers[FAULTY_BLOCK].mlp.gate_proj.weight[0, 0] = SIGN
    model.save_pretrained(where / "model", max_shard_size="40KB")
    samples = []
    for index, (ids, labels) in enumerate(make_samples(LENGTHS)):
        ids[ids == MARKED] += 1
        if index in BAD:
            ids[3] = MARKED
        samples.append((ids, torch.where(labels >= 0, ids, labels)))
    write_samples(where / "samples.jsonl", samples)
    write_samples(where / "good.jsonl", [sample for index, sample in enumerate(samples) if index not in BAD])
    write_samples(where / "only_bad.jsonl", [samples[index] for index in BAD])
    return where


def options(folder: Path, **given: Any) -> dict[str, Any]:
    own = {"rank": 2, "micro_batch_tokens": "24", "population_size": 100, "quiet": True}
    return run_options(folder, **own) | given


def collect(folder: Path, where: Path, **given: Any) -> tuple[dict[str, streamda.LayerStatistics], streamda.InitReport]:
    report = streamda.collect(**options(folder, statistics=str(where), **given))
    with streamda.open_statistics(where) as statistics:
        return dict(statistics), report


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def require_same_bits(found: dict[str, streamda.LayerStatistics], wanted: dict[str, streamda.LayerStatistics]) -> None:
    assert list(found) == list(wanted)
    for name, layer in wanted.items():
        assert (found[name].num_samples, found[name].num_tokens) == (layer.num_samples, layer.num_tokens), name
        for kind in ("gradient", "input_moment", "output_moment"):
            assert torch.equal(getattr(found[name], kind), getattr(layer, kind)), (name, kind)
            assert bool(getattr(found[name], kind).isfinite().all())


@pytest.fixture(scope="module")
def without(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, streamda.LayerStatistics]:
    """Statistics of the good samples alone."""
    return collect(folder, tmp_path_factory.mktemp("without"), dataset=str(folder / "good.jsonl"))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_sample_is_a_named_error_and_with_the_flag_leaves_nothing_behind_in_any_layer(
    kind: str, folder: Path, tmp_path: Path, without: dict[str, streamda.LayerStatistics]
) -> None:
    with faulty(kind):
        with pytest.raises(NumericalError, match=KINDS[kind]) as caught:
            collect(folder, tmp_path / "s")
        found, report = collect(folder, tmp_path / "s", skip_bad_samples=True)
        with pytest.raises(MismatchError, match="give --skip-bad-samples again"):
            collect(folder, tmp_path / "s")
    message = str(caught.value)
    assert caught.value.exit_code == 9
    assert message.startswith("samples 1 (row 1), 2 (row 2): ")
    assert "--skip-bad-samples" in message
    assert len(message.splitlines()) == 1
    assert report.resumed
    require_same_bits(found, without)
    assert [(entry["sample"], entry["row"]) for entry in report.skipped_samples] == [(1, 1), (2, 2)]
    assert report.data["num_samples"] == len(LENGTHS) - 2
    assert report.data["num_tokens"] == sum(LENGTHS) - sum(LENGTHS[index] for index in BAD)
    assert [notice for notice in report.notices if "row 2 of the data" in notice and "left out" in notice]
    assert "row 2 of the data" in report.to_table()


@pytest.mark.parametrize("rows", [False, True], ids=["sums", "rows"])
@pytest.mark.parametrize("kind", [pytest.param("forward", marks=pytest.mark.faults), "backward"])
def test_an_adapter_without_the_bad_samples_is_that_of_the_good_ones(
    kind: str, rows: bool, folder: Path, tmp_path: Path
) -> None:
    """From sums, and from rows, which are chosen by the number of tokens of all samples."""
    good = [json.loads(line) for line in (folder / "good.jsonl").read_text().splitlines()]
    every = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    if rows:
        good, every = good[:1], every[:3]  # 30 tokens, for the 56 inputs of a down projection
    for name, samples in (("good", good), ("every", every)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    kept: dict[str, Any] = {"target_modules": "down_proj"} if rows else {"keep_statistics": True}
    good = streamda.initialize(
        **options(folder, dataset=str(tmp_path / "good.jsonl"), output_dir=str(tmp_path / "good"), **kept)
    )
    kept["dataset"] = str(tmp_path / "every.jsonl")
    given = options(folder, output_dir=str(tmp_path / "a"), skip_bad_samples=True, **kept)
    with faulty(kind):
        report = streamda.initialize(**given)
        assert len(report.skipped_samples) == 2
        counts = ("num_samples", "num_tokens", "num_rows", "num_label_tokens")
        assert [report.data[count] for count in counts] == [good.data[count] for count in counts]
        assert streamda.initialize(**given).already_done
        # without the flag it would have been an error, so it is not done either
        with pytest.raises(ConfigError, match="not empty"):
            streamda.initialize(**options(folder, output_dir=str(tmp_path / "a"), **kept))
    wanted, found = adapter(tmp_path / "good"), adapter(tmp_path / "a")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert found.keys() == wanted.keys()
    kept = json.loads((tmp_path / "a" / "streamda_report.json").read_text())
    assert [entry["sample"] for entry in kept["skipped_samples"]] == list(BAD)


def test_the_flag_alone_changes_nothing(
    folder: Path, tmp_path: Path, without: dict[str, streamda.LayerStatistics]
) -> None:
    good = str(folder / "good.jsonl")
    found, report = collect(folder, tmp_path / "s", dataset=good, skip_bad_samples=True, skip_bad_layers=True)
    require_same_bits(found, without)
    assert report.skipped_samples == []


def test_a_solution_of_such_statistics_says_what_was_left_out(folder: Path, tmp_path: Path) -> None:
    with faulty("forward"):
        collect(folder, tmp_path / "s", skip_bad_samples=True)
    report = streamda.solve(statistics=str(tmp_path / "s"), output_dir=str(tmp_path / "a"), rank=2, quiet=True)
    assert [entry["sample"] for entry in report.skipped_samples] == list(BAD)
    assert any("row 1 of the data" in notice for notice in report.notices)
    assert report.data["num_samples"] == len(LENGTHS) - 2


@pytest.mark.parametrize("kind", ["forward", "moment"])
def test_if_all_samples_are_bad_nothing_can_be_saved(kind: str, folder: Path, tmp_path: Path) -> None:
    given = {"dataset": str(folder / "only_bad.jsonl"), "skip_bad_samples": True}
    with faulty(kind), pytest.raises(NumericalError, match=r"all 2 samples become NaN or Inf: .*nothing can be saved"):
        collect(folder, tmp_path / "s", **given)


class _KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize(
    ("kind", "point"),
    [
        ("backward", ("drop-renamed", 2)),
        ("forward", ("bad-samples-dropped", 1)),
        *(
            pytest.param("backward", point, marks=pytest.mark.faults)
            for point in (("drop-renamed", 1), ("drop-removed", 1), ("drop-renamed", 3), ("bad-samples-dropped", 1))
        ),
        pytest.param("forward", ("drop-renamed", 1), marks=pytest.mark.faults),
    ],
)
def test_a_run_stopped_while_it_leaves_samples_out_comes_to_the_same(
    kind: str, point: tuple[str, int], folder: Path, tmp_path: Path, without: dict[str, streamda.LayerStatistics]
) -> None:
    seen: list[str] = []

    def reached(name: str) -> None:
        seen.append(name)
        if name == point[0] and leaving and seen.count(name) == point[1]:
            raise _KilledError

    leaving: list[bool] = []
    begin = collect_stage.Collection._leave_out

    def leave_out(self: Any, reasons: dict[int, str]) -> None:
        seen.clear()
        leaving.append(True)
        begin(self, reasons)

    with faulty(kind):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collect_stage.Collection, "_leave_out", leave_out)
            for module in ("units", "collect_stage"):
                patch.setattr(f"streamda.{module}.reached", reached)
            with pytest.raises(_KilledError):
                collect(folder, tmp_path / "s", skip_bad_samples=True)
        found, report = collect(folder, tmp_path / "s", skip_bad_samples=True)
    require_same_bits(found, without)
    assert len(report.skipped_samples) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bad_samples_are_those_with_a_value_that_is_not_finite(value: float, dtype: torch.dtype, device: str) -> None:
    states = torch.full((4, 5, 6), torch.finfo(dtype).max, dtype=dtype, device=device)  # large, and their sums overflow
    assert bad_samples(states) == []
    states[1, 4, 5] = value
    states[3] = value
    assert bad_samples(states) == [1, 3]


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3", "mamba2"])
def test_nan_stays_in_its_sample_so_the_others_of_a_micro_batch_are_not_taken_for_bad(family: str) -> None:
    """Also where tokens of several samples share an expert's product."""
    model = make_model(make_config(family)).requires_grad_(False)
    model.config.use_cache = False
    stack = DecoderStack(model, torch.device("cpu"))
    stack.find_output_form()
    for block, call in zip(stack.blocks, stack.calls(3, 6), strict=True):
        hidden = torch.randn(3, 6, stack.hidden_size)
        hidden[1, 2, 1] = math.nan
        hidden.requires_grad_(True)
        output = call.run(block, hidden)
        output.backward(torch.ones_like(output))
        assert bad_samples(output) == [1]
        assert hidden.grad is not None
        assert set(bad_samples(hidden.grad)) <= {1}


def test_the_command_line_has_both_flags_and_they_are_no_part_of_what_a_run_is(folder: Path, tmp_path: Path) -> None:
    """A run that ended with exit 9 must be able to go on with them."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options(folder).items() if name != "quiet"]
    runner = CliRunner()
    arguments = ["collect", *given, "--statistics", str(tmp_path / "s"), "--quiet", "--json"]
    plain = runner.invoke(cli.app, arguments, catch_exceptions=False)
    again = runner.invoke(cli.app, [*arguments, "--skip-bad-samples", "--skip-bad-layers"], catch_exceptions=False)
    assert (plain.exit_code, again.exit_code) == (0, 0)
    assert json.loads(again.stdout)["config"]["skip_bad_layers"] is True
    solved = ["solve", "--statistics", str(tmp_path / "s"), "--output-dir", str(tmp_path / "a"), "--rank=2", "--quiet"]
    assert runner.invoke(cli.app, [*solved, "--skip-bad-layers"], catch_exceptions=False).exit_code == 0


def test_in_bfloat16_the_wider_type_is_named_as_a_way_out(folder: Path, tmp_path: Path) -> None:
    with faulty("forward"), pytest.raises(NumericalError, match=r"mlp gives NaN or Inf.*, or try --dtype float32$"):
        collect(folder, tmp_path / "s", dtype="bfloat16")


def test_few_tokens_are_said_to_be_few(folder: Path, tmp_path: Path) -> None:
    report = collect(folder, tmp_path / "s", target_modules="model.layers.2.mlp.down_proj")[1]
    assert any("57 tokens are fewer than 4 for each input of 1 layers" in notice for notice in report.notices)


class TestLayers:
    NAME = f"model.layers.{FAULTY_BLOCK}.mlp.down_proj"

    def test_statistics_that_overflow_in_every_sample_are_an_error_of_the_layer(
        self, folder: Path, tmp_path: Path
    ) -> None:
        with faulty("moment", everywhere=True), pytest.raises(NumericalError, match="down_proj") as caught:
            collect(folder, tmp_path / "s")
        assert caught.value.exit_code == 9

    @pytest.mark.parametrize("samples_too", [pytest.param(False, marks=pytest.mark.faults), True])
    def test_a_bad_layer_that_is_skipped_has_no_adapter_and_the_others_have_theirs(
        self, samples_too: bool, folder: Path, tmp_path: Path
    ) -> None:
        plain = options(folder, output_dir=str(tmp_path / "plain"), keep_statistics=True)  # so that there are moments
        streamda.initialize(**plain)
        given = plain | {
            "output_dir": str(tmp_path / "a"),
            "skip_bad_layers": True,
            "skip_bad_samples": samples_too,
        }
        with faulty("moment", everywhere=True):
            report = streamda.initialize(**given)
            assert streamda.initialize(**given).already_done
        assert report.modules[self.NAME]["status"] == "skipped"
        assert "input_moment holds NaN or Inf" in report.modules[self.NAME]["reason"]
        assert any(notice.startswith(f"{self.NAME} is left without adapter: ") for notice in report.notices)
        assert "skipped" in report.to_table()
        assert report.skipped_samples == []
        found, wanted = adapter(tmp_path / "a"), adapter(tmp_path / "plain")
        missing = {key for key in wanted if self.NAME in key}
        assert found.keys() == wanted.keys() - missing
        assert len(missing) == 2
        assert all(torch.equal(found[key], wanted[key]) for key in found)
        assert all(bool(value.isfinite().all()) for value in found.values())
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "model"), str(tmp_path / "a"), is_trainable=True
        )
        adapted = {name.removeprefix("base_model.model.").partition(".lora_A")[0]
                   for name, _ in model.named_parameters() if "lora_A" in name}  # fmt: skip
        assert self.NAME not in adapted
        assert len(adapted) == 3 * 7 - 1

    def test_collected_statistics_lack_the_layer_and_solving_them_needs_the_flag(
        self, folder: Path, tmp_path: Path
    ) -> None:
        with faulty("moment", everywhere=True):
            statistics, _ = collect(folder, tmp_path / "s", skip_bad_layers=True)
        assert self.NAME not in statistics
        assert len(statistics) == 3 * 7 - 1
        given = {"statistics": str(tmp_path / "s"), "output_dir": str(tmp_path / "a"), "rank": 2, "quiet": True}
        with pytest.raises(NumericalError, match=r"down_proj: its input_moment holds NaN or Inf; --skip-bad-layers"):
            streamda.solve(**given)
        report = streamda.solve(**given, skip_bad_layers=True)
        assert report.modules[self.NAME]["status"] == "skipped"
        assert not any(self.NAME in key for key in adapter(tmp_path / "a"))

    def test_a_layer_with_a_weight_that_is_not_finite_has_no_adapter(self, folder: Path, tmp_path: Path) -> None:
        damaged = shutil.copytree(folder / "model", tmp_path / "model")
        key = f"{self.NAME}.weight"
        shard = damaged / json.loads((damaged / "model.safetensors.index.json").read_text())["weight_map"][key]
        tensors = load_file(shard)
        tensors[key][3, 5], tensors[key][0, 0] = math.nan, -math.inf
        save_file(tensors, shard, metadata={"format": "pt"})
        given = options(folder, model=str(damaged), output_dir=str(tmp_path / "a"))
        with pytest.raises(ModelError, match=r"down_proj\.weight holds NaN or Inf"):
            streamda.initialize(**given)
        report = streamda.initialize(**given, skip_bad_layers=True)
        assert report.modules[self.NAME]["status"] == "skipped"
        assert "its weight holds NaN or Inf (2 of its values" in report.modules[self.NAME]["reason"]
        found = adapter(tmp_path / "a")
        assert not any(self.NAME in key for key in found)
        assert len(found) == 2 * (3 * 7 - 1)
        assert all(bool(value.isfinite().all()) for value in found.values())

    def test_if_no_layer_is_left_there_is_no_adapter(self, folder: Path, tmp_path: Path) -> None:
        given = options(
            folder,
            output_dir=str(tmp_path / "a"),
            target_modules=self.NAME,
            skip_bad_layers=True,
            keep_statistics=True,
            max_gpu_mem="300MB",
        )
        with (
            faulty("moment", everywhere=True),
            pytest.raises(NumericalError, match=r"no layer could be solved, so there is no adapter.*input_moment"),
        ):
            streamda.initialize(**given)
        assert not (tmp_path / "a").exists()
