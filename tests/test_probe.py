"""What the probe says of a block without computing anything is what happens when the block is run.

Checked on CPU: for every family the bytes are counted again on a real forward pass. CUDA takes other kernels, which
fake tensors choose as the device would; that is measured where there is one (test_memory_bound.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from streamda.block_calls import BlockCall
from streamda.blocks import DecoderStack
from streamda.layers import InputGroup, LinearSpec, is_linear
from streamda.probe import BlockProbe, input_groups, probe_block
from tests.models import EXPERTS, FAMILIES, make_config, make_model

SHAPES = [(1, 33, 32), (3, 16, 32)]
ROUTED = {  # grouped products of experts are known to fake tensors for bfloat16 only
    family
    for family, values in FAMILIES.items()
    if set(EXPERTS | {"num_local_experts": 0, "n_routed_experts": 0}) & set(values)
} - {"llama4_text"}
SHOWN = [
    "llama", "mistral", "gemma2", "gemma3_text", "gpt2", "bloom", "falcon", "mpt", "phi3", "cohere", "gpt_neo", "opt",
    "ctrl", "lfm2", "mamba2", "llama4_text", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_next",
]  # fmt: skip


def make_stack(family: str) -> DecoderStack:
    model = make_model(make_config(family))
    model.requires_grad_(False)
    stack = DecoderStack(model, torch.device("cpu"))
    stack.find_output_form()
    return stack


def bytes_saved(block: nn.Module, call: BlockCall, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes alive behind a forward pass that was really run, and the largest tensor: by the addresses of storages."""
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        return tensor

    def keep_input(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        alive.append(args[0])

    handles = [part.register_forward_pre_hook(keep_input) for part in block.modules() if is_linear(part)]
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = call.run(block, hidden)
    for handle in handles:
        handle.remove()
    sizes = {
        tensor.data_ptr() - tensor.storage_offset() * tensor.itemsize: tensor for tensor in (*alive, hidden, output)
    }
    for tensor in (*call.tensors(), *block.parameters(), *block.buffers()):
        sizes.pop(tensor.data_ptr() - tensor.storage_offset() * tensor.itemsize, None)
    nbytes = [tensor.untyped_storage().nbytes() for tensor in sizes.values()]
    return sum(nbytes), max(nbytes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", SHOWN)
def test_the_bytes_foreseen_are_the_bytes_saved(family: str, shape: tuple[int, int, int]) -> None:
    stack = make_stack(family)
    block, call = stack.blocks[1], stack.calls(*shape[:2])[1]
    probe = probe_block(block, call, shape, torch.float32)
    saved, largest = bytes_saved(block, call, shape)
    assert saved > 4 * 33 * 32 * 4
    assert probe.exact == (family not in ROUTED)
    if probe.exact:
        assert (probe.saved_bytes, probe.largest_bytes) == (saved, largest)
    else:
        assert 0.99 * saved <= probe.saved_bytes <= 1.25 * saved


def test_half_precision_halves_what_is_kept() -> None:
    stack = make_stack("gpt2")  # unlike Llama's, its norms do not compute in float32 on the way
    call = stack.calls(2, 16)[1]
    single = probe_block(stack.blocks[1], call, (2, 16, 32), torch.float32)
    half = probe_block(stack.blocks[1], call, (2, 16, 32), torch.bfloat16)
    assert half.exact
    assert half.saved_bytes == pytest.approx(single.saved_bytes / 2, rel=0.05)  # statistics of norms stay float32


def test_memory_of_attention_grows_with_the_tokens_and_not_with_their_square() -> None:
    stack = make_stack("llama")
    saved = [
        probe_block(stack.blocks[0], stack.calls(1, tokens)[0], (1, tokens, 32), torch.float32).saved_bytes
        for tokens in (512, 1024)
    ]
    assert saved[1] == pytest.approx(2 * saved[0], rel=0.01)


def test_the_block_is_left_as_it_was() -> None:
    stack = make_stack("llama")
    block = stack.blocks[0]
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    probe_block(block, stack.calls(1, 5)[0], (1, 5, 32), torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert not any(part._forward_pre_hooks for part in block.modules())


GROUPS = {
    "llama": {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)},
    "phi3": {("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)},
    "cohere": {("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj",), ("down_proj",)},
    "phi": {("q_proj", "k_proj", "v_proj", "fc1"), ("dense",), ("fc2",)},
    "gptj": {("q_proj", "k_proj", "v_proj", "fc_in"), ("out_proj",), ("fc_out",)},
    "gpt2": {("c_attn",), ("c_proj",), ("c_fc",)},
    "opt": {("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)},
    "qwen2_moe": {
        ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj", "shared_expert_gate"), ("down_proj",),
    },
    "deepseek_v3": {
        ("q_a_proj", "kv_a_proj_with_mqa"), ("q_b_proj",), ("kv_b_proj",), ("o_proj",), ("gate_proj", "up_proj"),
        ("down_proj",),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", GROUPS)
def test_layers_that_read_one_tensor_form_a_group(family: str) -> None:
    stack = make_stack(family)
    probe = probe_block(stack.blocks[1], stack.calls(2, 9)[1], (2, 9, 32), torch.float32)
    groups = {frozenset(name.rsplit(".", 1)[-1] for name in group) for group in probe.groups}
    assert groups == set(map(frozenset, GROUPS[family]))
    assert len({name for group in probe.groups for name in group}) == sum(map(len, probe.groups))


def test_equal_values_in_two_tensors_are_two_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.one(hidden) + self.two(hidden.clone()) + self.three(hidden)

    probe = probe_block(Twice(), BlockCall((), {}, hidden_is_positional=True), (1, 4, 8), torch.float32)
    assert set(probe.groups) == {("one", "three"), ("two",)}


class Routing(nn.Module):
    """Sends each token to one of two layers: how many go where depends on their values."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, 8)
        goes_left = flat[:, 0] > 0
        if not goes_left.any():
            return self.right(flat).reshape(hidden.shape)
        output = torch.zeros_like(flat)
        output[goes_left] = self.left(flat[goes_left])
        output[~goes_left] = self.right(flat[~goes_left])
        return output.reshape(hidden.shape)


def test_a_block_that_looks_at_its_values_gets_an_upper_estimate_and_no_groups(
    capfd: pytest.CaptureFixture[str],
) -> None:
    call, shape = BlockCall((), {}, hidden_is_positional=True), (2, 16, 8)
    block = Routing().requires_grad_(False)
    probe = probe_block(block, call, shape, torch.float32)
    assert not probe.exact
    assert probe.groups == (("left",), ("right",))
    assert probe.saved_bytes >= bytes_saved(block, call, shape)[0]
    assert capfd.readouterr().err == ""  # torch prints tracebacks of its own


def test_groups_are_named_in_full_and_hold_adapted_layers_only() -> None:
    probe = BlockProbe((("q", "k", "v"), ("o",), ("up",)), 0, 0, frozenset(), frozenset(), exact=True)
    linears = [LinearSpec(f"h.3.{name}", 8, 8) for name in ("k", "v", "up", "never_called")]
    assert input_groups("h.3", probe, linears) == (
        InputGroup(("h.3.k", "h.3.v"), 8),
        InputGroup(("h.3.up",), 8),
        InputGroup(("h.3.never_called",), 8),
    )
