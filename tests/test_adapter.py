"""An adapter folder against PEFT on the real base model, and against every way of not being allowed to write it.

The logits and merged weights that PEFT gives are compared with s B A added to the weights by hand. Crashes are tested
by killing a process between two renames. Power loss is not tested here: files.py has its own tests.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from streamda import files
from streamda.adapter import (
    OWN_FILES,
    AdapterFacts,
    peft_config,
    relative_change,
    require_writable_output,
    write_adapter,
)
from streamda.adapter_check import check_adapter
from streamda.config import SolveConfig
from streamda.errors import ConfigError, DamagedError, NumericalError, StorageError
from streamda.layers import is_linear, linear_spec
from streamda.model_card import model_card
from streamda.output import OutputFolder, resolved
from streamda.trace import PROFILE_FILES, write_profile

Factors = dict[str, tuple[Tensor, Tensor]]

LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=12,  # layers 1 and 10, 11: endings that a careless match confuses
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GPT2 = GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
CONFIGS = {"llama": LLAMA, "gpt2": GPT2}
TOKENS = torch.arange(2 * 9).reshape(2, 9) * 7 % 61

CASES = {
    # name: (model, pattern of the adapted modules, target_modules expected)
    "llama-all-linear": (
        "llama",
        r"layers.*_proj$",
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    ),
    "llama-attention": ("llama", r"self_attn", ["k_proj", "o_proj", "q_proj", "v_proj"]),
    "llama-one-layer": (
        "llama",
        r"layers\.1\.mlp",
        [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")],
    ),
    "llama-one-module": ("llama", r"layers\.10\.self_attn\.q_proj", ["model.layers.10.self_attn.q_proj"]),
    "llama-all-blocks-but-one": ("llama", r"layers\.(?!3\.).*_proj$", None),  # above PEFT's own shortening
    "gpt2-all-linear": ("gpt2", r"\.h\.", ["c_attn", "c_fc", "c_proj"]),
    "gpt2-attention": ("gpt2", r"\.attn\.", ["attn.c_attn", "attn.c_proj"]),  # mlp has a c_proj too
    "gpt2-one-layer": ("gpt2", r"\.h\.1\.attn\.", ["transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"]),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the base models, with random weights large enough that an adapter shows in the logits."""
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.2)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache  # no test changes it, and one sees to it
def skeleton_of(name: str) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def facts_of(base: str = "some-org/some-model", **solve: Any) -> AdapterFacts:
    return AdapterFacts(
        base_model=base,
        revision=None,
        dataset="my-task.jsonl",
        num_samples=256,
        is_shipped_data=False,
        solve=SolveConfig(rank=4, **solve),
        version="1.2.3",
        step_zero_change={},
    )


def random_factors(model: PreTrainedModel, pattern: str, rank: int = 4, seed: int = 1) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.named_modules():
        if is_linear(module) and re.search(pattern, name):
            spec = linear_spec(name, module)
            factors[name] = (
                torch.randn(rank, spec.d_in, generator=generator) / 8,
                torch.randn(spec.d_out, rank, generator=generator) / 8,
            )
    assert factors
    return factors


def changed_by_hand(model: PreTrainedModel, factors: Factors, scaling: float) -> PreTrainedModel:
    """The oracle: the base model with s B A added to its weights, in each layer's own orientation."""
    model = copy.deepcopy(model)
    for name, (lora_a, lora_b) in factors.items():
        module = model.get_submodule(name)
        delta_oi = (scaling * lora_b.double() @ lora_a.double()).float()
        module.weight.data += delta_oi.T if linear_spec(name, module).transposed else delta_oi
    return model


