"""Weights arrive as transformers loads them, one part at a time, and damage is refused by name.

The oracle is `from_pretrained`, or the file read by safetensors' own loader. Not covered: how much memory it takes.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from streamda import shard_values
from streamda.checkpoint import Checkpoint
from streamda.errors import MismatchError, ModelError
from streamda.file_reader import ALIGNMENT, FileReader
from streamda.skeleton import build_skeleton, load_config
from streamda.weight_map import fused_parameters
from tests.models import make_config, write_checkpoint

CPU = torch.device("cpu")
Edit = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def opened(folder: Path, dtype: torch.dtype = torch.float32, cache_bytes: int = sys.maxsize) -> Checkpoint:
    return Checkpoint(folder, build_skeleton(load_config(folder, False), dtype), CPU, cache_bytes=cache_bytes)


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by their names in the files."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def edited(source: Path, target: Path, edit: Edit) -> Path:
    """A copy in one file, its tensors edited."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = stored(source)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def on_meta(checkpoint: Checkpoint) -> set[str]:
    return {name for name, tensor in checkpoint._model.named_parameters() if tensor.is_meta}


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "jamba", "qwen3_next", "phimoe"],
)
def test_a_block_is_loaded_as_from_pretrained_loads_it(family: str, tmp_path: Path) -> None:
    """Also where the files hold single experts and the model holds them fused."""
    write_checkpoint(tmp_path, family)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    checkpoint = opened(tmp_path)
    prefix = {"gpt2": "transformer.h.1"}.get(family, "model.layers.1")
    checkpoint.load([prefix])
    block, expected = checkpoint._model.get_submodule(prefix), whole.get_submodule(prefix)
    ours, theirs = dict(block.named_parameters()), dict(expected.named_parameters())
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert not any(parameter.requires_grad for parameter in block.parameters())
    # nothing else was loaded
    assert on_meta(checkpoint) == {name for name, _ in whole.named_parameters() if not name.startswith(prefix + ".")}
    # and from the release on nothing is left of it
    gone = [weakref.ref(parameter) for parameter in block.parameters()]
    del ours, block
    checkpoint.release([prefix])
    gc.collect()
    assert all(reference() is None for reference in gone)
    assert on_meta(checkpoint) == {name for name, _ in whole.named_parameters()}


