"""The planner: what a run needs, and how it is cut so that it fits. Plain integers; no tensor, no file, no device.

How a block's statistics are cut is in `streamda.panels`. Every peak is a sum of what is alive at the worst moment of a
phase; the terms stand beside their names below.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streamda.costs import BlockCost, Workload
from streamda.disk_plan import DiskUse, choose_stride, disk_work, thinned_out
from streamda.errors import BudgetError, StorageError
from streamda.flops import count_flops
from streamda.kept_memory import between_micro_batches, room_bytes, spare_bytes, stretch_bytes
from streamda.memory import READ_CHUNK_BYTES, RING_BYTES, MemoryBudget, format_size, staged_bytes
from streamda.panels import FLOAT32_BYTES, Replay, block_panels, pack_replays
from streamda.solve_plan import (
    WORKSPACE_BYTES,
    BesideStatistics,
    SolveLayout,
    largest_bytes,
    layouts_beside_statistics,
    solve_layouts,
    spilled_bytes,
)

LOGIT_COPIES = 4
"""Float32 copies of a chunk of logits alive at once: the logits, their softmax, its gradient, and one in passing."""
MAX_LOGIT_ROWS = 1024
"""Label positions pass the epilogue as one sequence, and some models make a mask of its length squared."""
MAX_LOGIT_BYTES = 64 << 20
"""Float32 bytes of one copy of a chunk of logits. More saves products with thin operands, less saves memory."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run is cut, and what it is expected to take."""

    micro_batch_tokens: int
    replays: tuple[tuple[Replay, ...], ...]
    """Per block; empty where it has no adapted layer."""
    logit_rows: int
    """Label positions per chunk of the head."""
    keep_stored: bool
    """Whether weights stay in the dtype of their files and are cast for each product."""
    prefetch: bool
    """Whether the next block is read into memory while one is in use; if not, the system is asked to cache it."""
    spare_bytes: int
    """In the peak of the solution: memory of a block's weights that meanwhile stays for the next one's."""
    spill_statistics: bool
    """Whether the statistics of a block lie on disk until it is solved; if not, they stay in memory."""
    boundaries_in_memory: int
    boundary_threads: bool
    """Whether threads read and write boundary states while the device computes: where the host has the memory."""
    solve_capacity: int
    """Bytes of memory for the solution of one input group."""
    scratch_bytes: int
    """Of a solution that do not fit there and lie in a nameless file for a while, at most."""
    boundary_stride: int
    """Of the other boundaries every so many-th is kept on the way up, and the others are made again on the way down."""
    peaks: dict[str, int]
    """Predicted peak in bytes by phase, with what it may keep of the memory that it frees."""
    reused: dict[str, int]
    """Bytes by phase of freed memory that may be left over there: in its peak, where activations are not."""
    disk_bytes: int
    """Predicted peak of the work directory."""
    weight_bytes_read: int
    """In the files' dtype."""
    weight_passes: float
    """How often that is the size of the checkpoint."""
    bytes_written: dict[str, int]
    """To the work directory: boundaries (hidden states), gradients (of them), statistics, solutions."""
    bytes_read: dict[str, int]
    """From it: boundaries, gradients, statistics."""
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
        return asdict(self) | {"peak_bytes": self.peak_bytes, "replays": [len(block) for block in self.replays]}


