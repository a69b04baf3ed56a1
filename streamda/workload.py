"""What a model and its samples cost, for the planner: bytes and counts, learnt from the skeleton alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from streamda.batches import MicroBatch, make_micro_batches
from streamda.block_calls import BlockCall
from streamda.blocks import DecoderStack
from streamda.costs import CPU_HOLE_BYTES, HOLE_BYTES, BlockCost, Workload
from streamda.factors import DEVICE_TRIANGLE_ROWS, SQUARE_COLUMNS, wide_tokens
from streamda.layers import BlockSpec, InputGroup, LinearSpec, Targets
from streamda.memory import READ_CHUNK_BYTES, blas_workspace_bytes
from streamda.panels import FLOAT32_BYTES, PANEL_ROWS
from streamda.probe import BlockProbe, input_groups, probe_block
from streamda.products import work_bytes
from streamda.solve_plan import keeps_rows
from streamda.stored_weights import BAND_BYTES, LARGE_BYTES
from streamda.weight_map import fused_parameters

CAST_CHUNK_BYTES = READ_CHUNK_BYTES


class WorkloadModel:
    """Costs of one model and one set of samples, at any micro-batch size."""

    def __init__(
        self,
        stack: DecoderStack,
        targets: Targets,
        lengths: Sequence[int],
        num_labels: int,
        stored_dtype_bytes: int,
        *,
        min_tokens: int = 0,
        moment_bytes: int = FLOAT32_BYTES,
    ) -> None:
        """Takes what does not depend on the micro-batch size.

        Args:
            stack: with its small parameters in place.
            targets: the adapted layers.
            lengths: tokens of each sample.
            num_labels: label tokens of all samples.
            stored_dtype_bytes: bytes per weight in the files.
            min_tokens: that are counted in any case, whichever the token mask and whatever samples turn out bad.
            moment_bytes: of each sum of an input moment.
        """
        self._stack = stack
        self._targets = targets
        self._lengths = tuple(lengths)
        self._num_labels = num_labels
        self._min_tokens = min_tokens
        self._moment_bytes = moment_bytes
        self._stored_dtype_bytes = stored_dtype_bytes
        self._dtype = stack.model.dtype
        self._fused = fused_parameters(stack.model)
        self._probes: dict[object, BlockProbe] = {}
        self._known: dict[tuple[int, int], Workload] = {}

    def at(self, micro_batch_tokens: int, row_tokens: int = 0) -> Workload:
        """Costs with micro-batches of at most so many tokens.

        Args:
            micro_batch_tokens: of the largest micro-batch, but for a sample that has more.
            row_tokens: of all samples, whose rows stand for the sums of their products where those are few; 0 for sums
                in any case.
        """
        key = micro_batch_tokens, row_tokens
        if key not in self._known:
            self._known[key] = self._measure(micro_batch_tokens, row_tokens)
        return self._known[key]

    def _measure(self, micro_batch_tokens: int, row_tokens: int) -> Workload:
        stack, itemsize = self._stack, self._dtype.itemsize
        batches = make_micro_batches(self._lengths, micro_batch_tokens, padded=stack.is_causal)
        worst = max(batches, key=lambda batch: batch.num_rows)
        longest = max(batches, key=lambda batch: batch.length)
        embedding = sum(_num_parameters(module) for module in stack.embeddings.values())
        head = _num_parameters(stack.head)
        small = sum(stack.model.get_parameter(name).numel() for name in stack.small_names)
        blocks = self._block_costs((worst, longest), row_tokens)
        tied = stack.head.weight is stack.model.get_input_embeddings().weight
        narrow = min(self._stored_dtype_bytes, itemsize)
        stored = small + embedding + (0 if tied else head) + sum(cost.weight_count for cost in blocks)
        return Workload(
            micro_batch_tokens=micro_batch_tokens,
            largest_rows=worst.num_rows,
            num_rows=sum(batch.num_rows for batch in batches),
            num_labels=self._num_labels,
            hidden_size=stack.hidden_size,
            vocab_size=stack.vocab_size,
            dtype_bytes=itemsize,
            small_bytes=small * itemsize + blas_workspace_bytes(stack.device),
            embedding_bytes=embedding * itemsize + CAST_CHUNK_BYTES,
            head_bytes=head * itemsize + CAST_CHUNK_BYTES,
            blocks=blocks,
            checkpoint_bytes=stored * self._stored_dtype_bytes,
            stored_dtype_bytes=self._stored_dtype_bytes,
            outer_count=small + embedding + head,
            num_micro_batches=len(batches),
            hole_bytes=CPU_HOLE_BYTES if stack.device.type == "cpu" else HOLE_BYTES,
            stored_embedding_bytes=narrow * embedding + CAST_CHUNK_BYTES if narrow < itemsize else None,
            stored_head_bytes=narrow * head + CAST_CHUNK_BYTES + _cast_bytes(head * itemsize)
            if narrow < itemsize
            else None,
        )

    def _block_costs(self, batches: Sequence[MicroBatch], row_tokens: int) -> tuple[BlockCost, ...]:
        """Probes each kind of block once: a 70B model has eighty blocks of one kind."""
        stack, itemsize = self._stack, self._dtype.itemsize
        costs = []
        calls = [stack.calls(len(batch.samples), batch.length) for batch in batches]
        for index, (prefix, block) in enumerate(zip(stack.prefixes, stack.blocks, strict=True)):
            probes = [self._probe(block, call[index], batch) for batch, call in zip(batches, calls, strict=True)]
            linears = tuple(spec for spec in self._targets.linears if spec.name.startswith(prefix + "."))
            once = {f"{prefix}.{name}" for name in probes[0].called_once}
            groups = input_groups(prefix, probes[0], linears)
            with_rows = tuple(self._counted(group, linears, once, row_tokens) for group in groups)
            # not of a weight so large that it is cast by bands: gradients are multiplied with its transpose, and that
            # cannot be cast so
            counts = {
                name: block.get_parameter(f"{name}.weight").numel() for name in probes[0].unread & probes[1].unread
            }
            unread = {name: counts[name] for name in sorted(counts) if counts[name] * itemsize <= LARGE_BYTES}
            spec = BlockSpec(index, prefix, linears, with_rows, tuple(f"{prefix}.{name}" for name in unread))
            count = _num_parameters(block)
            matrices = [parameter.numel() for parameter in block.parameters() if parameter.ndim > 1]
            by_bands = {id(module.weight) for module in block.modules() if isinstance(module, nn.Linear)}
            sizes = [(id(weight) in by_bands, weight.numel() * itemsize) for weight in block.parameters()]
            casts = [_cast_bytes(size) if banded else size for banded, size in sizes]
            narrow = min(self._stored_dtype_bytes, self._dtype.itemsize)
            costs.append(
                BlockCost(
                    spec=spec,
                    weight_bytes=count * self._dtype.itemsize,
                    weight_count=count,
                    saved_bytes=max(probe.saved_bytes for probe in probes),
                    largest_bytes=max(probe.largest_bytes for probe in probes),
                    stored_weight_bytes=count * self._dtype.itemsize - sum(matrices) * (self._dtype.itemsize - narrow),
                    largest_module_bytes=max(casts, default=0),
                    fused_count=sum(
                        weight.numel() * self._fused.get(f"{prefix}.{name}", 0)
                        for name, weight in block.named_parameters()
                    ),
                    unread_count=sum(unread.values()),
                    product_bytes=self._product_bytes(spec, max(batch.num_rows for batch in batches)),
                )
            )
        return tuple(costs)

    def _counted(self, group: InputGroup, linears: Sequence[LinearSpec], once: set[str], tokens: int) -> InputGroup:
        """The group with what is known of its tokens, and with rows for its statistics where these are few.

        Args:
            group: of layers with their full names.
            linears: of its block.
            once: layers that are called once, on all tokens.
            tokens: of all samples; 0 for sums in any case.
        """
        group = dataclasses.replace(group, moment_bytes=self._moment_bytes)
        if not once.issuperset(group.modules):
            return group
        widths = [linear.d_out for linear in linears if linear.name in group.modules]
        rows = tokens if keeps_rows(tokens, group.d_in, widths) else 0
        return dataclasses.replace(group, token_rows=rows, min_tokens=self._min_tokens)

    def _product_bytes(self, spec: BlockSpec, rows: int) -> int:
        """What a product into a panel needs beside its operands and the panel; see `streamda.factors`."""
        device = self._stack.device
        sizes = [0]
        for linear in spec.linears:
            if spec.group_of(linear.name).token_rows:  # copied, and not multiplied
                continue
            work = work_bytes(device, rows, max(linear.d_in, linear.d_out))
            if self._moment_bytes > FLOAT32_BYTES:  # inputs are cast
                work = max(work, self._moment_bytes * min(rows, wide_tokens(linear.d_in)) * linear.d_in)
            if self._dtype.itemsize >= FLOAT32_BYTES:  # added to the panel where it is
                sizes.append(work)
                continue
            panel_rows = min(linear.d_out, PANEL_ROWS)
            if device.type == "cuda":  # narrow operands, and a product to add
                product = max(panel_rows, DEVICE_TRIANGLE_ROWS) * linear.d_in
            else:
                product = rows * (linear.d_in + panel_rows)
            # an output moment casts on every device, and squares what it has cast
            squares = 2 * rows * min(linear.d_out, SQUARE_COLUMNS)
            chosen = rows * max(linear.d_in, linear.d_out) * self._dtype.itemsize  # without padding
            sizes.append(work + chosen + FLOAT32_BYTES * max(product, squares))
        return max(sizes)

    def _probe(self, block: nn.Module, call: BlockCall, batch: MicroBatch) -> BlockProbe:
        shape = (len(batch.samples), batch.length, self._stack.hidden_size)
        kind = (_structure(block), _arguments(call), shape)
        if kind not in self._probes:
            self._probes[kind] = probe_block(block, call, shape, self._dtype)
        return self._probes[kind]


def micro_batch_candidates(setting: str, lengths: Sequence[int], device: torch.device) -> tuple[int, ...]:
    """Micro-batch sizes to choose from, largest first: a given one alone, or halves of a default down to one sample."""
    if setting != "auto":
        return (int(setting),)
    # a thousand rows run a CPU's matrix products at full rate; a GPU wants more of them to hide its latencies
    size = 8192 if device.type == "cuda" else 1024
    candidates = []
    while size > max(lengths) // 2 and size >= 32:
        candidates.append(size)
        size //= 2
    return (*candidates, 1)


def _cast_bytes(size: int) -> int:
    """What is in the compute dtype at a time of a weight of that size."""
    return size if size <= LARGE_BYTES else BAND_BYTES


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _structure(block: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return (type(block), shapes)


def _arguments(call: BlockCall) -> tuple[object, ...]:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in call.tensors())