@pytest.mark.parametrize(
    ("family", "copies"),
    [
        ("llama", {}),
        ("gpt_oss", {}),  # whose files hold them fused
        ("qwen3_moe", {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 1}),
        ("mixtral", {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 1}),
    ],
)
def test_parameters_that_are_fused_are_known_from_the_model_alone(
    family: str, copies: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = opened(write_checkpoint(tmp_path, family))
    found = fused_parameters(checkpoint._model)
    assert {name.removeprefix("model.layers.1."): count for name, count in found.items() if ".1." in name} == copies
    assert {tensor.target for tensor in checkpoint.map.tensors if tensor.converted} == set(found)


@pytest.mark.parametrize("shift", [0, 1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_memory_cannot_hold_is_read_past_the_cache_with_the_same_bits(
    dtype: torch.dtype, shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cast on the way or not, in chunks that begin anywhere, from files whose tensors may lie at odd places."""
    monkeypatch.setattr(shard_values, "READ_CHUNK_BYTES", shard_values.READ_MARGIN + 4 * ALIGNMENT + 8)
    folder = write_checkpoint(tmp_path, "llama", dtype=torch.bfloat16, hidden_size=128, intermediate_size=200)
    for shard in folder.glob("*.safetensors"):  # its header may end in spaces
        content = shard.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + length] + b" " * shift
        shard.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    reads: list[bool] = []
    read = FileReader.read_into

    def noted(
        self: FileReader, memory: memoryview, offset: int, needed: int | None = None, *, aligned: bool = False
    ) -> int:
        assert not aligned or offset % ALIGNMENT == len(memory) % ALIGNMENT == 0
        reads.append(self.is_direct and aligned)
        return read(self, memory, offset, needed, aligned=aligned)

    monkeypatch.setattr(FileReader, "read_into", noted)
    plain = opened(folder, dtype)
    assert plain.total_bytes > 40 * ALIGNMENT
    plain.load(["model.layers.1"])
    assert reads
    assert not any(reads)
    reads.clear()
    checkpoint = opened(folder, dtype, plain.total_bytes - 1)
    assert checkpoint.is_read_directly
    assert not opened(folder, dtype, plain.total_bytes).is_read_directly
    checkpoint.load(["model.layers.1"])
    with closing(FileReader(next(iter(checkpoint.shards)), direct=True)) as reader:
        if reader.is_direct:  # else the file system has no such reads
            assert all(reads) == any(reads) == (shift % 2 == 0)
    assert checkpoint.bytes_read == plain.bytes_read
    for name, value in plain._model.get_submodule("model.layers.1").named_parameters():
        assert torch.equal(checkpoint._model.get_submodule("model.layers.1").get_parameter(name), value), name


def test_every_byte_read_is_counted(llama: Path) -> None:
    checkpoint = opened(llama)
    assert checkpoint.bytes_read == 0
    sizes = {name: tensor.nbytes for name, tensor in stored(llama).items()}
    block = sum(size for name, size in sizes.items() if name.startswith("model.layers.1."))
    checkpoint.load(["model.layers.1"])
    assert checkpoint.bytes_read == block
    checkpoint.release(["model.layers.1"])
    checkpoint.load(["model.layers.1", "model.norm.weight"])
    assert checkpoint.bytes_read == 2 * block + sizes["model.norm.weight"]
    assert checkpoint.total_bytes == sum(sizes.values())
    assert len(checkpoint.shards) > 2


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_in_the_files_is_cast_once(kept: torch.dtype, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", dtype=kept)
    checkpoint = opened(tmp_path)
    checkpoint.load(["model.layers.0"])
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored(tmp_path)[name].dtype == kept
    assert torch.equal(checkpoint._model.get_parameter(name), stored(tmp_path)[name].float())


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_a_large_tensor_read_by_bands_is_the_same(
    kept: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, "llama", dtype=kept)
    # of the 3584 or 7168 bytes of up_proj
    monkeypatch.setattr(shard_values, "READ_CHUNK_BYTES", shard_values.READ_MARGIN + 1000)
    checkpoint = opened(tmp_path)
    checkpoint.load(["model.layers.0"])
    for name, value in stored(tmp_path).items():
        if name.startswith("model.layers.0."):
            assert torch.equal(checkpoint._model.get_parameter(name), value.float()), name


def test_a_tied_head_is_read_under_the_name_of_the_embedding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama-tied")
    tensors = stored(tmp_path)
    assert "lm_head.weight" not in tensors
    checkpoint = opened(tmp_path)
    checkpoint.load(["lm_head"])
    assert torch.equal(checkpoint._model.lm_head.weight, tensors["model.embed_tokens.weight"])
    assert checkpoint.bytes_read == tensors["model.embed_tokens.weight"].nbytes
    checkpoint.release(["lm_head"])
    checkpoint.load(["model.embed_tokens"])
    assert torch.equal(checkpoint._model.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])
    checkpoint.release(["model.embed_tokens"])
    assert on_meta(checkpoint) >= {"model.embed_tokens.weight"}


def test_tensors_that_the_model_does_not_have_are_passed_over(llama: Path, tmp_path: Path) -> None:
    """Old checkpoints hold rotary buffers."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["something.else"] = torch.ones(2, dtype=torch.int64)

    checkpoint = opened(edited(llama, tmp_path / "more", edit))
    checkpoint.load(["model.layers.0"])
    assert checkpoint.total_bytes == opened(llama).total_bytes


def lacks_a_weight(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def has_another_shape(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(32, 56)


def has_whole_numbers(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(56, 32, dtype=torch.int8)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lacks_a_weight, r"lacks 1 tensors that config\.json asks for: model\.layers\.1\.mlp\.up_proj\.weight$"),
        (dict.clear, r"lacks 21 tensors that config\.json asks for: lm_head\.weight, .* \.\.\.$"),
        (has_another_shape, r"up_proj\.weight has shape \[32, 56\], config\.json asks for \[56, 32\]"),
        (has_whole_numbers, r"up_proj\.weight is stored as I8, which is not a weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_any_is_read(
    edit: Edit, reason: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason):
        opened(edited(llama, tmp_path / "edited", edit))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_when_it_is_read(value: float, llama: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][55, 31] = value

    checkpoint = opened(edited(llama, tmp_path / "edited", edit))
    checkpoint.load(["model.layers.0"])
    with pytest.raises(
        ModelError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"
    ):
        checkpoint.load(["model.layers.1"])


def test_huge_weights_are_not_taken_for_infinite_ones(llama: Path, tmp_path: Path) -> None:
    """Their sum overflows."""

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)

    checkpoint = opened(edited(llama, tmp_path / "edited", edit))
    checkpoint.load(["model.layers.1"])
    assert float(checkpoint._model.get_parameter("model.layers.1.mlp.up_proj.weight").max()) == pytest.approx(3e38)


def test_a_tensor_in_two_shards_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    shutil.copytree(llama, folder)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second)
    with pytest.raises(ModelError, match=rf"tensor {name} is in {first.name} and again in {second.name}"):
        opened(folder)


def git_lfs_pointer(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 40000\n")


def truncated(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def shard_lost(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def index_leads_outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(names))


def index_is_garbage(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1, 2]}')


def only_pickles(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")


def no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (git_lfs_pointer, r"model-00002-of-.* cannot be read: .* \(a git-lfs pointer: run `git lfs pull`\)$"),
        (truncated, r"model-00002-of-.* cannot be read: "),
        (shard_lost, r"lacks the shard model-00002-of-.* that its index names"),
        (index_leads_outside, r"names the shard '\.\./elsewhere\.safetensors'; it must be a plain file name"),
        (index_is_garbage, r"is no index of a sharded checkpoint"),
        (only_pickles, r"holds pickled weights only; convert them once"),
        (no_weights, r"holds no model\.safetensors and no model\.safetensors\.index\.json"),
    ],
)
def test_damaged_files_are_refused_in_one_line(
    damage: Callable[[Path], None], reason: str, llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(llama, folder)
    damage(folder)
    with pytest.raises(ModelError, match=reason) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_cut_while_the_run_goes_on_is_an_error_and_no_crash(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(llama, folder)
    checkpoint = opened(folder)
    for shard in checkpoint.shards:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"cannot be read"):
        checkpoint.load(["model.layers.0", "model.layers.1"])


def test_a_value_that_changes_between_two_readings_is_found_though_nothing_else_tells(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamda.checkpoint.SAMPLED_BYTES", 64)
    folder = tmp_path / "changed"
    shutil.copytree(llama, folder)
    checkpoint = opened(folder)
    checkpoint.load(["model.layers.0", "model.layers.1"])
    (tensor,) = checkpoint.map.stored("model.layers.1.mlp.up_proj.weight")
    before = tensor.file.stat()
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset + tensor.num_bytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    os.utime(tensor.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    checkpoint.load(["model.layers.0"])
    with pytest.raises(MismatchError, match=r"up_proj\.weight has other bytes\); put the file back"):
        checkpoint.load(["model.layers.1"])


def test_of_fused_tensors_all_values_that_are_not_finite_are_counted_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "whole", "qwen3_moe")
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (1, 3)]

    def damage(tensors: dict[str, Tensor]) -> None:
        for count, name in enumerate(names, start=2):
            tensors[name].view(-1)[:count] = float("nan")

    checkpoint = opened(edited(tmp_path / "whole", tmp_path / "edited", damage))
    (target,) = {tensor.target for tensor in checkpoint.map.tensors if tensor.key in names}
    checkpoint.tolerate([target])
    for _ in range(2):
        checkpoint.load(["model.layers.1"])
        assert checkpoint.not_finite == {target: 5}
        checkpoint.release(["model.layers.1"])


def lacks_an_expert(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def expert_of_another_shape(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.ones(24, 16)


@pytest.mark.parametrize("edit", [lacks_an_expert, expert_of_another_shape])
def test_experts_that_cannot_be_fused_are_refused(edit: Edit, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "whole", "qwen3_moe")
    folder = edited(tmp_path / "whole", tmp_path / "edited", edit)

    def read() -> None:
        opened(folder).load(["model.layers.1"])

    with pytest.raises(ModelError) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_fingerprint_tells_weights_apart_and_not_places(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(llama, folder)
    assert opened(folder).fingerprint() == opened(llama).fingerprint()
    shard = sorted(folder.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert opened(folder).fingerprint() != opened(llama).fingerprint()
    data[-1] ^= 1
    shard.write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert opened(folder).fingerprint() != opened(llama).fingerprint()


def test_a_skeleton_has_shapes_and_buffers_and_nothing_else() -> None:
    model = build_skeleton(make_config("gpt_neo"), torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers
    assert not any(buffer.is_meta for buffer in buffers.values())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", r"config\.json cannot be used: "),
        ("[]", r"config\.json cannot be used: "),
        ('{"hidden_size": 8}', r"config\.json cannot be used: "),
        ('{"model_type": "no_such_model"}', r"config\.json cannot be used: .*no_such_model"),
        ('{"model_type": "t5"}', r"is an encoder-decoder model; streamda reads decoder-only"),
        ('{"model_type": "bart"}', r"is an encoder-decoder model"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}',
            r"is a quantized checkpoint; gradients need the original weights",
        ),
        (
            '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}',
            r"brings its own Python code; add --trust-remote-code if you trust it",
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "own.py").write_text("raise SystemExit('never run')\n")
    with pytest.raises(ModelError, match=reason) as caught:
        load_config(tmp_path, trust_remote_code=False)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        load_config(tmp_path, trust_remote_code=False)


def test_a_model_that_is_no_language_model_is_refused() -> None:
    config = AutoConfig.for_model("vit", hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ModelError, match=r"no causal language model can be built") as caught:
        build_skeleton(config, torch.float32)
    assert "\n" not in str(caught.value)