def make_plan(
    budget: MemoryBudget,
    candidates: Sequence[int],
    workload_at: Callable[[int], Workload],
    *,
    rank: int,
    keep_statistics: bool,
    host_is_device: bool,
    spill_statistics: bool = False,
    disk_room: int | None = None,
) -> Plan:
    """Chooses the micro-batch size with the fewest replays (the largest of them), and cuts everything to the budget.

    Weights stay in their stored dtype only where that saves replays or is the only way to fit: casting them for each
    product takes time. A block's statistics stay in memory where its solution fits beside them, and the next block is
    read ahead, only where that costs nothing of what was said before.

    Args:
        budget: what may be used.
        candidates: micro-batch sizes in tokens, largest first.
        workload_at: costs at a micro-batch size.
        rank: of the adapter that will be solved (0: nothing is solved in this run).
        keep_statistics: whether the statistics of all blocks stay on disk.
        host_is_device: whether memory for boundary states comes out of the device's budget (no accelerator).
        spill_statistics: whether a block's statistics go to disk even where memory would hold them.
        disk_room: what the file system has to give (None: enough). Boundaries are thinned out until the run fits; the
            caller looks whether it does.

    Raises:
        BudgetError: naming need, have, and the smallest budget that would do.
        StorageError: the work directory would outgrow the budget's disk.
    """
    plan_at = functools.partial(
        _plan_at,
        budget,
        rank=rank,
        keep_statistics=keep_statistics,
        spill_statistics=spill_statistics or keep_statistics,
        host_is_device=host_is_device,
        disk_room=disk_room,
    )
    best: Plan | None = None
    for keep_stored, tokens in itertools.product((False, True), candidates):
        workload = workload_at(tokens)
        if keep_stored and not workload.shrinks:
            continue
        plan = plan_at(workload, keep_stored)
        if plan is not None and (best is None or plan.num_replays < best.num_replays):
            best = plan
            if max(map(len, plan.replays), default=0) <= 1:
                break  # fewer there cannot be, and smaller micro-batches are slower
    if best is not None:
        ahead = plan_at(workload_at(best.micro_batch_tokens), best.keep_stored, prefetch=True)
        if ahead is not None and ahead.num_replays == best.num_replays:
            best = best if ahead.spill_statistics and not best.spill_statistics else ahead
    if best is None:
        host = budget.host_bytes if host_is_device else 0
        megabytes = -(-minimum_bytes(workload_at(candidates[-1]), rank, host) // 10**6)
        raise BudgetError(
            f"the budget of {format_size(budget.device_bytes)} is too small: this model and data need {megabytes}MB at "
            f"least; use --max-gpu-mem {megabytes}MB or more, or a smaller --max-length"
            + (", or leave out --max-host-mem, which is a part of it without a GPU" if host else "")
        )
    if budget.disk_bytes is not None and best.disk_bytes > budget.disk_bytes:
        raise StorageError(
            f"the run needs {format_size(best.disk_bytes)} of disk{thinned_out(best.boundary_stride)}, and --max-disk "
            f"allows {format_size(budget.disk_bytes)}; allow more, or use fewer or shorter samples"
            + (", or leave out --keep-statistics" if keep_statistics and rank else "")
        )
    return best


def minimum_bytes(workload: Workload, rank: int, host_bytes: int) -> int:
    """The smallest budget at this micro-batch size: a block, one panel of its statistics, and what else must be."""
    boundary = _boundary_bytes(workload)
    kept = min(len(workload.blocks) + 1, host_bytes // max(1, boundary)) * boundary
    smallest = []
    layouts = solve_layouts([cost.spec for cost in workload.blocks], rank, 0, workload.num_rows)
    for keep_stored in (False, True):
        phases = _fixed_peaks(workload, _logit_rows(workload, None, keep_stored), layouts, keep_stored)
        for cost in workload.blocks:
            panel = max((panel.num_bytes for panel in block_panels(cost.spec)), default=0)
            phases["backward"] = max(phases.get("backward", 0), _backward_fixed(workload, cost, keep_stored) + panel)
        smallest.append(max(phases.values()))
    return min(smallest) + kept


def _plan_at(
    budget: MemoryBudget,
    workload: Workload,
    keep_stored: bool,
    *,
    rank: int,
    keep_statistics: bool,
    spill_statistics: bool,
    host_is_device: bool,
    disk_room: int | None,
    prefetch: bool = False,
) -> Plan | None:
    boundary = _boundary_bytes(workload)
    pinned = 0 if host_is_device else RING_BYTES + staged_bytes(_hidden_bytes(workload))
    boundary_threads = not host_is_device and budget.host_bytes >= pinned
    in_memory = min(len(workload.blocks) + 1, max(0, budget.host_bytes - pinned) // max(1, boundary))
    available = budget.device_bytes - (in_memory * boundary if host_is_device else 0)
    logit_rows = _logit_rows(workload, available, keep_stored)
    specs = [cost.spec for cost in workload.blocks]
    capacity = max(0, available - workload.small_bytes - WORKSPACE_BYTES)
    layouts = solve_layouts(specs, rank, capacity, workload.num_rows)
    # the next block is there from one block's start to its own, through the solution between them
    ahead = _ahead_bytes(workload, keep_stored) if prefetch else 0
    peaks = _fixed_peaks(workload, logit_rows, layouts, keep_stored, ahead)
    schedule: list[tuple[Replay, ...]] = []
    peaks["backward"] = 0
    for cost in workload.blocks:
        fixed = _backward_fixed(workload, cost, keep_stored, ahead)
        replays = pack_replays(block_panels(cost.spec), available - fixed)
        if replays is None:
            return None
        schedule.append(replays)
        held = max((sum(panel.num_bytes for panel in replay.panels) for replay in replays), default=0)
        peaks["backward"] = max(peaks["backward"], fixed + held)
    if max(peaks.values()) > available:
        return None
    beside: BesideStatistics | None = None
    if layouts and not spill_statistics and max(map(len, schedule)) == 1:
        most = available - peaks["solve"]
        beside = layouts_beside_statistics(specs, rank, capacity - ahead, workload.num_rows, layouts, most)
        if beside is not None:
            capacity, layouts = beside.capacity, beside.layouts
            peaks["solve"] += beside.growth
    reused: dict[str, int] = {}
    spare = 0
    if host_is_device:
        stretch = stretch_bytes(workload, peaks["backward"], available)
        peaks["backward"] += stretch
        if spare := spare_bytes(workload, peaks, keep_stored):
            peaks["solve"] += spare
        below = room_bytes(peaks, stretch)
        peaks |= {phase: peaks[phase] + size for phase, size in below.items()}
        reused = below | {"backward": below["backward"] + between_micro_batches(workload, stretch)}
        peaks = {phase: peak + in_memory * boundary for phase, peak in peaks.items()}
    scratch = spilled_bytes(layouts)
    work = disk_work(
        specs,
        schedule,
        boundary_bytes=boundary,
        num_micro_batches=workload.num_micro_batches,
        slots=in_memory,
        rank=rank,
        scratch_bytes=scratch,
        keep_statistics=keep_statistics,
        spill_statistics=beside is None,
    )
    disk = choose_stride(work, budget.disk_bytes, disk_room)
    weight_bytes_read = _weight_bytes_read(workload, work.lowest, disk)
    return Plan(
        micro_batch_tokens=workload.micro_batch_tokens,
        replays=tuple(schedule),
        logit_rows=logit_rows,
        keep_stored=keep_stored,
        prefetch=prefetch,
        spare_bytes=spare,
        spill_statistics=beside is None,
        boundaries_in_memory=in_memory,
        boundary_threads=boundary_threads,
        solve_capacity=capacity,
        scratch_bytes=scratch,
        peaks=peaks,
        reused=reused,
        boundary_stride=disk.stride,
        disk_bytes=disk.disk_bytes,
        weight_bytes_read=weight_bytes_read,
        weight_passes=weight_bytes_read / workload.checkpoint_bytes,
        bytes_written=disk.bytes_written,
        bytes_read=disk.bytes_read,
        flops=count_flops(workload, schedule, rank, disk.blocks_again),
    )


def _boundary_bytes(workload: Workload) -> int:
    return workload.num_rows * workload.hidden_size * workload.dtype_bytes


def _hidden_bytes(workload: Workload) -> int:
    return workload.largest_rows * workload.hidden_size * workload.dtype_bytes


def _logit_rows(workload: Workload, available: int | None, keep_stored: bool) -> int:
    """Label positions per chunk: as many as `MAX_LOGIT_BYTES` and a quarter of what the head leaves allow."""
    room = MAX_LOGIT_BYTES
    if available is not None:
        _, head = workload.outer_bytes(keep_stored)
        left = available - head - workload.small_bytes - WORKSPACE_BYTES - 3 * _hidden_bytes(workload)
        room = min(room, max(0, left) // (2 * LOGIT_COPIES))
    else:
        room = 0
    return max(16, min(workload.largest_rows, MAX_LOGIT_ROWS, room // (workload.vocab_size * FLOAT32_BYTES)))


def _fixed_peaks(
    workload: Workload, logit_rows: int, layouts: Sequence[SolveLayout], keep_stored: bool, ahead: int = 0
) -> dict[str, int]:
    """Peaks of the phases that cannot be cut further."""
    base = workload.small_bytes + WORKSPACE_BYTES
    hidden = _hidden_bytes(workload)
    embedding, head = workload.outer_bytes(keep_stored)
    peaks = {
        # token embeddings, and the micro-batch that they make
        "prologue": base + embedding + 2 * hidden,
        # one block as it is loaded, before the next one is read; or with its input, its output, and the activations of
        # one sub-layer in passing
        "forward": base
        + max(
            max(
                cost.loading_bytes(keep_stored),
                cost.used_bytes(keep_stored)
                + _fragmented(workload, 2 * hidden + min(cost.saved_bytes, 3 * cost.largest_bytes))
                + ahead,
            )
            for cost in workload.blocks
        ),
        # the head, one chunk of logits, and the boundary state and its gradient
        "epilogue": base + head + LOGIT_COPIES * logit_rows * workload.vocab_size * FLOAT32_BYTES + 3 * hidden,
    }
    if layouts:
        peaks["solve"] = base + largest_bytes(layouts) + ahead
    return peaks


def _backward_fixed(workload: Workload, cost: BlockCost, keep_stored: bool, ahead: int = 0) -> int:
    """A block without its panels, as it is loaded, before the next one is read, or in replay.

    That takes its weights, what autograd keeps, with its input and output, the gradients of both, others in passing.
    """
    activations = _fragmented(workload, cost.saved_bytes + 3 * cost.largest_bytes + 3 * _hidden_bytes(workload))
    replayed = cost.used_bytes(keep_stored) + cost.product_bytes + activations + ahead
    return workload.small_bytes + WORKSPACE_BYTES + max(cost.loading_bytes(keep_stored), replayed)


def _ahead_bytes(workload: Workload, keep_stored: bool) -> int:
    """The largest block that is read while another one is in use, and what its reader holds."""
    return workload.block_bytes(keep_stored) + READ_CHUNK_BYTES


def _fragmented(workload: Workload, activation_bytes: int) -> int:
    return activation_bytes + min(activation_bytes, workload.hole_bytes)


def _weight_bytes_read(workload: Workload, lowest: int, disk: DiskUse) -> int:
    """All weights on the way up, the blocks again on the way down, and those whose boundaries are made again."""
    counts = [cost.weight_count for cost in workload.blocks]
    again = sum(counts[index] for index in disk.blocks_again)
    return workload.stored_dtype_bytes * (workload.outer_count + sum(counts) + sum(counts[lowest:]) + again)
