"""Which results of linear layers no gradient needs, and that a block without them has the same gradients.

That statistics and adapters of whole models stay what they are is in test_streamed_equals_whole.py and test_golden.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode

import streamda
from streamda import products, unread
from streamda.block_calls import BlockCall
from streamda.errors import ModelError
from streamda.probe import probe_block
from streamda.stored_weights import StoredWeight
from streamda.unread import Replayed, ResultWatch, plain_linears
from tests.golden_options import golden_options
from tests.test_probe import make_stack

CALL = BlockCall((), {}, hidden_is_positional=True)
Combine = Callable[["Mlp", torch.Tensor, torch.Tensor], torch.Tensor]


class Keep(torch.autograd.Function):
    """Keeps what it is given without a function that a mode could see in the block itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return 2 * gradients[0] * ctx.saved_tensors[0]


class Gate(torch.autograd.Function):
    """Keeps what it is given where no hook for saved tensors sees it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        ctx.kept = x, gate
        return x * torch.sigmoid(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, gate = ctx.kept
        share = torch.sigmoid(gate)
        return gradients[0] * share, gradients[0] * x * share * (1 - share)


class Mlp(nn.Module):
    """Two linear layers; what becomes of the second one's result is for a test to say."""

    def __init__(self, combine: Combine) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)
        self.gate, self.dropout = nn.Parameter(torch.rand(8)), nn.Dropout(0.5)
        self.combine = combine
        self.requires_grad_(False).eval()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.combine(self, hidden, self.down(F.silu(self.up(hidden))))


def added(mlp: Mlp, hidden: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    return hidden + result


UNREAD: dict[str, Combine] = {
    "added": added,
    "dropped out": lambda mlp, hidden, result: hidden + mlp.dropout(result),
    "asked": lambda mlp, hidden, result: hidden + result.view(result.shape) if result.requires_grad else hidden,
    "reshaped": lambda mlp, hidden, result: (hidden.reshape(-1, 8) + result.reshape(-1, 8)).view(hidden.shape),
    "scaled": lambda mlp, hidden, result: hidden + 0.5 * result,
    "times a weight": lambda mlp, hidden, result: result * mlp.gate + hidden,
    "two sums": lambda mlp, hidden, result: (hidden + result) + mlp.norm(hidden),
}
READ: dict[str, Combine] = {
    "normed": lambda mlp, hidden, result: hidden + mlp.norm(result),
    "sum normed": lambda mlp, hidden, result: mlp.norm(hidden + result),
    "also normed": lambda mlp, hidden, result: hidden + result + mlp.norm(hidden + result),
    "times the hidden states": lambda mlp, hidden, result: hidden + result * hidden,
    "squared": lambda mlp, hidden, result: hidden + result * result,
    "detached": lambda mlp, hidden, result: hidden * result.detach().abs().mean() + result,
    "in place": lambda mlp, hidden, result: (hidden * 1).add_(result),
    "in a function of its own": lambda mlp, hidden, result: hidden + result + Keep.apply(result),
    "gated in a function of its own": lambda mlp, hidden, result: hidden + Gate.apply(result, hidden),
    "in a list": lambda mlp, hidden, result: hidden + torch.stack([result, hidden]).sum(0),
    "by name": lambda mlp, hidden, result: torch.where(hidden > 0, hidden, other=result) + result,
    "to NumPy": lambda mlp, hidden, result: hidden * float(result.detach().numpy().sum()) + result,
    "left alone": lambda mlp, hidden, result: hidden * 2,
    "made twice": lambda mlp, hidden, result: hidden + result + mlp.down(F.silu(mlp.up(hidden))),
    "dropped out for good": lambda mlp, hidden, result: hidden + F.dropout(result, 0.5, training=True),
}


def watched(block: nn.Module) -> frozenset[str]:
    watch = ResultWatch(plain_linears(block))
    output = CALL.run(block, torch.ones(2, 3, 8, requires_grad=True), watch)
    return watch.unread(output)


@pytest.mark.parametrize("name", UNREAD)
def test_a_result_that_is_only_added_up_is_not_needed(name: str) -> None:
    assert watched(Mlp(UNREAD[name])) == {"down"}


@pytest.mark.parametrize("name", READ)
def test_a_result_that_is_looked_at_is_needed(name: str) -> None:
    assert watched(Mlp(READ[name])) == frozenset()


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"mlp.down_proj"}),
        ("granite", {"mlp.down_proj"}),  # scaled by a number
        ("opt", {"fc2"}),  # added to rows, and shaped back
        ("gpt_neox", {"attention.dense", "mlp.dense_4h_to_h"}),  # beside each other
        ("gemma2", set()),  # normed before they are added
        ("olmo2", set()),
        ("gpt2", set()),  # no layer of torch's
    ],
)
def test_of_a_family_the_last_layers_of_a_block_are_found(family: str, expected: set[str]) -> None:
    stack = make_stack(family)
    probe = probe_block(stack.blocks[1], stack.calls(2, 9)[1], (2, 9, stack.hidden_size), torch.float32)
    assert probe.unread == expected


