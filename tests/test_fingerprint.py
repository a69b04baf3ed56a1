"""Whose run is this: what must be the same to continue one, what may change, and what a mismatch says.

Not here: the record itself, its locks and its damage (test_rundir), and which shards are read (test_checkpoint).
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamda
from streamda import products, rundir, setup, solve_stage
from streamda.errors import ConfigError, MismatchError
from tests.killed import run_until, weights
from tests.models import SMALL, make_samples, run_options, write_inputs, write_samples

NUM_BLOCKS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and samples, which tests leave as it is."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), num_hidden_layers=NUM_BLOCKS)


@pytest.fixture
def options(inputs: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(**given: Any) -> dict[str, Any]:
        # on disk, so that a run can be killed between a block's statistics and its solution
        return SMALL | run_options(inputs, output_dir=str(tmp_path / "adapter"), spill_statistics=True) | given

    return make


@pytest.fixture
def interrupted(options: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Options of a run that was killed when its last block's statistics were just committed."""
    assert run_until("unit-committed:7", options()) == -signal.SIGKILL
    units = Path(options()["output_dir"] + ".work") / "units"
    assert [path.name for path in units.glob("stats-*") if "." not in path.name] == [f"stats-{NUM_BLOCKS - 1:04d}"]
    assert not list(units.glob("solve-*"))
    return options


def copied_model(inputs: Path, folder: Path) -> Path:
    return Path(shutil.copytree(inputs / "model", folder))


def record(tmp_path: Path) -> bytes:
    return (tmp_path / "adapter.work" / "run.json").read_bytes()


