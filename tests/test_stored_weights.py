"""Weights kept in the dtype of their file give the bits that fully cast ones give, and no cast copy stays alive.

Not covered here: that a whole run with them gives the same statistics (test_prefetch.py).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamda import stored_weights
from streamda.blocks import DecoderStack
from streamda.checkpoint import Checkpoint
from streamda.layers import is_linear
from streamda.skeleton import build_skeleton, load_config
from streamda.stored_weights import StoredWeight
from tests.models import write_checkpoint

CPU = torch.device("cpu")


def loaded(folder: Path, keep_stored: bool) -> tuple[DecoderStack, Checkpoint]:
    """A stack with its small parameters and block 1 in place."""
    stack = DecoderStack(build_skeleton(load_config(folder, False), torch.float32), CPU)
    checkpoint = Checkpoint(folder, stack.model, CPU)
    checkpoint.load(stack.small_names)
    stack.find_output_form()
    checkpoint.load([stack.prefixes[1]], keep_stored=keep_stored)
    return stack, checkpoint


def replay(stack: DecoderStack) -> dict[str, Tensor]:
    """Output of a block, gradient of its input, and per linear layer its input and output gradient."""
    block, seen = stack.blocks[1], {}

    def hook(name: str) -> object:
        def note(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[f"{name}.x"] = args[0].detach()
            output.register_hook(lambda g: seen.__setitem__(f"{name}.g", g.clone()))

        return note

    handles = [m.register_forward_hook(hook(name)) for name, m in block.named_modules() if is_linear(m)]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 9, stack.hidden_size, generator=generator).requires_grad_(True)
    output = stack.calls(2, 9)[1].run(block, hidden)
    output.backward(torch.randn(output.shape, generator=generator))
    for handle in handles:
        handle.remove()
    assert hidden.grad is not None
    return seen | {"output": output.detach(), "gradient": hidden.grad}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family",
    # biases, transposed weights, experts in one tensor and in many, weights read by the module above them
    ["llama", "qwen2", "gpt2", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss", "phimoe", "mamba", "deepseek_v3"],
)
def test_every_bit_is_that_of_the_cast_block(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    _require_equal_bits(family, stored, tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gpt_oss", "deepseek_v3"])
def test_and_so_it_is_where_products_go_by_pieces(family: str, tmp_path: Path, small_pieces: list[int]) -> None:
    _require_equal_bits(family, torch.bfloat16, tmp_path)
    assert small_pieces[0] > 20


def _require_equal_bits(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, dtype=stored)
    cast, _ = loaded(tmp_path, False)
    kept, _ = loaded(tmp_path, True)
    matrices = [weight for weight in kept.blocks[1].parameters() if weight.ndim > 1]
    assert matrices
    assert all(isinstance(weight, StoredWeight) and weight.element_size() == 2 for weight in matrices)
    expected, actual = replay(cast), replay(kept)
    assert set(actual) == set(expected)
    assert expected["gradient"].norm() > 1e-3
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_released_weights_leave_the_skeleton_as_it_was(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", dtype=torch.bfloat16)
    stack, checkpoint = loaded(tmp_path, True)
    block = stack.blocks[1]
    gone = [weakref.ref(weight) for weight in block.parameters()]
    replay(stack)
    checkpoint.release([stack.prefixes[1]])
    assert all(weight.is_meta and weight.dtype == torch.float32 for weight in block.parameters())
    assert not any(isinstance(weight, StoredWeight) for weight in block.parameters())
    gc.collect()
    assert all(reference() is None for reference in gone)


@contextmanager
def storages_alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Tensor]]]:
    """Watches every cast copy that is made."""
    made: list[weakref.ref[Tensor]] = []
    plain = torch.Tensor.to

    def watched(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        result = plain(tensor, *args, **kwargs)
        if tensor.dtype == torch.bfloat16 and result.dtype == torch.float32:
            made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(torch.Tensor, "to", watched)
    yield made
    monkeypatch.undo()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_no_cast_copy_lives_from_forward_to_backward(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    stack, _ = loaded(tmp_path, True)
    hidden = torch.randn(2, 9, stack.hidden_size).requires_grad_(True)
    gc.disable()  # what only the collector could free would count as alive
    try:
        with storages_alive(monkeypatch) as made:
            output = stack.calls(2, 9)[1].run(stack.blocks[1], hidden)
            assert len(made) > 3
            assert not any(reference() is not None for reference in made)
            before = len(made)
            output.sum().backward()
            assert len(made) > before  # cast again
            assert not any(reference() is not None for reference in made)
    finally:
        gc.enable()


def test_autograd_keeps_no_storage_of_the_size_of_a_cast_weight() -> None:
    """What `weakref` cannot see: a saved view of a copy whose own object is gone."""
    stored = torch.randn(64, 64).bfloat16()
    weight = StoredWeight.keep(stored, torch.float32)
    x = torch.randn(3, 64).requires_grad_(True)
    results = (F.linear(x, weight), x @ weight.T, x @ weight, torch.addmm(torch.zeros(64), x, weight), x @ weight[:, :])
    for result in results:
        kept, todo = [], [result.grad_fn]
        while todo:
            node = todo.pop()
            todo += [parent for parent, _ in node.next_functions if parent is not None]
            for name in dir(node):
                if name.startswith("_raw_saved_"):
                    kept.append(getattr(node, name))
        assert kept
        copies = [saved.data for saved in kept if isinstance(saved.data, Tensor) and saved.data.shape[-1:] == (64,)]
        assert not any(copy.shape == (64, 64) and copy.dtype == torch.float32 for copy in copies)


@pytest.mark.parametrize(
    "select", [lambda w: w[1], lambda w: w.transpose(1, 2), lambda w: w[[2, 0]], lambda w: w.mT[0]]
)
def test_a_selection_of_a_weight_is_not_cast_before_it_is_used(select: object, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = torch.randn(3, 8, 8).bfloat16()
    with storages_alive(monkeypatch) as made:
        chosen = select(StoredWeight.keep(stored, torch.float32))
        assert not made
    expected = select(stored.float())
    assert (chosen.dtype, chosen.shape) == (torch.float32, expected.shape)
    assert torch.equal(chosen * 1.0, expected)


def test_a_selection_whose_strides_a_cast_would_change_is_cast_first() -> None:
    weight = StoredWeight.keep(torch.randn(8, 8).bfloat16(), torch.float32)
    part = weight[:, :3]
    assert not isinstance(part, StoredWeight)
    assert part.stride() == (8, 1)


def test_a_weight_says_that_it_is_of_the_compute_dtype_and_a_parameter() -> None:
    weight = StoredWeight.keep(torch.ones(4, 6, dtype=torch.bfloat16), torch.float32)
    assert (weight.dtype, weight.shape, weight.ndim, weight.device) == (torch.float32, (4, 6), 2, CPU)
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert weight.float() is weight
    assert weight.to(torch.float32) is weight
    assert weight.untyped_storage().nbytes() == 4 * 6 * 2
    assert torch.linalg.vector_norm(weight, dtype=torch.float64) == 24**0.5


def test_a_change_that_would_be_lost_is_refused() -> None:
    weight = StoredWeight.keep(torch.ones(4, 6, dtype=torch.bfloat16), torch.float32)
    with pytest.raises(TypeError, match="mul_ would change a copy"):
        weight.mul_(2)


def test_an_error_in_a_module_leaves_nothing_changed() -> None:
    layer = Conv1D(4, 6)
    layer.weight = None
    layer._parameters["weight"] = StoredWeight.keep(torch.ones(6, 4, dtype=torch.bfloat16), torch.float32)
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 5))
    assert isinstance(layer.weight, StoredWeight)
    assert torch.equal(layer(torch.ones(2, 6)), torch.full((2, 4), 6.0) + layer.bias)


class TestLargeWeights:
    """The embeddings and the head of a large vocabulary: looked up, and multiplied by bands."""

    def test_an_embedding_looks_up_stored_rows_and_casts_only_those(self) -> None:
        table = torch.randn(50, 8).bfloat16()
        ids = torch.tensor([[3, 49, 3], [0, 7, 1]])
        found = F.embedding(ids, StoredWeight.keep(table, torch.float32))
        assert found.dtype == torch.float32
        assert type(found) is torch.Tensor
        assert torch.equal(found, F.embedding(ids, table.float()))

    @pytest.mark.parametrize("with_bias", [False, True])
    def test_a_product_by_bands_is_the_whole_product(self, monkeypatch: pytest.MonkeyPatch, with_bias: bool) -> None:
        monkeypatch.setattr(stored_weights, "LARGE_BYTES", 1000)
        monkeypatch.setattr(stored_weights, "BAND_BYTES", 7 * 16 * 4)  # seven rows: the last band is a part of one
        stored, bias = torch.randn(50, 16).bfloat16(), torch.randn(50) if with_bias else None
        x = torch.randn(3, 5, 16, requires_grad=True)
        y = x.detach().clone().requires_grad_(True)
        weight = StoredWeight.keep(stored, torch.float32)
        found = F.linear(x, weight, bias)
        whole = F.linear(y, stored.float(), bias)
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
        upper = torch.randn_like(whole)
        found.backward(upper)
        whole.backward(upper)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
