"""The planner: what a run needs, and how it is cut so that it fits. Plain integers; no tensor, no file, no device.

How a block's statistics are cut is in `streamda.panels`. Every peak is a sum of what is alive at the worst moment of a
phase; the terms stand beside their names below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streamda.errors import BudgetError, StorageError
from streamda.layers import BlockSpec
from streamda.memory import MemoryBudget, format_size
from streamda.panels import FLOAT32_BYTES, PANEL_ROWS, Replay, block_panels, pack_replays, stored_bytes

FLOAT64_BYTES = 8
LOGIT_COPIES = 4
"""Float32 copies of a chunk of logits alive at once: the logits, their softmax, its gradient, and one in passing."""
MAX_LOGIT_ROWS = 1024
"""Label positions pass the epilogue as one sequence, and some models make a mask of its length squared."""
MAX_LOGIT_BYTES = 64 << 20
"""Float32 bytes of one copy of a chunk of logits. More saves products with thin operands, less saves memory."""
WORKSPACE_BYTES = 64 << 20
"""What a run takes beside its tensors: interpreter objects, buffers of the matrix library, of the tensor reader and of
the statistics writer. Measured on CPU, see tests/test_memory_bound.py."""
FRAGMENTATION_BYTES = 80 << 20
"""Activations of many shapes leave holes in an allocator that are as large as themselves, up to about this much: larger
blocks are mapped one by one. Measured on CPU."""
THIN_BLOCKS = 40
"""Blocks of rank + guard columns that the eigensolver holds at most: basis, images, and temporaries."""


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One block, at the largest micro-batch."""

    spec: BlockSpec
    weight_bytes: int
    """In the compute dtype."""
    weight_count: int
    saved_bytes: int
    """Kept by autograd between forward and backward."""
    largest_bytes: int
    """The largest single activation."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The model and the samples at one choice of micro-batch size."""

    micro_batch_tokens: int
    largest_rows: int
    """Rows of the largest micro-batch."""
    num_rows: int
    """Rows of all micro-batches, padding included."""
    num_labels: int
    hidden_size: int
    vocab_size: int
    dtype_bytes: int
    small_bytes: int
    """Parameters outside blocks, embeddings and head."""
    embedding_bytes: int
    head_bytes: int
    blocks: tuple[BlockCost, ...]
    checkpoint_bytes: int
    """Stored size of all weights."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run is cut, and what it is expected to take."""

    micro_batch_tokens: int
    replays: tuple[tuple[Replay, ...], ...]
    """Per block; empty where it has no adapted layer."""
    logit_rows: int
    """Label positions per chunk of the head."""
    boundaries_in_memory: int
    peaks: dict[str, int]
    """Predicted peak in bytes by phase."""
    disk_bytes: int
    weight_bytes_read: int
    flops: dict[str, int]
    """Multiplications plus additions by phase."""

    @property
    def peak_bytes(self) -> int:
        """The highest of the phases' peaks."""
        return max(self.peaks.values())

    @property
    def num_replays(self) -> int:
        """Block passes of the backward sweep, all blocks together."""
        return sum(map(len, self.replays))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; replays as their number per block."""
        plain = {key: value for key, value in asdict(self).items() if key != "replays"}
        return plain | {"peak_bytes": self.peak_bytes, "replays": [len(block) for block in self.replays]}


def make_plan(
    budget: MemoryBudget,
    candidates: Sequence[int],
    workload_at: Callable[[int], Workload],
    *,
    rank: int,
    keep_statistics: bool,
    host_is_device: bool,
) -> Plan:
    """Chooses the micro-batch size with the fewest replays (the largest of them), and cuts everything to the budget.

    Args:
        budget: what may be used.
        candidates: micro-batch sizes in tokens, largest first.
        workload_at: costs at a micro-batch size.
        rank: of the adapter that will be solved (0: nothing is solved in this run).
        keep_statistics: whether the statistics of all blocks stay on disk.
        host_is_device: whether memory for boundary states comes out of the device's budget (no accelerator).

    Raises:
        BudgetError: naming need, have, and the smallest budget that would do.
        StorageError: the work directory would outgrow the budget's disk.
    """
    best: Plan | None = None
    smallest = 0
    for tokens in candidates:
        workload = workload_at(tokens)
        smallest = minimum_bytes(workload, rank, budget.host_bytes if host_is_device else 0)
        plan = _plan_at(budget, workload, rank, keep_statistics, host_is_device)
        if plan is not None and (best is None or plan.num_replays < best.num_replays):
            best = plan
    if best is None:
        raise BudgetError(
            f"the budget of {format_size(budget.device_bytes)} is too small: this model and data need "
            f"{format_size(smallest)} at least; use --max-gpu-mem {-(-smallest // 1_000_000)}MB or more, or a smaller "
            "--max-length"
        )
    if budget.disk_bytes is not None and best.disk_bytes > budget.disk_bytes:
        raise StorageError(
            f"the run needs {format_size(best.disk_bytes)} of disk and --max-disk allows "
            f"{format_size(budget.disk_bytes)}; use fewer or shorter samples, or leave out --keep-statistics"
        )
    return best


def minimum_bytes(workload: Workload, rank: int, host_bytes: int) -> int:
    """The smallest budget at this micro-batch size: a block, one panel of its statistics, and what else must be."""
    boundary = _boundary_bytes(workload)
    kept = min(len(workload.blocks) + 1, host_bytes // max(1, boundary)) * boundary
    phases = _fixed_peaks(workload, rank, _logit_rows(workload, None))
    for cost in workload.blocks:
        panel = max((panel.num_bytes for panel in block_panels(cost.spec)), default=0)
        phases["backward"] = max(phases.get("backward", 0), _backward_fixed(workload, cost) + panel)
    return max(phases.values()) + kept


def _plan_at(
    budget: MemoryBudget, workload: Workload, rank: int, keep_statistics: bool, host_is_device: bool
) -> Plan | None:
    boundary = _boundary_bytes(workload)
    in_memory = min(len(workload.blocks) + 1, budget.host_bytes // max(1, boundary))
    available = budget.device_bytes - (in_memory * boundary if host_is_device else 0)
    logit_rows = _logit_rows(workload, available)
    peaks = _fixed_peaks(workload, rank, logit_rows)
    schedule: list[tuple[Replay, ...]] = []
    peaks["backward"] = 0
    for cost in workload.blocks:
        fixed = _backward_fixed(workload, cost)
        replays = pack_replays(block_panels(cost.spec), available - fixed)
        if replays is None:
            return None
        schedule.append(replays)
        held = max((sum(panel.num_bytes for panel in replay.panels) for replay in replays), default=0)
        peaks["backward"] = max(peaks["backward"], fixed + held)
    if max(peaks.values()) > available:
        return None
    if host_is_device:
        peaks = {phase: peak + in_memory * boundary for phase, peak in peaks.items()}
    return Plan(
        micro_batch_tokens=workload.micro_batch_tokens,
        replays=tuple(schedule),
        logit_rows=logit_rows,
        boundaries_in_memory=in_memory,
        peaks=peaks,
        disk_bytes=_disk_bytes(workload, in_memory, keep_statistics),
        weight_bytes_read=2 * workload.checkpoint_bytes,
        flops=_flops(workload, schedule, rank),
    )


def _boundary_bytes(workload: Workload) -> int:
    return workload.num_rows * workload.hidden_size * workload.dtype_bytes


def _hidden_bytes(workload: Workload) -> int:
    return workload.largest_rows * workload.hidden_size * workload.dtype_bytes


def _logit_rows(workload: Workload, available: int | None) -> int:
    """Label positions per chunk: as many as `MAX_LOGIT_BYTES` and a quarter of what the head leaves allow."""
    room = MAX_LOGIT_BYTES
    if available is not None:
        left = available - workload.head_bytes - workload.small_bytes - WORKSPACE_BYTES - 3 * _hidden_bytes(workload)
        room = min(room, max(0, left) // (2 * LOGIT_COPIES))
    else:
        room = 0
    return max(16, min(workload.largest_rows, MAX_LOGIT_ROWS, room // (workload.vocab_size * FLOAT32_BYTES)))


def _fixed_peaks(workload: Workload, rank: int, logit_rows: int) -> dict[str, int]:
    """Peaks of the phases that cannot be cut further."""
    base = workload.small_bytes + WORKSPACE_BYTES
    hidden = _hidden_bytes(workload)
    peaks = {
        # token embeddings, and the micro-batch that they make
        "prologue": base + workload.embedding_bytes + 2 * hidden,
        # one block; its input, its output, and the activations of one sub-layer in passing
        "forward": base
        + max(
            cost.weight_bytes + _fragmented(2 * hidden + min(cost.saved_bytes, 3 * cost.largest_bytes))
            for cost in workload.blocks
        ),
        # the head, one chunk of logits, and the boundary state and its gradient
        "epilogue": base
        + workload.head_bytes
        + LOGIT_COPIES * logit_rows * workload.vocab_size * FLOAT32_BYTES
        + 3 * hidden,
    }
    if rank:
        peaks["solve"] = base + max(
            (_solve_bytes(group.d_in, cost.spec, rank) for cost in workload.blocks for group in cost.spec.groups),
            default=0,
        )
    return peaks


def _solve_bytes(d_in: int, spec: BlockSpec, rank: int) -> int:
    """Float64 factor, the largest float32 gradient on that input, one tile, one band, and the eigensolver's blocks."""
    d_out = max(linear.d_out for linear in spec.linears if linear.d_in == d_in)
    tile = min(d_in, PANEL_ROWS) ** 2 * FLOAT32_BYTES
    thin = THIN_BLOCKS * (rank + 8) * (d_in + d_out // 8) * FLOAT64_BYTES
    band = (min(1024, d_out) + min(512, d_in)) * d_in * FLOAT64_BYTES
    return d_in * d_in * FLOAT64_BYTES + 2 * d_out * d_in * FLOAT32_BYTES + 2 * tile + band + thin


def _backward_fixed(workload: Workload, cost: BlockCost) -> int:
    """A block in replay without its panels: weights, what autograd keeps, four hidden states, gradients in passing."""
    return (
        workload.small_bytes
        + WORKSPACE_BYTES
        + cost.weight_bytes
        + _fragmented(cost.saved_bytes + 3 * cost.largest_bytes + 4 * _hidden_bytes(workload))
    )


def _fragmented(activation_bytes: int) -> int:
    return activation_bytes + min(activation_bytes, FRAGMENTATION_BYTES)


def _disk_bytes(workload: Workload, in_memory: int, keep_statistics: bool) -> int:
    """Boundary states that are not in memory, two gradients of boundaries, and statistics of one block or of all."""
    boundaries = len(workload.blocks) + 1 - in_memory + 2
    sizes = [stored_bytes(cost.spec) for cost in workload.blocks]
    kept = sum(sizes) if keep_statistics else max(sizes)
    return boundaries * _boundary_bytes(workload) + kept


def _flops(workload: Workload, schedule: Sequence[tuple[Replay, ...]], rank: int) -> dict[str, int]:
    """Work of the matrix products with weights and of the statistics; attention's own products are left out."""
    rows = workload.num_rows
    forward = sum(2 * cost.weight_count * rows for cost in workload.blocks)
    replay = statistics = solve = 0
    for cost, replays in zip(workload.blocks, schedule, strict=True):
        for item in replays or (Replay(()),):
            replay += (4 if item.needs_backward else 2) * cost.weight_count * rows
        statistics += sum(
            2 * (p.stop - p.start) * (p.columns + p.start) // 2 * rows
            for r in replays
            for p in r.panels
            if p.statistic == "input_moment"
        )
        statistics += sum(
            2 * (p.stop - p.start) * p.columns * rows for r in replays for p in r.panels if p.statistic == "gradient"
        )
        if rank:
            solve += sum(group.d_in**3 // 3 for group in cost.spec.groups)
    head = 4 * workload.num_labels * workload.vocab_size * workload.hidden_size
    return {"forward": forward, "epilogue": head, "replay": replay, "statistics": statistics, "solve": solve}