def test_each_part_is_refused_by_name_with_both_values_and_the_run_is_left_alone(
    inputs: Path, tmp_path: Path, interrupted: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = record(tmp_path)

    def refusal(**given: Any) -> str:
        with pytest.raises(MismatchError) as caught:
            streamda.initialize(**interrupted(**given))
        assert caught.value.exit_code == 5
        assert len(str(caught.value).splitlines()) == 1
        assert record(tmp_path) == before
        return str(caught.value)

    assert 'method.token_mask was "attention" and is now "labels"' in refusal(token_mask="labels")
    assert 'method.dtype was "float32" and is now "bfloat16"' in refusal(dtype="bfloat16")
    assert 'method.statistics_codec was "none" and is now "zstd"' in refusal(statistics_codec="zstd")
    assert re.search(
        r'method\.modules was \["model.*down_proj"\] and is now \[.*up_proj"\]', refusal(target_modules="up_proj")
    )
    # the file may have any name, its tokens count
    other = write_samples(tmp_path / "other.jsonl", make_samples(seed=5))
    assert "data.tokens was" in refusal(dataset=str(other))
    fewer = write_samples(tmp_path / "fewer.jsonl", make_samples()[:3])
    assert "data.num_samples was 5 and is now 3" in refusal(dataset=str(fewer))
    assert "data.tokens was" in refusal(max_length=8)
    # another model of the same shapes, different in one tensor in the middle of a file only
    model = copied_model(inputs, tmp_path / "tuned")
    shard = sorted(model.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name] = tensors[name] + 0.25
    save_file(tensors, shard, {"format": "pt"})
    assert f"model.shards.{shard.name} was" in refusal(model=str(model))
    version = setup.STATISTICS_VERSION
    monkeypatch.setattr(setup, "STATISTICS_VERSION", 0)
    assert f"method.version was {version} and is now 0" in refusal()


def test_the_environment_is_refused_unless_its_change_is_accepted(
    tmp_path: Path, interrupted: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = setup.versions
    monkeypatch.setattr(setup, "versions", lambda: real() | {"torch": "9.9", "peft": "0.0"})
    with pytest.raises(
        MismatchError, match=r'numerics\.torch was ".*" and is now "9\.9"; .*--allow-environment-change'
    ) as caught:
        streamda.initialize(**interrupted())
    assert "peft" not in str(caught.value)  # it decides no number
    with monkeypatch.context() as patch:
        other = products.PLAIN if products.cpu_products() != products.PLAIN else products.MKL_BY_COLUMNS
        patch.setattr(products, "cpu_products", lambda: other)
        with pytest.raises(MismatchError, match=r"numerics\.products was "):
            streamda.initialize(**interrupted())
    with pytest.raises(MismatchError, match=r"method\.token_mask") as caught:
        streamda.initialize(**interrupted(allow_environment_change=True, token_mask="labels"))
    assert "torch" not in str(caught.value)
    report = streamda.initialize(**interrupted(allow_environment_change=True))
    assert report.resumed
    assert any("environment has changed" in notice and "9.9" in notice for notice in report.notices)
    # what is finished stands, whatever is installed now
    assert streamda.initialize(**interrupted()).already_done
    monkeypatch.undo()
    assert streamda.initialize(**interrupted()).already_done


def test_the_environment_names_what_decides_the_last_bits(
    tmp_path: Path, interrupted: Callable[..., dict[str, Any]]
) -> None:
    parts = json.loads(record(tmp_path))["parts"]
    assert set(parts) == {"model", "data", "method", "numerics"}
    libraries = {"torch", "transformers", "numpy", "zarr", "numcodecs"}
    assert set(parts["numerics"]) == libraries | {"device", "threads", "products"}
    assert parts["numerics"]["threads"] == torch.get_num_threads()
    assert parts["numerics"]["products"] == products.product_library(torch.device("cpu"))
    # all else in the method would force a new collection for nothing
    assert set(parts["method"]) == {"version", "modules", "token_mask", "dtype", "statistics_codec"}


SOLVE_ONLY: list[dict[str, Any]] = [
    {"rank": 3, "lora_alpha": 8, "rslora": False, "population_size": 77, "variance_weight": 0.5, "bias_weight": 0.5},
    {"gamma": 8, "a_norm": 1, "damping": 1e-4, "output_damping_ratio": 0.1, "normalize": False, "seed": 3},
    {"use_fisher": False, "variance_weight": 0, "balance": True},
]


def test_settings_of_the_solver_never_force_a_new_collection(
    tmp_path: Path, options: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = options(keep_statistics=True)
    streamda.initialize(**first)
    work = tmp_path / "adapter.work"
    stats = {path.name: path.stat().st_ino for path in (work / "units").glob("stats-*")}
    assert len(stats) == NUM_BLOCKS
    for number, given in enumerate(SOLVE_ONLY):
        output = tmp_path / f"adapter{number}"
        report = streamda.initialize(**(first | given | {"output_dir": str(output), "work_dir": str(work)}))
        assert report.resumed
        assert report.bytes["weights_read"] == 0, given
    assert {path.name: path.stat().st_ino for path in (work / "units").glob("stats-*")} == stats
    # a newer solver solves again what an older one solved
    same = options(output_dir=str(tmp_path / "newer"), work_dir=str(work))
    monkeypatch.setattr(solve_stage, "SOLVER_VERSION", solve_stage.SOLVER_VERSION + 1)
    solved = {path.name: path.stat().st_ctime_ns for path in (work / "units").glob("solve-*")}  # inodes come back
    assert streamda.initialize(**same).bytes["weights_read"] == 0
    after = {path.name: path.stat().st_ctime_ns for path in (work / "units").glob("solve-*")}
    assert not solved.items() & after.items()


def test_a_solved_block_without_its_statistics_names_the_settings_that_differ(
    tmp_path: Path, options: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_until("unit-committed:11", options()) == -signal.SIGKILL
    units = tmp_path / "adapter.work" / "units"
    assert (units / f"solve-{NUM_BLOCKS - 1:04d}").is_dir()
    assert not list(units.glob(f"stats-{NUM_BLOCKS - 1:04d}"))
    with pytest.raises(MismatchError, match=r"damping was 1e-06 and is now 0\.01, rank was 2 and is now 3") as caught:
        streamda.initialize(**options(rank=3, damping=0.01))
    assert "the options of the interrupted run" in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(solve_stage, "SOLVER_VERSION", solve_stage.SOLVER_VERSION + 1)
        with pytest.raises(MismatchError, match="by another version of streamda") as caught:
            streamda.initialize(**options())
    assert "the options of" not in str(caught.value)
    assert streamda.initialize(**options()).resumed


IRRELEVANT: list[dict[str, Any]] = [
    {
        "max_gpu_mem": "700MB",
        "max_host_mem": "1MB",
        "max_disk": "1GB",
        "population_size": 5,
    },  # what the data say anyway
    {"micro_batch_tokens": "16", "profile": True, "rates": "flops=1e9,flops64=1e9,read=1e9,write=1e9"},
]


def test_settings_that_change_no_number_continue_to_the_same_bits(
    tmp_path: Path, interrupted: Callable[..., dict[str, Any]]
) -> None:
    saved = tmp_path / "saved"
    shutil.copytree(tmp_path / "adapter.work", saved)
    streamda.initialize(**interrupted())
    expected = weights(tmp_path)
    for given in IRRELEVANT:
        shutil.rmtree(tmp_path / "adapter")
        shutil.rmtree(tmp_path / "adapter.work", ignore_errors=True)
        shutil.copytree(saved, tmp_path / "adapter.work")
        report = streamda.initialize(**interrupted(**given))
        assert report.resumed, given
        assert weights(tmp_path) == expected, given
        said = [notice for notice in report.notices if "per micro-batch, as it was begun" in notice]
        assert bool(said) == ("micro_batch_tokens" in given)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"thesis.txt": b"years of work"}, ConfigError),
        ({"run.json": b'{"format": "another-tool"}', "units/x": b""}, MismatchError),
        ({"run.json": b'{"format": "streamda-run", "version": 99}', "units/x": b""}, MismatchError),
        ({"run.json": b'{"epochs": 3}'}, ConfigError),
    ],
    ids=["foreign files", "another tool", "a newer format", "a foreign run.json"],
)
def test_what_is_not_a_run_of_ours_is_refused_everywhere_and_left_untouched(
    tmp_path: Path, options: Callable[..., dict[str, Any]], content: dict[str, bytes], error: type[Exception]
) -> None:
    place = tmp_path / "place"
    for name, data in content.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    before = {path: path.stat().st_mtime_ns for path in [place, *place.rglob("*")]}
    # a model that is not there: refused before anything is looked for
    base = options(model=str(tmp_path / "no model"))
    collected = {name: value for name, value in base.items() if name != "output_dir"}
    attempts: list[Callable[[], Any]] = [
        lambda: streamda.initialize(**(base | {"work_dir": str(place)})),
        lambda: streamda.initialize(**(base | {"work_dir": str(place), "overwrite": True})),
        lambda: streamda.collect(**collected, statistics=str(place)),
        lambda: streamda.solve(statistics=str(place), output_dir=str(tmp_path / "out")),
        lambda: rundir.RunDirectory.open_existing(place, exclusive=False),
    ]
    for attempt in attempts:
        with pytest.raises((error, ConfigError)):
            attempt()
        assert {path: path.stat().st_mtime_ns for path in [place, *place.rglob("*")]} == before
