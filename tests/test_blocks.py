"""A decoder cut at its blocks does what the whole decoder does, and one that cannot be cut is refused.

The whole model is run beside it with hooks on its blocks and head: what enters them is the truth. Whether gradients
come out right as well is for test_streamed_equals_whole.py to say.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from streamda import block_calls
from streamda.block_calls import BlockCall
from streamda.blocks import DecoderStack, find_block_list
from streamda.errors import ModelError
from streamda.skeleton import build_skeleton
from tests.models import VOCAB_SIZE, make_config, make_model

CPU = torch.device("cpu")
SHOWN = [
    "llama",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "opt-projected",
    "bloom",
    "falcon-alibi",
    "cohere",
    "granite",
    "mamba2",
]


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(0))


def make_stack(family: str) -> DecoderStack:
    model = make_model(make_config(family))
    model.requires_grad_(False)
    stack = DecoderStack(model, CPU)
    stack.find_output_form()
    return stack


def run_whole(stack: DecoderStack, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[dict[str, Any]], torch.Tensor]:
    """Hidden states entering each block and leaving the last one, keyword arguments of the blocks, and logits."""
    hidden: list[torch.Tensor] = []
    arguments: list[dict[str, Any]] = []

    def before(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        arguments.append(kwargs)

    def after(_block: nn.Module, _args: Any, output: Any) -> None:
        hidden.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in stack.blocks]
    handles.append(stack.blocks[-1].register_forward_hook(after))
    with torch.no_grad():
        logits = stack.model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return hidden, arguments, logits


@pytest.mark.parametrize("family", SHOWN)
def test_prologue_blocks_and_epilogue_are_the_model(family: str) -> None:
    stack, ids = make_stack(family), token_ids(2, 11)
    hidden, _, logits = run_whole(stack, ids)
    states = stack.embed(ids)
    torch.testing.assert_close(states, hidden[0])
    with torch.no_grad():
        for block, call, expected in zip(stack.blocks, stack.calls(2, 11), hidden[1:], strict=True):
            states = call.run(block, states)
            torch.testing.assert_close(states, expected)
        rows = torch.tensor([0, 3, 10, 11, 21])  # positions of both samples, as one sequence
        torch.testing.assert_close(stack.logits(states.reshape(22, -1)[rows]), logits.reshape(22, -1)[rows])


@pytest.mark.parametrize("family", ["gemma3_text", "bloom", "llama"])
def test_each_block_is_called_as_the_model_calls_it(family: str) -> None:
    """Without weights: the skeleton has none. Gemma 3's blocks differ in masks and rotary tables."""
    skeleton = DecoderStack(build_skeleton(make_config(family), torch.float32), CPU)
    skeleton.fill_small_parameters()
    skeleton.find_output_form()
    _, arguments, _ = run_whole(make_stack(family), token_ids(2, 11))
    for call, kwargs in zip(skeleton.calls(2, 11), arguments, strict=True):
        ours = tree_leaves({key: value for key, value in call.kwargs.items() if value is not None})
        theirs = tree_leaves(
            {key: value for key, value in kwargs.items() if value is not None and key != "hidden_states"}
        )
        ours, theirs = ([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] for leaves in (ours, theirs))
        assert ours
        assert len(ours) == len(theirs)
        assert all(map(torch.equal, ours, theirs))
    if family == "gemma3_text":
        first, second = skeleton.calls(2, 11)
        assert not all(map(torch.equal, first.tensors(), second.tensors()))


def test_padding_on_the_right_changes_no_real_token() -> None:
    stack, ids = make_stack("mistral"), token_ids(1, 9)
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    ends = []
    for batch in (ids, padded):
        states = stack.embed(batch)
        with torch.no_grad():
            for block, call in zip(stack.blocks, stack.calls(*batch.shape), strict=True):
                states = call.run(block, states)
        ends.append(states[:, :9])
    torch.testing.assert_close(ends[0], ends[1])


