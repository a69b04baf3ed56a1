"""What one block does, found out by running it on the meta device: nothing is computed and no weight is needed.

Two things are learnt: which linear layers read the very same tensor (by the identity of the tensor, not by their
names), and how many bytes autograd keeps alive for a batch of a given shape.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from streamda.blocks import BlockCall
from streamda.layers import InputGroup, LinearSpec, is_linear

FALLBACK_COPIES = 4
"""Where a block cannot run on meta (data-dependent routing), this many copies of every linear layer's input and
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
    exact: bool
    """False where the block could not run on meta and all of this is an upper estimate."""


def probe_block(block: nn.Module, call: BlockCall, shape: tuple[int, int, int], dtype: torch.dtype) -> BlockProbe:
    """Runs a block forward on meta.

    Args:
        block: its parameters may be on meta; it is copied, not changed.
        call: its arguments for that shape, on any device.
        shape: [batch, tokens, hidden].
        dtype: of the hidden states.
    """
    for run_dtype in dict.fromkeys((dtype, torch.bfloat16)):  # grouped expert products exist on meta for bfloat16 only
        try:
            probe = _run_on_meta(block, call, shape, run_dtype)
        except (NotImplementedError, RuntimeError, ValueError, TypeError):
            # whatever keeps a block from running without data; the estimate below is safe in every case
            continue
        factor = dtype.itemsize // run_dtype.itemsize if dtype.itemsize > run_dtype.itemsize else 1
        return BlockProbe(probe.groups, probe.saved_bytes * factor, probe.largest_bytes * factor, exact=True)
    linears = [(name, module) for name, module in block.named_modules() if is_linear(module)]
    rows = shape[0] * shape[1]
    sides = [sum(module.weight.shape) for _, module in linears]  # type: ignore[misc, arg-type]
    # expert weights are no linear layers; the hidden size stands for what they keep
    saved = FALLBACK_COPIES * rows * (sum(sides) + 8 * shape[2]) * dtype.itemsize
    largest = rows * max([*sides, shape[2]]) * dtype.itemsize
    return BlockProbe(tuple((name,) for name, _ in linears), saved, largest, exact=False)


def _run_on_meta(block: nn.Module, call: BlockCall, shape: tuple[int, int, int], dtype: torch.dtype) -> BlockProbe:
    twin = copy.deepcopy(block).to(device="meta", dtype=dtype)
    # held in lists, so that no tensor dies and hands its identity on to another one
    calls: dict[str, list[torch.Tensor]] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    weights = {id(parameter) for parameter in twin.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in weights and not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
        return tensor

    def note(name: str, tensor: torch.Tensor) -> None:
        calls.setdefault(name, []).append(tensor)
        keep(tensor)

    for name, module in twin.named_modules():
        if is_linear(module):
            module.register_forward_pre_hook(lambda _module, args, name=name: note(name, args[0]))
    # rotary tables follow the dtype, or attention would refuse to mix them with the hidden states
    twin_call = call.to("meta", dtype)
    outside = {tensor.untyped_storage()._cdata for tensor in twin_call.tensors()}
    hidden = torch.zeros(shape, dtype=dtype, device="meta", requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = twin_call.run(twin, hidden)
    keep(hidden)
    keep(output)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, inputs in calls.items():
        groups.setdefault(tuple(id(tensor) for tensor in inputs), []).append(name)
    sizes = [storage.nbytes() for key, storage in storages.items() if key not in outside]
    return BlockProbe(tuple(map(tuple, groups.values())), sum(sizes), max(sizes), exact=True)


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
