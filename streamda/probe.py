"""What one block does, found out by running it on fake tensors: nothing is computed and no weight is needed.

Three things are learnt: which linear layers read the very same tensor (by the identity of the tensor, not by their
names), of which of them no gradient needs the result, and how many bytes autograd keeps alive for a batch of a given
shape. Fake tensors know the device they stand
for, so attention takes the same kernel as later; on meta it would take the one that keeps all attention weights.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from streamda.block_calls import BlockCall
from streamda.layers import InputGroup, LinearSpec, is_linear
from streamda.unread import ResultWatch, plain_linears

FALLBACK_COPIES = 4
"""Where a block cannot run on fakes (data-dependent routing), this many copies of every linear layer's input and
output are assumed alive. Too high refuses budgets that would do; too low would break them."""


@dataclass(frozen=True, slots=True)
class BlockProbe:
    """One block at one batch shape."""

    groups: tuple[tuple[str, ...], ...]
    """Names, within the block, of linear layers that share their input, in call order."""
    saved_bytes: int
    """Kept alive between forward and backward, weights excluded, inputs of linear layers included."""
    largest_bytes: int
    """The largest single tensor among them."""
    called_once: frozenset[str]
    """Names of linear layers that one pass calls once, on all tokens, as far as that is known."""
    unread: frozenset[str]
    """Names of linear layers whose results no gradient needs (`streamda.unread`), as far as that is known."""
    exact: bool
    """False where the block could not run as it will, and the bytes are an upper estimate."""


def probe_block(block: nn.Module, call: BlockCall, shape: tuple[int, int, int], dtype: torch.dtype) -> BlockProbe:
    """Runs a block forward on fake tensors.

    Args:
        block: its parameters may be on meta; it is copied, not changed.
        call: its arguments for that shape, on the device that will compute.
        shape: [batch, tokens, hidden].
        dtype: of the hidden states.
    """
    for run_dtype in dict.fromkeys((dtype, torch.bfloat16)):  # grouped expert products are known for bfloat16 only
        try:
            with _quiet_fakes():
                return _run_on_fakes(block, call, shape, run_dtype, dtype)
        except (NotImplementedError, RuntimeError, ValueError, TypeError):
            # whatever keeps a block from running without data; the estimate below is safe in every case
            continue
    linears = [(name, module) for name, module in block.named_modules() if is_linear(module)]
    rows = shape[0] * shape[1]
    sides = [sum(module.weight.shape) for _, module in linears]
    # expert weights are no linear layers; the hidden size stands for what they keep
    saved = FALLBACK_COPIES * rows * (sum(sides) + 8 * shape[2]) * dtype.itemsize
    largest = rows * max([*sides, shape[2]]) * dtype.itemsize
    return BlockProbe(tuple((name,) for name, _ in linears), saved, largest, frozenset(), frozenset(), exact=False)


def _run_on_fakes(
    block: nn.Module, call: BlockCall, shape: tuple[int, int, int], run_dtype: torch.dtype, dtype: torch.dtype
) -> BlockProbe:
    real = [tensor.device for tensor in (*call.tensors(), *block.buffers()) if tensor.device.type != "meta"]
    device = real[0] if real else torch.device("cpu")
    twin = copy.deepcopy(block).to(device="meta", dtype=run_dtype)
    # held in lists, so that no tensor dies and hands its identity on to another one
    calls: dict[str, list[torch.Tensor]] = {}
    storages: dict[int, tuple[torch.UntypedStorage, torch.dtype]] = {}

    def fake(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = (storage, tensor.dtype)
        return tensor

    def pack(tensor: torch.Tensor) -> Any:
        # no backward pass follows; an operation that kept its own result would keep itself alive for ever
        keep(tensor)

    def note(name: str, tensor: torch.Tensor) -> None:
        calls.setdefault(name, []).append(tensor)
        keep(tensor)

    for name, module in twin.named_modules():
        if is_linear(module):
            module.register_forward_pre_hook(lambda _module, args, name=name: note(name, args[0]))
    # rotary tables follow the dtype, or attention would refuse to mix them with the hidden states
    meta_call = call.to("meta", run_dtype)
    with FakeTensorMode():  # whose tensors torch's types do not know
        for module in twin.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(fake(parameter), requires_grad=False)  # type: ignore[arg-type]
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = fake(buffer)  # type: ignore[assignment]
        twin_call = BlockCall(
            tree_map(fake, meta_call.args), tree_map(fake, meta_call.kwargs), meta_call.hidden_is_positional
        )
        hidden = torch.zeros(shape, dtype=run_dtype, device=device, requires_grad=True)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing)
        watch = ResultWatch(plain_linears(twin))
        with torch.enable_grad(), hooks:
            output = twin_call.run(twin, hidden, watch)
        unread = watch.unread(output)
        keep(hidden)
        keep(output)
        # a weight is kept as a view of itself, so it is known by its storage only
        outside = (*twin_call.tensors(), *twin.parameters(), *twin.buffers())
        for tensor in outside:
            storages.pop(tensor.untyped_storage()._cdata, None)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, inputs in calls.items():
        groups.setdefault(tuple(id(tensor) for tensor in inputs), []).append(name)
    sizes = [
        storage.nbytes() * (dtype.itemsize if kept == run_dtype else kept.itemsize) // kept.itemsize
        for storage, kept in storages.values()
    ]
    rows = shape[0] * shape[1]
    once = frozenset(name for name, (x, *more) in calls.items() if not more and x.numel() == rows * x.shape[-1])
    names = tuple(map(tuple, groups.values()))
    return BlockProbe(names, sum(sizes), max(sizes), once, unread, exact=run_dtype == dtype)


@contextmanager
def _quiet_fakes() -> Iterator[None]:
    """Keeps torch from printing a traceback for an operation that it cannot fake, which is expected here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def input_groups(prefix: str, probe: BlockProbe, linears: Iterable[LinearSpec]) -> tuple[InputGroup, ...]:
    """The input groups of a block's adapted layers, by full names; layers never called form groups of their own."""
    specs = {spec.name: spec for spec in linears}
    groups = []
    for names in probe.groups:
        chosen = tuple(full for full in (f"{prefix}.{name}" for name in names) if full in specs)
        if chosen:
            groups.append(InputGroup(chosen, specs.pop(chosen[0]).d_in))
            for name in chosen[1:]:
                del specs[name]
    return (*groups, *(InputGroup((name,), spec.d_in) for name, spec in specs.items()))
