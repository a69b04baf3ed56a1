"""Target modules: what PEFT would adapt is what is initialized, and everything else is refused by name."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from streamda.errors import ConfigError
from streamda.layers import (
    BlockSpec,
    InputGroup,
    LinearSpec,
    find_targets,
    is_linear,
    linear_spec,
    parse_target_modules,
    require_rank,
)

SMALL = {"vocab_size": 31, "max_position_embeddings": 16}
MODELS = {
    "llama": (
        AutoConfig.for_model(
            "llama",
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=12,  # so that the prefix of block 1 is also how block 10's begins
            num_attention_heads=2,
            num_key_value_heads=1,
            **SMALL,
        ),
        [f"model.layers.{index}" for index in range(12)],
    ),
    "gpt2": (
        AutoConfig.for_model("gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=31),
        ["transformer.h.0", "transformer.h.1"],
    ),
    "opt": (  # its projections into and out of the embedding space lie outside the blocks
        AutoConfig.for_model(
            "opt",
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=8,
            **SMALL,
        ),
        ["model.decoder.layers.0", "model.decoder.layers.1"],
    ),
}


def build(kind: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(MODELS[kind][0])
    assert isinstance(model, PreTrainedModel)
    return model


@cache
def skeleton(kind: str) -> PreTrainedModel:
    with torch.device("meta"):
        return build(kind)


def peft_adapts(kind: str, target_modules: str | list[str]) -> set[str]:
    """Full names of the layers into which PEFT itself puts an adapter."""
    config = LoraConfig(r=1, target_modules=target_modules, fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM")
    adapted = inject_adapter_in_model(config, build(kind))
    return {name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("kind", MODELS)
def test_all_linear_is_peft_s_and_names_what_lies_outside_the_blocks(kind: str) -> None:
    targets = find_targets(skeleton(kind), MODELS[kind][1], "all-linear")
    expected = peft_adapts(kind, "all-linear")
    inside = {name for name in expected if any(name.startswith(prefix + ".") for prefix in MODELS[kind][1])}
    assert {spec.name for spec in targets.linears} == inside
    assert set(targets.outside) == expected - inside
    assert bool(targets.outside) == (kind == "opt")
    assert len(inside) >= 4 * len(MODELS[kind][1])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("llama", "q_proj"),
        ("llama", "q_proj, v_proj,down_proj"),
        ("llama", "self_attn.q_proj"),
        ("llama", "model.layers.1.mlp.up_proj"),
        ("llama", "layers.1.mlp.up_proj"),
        ("llama", r".*\.layers\.1\.mlp\.(up|down)_proj"),
        ("llama", r"model\.layers\.(1|10)\..*proj"),
        ("gpt2", "c_attn"),
        ("gpt2", "c_proj,c_fc"),
        ("gpt2", r".*\.mlp\.c_proj"),
        ("opt", "fc1,fc2"),
    ],
)
def test_names_and_regexes_mean_what_they_mean_to_peft(kind: str, text: str) -> None:
    found = [spec.name for spec in find_targets(skeleton(kind), MODELS[kind][1], text).linears]
    meaning = text if any(sign in text for sign in "*(|\\") else [name.strip() for name in text.split(",")]
    assert set(found) == peft_adapts(kind, meaning)
    assert found
    assert len(found) == len(set(found))


def test_layers_come_in_the_model_s_order_with_their_shapes() -> None:
    model = skeleton("llama")
    targets = find_targets(model, MODELS["llama"][1], "down_proj,q_proj,k_proj")
    names = [spec.name for spec in targets.linears]
    assert names == [name for name, _ in model.named_modules() if name.endswith(("q_proj", "k_proj", "down_proj"))]
    shapes = {spec.name.rsplit(".", 1)[-1]: (spec.d_out, spec.d_in, spec.transposed) for spec in targets.linears}
    assert shapes == {"q_proj": (16, 16, False), "k_proj": (8, 16, False), "down_proj": (16, 24, False)}


def test_conv1d_stores_its_weight_the_other_way_round() -> None:
    """A Conv1D computes x W + b: its rows are inputs."""
    module = build("gpt2").get_submodule("transformer.h.0.mlp.c_fc")
    x = torch.randn(3, 16)
    spec = linear_spec("c_fc", module)
    assert (spec.d_in, spec.d_out, spec.transposed) == (x.shape[1], module(x).shape[1], True)
    assert spec.d_in != spec.d_out
    assert not linear_spec("l", nn.Linear(3, 5)).transposed


@pytest.mark.parametrize("text", ["qproj", "layers", r".*nothing.*", "embed_tokens", "norm"])
def test_a_target_that_matches_no_linear_layer_is_refused_with_the_names_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"matches no linear layer; this model has .*down_proj.*q_proj") as caught:
        find_targets(skeleton("llama"), MODELS["llama"][1], text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "text", "named"), [("llama", "lm_head", "lm_head"), ("opt", "q_proj,project_in", "project_in")]
)
def test_a_named_layer_outside_the_blocks_is_refused(kind: str, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"{named}, which lies outside the decoder blocks"):
        find_targets(skeleton(kind), MODELS[kind][1], text)


def test_a_block_s_prefix_is_not_the_beginning_of_another_block_s() -> None:
    """With only block 1 streamed, block 10 and 11 lie outside."""
    with pytest.raises(ConfigError, match=r"model\.layers\.0\."):
        find_targets(skeleton("llama"), ["model.layers.1"], "q_proj")
    targets = find_targets(skeleton("llama"), ["model.layers.1"], "all-linear")
    assert len(targets.linears) == 7
    assert all(spec.name.startswith("model.layers.1.") for spec in targets.linears)
    assert any(name.startswith("model.layers.10.") for name in targets.outside)


def test_blocks_without_a_linear_layer_are_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.LayerNorm(4)), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="hold no linear layer"):
        find_targets(model, ["0"], "all-linear")


class Scores(nn.Linear):
    """A router that is a Linear by its class and returns more than a product."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class Scaled(nn.Linear):
    """A subclass that still maps rows to rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_router_that_only_looks_like_a_linear_layer_is_left_out() -> None:
    inner = nn.ModuleDict(
        {"router": Scores(4, 3), "scaled": Scaled(4, 3), "plain": nn.Linear(4, 3), "norm": nn.LayerNorm(4)}
    )
    model = nn.ModuleDict({"block": inner})
    assert [name for name, module in inner.items() if is_linear(module)] == ["scaled", "plain"]
    assert [spec.name for spec in find_targets(model, ["block"], "all-linear").linears] == [
        "block.scaled",
        "block.plain",
    ]
    with pytest.raises(ConfigError, match="this model has plain, scaled"):
        find_targets(model, ["block"], "router")


def test_layers_that_peft_would_refuse_in_the_end_are_refused_at_the_start() -> None:
    """Mamba's fused kernels read the weight of out_proj past any adapter."""
    config = AutoConfig.for_model(
        "mamba", hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=31, time_step_rank=4
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = ["backbone.layers.0", "backbone.layers.1"]
    with pytest.raises(ConfigError, match=r"PEFT refuses .* 'out_proj' is incompatible"):
        find_targets(model, blocks, "all-linear")
    names = [spec.name for spec in find_targets(model, blocks, "in_proj,x_proj").linears]
    assert names == [f"{block}.mixer.{name}" for block in blocks for name in ("in_proj", "x_proj")]


def test_looking_for_targets_leaves_the_model_as_it_was() -> None:
    before = [(name, type(module)) for name, module in skeleton("gpt2").named_modules()]
    find_targets(skeleton("gpt2"), MODELS["gpt2"][1], "all-linear")
    assert [(name, type(module)) for name, module in skeleton("gpt2").named_modules()] == before


def test_a_broken_regex_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'\(q_proj' is no regular expression"):
        find_targets(skeleton("llama"), MODELS["llama"][1], "(q_proj")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("q_proj", ["q_proj"]),
        (" a , b,,c ", ["a", "b", "c"]),
        ("model.layers.0.x", ["model.layers.0.x"]),
        (r".*q_proj", r".*q_proj"),
        ("q_proj|v_proj", "q_proj|v_proj"),
    ],
)
def test_text_of_names_is_a_list_and_all_other_text_a_regex(text: str, meaning: str | list[str]) -> None:
    assert parse_target_modules(text) == meaning


def test_a_rank_above_a_layer_s_smaller_side_is_refused_naming_the_layer() -> None:
    linears = [LinearSpec("wide", 64, 64), LinearSpec("narrow", 64, 12), LinearSpec("thin", 8, 64)]
    with pytest.raises(ConfigError, match=r"rank 13 is .* of 2 layers, narrowest thin \[64, 8\]; use --rank 8"):
        require_rank(linears, 13)
    with pytest.raises(ConfigError, match=r"smaller side of 1 layer, narrowest thin"):
        require_rank(linears, 9)
    require_rank(linears, 8)
    require_rank([], math.inf)  # nothing adapted, nothing to refuse


def test_a_block_finds_its_layers_and_groups_by_name() -> None:
    q, k, o = (LinearSpec(f"b.{name}", 4, 4) for name in "qko")
    group, other = InputGroup(("b.q", "b.k"), 4), InputGroup(("b.o",), 4)
    block = BlockSpec(0, "b", (q, k, o), (group, other))
    assert block.linear("b.k") is k
    assert block.group_of("b.k") is group
    assert block.group_of("b.o") is other
    assert group.name == "b.q"