def test_modules_outside_the_blocks_are_told_apart() -> None:
    stack = make_stack("opt-projected")
    assert stack.prefixes == ("model.decoder.layers.0", "model.decoder.layers.1")
    assert set(stack.embeddings) == {"model.decoder.embed_tokens", "model.decoder.embed_positions"}
    assert stack.head_name == "lm_head"
    assert set(stack.small_names) == {
        "model.decoder.final_layer_norm.weight",
        "model.decoder.final_layer_norm.bias",
        "model.decoder.project_in.weight",
        "model.decoder.project_out.weight",
    } or set(stack.small_names) == {"model.decoder.project_in.weight", "model.decoder.project_out.weight"}
    assert (stack.hidden_size, stack.vocab_size) == (32, VOCAB_SIZE)


def test_the_model_is_left_as_it_was() -> None:
    stack, ids = make_stack("gpt2"), token_ids(1, 5)
    before = stack.model(input_ids=ids).logits
    stack.embed(ids)
    stack.logits(torch.randn(3, 32))
    assert not any("forward" in module.__dict__ for module in stack.model.modules())
    assert torch.equal(stack.model(input_ids=ids).logits, before)


def test_calls_of_as_many_shapes_are_kept_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack("llama")
    shapes = [(1, tokens) for tokens in range(4, 34)]
    calls = [stack.calls(*shape) for shape in shapes]
    assert all(stack.calls(*shape) is call for shape, call in zip(shapes, calls, strict=True))

    stack.forget_calls()
    assert stack.calls(*shapes[0]) is not calls[0]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in stack.calls(1, 33)[0].tensors()}
    monkeypatch.setattr(block_calls, "CACHED_BYTES", 10 * sum(storage.nbytes() for storage in storages.values()))
    stack.forget_calls()
    rounds = [[stack.calls(*shape) for shape in shapes] for _ in range(3)]
    kept = sum(before is after for before, after in zip(*rounds[1:], strict=True))
    assert 10 <= kept < len(shapes) - 1  # there is room for ten of the largest one; one place is taken in turns
    large = stack.calls(1, 400)  # larger than all the room there is
    assert stack.calls(1, 400) is large


def test_a_call_moves_to_another_dtype_without_its_indices() -> None:
    call = BlockCall((torch.arange(3),), {"tables": (torch.ones(2), None)}, hidden_is_positional=True)
    moved = call.to("meta", torch.bfloat16)
    assert [(tensor.dtype, tensor.device.type) for tensor in moved.tensors()] == [
        (torch.int64, "meta"),
        (torch.bfloat16, "meta"),
    ]