def write(folder: Path, model: str = "llama", pattern: str = "self_attn", seed: int = 1, **options: Any) -> Factors:
    skeleton = skeleton_of(model)
    factors = random_factors(skeleton, pattern, seed=seed)
    write_adapter(folder, factors, facts_of(), skeleton, **options)
    return factors


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_the_unmodified_base_with_the_adapter_is_the_base_with_s_b_a_added(
    case: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    name, pattern, targets = CASES[case]
    skeleton, base = skeleton_of(name), load(bases[name])
    factors = random_factors(skeleton, pattern)
    write_adapter(tmp_path / "out", factors, facts_of(str(bases[name])), skeleton)
    expected = changed_by_hand(base, factors, scaling=16 / math.sqrt(4))

    with torch.no_grad():
        untouched = base(TOKENS).logits
        wanted = expected(TOKENS).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "out")
        actual = loaded(TOKENS).logits
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)
    assert (actual - untouched).abs().max() > 0.1  # the adapter did something
    assert set(loaded.base_model.targeted_module_names) == set(factors)

    merged = loaded.merge_and_unload().state_dict()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(merged[key], value, atol=1e-5, rtol=1e-5)
    if targets is not None:
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == targets


@pytest.mark.parametrize(("rslora", "scaling"), [(True, 24 / math.sqrt(4)), (False, 24 / 4)])
def test_peft_scales_as_the_configuration_says(
    rslora: bool, scaling: float, bases: dict[str, Path], tmp_path: Path
) -> None:
    skeleton, base = skeleton_of("llama"), load(bases["llama"])
    factors = random_factors(skeleton, "down_proj")
    facts = facts_of(rslora=rslora, lora_alpha=24.0)
    write_adapter(tmp_path / "out", factors, facts, skeleton)
    expected = changed_by_hand(base, factors, scaling)
    assert facts.scaling == scaling
    with torch.no_grad():
        actual = PeftModel.from_pretrained(base, tmp_path / "out")(TOKENS).logits
        torch.testing.assert_close(actual, expected(TOKENS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_starts_from_these_factors_and_reaches_both(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    factors = write(tmp_path / "out", name, r"_proj|c_attn")
    model = PeftModel.from_pretrained(load(bases[name]), tmp_path / "out", is_trainable=True)
    model(TOKENS, labels=TOKENS).loss.backward()
    trainable = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert len(trainable) == 2 * len(factors)
    for module, pair in factors.items():
        for letter, factor in zip("AB", pair, strict=True):
            parameter = trainable[f"base_model.model.{module}.lora_{letter}.default.weight"]
            assert torch.equal(parameter, factor)
            assert parameter.grad.abs().max() > 0


def test_the_files_are_what_peft_itself_would_write(bases: dict[str, Path], tmp_path: Path) -> None:
    factors = write(tmp_path / "out")
    PeftModel.from_pretrained(load(bases["llama"]), tmp_path / "out", is_trainable=True).save_pretrained(
        tmp_path / "peft", save_embedding_layers=False
    )
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == torch.float32 for key in ours)
    assert len(ours) == 2 * len(factors)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("out", "peft")]
    for config in configs:
        config["target_modules"].sort()
        # what PEFT says beside about where an adapter comes from: class of the base, and training or not
        del config["auto_mapping"], config["inference_mode"]
    assert configs[0] == configs[1]
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "streamda": "1.2.3"}


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one", report=lambda _written: "{}")
    write(tmp_path / "two", report=lambda _written: "{}")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == set(OWN_FILES)


def test_neither_the_skeleton_nor_a_loaded_model_is_changed(bases: dict[str, Path], tmp_path: Path) -> None:
    skeleton, base = skeleton_of("llama"), load(bases["llama"])
    before = {name: type(module) for name, module in skeleton.named_modules()}
    state = {key: (value, value.clone()) for key, value in base.state_dict().items()}
    factors = random_factors(skeleton, "mlp")
    write_adapter(tmp_path / "out", factors, facts_of(), skeleton)
    check_adapter(tmp_path / "out", base)
    assert {name: type(module) for name, module in skeleton.named_modules()} == before
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for key, value in base.state_dict().items():
        assert value.data_ptr() == state[key][0].data_ptr()
        assert torch.equal(value, state[key][1])


@pytest.mark.parametrize("name", CONFIGS)
def test_writing_is_silent_and_offline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write(tmp_path / "out", name, r"attn")  # the base's id is one on the hub; warnings are errors in this suite
    assert capfd.readouterr() == ("", "")


def test_a_mapping_that_reads_lazily_is_asked_once_per_module(tmp_path: Path) -> None:
    asked: list[str] = []

    class Lazy(dict[str, tuple[Tensor, Tensor]]):
        def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
            asked.append(name)
            return super().__getitem__(name)

    skeleton = skeleton_of("llama")
    factors = Lazy(random_factors(skeleton, "q_proj"))
    write_adapter(tmp_path / "out", factors, facts_of(), skeleton)
    assert asked == list(factors)


