"""Writes a checkpoint with the exact shapes of a known model and random weights: for runs where only size matters.

    python -m tools.make_checkpoint NAME_OR_CONFIG OUTPUT_DIR [--layers N] [--seed 0] [--shard-size 2GB]
                                    [--samples 8 --tokens 64]
    python -m tools.make_checkpoint llama-2-13b .cache/llama-2-13b --samples 8 --tokens 64
    python -m tools.make_checkpoint llama-2-70b .cache/llama-2-70b-3 --layers 3

NAME_OR_CONFIG is one of the names below or the path of any causal model's config.json. Outputs belong below `.cache/`,
which git ignores. bfloat16 safetensors in shards, config.json, an index, no tokenizer; `--samples` adds
calibration.jsonl with rows of token ids, the first quarter of each a prompt without loss.

Every number is drawn on its own from a seeded normal distribution, so no matrix is short of rank: standard deviation
0.02 for embeddings, 1/sqrt(inputs) for linear layers, that over sqrt(2 layers) where a layer writes to the residual
stream, 1 with a spread of 0.02 for norms. Activations stay of order one at any depth. A tensor depends on its name, the
seed and the full model only: `--layers N` gives the first N blocks of the same weights. Memory stays below 100 MB above
the imports, whatever the size. The folder appears only when it is complete.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from streamda.heap import bound_allocator
from streamda.memory import format_size, parse_size

LLAMA_2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
QWEN = {"max_position_embeddings": 40960, "rope_theta": 1e6, "bos_token_id": 151643, "eos_token_id": 151643}


def _sizes(hidden: int, mlp: int, layers: int, heads: int, key_value_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA_2 | _sizes(4096, 11008, 32, 32, 32),
    "llama-2-13b": LLAMA_2 | _sizes(5120, 13824, 40, 40, 40),
    "llama-2-70b": LLAMA_2 | _sizes(8192, 28672, 80, 64, 8),
    "llama-3-8b": LLAMA_3 | _sizes(4096, 14336, 32, 32, 8),
    "llama-3-70b": LLAMA_3 | _sizes(8192, 28672, 80, 64, 8),
    # Qwen2.5-32B and Qwen3-32B
    "qwen-32b": QWEN
    | _sizes(5120, 27648, 64, 40, 8)
    | {"model_type": "qwen2", "vocab_size": 152064, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    "qwen-3-32b": QWEN
    | _sizes(5120, 25600, 64, 64, 8)
    | {"model_type": "qwen3", "vocab_size": 151936, "rms_norm_eps": 1e-6, "head_dim": 128},
}

RESIDUAL = {"o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "w2", "wo"}
"""Names of modules that write to the residual stream."""
CHUNK_ELEMENTS = 1 << 20
"""Numbers drawn at a time: 4 MB in float32 per thread, and 2 MB in bfloat16 for each chunk that waits to be written."""
THREADS = 2
RECIPE = "streamda_recipe"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: ``mean + std * normal``."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def num_elements(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in bfloat16."""
        return 2 * self.num_elements


def load_fields(name_or_config: str) -> dict[str, Any]:
    """Configuration fields of a known name, or of a config.json (or the folder that holds one)."""
    if name_or_config in CONFIGS:
        return dict(CONFIGS[name_or_config])
    path = Path(name_or_config)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        sys.exit(f"{name_or_config} is neither a file nor one of {', '.join(CONFIGS)}")
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return fields


def build_config(fields: dict[str, Any], num_layers: int | None = None) -> PretrainedConfig:
    """The transformers configuration, cut to the first `num_layers` decoder blocks."""
    fields = {
        key: value for key, value in fields.items() if key not in ("transformers_version", "dtype", "torch_dtype")
    }
    kind = fields.pop("model_type")
    config = AutoConfig.for_model(kind, **fields)
    if num_layers is not None:
        available = config.num_hidden_layers
        if not 1 <= num_layers <= available:
            sys.exit(f"--layers is {num_layers}; the model has {available}")
        fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = num_layers
        for key in ("layer_types", "mlp_layer_types"):
            if isinstance(fields.get(key), list):
                fields[key] = fields[key][:num_layers]
        config = AutoConfig.for_model(kind, **fields)
    config.dtype = torch.bfloat16
    return config


def list_tensors(config: PretrainedConfig, full_depth: int) -> list[TensorSpec]:
    """All tensors of the checkpoint in the model's order; tied ones once.

    Args:
        config: of the model to write; its `architectures` are filled in.
        full_depth: decoder blocks of the whole model, which set the scale of what is added to the residual stream.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    config.architectures = [type(model).__name__]
    specs, seen = [], set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        module = model.get_submodule(name.rpartition(".")[0])
        mean, std = _distribution(module, name, tensor, full_depth)
        specs.append(TensorSpec(name, tuple(tensor.shape), mean, std))
    return specs


def _distribution(module: nn.Module, name: str, tensor: torch.Tensor, full_depth: int) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's entries."""
    if not isinstance(tensor, nn.Parameter):
        return 0.0, 0.0
    if isinstance(module, nn.Embedding):
        return 0.0, 0.02
    if tensor.ndim < 2:
        is_norm = "norm" in type(module).__name__.lower() and name.endswith("weight")
        return (1.0 if is_norm else 0.0), 0.02
    num_inputs = tensor.shape[0] if type(module).__name__ == "Conv1D" else tensor.shape[-1]
    std = num_inputs**-0.5
    if RESIDUAL & set(name.split(".")[-2:]):
        std /= math.sqrt(2 * full_depth)
    return 0.0, std