class ToyBlock(nn.Module):
    """A block of one matrix; keeps and returns whatever the loop under test wants."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return hidden_states + self.linear(hidden_states)


class Toy(PreTrainedModel):
    """A decoder whose loop over the blocks is chosen by name."""

    config_class = LlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ["ToyBlock"]  # noqa: RUF012 - as transformers declares it

    def __init__(self, loop: str) -> None:
        super().__init__(LlamaConfig(vocab_size=13, hidden_size=8, num_attention_heads=1))
        self.loop = loop
        self.embed = nn.Embedding(13, 8)
        self.layers = nn.ModuleList([ToyBlock(8), ToyBlock(8)])
        self.lm_head = nn.Linear(8, 13, bias=False)
        self.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        start = hidden = self.embed(input_ids)
        first, second = self.layers
        match self.loop:
            case "plain":
                hidden = second(first(hidden))
            case "tuples":
                hidden, _ = first(hidden)
                hidden, _ = second(hidden)
            case "backwards":
                hidden = first(second(hidden))
            case "one of two":
                hidden = first(first(hidden))
            case "scaled between":
                hidden = second(first(hidden) / 2)
            case "past the blocks":
                hidden = second(first(hidden)) + start
            case "embeddings beside":
                hidden = second(first(hidden, start), start)
            case "shared container":
                shared: dict[str, torch.Tensor] = {}
                hidden = second(first(hidden, shared), shared)
            case "cache":
                hidden = second(first(hidden, past=DynamicCache()))
            case "handed on":
                hidden, bias = first(hidden, None)
                hidden, _ = second(hidden, bias)
            case "handed on if there":
                output = first(hidden)
                bias = output[1] if len(output) > 1 else None
                hidden = second(output[0], bias)[0]
            case "reads the ids":
                hidden = second(first(hidden, input_ids), input_ids)
            case "folded":
                hidden = second(first(hidden.reshape(-1, 8))).reshape(start.shape)
            case "no head":
                return SimpleNamespace(logits=second(first(hidden)))
        return SimpleNamespace(logits=self.lm_head(hidden))


@pytest.mark.parametrize("loop", ["plain", "tuples"])
def test_a_plain_loop_is_accepted(loop: str) -> None:
    stack = DecoderStack(Toy(loop), CPU)
    stack.find_output_form()
    assert len(stack.calls(2, 5)) == 2
    assert stack.embed(torch.ones(2, 5, dtype=torch.long)).shape == (2, 5, 8)


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        ("backwards", "block 1 is called in the place of block 0"),
        ("one of two", "block 0 is called in the place of block 1"),
        ("scaled between", "block 1 receives something else than block 0 returns"),
        ("past the blocks", "led past the blocks"),
        ("embeddings beside", "a second tensor that depends on the embeddings"),
        ("shared container", "a container that one block fills and another reads"),
        ("cache", "a container that one block fills and another reads"),
        ("handed on", "more than hidden states"),
        ("handed on if there", "more than hidden states"),
        ("folded", r"hidden states of shape \[3, 8\]"),
        ("no head", "the head is not called"),
    ],
)
def test_a_loop_that_does_more_than_hand_on_hidden_states_is_refused(loop: str, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"^Toy cannot be streamed: its blocks exchange .*{reason}") as caught:
        DecoderStack(Toy(loop), CPU).find_output_form()
    assert "\n" not in str(caught.value)


def test_blocks_that_read_the_token_ids_are_refused_when_the_ids_are_known() -> None:
    stack = DecoderStack(Toy("reads the ids"), CPU)
    stack.find_output_form()  # with all ids zero there is nothing to see
    with pytest.raises(ModelError, match=r"Toy cannot be streamed: its blocks also read the token ids"):
        stack.embed(torch.ones(1, 3, dtype=torch.long))


def test_a_block_that_changes_the_shape_is_refused() -> None:
    with pytest.raises(ModelError, match=r"a Linear does not map hidden states to hidden states of the same shape"):
        BlockCall((), {}, hidden_is_positional=True).run(nn.Linear(8, 4), torch.zeros(1, 2, 8))


@pytest.mark.parametrize("kind", [tuple, list])
def test_the_first_of_what_a_block_returns_are_the_hidden_states(kind: type) -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> Any:
            return kind((hidden_states * mask, mask))

    call = BlockCall((), {"mask": torch.tensor(2.0)}, hidden_is_positional=False)
    assert torch.equal(call.run(Block(), torch.ones(1, 2, 8)), torch.full((1, 2, 8), 2.0))


def test_a_model_without_declared_blocks_gives_its_outermost_list() -> None:
    model = make_model(make_config("mpt"))
    model._no_split_modules = []
    name, blocks = find_block_list(model)
    assert name == "transformer.blocks"
    assert blocks is model.transformer.blocks


def test_a_model_with_two_lists_of_blocks_is_refused_by_their_names() -> None:
    model = Toy("plain")
    model.more = nn.ModuleList([ToyBlock(8)])
    with pytest.raises(ModelError, match=r"Toy should have one list of decoder blocks; found layers, more"):
        find_block_list(model)


def test_a_model_without_blocks_or_without_head_is_refused() -> None:
    model = Toy("plain")
    model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match=r"one list of decoder blocks; found none"):
        find_block_list(model)
    headless = Toy("plain")
    headless.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match=r"Toy has no output embeddings"):
        DecoderStack(headless, CPU)
