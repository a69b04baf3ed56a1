"""Tiny seeded checkpoints on disk, of many decoder families, and samples for them.

transformers' own initialization makes a tiny model nearly linear: its attention is flat and its gradients say little.
Here every matrix is scaled by its fan-in, every norm and bias is shaken, so that each statistic of each layer is of
ordinary size and a mistake in any of them shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCAB_SIZE = 97
SMALL = {"rank": 2, "target_modules": "down_proj"}
"""Options of a run whose adapter matters to nobody."""
TINY_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
}
"""Of a Llama, for tools that make their own checkpoints."""
LENGTHS = (17, 5, 16, 2, 9)  # unequal, one pair close enough to be padded together, and the shortest legal sample

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_inner": 56, "n_positions": 64}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT: dict[str, Any] = {  # multi-head latent attention of DeepSeek
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
}

FAMILIES: dict[str, dict[str, Any]] = {
    # plain rotary decoders; behind a dash: which variant
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {},  # biases on q, k, v
    "qwen3": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 4},
    "smollm3": {},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "helium": {},
    "apertus": {},
    "seed_oss": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "exaone4": {"sliding_window": 4, "sliding_window_pattern": 2},
    "starcoder2": {"sliding_window": 4},
    "glm4": {},
    "cohere": {},  # one input for attention and MLP
    "cohere2": {"sliding_window": 4, "sliding_window_pattern": 2},
    "nemotron": {},
    "stablelm": {},
    "persimmon": {"num_key_value_heads": 4},
    "diffllama": {},
    "nanochat": {},
    "gemma": {},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},  # soft-capped logits
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},  # masks per layer
    "gemma4_text-dense": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "global_head_dim": 16,  # its configuration has no one head_dim then
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # tokens see what lies to their right, so samples cannot be padded
    "gemma3_text-bidirectional": {"query_pre_attn_scalar": 8, "use_bidirectional_attention": True},
    "llama-bidirectional": {"is_causal": False},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},  # fused q, k, v and gate, up
    # learned positions, alibi, blocks that return tuples or lists, other names for everything
    "gpt2": GPT,  # Conv1D
    "gpt_bigcode": GPT,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": GPT | {"rotary_dim": 4},
    "codegen": GPT | {"rotary_dim": 4},
    "gpt_neox": {"num_key_value_heads": 4},
    "openai-gpt": GPT,
    "ctrl": GPT | {"dff": 56},  # scales its embeddings in place
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 32},
    "opt-projected": {"ffn_dim": 56, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"head_dim": None},
    "falcon-alibi": {"head_dim": None, "alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 56},
    "biogpt": {"num_key_value_heads": 4},
    # mixtures of experts
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": EXPERTS | {"decoder_sparse_step": 1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "layer_types": None},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # a router that is a Linear by its class
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 56, "attention_chunk_size": 4},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe": LATENT | {"head_dim": 8, "partial_rotary_factor": 0.5},
    # no attention, or not only
    "mamba": {"state_size": 4, "time_step_rank": 4, "intermediate_size": 64, "expand": 2},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 4, "block_types": ["recurrent", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 56, "conv_L_cache": 3},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_expand": 2,
        "num_local_experts": 4,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"],
    },
    "jamba": {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "qwen3_next": EXPERTS
    | {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
    },
}

REFUSED: dict[str, dict[str, Any]] = {
    # an embedding per layer goes to each block beside the hidden states
    "gemma3n_text": {
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # the embeddings go to each attention beside the hidden states
    "zamba": {
        "mamba_d_state": 4,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_dt_rank": 4,
        "n_mamba_heads": 1,
    },
    # a state goes from block to block, and hidden states are rescaled between them
    "rwkv": {"context_length": 64, "attention_hidden_size": 32},
}

SIMILAR = {  # to another family as far as blocks and their calls go; marked slow
    "biogpt",
    "cohere2",
    "deepseek_v2",
    "ernie4_5",
    "exaone4",
    "gemma",
    "glm4_moe",
    "gpt_bigcode",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "olmo",
    "olmo3",
    "olmoe",
    "persimmon",
    "qwen3",
    "seed_oss",
    "starcoder2",
    "xglm",
}

TARGETS = {  # all-linear elsewhere; the layers left out PEFT does not adapt
    "mamba": "in_proj,x_proj",
    "mamba2": "in_proj",
    "deepseek_v2": "q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj",
    "deepseek_v3": "q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj",
    "glm4_moe": "q_proj,k_proj,v_proj,o_proj",
    "qwen3_next": "q_proj,k_proj,v_proj,o_proj,in_proj_qkvz,in_proj_ba,out_proj,shared_expert_gate",
}


def make_config(family: str, **overrides: Any) -> PretrainedConfig:
    """A tiny configuration."""
    values = BASE | (FAMILIES | REFUSED)[family] | overrides
    kind = family if family == "openai-gpt" else family.partition("-")[0]
    return AutoConfig.for_model(kind, **{key: value for key, value in values.items() if value is not None})


def make_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A float32 model with weights as the module's docstring says."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(0.1 * noise)
            elif parameter is model.get_input_embeddings().weight:
                parameter.copy_(0.5 * noise)
            else:
                fan_in = parameter.shape[0] if id(parameter) in transposed else parameter.shape[-1]
                parameter.copy_(noise / math.sqrt(fan_in))
    return model.eval()


def write_checkpoint(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Path:
    """Writes a tiny checkpoint in several shards."""
    model = make_model(make_config(family, **overrides), seed).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def make_samples(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids [tokens] and labels [tokens]; the first third of each sample is a prompt without loss."""
    generator = torch.Generator().manual_seed(seed + 1)  # not the weights' own numbers
    samples = []
    for length in lengths:
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        samples.append((ids, labels))
    return samples


def write_samples(path: Path, samples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """Writes samples as tokenized JSON lines."""
    rows = [json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist()}) for ids, labels in samples]
    path.write_text("\n".join(rows) + "\n")
    return path


def write_inputs(folder: Path, **overrides: Any) -> Path:
    """Writes a tiny checkpoint (`model`) and samples for it (`samples.jsonl`) into a folder."""
    write_checkpoint(folder / "model", "llama", **overrides)
    write_samples(folder / "samples.jsonl", make_samples())
    return folder


def run_options(inputs: Path, **given: Any) -> dict[str, Any]:
    """Options of a run of less than a second, from a folder with `model` and `samples.jsonl`."""
    return {
        "model": str(inputs / "model"),
        "dataset": str(inputs / "samples.jsonl"),
        "max_gpu_mem": "400MB",
        "device": "cpu",
    } | given