def test_factors_of_any_layout_and_dtype_are_stored_as_contiguous_float32(tmp_path: Path) -> None:
    skeleton = skeleton_of("llama")
    factors = {
        name: (lora_a.T.contiguous().T.double(), lora_b.bfloat16().requires_grad_())
        for name, (lora_a, lora_b) in random_factors(skeleton, "v_proj").items()
    }
    write_adapter(tmp_path / "out", factors, facts_of(), skeleton)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, (lora_a, lora_b) in factors.items():
        assert torch.equal(stored[f"base_model.model.{name}.lora_A.weight"], lora_a.float())
        assert torch.equal(stored[f"base_model.model.{name}.lora_B.weight"], lora_b.float())


def test_relative_change_is_the_dense_norm() -> None:
    torch.manual_seed(0)
    lora_a, lora_b, weight = torch.randn(4, 33), torch.randn(57, 4), torch.randn(57, 33)
    expected = torch.linalg.norm(8 * lora_b.double() @ lora_a.double()) / torch.linalg.norm(weight.double())
    actual = relative_change(lora_a, lora_b, 8.0, torch.linalg.norm(weight.double()).item())
    assert actual == pytest.approx(expected.item(), rel=1e-12)
    assert relative_change(lora_a, 0 * lora_b, 8.0, 1.0) == 0
    assert relative_change(lora_a, 0 * lora_b, 8.0, 0.0) == 0
    assert relative_change(lora_a, lora_b, 8.0, 0.0) == math.inf
    assert relative_change(1e-18 * lora_a, 1e-18 * lora_b, 1.0, 1.0) > 0  # float32 squares would underflow


def test_a_target_whose_full_name_is_another_ones_ending_is_refused() -> None:
    skeleton = copy.deepcopy(skeleton_of("llama"))
    skeleton.extra = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(4, 4)})
    with pytest.raises(ConfigError, match="PEFT cannot adapt lm_head alone"):
        peft_config(facts_of(), ["lm_head"], skeleton)


def damage_key(tensors: dict[str, Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


def damage_missing(tensors: dict[str, Tensor]) -> None:
    del tensors["base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"]


def damage_unexpected(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.3.mlp.up_proj.lora_B.weight"] = torch.zeros(48, 4)


def damage_shape(tensors: dict[str, Tensor]) -> None:
    key = "base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"
    tensors[key] = tensors[key].T.contiguous()


def damage_value(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"][0, 0] = math.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_key, "lacks|holds"),
        (damage_missing, r"lacks .*layers\.3\.self_attn\.q_proj\.lora_B.*which adapter_config\.json asks for"),
        (damage_unexpected, r"holds .*layers\.3\.mlp\.up_proj\.lora_B.*does not use"),
        (damage_shape, r"does not fit the model: size mismatch for .*layers\.3\.self_attn\.q_proj\.lora_B"),
        (damage_value, r"layers\.3\.self_attn\.q_proj\.lora_B\.weight is not finite"),
    ],
)
def test_wrong_tensors_are_damage_named(damage: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "out")
    check_adapter(tmp_path / "out", skeleton_of("llama"))
    weights = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(weights)
    damage(tensors)
    save_file(tensors, weights)
    with pytest.raises(DamagedError, match=message):
        check_adapter(tmp_path / "out", skeleton_of("llama"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is not the configuration of a LoRA adapter"),
        ({"r": 8}, "does not fit the model"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "holds .*o_proj"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}, "lacks .*up_proj"),
        ({"target_modules": ["nonsense"]}, "PEFT refuses"),
        ({"target_modules": ["self_attn"]}, "PEFT refuses"),
        ({"task_type": "NONSENSE"}, "PEFT refuses"),
    ],
)
def test_a_wrong_configuration_is_damage(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "out")
    edit_config(tmp_path / "out", **changes)
    with pytest.raises(DamagedError, match=message):
        check_adapter(tmp_path / "out", skeleton_of("llama"))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_lost_or_truncated_file_is_damage(name: str, tmp_path: Path) -> None:
    write(tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:-1] if name.endswith("s") else b"{")
    with pytest.raises(DamagedError, match=name):
        check_adapter(tmp_path / "out", skeleton_of("llama"))
    path.unlink()
    with pytest.raises(DamagedError, match=f"{name}.* cannot be read"):
        check_adapter(tmp_path / "out", skeleton_of("llama"))


