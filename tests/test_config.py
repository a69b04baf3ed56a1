"""Configuration: legal by construction, and every refusal names the option, its value and what is allowed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda.config import PRESETS, CollectConfig, DataConfig, RunConfig, SolveConfig, option_fields
from streamda.errors import ConfigError

PUBLISHED: dict[str, Any] = {
    # of the experiments in arXiv 2510.24561, and of the command line as it was specified
    "rank": 8,
    "lora_alpha": 16.0,
    "rslora": True,
    "variance_weight": 0.03,
    "bias_weight": 1.0,
    "gamma": 1024.0,
    "a_norm": None,
    "damping": 1e-6,
    "output_damping_ratio": None,
    "normalize": True,
    "balance": False,
    "num_samples": 256,
    "max_length": 1024,
    "token_mask": "attention",
    "target_modules": "all-linear",
    "split": "train",
    "seed": 0,
}

ILLEGAL: dict[str, list[Any]] = {
    "num_samples": [0, -1, 4097],
    "max_length": [1, 0, 10**10],
    "skip_bad_lines": [-1, 10**10],
    "seed": [-1, 2**63],
    "target_modules": ["", "  "],
    "token_mask": ["all", ""],
    "dtype": ["float16", "fp32"],
    "micro_batch_tokens": ["0", "-3", "many", "1.5", "\u00b2", "\u0663"],
    "statistics_codec": ["gzip", ""],
    "rank": [0, -8, 10**10],
    "lora_alpha": [0.0, -1.0, 1e-320, 1e300, math.nan, math.inf],
    "variance_weight": [-0.1, math.nan, math.inf],
    "bias_weight": [-1.0, math.nan],
    "gamma": [0.0, -1.0, math.inf],
    "a_norm": [0.0, -0.5, math.nan],
    "damping": [0.0, -1e-6, math.nan],
    "output_damping_ratio": [0.0, -1.0, math.inf],
    "population_size": [0, -5, 10**16],
    "model": ["", " "],
    "output_dir": ["", "\udcff"],
    "device": ["cuda:1000", "gpu", "cuda:", "cuda:x", "CPU", ""],
}

WRONG_TYPE: dict[str, list[Any]] = {
    "rank": ["8", 8.0, True, None, [8]],
    "rslora": [1, "yes", None],
    "gamma": ["much", None, False, [1.0]],
    "dataset": [1.5, ["a"], True],
    "split": [None, {"train": 1}],
    "population_size": [1e4, "10", True],
}


def flat(config: RunConfig) -> dict[str, Any]:
    """All options of a configuration by name, whichever stage they belong to."""
    values = {name: getattr(config, name) for name in ("model", "device", "max_gpu_mem", "keep_statistics", "resume")}
    for stage in (config.data, config.collect, config.solve):
        values |= dataclasses.asdict(stage)
    return values


def test_the_defaults_are_those_of_the_published_experiments() -> None:
    values = flat(RunConfig())
    assert {name: values[name] for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ILLEGAL.items() for value in values])
def test_an_illegal_value_is_refused_by_name_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_options({name: value})
    message = str(caught.value)
    assert name in message
    assert repr(value) in message
    assert "allowed is" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_TYPE.items() for value in values])
def test_a_value_of_the_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is .*; expected "):
        RunConfig.from_options({name: value})


@pytest.mark.parametrize("name", ["gamma", "damping", "variance_weight"])
@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["huge", "minus huge"])
def test_an_integer_that_is_no_float_is_refused_like_any_other_value(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is "):
        RunConfig.from_options({name: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variance_weight": 0.0, "bias_weight": 0.0}, "variance_weight and bias_weight are both 0"),
        ({"balance": True, "a_norm": 0.5}, "balance and a_norm"),
        ({"use_fisher": False}, "--variance-weight 0"),
        ({"text_column": "t", "prompt_column": "p"}, "text_column excludes"),
        ({"text_column": "t", "completion_column": "c"}, "text_column excludes"),
        ({"text_column": "t", "template": "{a}"}, "text_column excludes"),
        ({"preset": "best"}, "released, theorem"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig.from_options(options)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("rnak", "rank"),
        ("max_gpu_memory", "max_gpu_mem"),
        ("varianceweight", "variance_weight"),
        ("Damping", "damping"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_nearest_one(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{wrong}'; did you mean '{right}'"):
        RunConfig.from_options({wrong: 1})


def test_an_option_like_no_other_is_refused_without_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"^unknown option 'zzzzzz'$"):
        RunConfig.from_options({"zzzzzz": 1})


@pytest.mark.parametrize(
    ("name", "given_value", "kept"),
    [
        ("damping", "1e-6", 1e-6),  # YAML 1.1 reads 1e-6 as text
        ("gamma", 16, 16.0),
        ("a_norm", None, None),
        ("output_damping_ratio", "0.1", 0.1),
        ("micro_batch_tokens", 512, "512"),
        ("revision", 1234567, "1234567"),
        ("model", Path("a/b"), "a/b"),
        ("max_gpu_mem", 24_000_000_000, "24000000000"),
        ("target_modules", ["q_proj", "v_proj"], "q_proj,v_proj"),
        ("target_modules", ("q_proj",), "q_proj"),
    ],
)
def test_what_yaml_and_python_naturally_give_is_accepted(name: str, given_value: Any, kept: Any) -> None:
    config = RunConfig.from_options({name: given_value})
    value = (flat(config) | dataclasses.asdict(config))[name]
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("released", {}),
        ("theorem", {"normalize": False, "variance_weight": 1.0, "gamma": 1.0}),
        ("without-variance", {"variance_weight": 0.0}),
        ("without-bias", {"bias_weight": 0.0}),
        ("without-fisher", {"variance_weight": 0.0, "use_fisher": False}),
    ],
)
def test_a_preset_sets_what_the_paper_says_and_nothing_else(preset: str, expected: dict[str, Any]) -> None:
    assert preset in PRESETS
    assert flat(RunConfig.from_options({"preset": preset})) == flat(RunConfig()) | expected


def test_an_option_beside_a_preset_wins() -> None:
    config = RunConfig.from_options({"preset": "theorem", "gamma": 7.0})
    assert (config.solve.gamma, config.solve.normalize, config.solve.variance_weight) == (7.0, False, 1.0)


def test_every_option_has_a_name_of_its_own_and_a_sentence_of_help() -> None:
    names = [entry.name for _, entry in option_fields()]
    assert len(names) == len(set(names)) > 30
    for _, entry in option_fields():
        assert len(entry.metadata["help"]) > 10
        assert entry.metadata["help"].endswith(".")
        assert entry.name not in ("data", "collect", "solve", "preset")


def test_no_stage_can_be_changed_after_it_was_checked() -> None:
    for stage, name in (
        (DataConfig(), "seed"),
        (CollectConfig(), "dtype"),
        (SolveConfig(), "rank"),
        (RunConfig(), "device"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(stage, name, 1)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    rank=st.integers(1, 512),
    alpha=st.floats(1e-3, 1e3),
    damping=st.floats(1e-12, 1.0),
    samples=st.integers(1, 4096),
    modules=st.sampled_from(["all-linear", "q_proj,v_proj", r".*\.mlp\..*"]),
)
def test_the_nested_form_is_json_and_comes_back_equal(
    rank: int, alpha: float, damping: float, samples: int, modules: str
) -> None:
    options = {
        "rank": rank,
        "lora_alpha": alpha,
        "damping": damping,
        "num_samples": samples,
        "target_modules": modules,
    }
    config = RunConfig.from_options(options)
    plain = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    stages = {"data": plain.pop("data"), "collect": plain.pop("collect"), "solve": plain.pop("solve")}
    again = RunConfig.from_options(plain | stages["data"] | stages["collect"] | stages["solve"])
    assert again == config


@pytest.mark.parametrize(("rank", "alpha"), [(8, 16.0), (1, 3.0), (64, 16.0)])
def test_the_scaling_is_peft_s(rank: int, alpha: float) -> None:
    """PEFT computes lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    for rslora in (True, False):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        lora = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"])
        expected = inject_adapter_in_model(lora, model)[0].scaling["default"]
        assert math.isclose(SolveConfig(rank=rank, lora_alpha=alpha, rslora=rslora).scaling, expected, rel_tol=1e-12)