class Products(TorchFunctionMode):
    """Notes the width of each linear layer's result."""

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.widths.append(result.shape[-1])
        return result


@pytest.mark.parametrize("stored", [False, True], ids=["plain", "stored"])
def test_without_the_product_gradients_are_the_same(stored: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    times = products._times

    def multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        widths.append(weight.shape[0])
        return times(x, weight, bias)

    monkeypatch.setattr(products, "_times", multiplied)
    block = Mlp(added)
    if stored:
        for part in (block.up, block.down):
            part._parameters["weight"] = StoredWeight.keep(part.weight.bfloat16(), torch.float32)  # type: ignore[assignment]
    hidden, above = torch.randn(2, 50, 8), torch.randn(2, 50, 8)
    gradients, results, seen = [], [], []
    block.down.register_forward_hook(lambda _module, args, _result: seen.append(args[0].detach()))
    for names in ((), ("b.down",)):
        entering = hidden.clone().requires_grad_()
        widths.clear()
        with Replayed(block, "b", names) as replayed, Products() as plainly:
            output = replayed.run(CALL, entering)
        assert bool(widths) == (way != "plainly")
        # what is not multiplied by pieces is seen as PyTorch's own function
        assert (widths or plainly.widths) == ([12] if names else [12, 8])
        torch.autograd.backward(output, above)
        assert entering.grad is not None
        gradients.append(entering.grad)
        results.append(output)
    assert torch.equal(*gradients)
    assert torch.equal(*seen)
    assert torch.equal(results[1], hidden)  # nothing was added to it
    assert block.down.forward.__func__ is nn.Linear.forward  # and the layer is itself again


def test_a_run_leaves_the_last_product_of_each_replay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = []
    plain = unread.Replayed.run

    def run(self: Replayed, call: BlockCall, hidden: torch.Tensor) -> torch.Tensor:
        left_out.append(sorted(self._linears))
        return plain(self, call, hidden)

    monkeypatch.setattr(unread.Replayed, "run", run)
    streamda.initialize(**golden_options(tmp_path))
    blocks = len({tuple(names) for names in left_out})
    assert blocks > 1
    assert {tuple(names) for names in left_out} == {(f"model.layers.{i}.mlp.down_proj",) for i in range(blocks)}


def test_a_result_that_is_read_after_all_is_an_error_and_no_wrong_gradient() -> None:
    block = Mlp(READ["also normed"])
    refused = pytest.raises(ModelError, match=r"b\.down is not only added up")
    with Replayed(block, "b", ("b.down",)) as replayed, refused:
        replayed.run(CALL, torch.ones(1, 2, 8, requires_grad=True))
    with torch.no_grad():
        assert block(torch.ones(1, 2, 8)).shape == (1, 2, 8)


class Within(Mlp):
    """Calls a layer within a mode of its own, as some models do to make tensors on a device."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.device("cpu"):
            result = self.down(F.silu(self.up(hidden)))
        return hidden + result


def test_nothing_is_said_of_a_layer_that_is_called_within_another_mode() -> None:
    assert watched(Within(added)) == frozenset()
    assert _len_torch_function_stack() == 0


class Doubled(TorchFunctionMode):
    """Gives twice of every hyperbolic tangent."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.tanh else result


class Partly(Mlp):
    """Calls its first layer within a mode, and reads its second one's result after that."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with Doubled():
            inner = self.up(hidden)
        result = self.down(torch.tanh(inner))
        return hidden + result * hidden


def test_a_mode_that_ends_within_a_block_ends_there() -> None:
    block, hidden = Partly(added), torch.ones(2, 3, 8, requires_grad=True)
    watch = ResultWatch(plain_linears(block))
    output = CALL.run(block, hidden, watch)
    assert torch.equal(output, block(hidden))
    assert watch.unread(output) == frozenset()
    assert _len_torch_function_stack() == 0
