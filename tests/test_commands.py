"""The command that a run keeps says the same options, whatever they are."""

import random
import shlex
from pathlib import Path
from typing import Any

import pytest

from streamda import cli, commands
from streamda.config import RunConfig
from streamda.report import InitReport
from tests.command_line import run

VALUES: dict[str, list[Any]] = {
    "model": ["org/model", "./a b/c'd", "-x"],
    "output_dir": ["out", "--out"],
    "dataset": ["rows.jsonl", "$HOME/`x`.jsonl"],
    "template": ["Q: {question}\\nA: ", "\n{a}"],
    "prompt_column": ["-"],
    "num_samples": [1, 4096],
    "max_gpu_mem": ["24GB"],
    "rank": [1, 64],
    "lora_alpha": [0.1 + 0.2, 32.0, 1e-6, 123456789.123],
    "variance_weight": [1e-30, 0.5],
    "damping": [1e-7, 1e12],
    "a_norm": [None, 1.0],
    "rslora": [False],
    "normalize": [False],
    "balance": [False],
    "resume": [False],
    "overwrite": [True],
    "work_dir": ["w"],
    "allow_environment_change": [True],
    "unsafe_filesystem": [True],
    "profile": [True],
    "keep_statistics": [True],
    "skip_bad_samples": [True],
    "target_modules": ["q_proj,v_proj", r".*\.(q|k)_proj"],
}


@pytest.mark.parametrize("seed", range(20))
def test_the_command_read_again_gives_the_options_that_it_was_made_from(
    seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(seed)
    chosen = {name: chance.choice(values) for name, values in VALUES.items() if chance.random() < 0.7}
    config = RunConfig.from_options(chosen)
    assert RunConfig.from_options(config.given()) == config
    # what would begin anew is no part of what continues
    options = config.given()
    continued = {name: value for name, value in options.items() if name not in ("resume", "overwrite")}
    command = commands.continuing(commands.record("init", options, Path("w")), Path("w"))
    assert command is not None
    seen: list[RunConfig] = []

    def initialize(given: RunConfig, **_: Any) -> InitReport:
        seen.append(given)
        return InitReport()

    monkeypatch.setattr(cli.pipeline, "initialize", initialize)
    assert run(monkeypatch, *shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert seen == [RunConfig.from_options(continued)]


def test_no_command_is_made_up() -> None:
    assert commands.continuing({}, Path("s")) is commands.collecting({}, Path("s")) is None
    assert commands.completing({}, Path("s")) == "the same command as before"
    assert commands.completing({"finished": True}, Path("s")) == "the same `streamda collect` as before"


def test_an_overwriting_is_told_only_until_it_is_done() -> None:
    settings = commands.record("init", {"model": "m", "overwrite": True, "resume": False}, Path("w"))
    assert commands.continuing(settings, Path("w")) == "streamda init --model m"
    assert commands.continuing({**settings, "overwriting": "mark"}, Path("w")) == "streamda init --model m --overwrite"
    assert (
        commands.collecting({**settings, "overwriting": "mark"}, Path("s"))
        == "streamda collect --model m --statistics s"
    )


def test_statistics_are_collected_by_what_init_was_given_but_for_what_collect_does_not_take() -> None:
    config = RunConfig(model="m", output_dir="out", max_gpu_mem="1GB", keep_statistics=True, profile=True)
    found = commands.collecting(commands.record("init", config.given(), Path("w")), Path("out.work"))
    assert found == "streamda collect --model m --statistics out.work --max-gpu-mem 1GB"


def test_a_folder_by_another_name_and_samples_left_out_are_in_what_continues() -> None:
    settings = commands.record("init", {"model": "m"}, Path("a/m-lora-da.work"))
    assert commands.continuing(settings, Path("b/m-lora-da.work")) == "streamda init --model m"
    moved = commands.continuing({**settings, "skipped_samples": [{"sample": 0}]}, Path("b/moved"))
    assert moved == "streamda init --model m --work-dir b/moved --skip-bad-samples"


def test_what_the_command_does_not_take_or_know_is_not_in_it() -> None:
    options = {"model": "m", "statistics": "s", "of_another_version": 1}
    assert commands.continuing(commands.record("init", options, Path("w")), Path("w")) == "streamda init --model m"
    collect = commands.record("collect", options, Path("s"))
    assert commands.continuing(collect, Path("s")) == "streamda collect --model m --statistics s"