def test_another_model_of_other_sizes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(DamagedError, match="PEFT refuses"):
        check_adapter(tmp_path / "out", skeleton_of("gpt2"))


def test_factors_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    skeleton = skeleton_of("llama")
    good = random_factors(skeleton, "q_proj")
    first = next(iter(good))
    lora_a, lora_b = good[first]
    for bad, kind, message in (
        ({first: (lora_a.clone().fill_(math.nan), lora_b)}, NumericalError, f"{first} is not finite"),
        ({first: (lora_a, lora_b.double() * 1e300)}, NumericalError, "not finite in float32"),
        ({first: (lora_a.T, lora_b)}, ValueError, r"is \[32, 4\], not \[4, 32\]"),
        ({"model.layers.0.input_layernorm": (lora_a, lora_b)}, ValueError, "not linear layers .*input_layernorm"),
        ({"no.such.module": (lora_a, lora_b)}, ValueError, "not linear layers of this model: no.such.module"),
        ({}, ValueError, "no module is adapted"),
    ):
        with pytest.raises(kind, match=message):
            write_adapter(tmp_path / "out", bad, facts_of(), skeleton)
    assert list(tmp_path.iterdir()) == []


def test_parents_are_made_and_an_empty_folder_is_filled(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "out"
    require_writable_output(folder, overwrite=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    folder.mkdir()
    require_writable_output(folder, overwrite=False)
    write(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_an_existing_adapter_needs_overwrite_and_is_then_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", report=lambda _written: "{}")
    old = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"is not empty; .*--overwrite"):
        require_writable_output(tmp_path / "out", overwrite=False)
    with pytest.raises(ConfigError, match=r"is not empty; .*--overwrite"):
        write(tmp_path / "out", seed=2)
    assert contents(tmp_path / "out") == old
    require_writable_output(tmp_path / "out", overwrite=True)
    write(tmp_path / "out", seed=2, overwrite=True)
    new = contents(tmp_path / "out")
    assert new.keys() == old.keys() - {"streamda_report.json"}
    assert new["adapter_model.safetensors"] != old["adapter_model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_removes_what_is_not_ours(tmp_path: Path) -> None:
    def refuses(folder: Path, message: str) -> None:
        before = sorted(os.walk(folder))
        for attempt in (
            lambda: require_writable_output(folder, overwrite=True),
            lambda: write(folder, seed=2, overwrite=True),
        ):
            with pytest.raises(ConfigError, match=message):
                attempt()
        assert sorted(os.walk(folder)) == before
        assert {path.name for path in tmp_path.iterdir()} == existing

    write(tmp_path / "out")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("# my project\n")
    existing = {"out", "project"}
    refuses(tmp_path / "project", "holds README.md")

    for name in ("notes.txt", "line\nbreak", "adapter_model.bin"):
        (tmp_path / "out" / name).write_text("mine")
        refuses(tmp_path / "out", re.escape(f"holds {files.shown(name)}"))
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "checkpoint-1").mkdir()
    refuses(tmp_path / "out", "holds checkpoint-1")
    (tmp_path / "out" / "checkpoint-1").rmdir()
    (tmp_path / "out" / "streamda_report.json").symlink_to(tmp_path / "elsewhere")
    refuses(tmp_path / "out", "holds streamda_report.json")


def test_a_profile_goes_with_the_adapter_that_it_is_of_and_not_before(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out)
    write_profile(out, [], "a run")
    (out / "mine.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(ConfigError, match=r"holds mine\.txt"):
        require_writable_output(out, overwrite=True)
    assert contents(out) == before
    (out / "mine.txt").unlink()
    require_writable_output(out, overwrite=True)
    write(out, seed=2, overwrite=True)
    assert set(contents(out)) == set(before) - {"mine.txt", *PROFILE_FILES}


def test_overwrite_keeps_an_adapter_that_was_trained_in_the_same_folder(bases: dict[str, Path], tmp_path: Path) -> None:
    write(tmp_path / "out")
    model = PeftModel.from_pretrained(load(bases["llama"]), tmp_path / "out", is_trainable=True)
    model.save_pretrained(tmp_path / "out", save_embedding_layers=False)
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors, not written by streamda or changed since"):
        require_writable_output(tmp_path / "out", overwrite=True)


def test_a_foreign_file_that_appears_during_the_work_stops_the_replacement(tmp_path: Path) -> None:
    write(tmp_path / "out")
    skeleton = skeleton_of("llama")

    class Intruding(dict[str, tuple[Tensor, Tensor]]):
        def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
            (tmp_path / "out" / "mine.txt").write_text("mine")
            return super().__getitem__(name)

    with pytest.raises(ConfigError, match=r"holds mine\.txt"):
        write_adapter(
            tmp_path / "out",
            Intruding(random_factors(skeleton, "q_proj")),
            facts_of(),
            skeleton,
            overwrite=True,
        )
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_linked_output_folder_stays_a_link_to_the_new_adapter(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "out")  # dangling at first
    require_writable_output(link, overwrite=False)
    for seed in (1, 2):
        write(link, seed=seed, overwrite=True)
        assert link.is_symlink()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
        check_adapter(link, skeleton_of("llama"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StorageError, match="loop"):
        require_writable_output(tmp_path / "loop", overwrite=True)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"cannot write .*/file: Not a directory"):
        require_writable_output(tmp_path / "file", overwrite=True)
    with pytest.raises(StorageError, match="Not a directory"):
        require_writable_output(tmp_path / "file" / "out", overwrite=True)
    (tmp_path / "full").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "full")
    with pytest.raises(ConfigError, match="full is a mount point"):
        require_writable_output(tmp_path / "full", overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        require_writable_output(tmp_path / "out", overwrite=True)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_modes_obey_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_whichever_system_call_fails_the_old_adapter_or_the_new_one_is_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = skeleton_of("gpt2")
    old, new = (random_factors(skeleton, r"h\.1\.attn", seed=seed) for seed in (1, 2))
    folder = tmp_path / "out"
    write_adapter(folder, old, facts_of(), skeleton)
    before = contents(folder)
    write_adapter(tmp_path / "reference", new, facts_of(), skeleton)
    after = contents(tmp_path / "reference")
    for path in (tmp_path / "reference").iterdir():
        path.unlink()
    (tmp_path / "reference").rmdir()
    # reading back is tested above and is most of the time
    monkeypatch.setattr("streamda.adapter.check_adapter", lambda *_: None)

    class Failing(files.SystemCalls):
        """Fails the n-th of the calls that change the disk, once."""

        def __init__(self, fail_at: int) -> None:
            self.remaining = fail_at
            for name in ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "flock"):
                setattr(self, name, self._counted(getattr(os, name, None) or files.SystemCalls.flock))

        def _counted(self, call: Any) -> Any:
            def counted(*args: Any) -> Any:
                self.remaining -= 1
                if self.remaining == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return call(*args)

            return counted

    failures = 0
    for fail_at in range(1, 100):
        calls = Failing(fail_at)
        monkeypatch.setattr(files, "system_calls", calls)
        error = None
        try:
            write_adapter(folder, new, facts_of(), skeleton, overwrite=True)
        except StorageError as raised:
            error = raised
            failures += 1
            assert "No space left" in str(error)
        monkeypatch.setattr(files, "system_calls", files.SystemCalls())
        if calls.remaining > 0:
            break
        assert contents(folder) in (before, after)
        if error is None:
            assert contents(folder) == after
        require_writable_output(folder, overwrite=True)  # clears away what could not be removed
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        write_adapter(folder, old, facts_of(), skeleton, overwrite=True)
        assert contents(folder) == before
    assert error is None
    assert failures > 10
    assert contents(folder) == after


def killed_while_replacing(folder: Path, new: Path, point: str) -> int:
    """Exit status of a child that replaces ``folder`` by a copy of ``new`` and is killed at ``point``.

    A fork, because a fresh interpreter needs seconds to import torch; the child touches files only, never torch.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        os.environ["STREAMDA_KILL_AT"] = point
        with OutputFolder(resolved(folder), True, lambda _: True, OWN_FILES).building() as part:
            shutil.copytree(new, part, dirs_exist_ok=True)
    finally:
        os._exit(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # os.fork, Python 3.12
@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("output-built", {"out", "part"}),
        ("output-displaced", {"trash", "part"}),
        ("output-replaced", {"out", "trash"}),
    ],
)
def test_a_process_killed_while_replacing_leaves_an_adapter_that_the_next_run_finds(
    point: str, left: set[str], tmp_path: Path
) -> None:
    parent = tmp_path / "parent"
    folder = parent / "out"
    write(folder, "gpt2", r"h\.1\.attn", seed=1)
    write(tmp_path / "new", "gpt2", r"h\.1\.attn", seed=2)
    old, new = contents(folder), contents(tmp_path / "new")
    assert killed_while_replacing(folder, tmp_path / "new", point) == signal.SIGKILL
    assert {path.name.rsplit(".", 1)[-1] for path in parent.iterdir()} == left
    require_writable_output(folder, overwrite=True)
    assert [path.name for path in parent.iterdir()] == ["out"]
    assert contents(folder) == (new if point == "output-replaced" else old)
    write(folder, "gpt2", r"h\.1\.attn", seed=2, overwrite=True)
    assert [path.name for path in parent.iterdir()] == ["out"]
    assert contents(folder) == new


def test_the_work_of_a_living_process_beside_ours_is_left_alone(tmp_path: Path) -> None:
    skeleton = skeleton_of("llama")

    class Nested(dict[str, tuple[Tensor, Tensor]]):
        def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
            require_writable_output(tmp_path / "out", overwrite=False)  # another run that starts now
            return super().__getitem__(name)

    (tmp_path / "out.0123456z.part").mkdir()  # not a name of ours
    write_adapter(tmp_path / "out", Nested(random_factors(skeleton, r"\.1\.self")), facts_of(), skeleton)
    check_adapter(tmp_path / "out", skeleton)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.0123456z.part"}


def test_the_card_says_what_it_is_and_how_far_the_output_is_changed() -> None:
    changes = {f"model.layers.{index}.q_proj": 0.001 * (index + 1) for index in range(8)}
    facts = dataclasses.replace(facts_of(), step_zero_change=changes, revision="abc123")
    text = model_card(facts)
    assert text.startswith('---\nbase_model: "some-org/some-model"\nlibrary_name: peft\n')
    for part in (
        "not a trained adapter",
        "is_trainable=True",
        'revision="abc123"',
        "no** `peft_config`",
        "| minimum | 0.001 |",
        "| median | 0.0045 |",
        "| maximum | 0.008 |",
        "| `model.layers.3.q_proj` | 0.004 |",
        "| `--rank` | 4 |",
        "| `--variance-weight` | 0.03 |",
        "| `--normalize` | on |",
        "norm 0.03125 (1 / sqrt(gamma), the published choice)",
        "256 samples of my-task.jsonl",
    ):
        assert part in text
    assert "model.layers.2.q_proj" not in text  # the sixth largest
    assert "general set that ships" not in text
    assert "general set that ships" in model_card(dataclasses.replace(facts, is_shipped_data=True))
    assert "norm 0.5 (`--a-norm`)" in model_card(facts_of(a_norm=0.5))
    assert "split evenly" in model_card(facts_of(balance=True))


@pytest.mark.parametrize("base", ["/data/models/llama", "./llama", "llama", "a/b/c", "bad|name\n# x"])
def test_a_base_model_that_is_no_hub_id_stays_out_of_the_header(base: str) -> None:
    text = model_card(facts_of(base))
    assert "base_model:" not in text.split("---")[1]
    assert "\n# x" not in text


def test_the_code_in_the_card_loads_the_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    skeleton = skeleton_of("llama")
    factors = random_factors(skeleton, "k_proj")
    write_adapter(tmp_path / "out", factors, facts_of(str(bases["llama"])), skeleton)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1].replace("path/to/this/folder", str(tmp_path / "out")), names)
    name = next(iter(factors))
    assert torch.equal(names["model"].get_submodule(f"base_model.model.{name}.lora_B.default").weight, factors[name][1])