def make_chunk(spec: TensorSpec, index: int, seed: int) -> torch.Tensor:
    """Numbers [elements] bfloat16 of one chunk of a tensor; the same whatever was drawn before."""
    count = min(CHUNK_ELEMENTS, spec.num_elements - index * CHUNK_ELEMENTS)
    if spec.std == 0:
        return torch.full((count,), spec.mean, dtype=torch.bfloat16)
    digest = hashlib.sha256(f"{seed}/{index}/{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    # float32 normals, since torch draws bfloat16 ones with an eight-bit uniform number below each
    return torch.empty(count).normal_(spec.mean, spec.std, generator=generator).to(torch.bfloat16)


def _chunks(specs: Sequence[TensorSpec], seed: int) -> Iterator[torch.Tensor]:
    """The numbers of all tensors in order, drawn a few chunks ahead."""
    jobs = ((spec, index) for spec in specs for index in range(-(-spec.num_elements // CHUNK_ELEMENTS)))
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future[torch.Tensor]] = deque()
        for spec, index in jobs:
            waiting.append(pool.submit(make_chunk, spec, index, seed))
            if len(waiting) > 2 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_shard(file: IO[bytes], specs: Sequence[TensorSpec], seed: int) -> None:
    """One safetensors file: eight bytes of header length, a JSON header, then the tensors' bytes in its order.

    safetensors' own writer wants all tensors of a file in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": "BF16",
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of eight
    file.write(len(encoded).to_bytes(8, "little"))
    file.write(encoded)
    for chunk in _chunks(specs, seed):
        file.write(chunk.view(torch.uint8).numpy().data)


def split_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive tensors of at most `shard_bytes` together; a larger one has a shard of its own."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards


def make(name_or_config: str, output_dir: Path, num_layers: int | None, seed: int, shard_bytes: int) -> None:
    """Writes the checkpoint; does nothing if the very same one is there already."""
    fields = load_fields(name_or_config)
    full_depth = build_config(fields).num_hidden_layers
    config = build_config(fields, num_layers)
    specs = list_tensors(config, full_depth)
    total = sum(spec.num_bytes for spec in specs)
    recipe = {"fields": fields, "layers": num_layers, "seed": seed, "shard_bytes": shard_bytes}
    index_path = output_dir / "model.safetensors.index.json"
    if output_dir.exists():
        found = json.loads(index_path.read_text(encoding="utf-8"))["metadata"] if index_path.is_file() else {}
        if found.get(RECIPE) != json.loads(json.dumps(recipe)):
            sys.exit(f"{output_dir} exists and holds something else; delete it or choose another folder")
        print(f"{output_dir} is there already")
        return
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output_dir.parent).free
    if free < 1.01 * total:
        sys.exit(f"{output_dir} needs {format_size(total)} of disk, and {format_size(free)} are free")

    bound_allocator(torch.device("cpu"))  # the C heap would keep some 400 MB of what the threads free
    started = time.monotonic()
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shards = split_shards(specs, shard_bytes)
    weight_map = {}
    try:
        for number, shard in enumerate(shards, start=1):
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with (partial / file_name).open("wb") as file:
                write_shard(file, shard, seed)
            weight_map |= {spec.name: file_name for spec in shard}
            print(f"{number} of {len(shards)} shards", flush=True)
        index = {"metadata": {"total_size": total, RECIPE: recipe}, "weight_map": weight_map}
        (partial / index_path.name).write_text(json.dumps(index, indent=2), encoding="utf-8")
        config.save_pretrained(partial)
        partial.rename(output_dir)
    except BaseException:  # Ctrl-C leaves no half of a checkpoint either; it is raised again
        shutil.rmtree(partial, ignore_errors=True)
        raise
    seconds = time.monotonic() - started
    print(
        f"wrote {output_dir}: {config.num_hidden_layers} of {full_depth} blocks, {format_size(total)} in {len(shards)} "
        f"shards, {seconds:.0f} s, {format_size(total / max(seconds, 1e-9))}/s"
    )


def write_samples(path: Path, num_samples: int, num_tokens: int, vocab_size: int, seed: int) -> None:
    """Random token ids; the first quarter of each sample has no loss."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_samples):
            # the lowest ids are mostly control tokens
            ids = torch.randint(min(16, vocab_size - 1), vocab_size, (num_tokens,), generator=generator).tolist()
            labels = [-100] * (num_tokens // 4) + ids[num_tokens // 4 :]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    print(f"wrote {path}: {num_samples} samples of {num_tokens} tokens")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="NAME_OR_CONFIG")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--layers", type=int, help="only the first decoder blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", default="2GB")
    parser.add_argument("--samples", type=int, default=0, help="rows of calibration.jsonl; none without it")
    parser.add_argument("--tokens", type=int, default=64, help="of each sample")
    options = parser.parse_args(arguments)
    make(options.model, options.output, options.layers, options.seed, parse_size(options.shard_size, "--shard-size"))
    if options.samples:
        vocab_size = AutoConfig.from_pretrained(options.output).vocab_size
        path = options.output / "calibration.jsonl"
        write_samples(path, options.samples, options.tokens, vocab_size, options.seed)


if __name__ == "__main__":
    main()
