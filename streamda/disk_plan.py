"""Which boundary states stay on disk, and what that costs: peak of the work directory, bytes moved, blocks run again.

Where the disk holds all boundaries, each is made once. Where it is short, the forward pass keeps every k-th one,
counted from the top, and those of the top segment; before the way down enters a lower segment, the segment's boundaries
are made again from the kept one below. With k near the square root of the number of blocks the fewest lie on disk at a
time, and weights are read almost three times.

The numbers come from walking through a run unit by unit, as `streamda.collect_stage` does it, in plain integers: what
is written, read and dropped, in which order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamda.layers import BlockSpec
from streamda.panels import FLOAT32_BYTES, Replay, stored_bytes

RUN_RECORD_BYTES = 1 << 20
"""What describes a run: its record (twice while it is replaced), the lock, copies of the model's configuration."""
LAYER_RECORD_BYTES = 8 << 10
"""What describes a layer's statistics and solution: array descriptions, manifests, headers, counts. Measured: 5 kB."""
RANK_RECORD_BYTES = 64
"""Of a layer's eigenvalues, as text, per rank."""
BOUNDARY_RECORD_BYTES, MICRO_BATCH_RECORD_BYTES = 1 << 10, 16
"""What describes a boundary, and in it the checksum of a micro-batch, as text."""


def needed_boundaries(following: int, lowest: int, num_blocks: int, stride: int) -> tuple[int, ...]:
    """Boundaries that exist when the way down is about to enter a block, ascending.

    Args:
        following: the block that comes next.
        lowest: the last block of the way down; its boundary is always kept.
        num_blocks: decoder blocks; every `stride`-th boundary is counted down from here.
        stride: 1 keeps all.

    Returns:
        The kept boundaries up to ``following``, and those between the highest of them and ``following``.
    """
    kept = [i for i in range(lowest, following + 1) if i == lowest or (num_blocks - i) % stride == 0]
    return (*kept[:-1], *range(kept[-1], following + 1))


@dataclass(frozen=True, slots=True)
class DiskWork:
    """What a run puts on disk, whatever the stride."""

    lowest: int
    """The first block with an adapted layer."""
    boundary_bytes: int
    """Hidden states of all samples at one boundary."""
    num_micro_batches: int
    slots: int
    """Boundaries that may be in memory at a time."""
    statistics_bytes: tuple[int, ...]
    """Per block, on disk; 0 where they stay in memory."""
    solution_bytes: tuple[int, ...]
    """Per block: lora_A and lora_B of its layers; 0 where nothing is solved."""
    record_bytes: tuple[int, ...]
    """Per block, what describes the two."""
    scratch_bytes: int
    """Nameless file of a solution at most, gone before the solution is written."""
    replays: tuple[tuple[Replay, ...], ...]
    keep_statistics: bool
    spill_statistics: bool

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return len(self.replays)


@dataclass(frozen=True, slots=True)
class DiskUse:
    """What a run takes and moves at one stride."""

    stride: int
    disk_bytes: int
    """Peak of the sum of file sizes in the work directory, and of the nameless file of a solution."""
    blocks_again: tuple[int, ...]
    """Blocks whose forward pass runs a second time."""
    bytes_written: dict[str, int]
    bytes_read: dict[str, int]


def disk_work(
    specs: Sequence[BlockSpec],
    replays: Sequence[tuple[Replay, ...]],
    *,
    boundary_bytes: int,
    num_micro_batches: int,
    slots: int,
    rank: int,
    scratch_bytes: int,
    keep_statistics: bool,
    spill_statistics: bool,
) -> DiskWork:
    """Sizes of what a run writes.

    Args:
        specs: of all blocks.
        replays: of all blocks.
        boundary_bytes: hidden states of all samples at one boundary.
        num_micro_batches: that the samples are cut into.
        slots: boundaries that may be in memory at a time.
        rank: of the adapter (0: nothing is solved).
        scratch_bytes: that solving a block puts into a file for a while.
        keep_statistics: whether the statistics of all blocks stay.
        spill_statistics: whether those of a block lie on disk until it is solved; else no disk sees them.
    """
    statistics = tuple(stored_bytes(spec) if spill_statistics else 0 for spec in specs)
    return DiskWork(
        lowest=next((index for index, spec in enumerate(specs) if spec.linears), 0),
        boundary_bytes=boundary_bytes,
        num_micro_batches=num_micro_batches,
        slots=slots,
        statistics_bytes=statistics,
        solution_bytes=tuple(solution_bytes(spec, rank) for spec in specs),
        record_bytes=tuple(
            # checksums, manifest entries and codec frames of tiles: 1 kB each is ample
            len(spec.linears) * (LAYER_RECORD_BYTES + rank * RANK_RECORD_BYTES) + size // (16 << 10)
            for spec, size in zip(specs, statistics, strict=True)
        ),
        scratch_bytes=scratch_bytes,
        replays=tuple(replays),
        keep_statistics=keep_statistics,
        spill_statistics=spill_statistics,
    )


def solution_bytes(spec: BlockSpec, rank: int) -> int:
    """Float32 bytes of lora_A [rank, d_in] and lora_B [d_out, rank] of a block's layers."""
    return sum(rank * (linear.d_in + linear.d_out) * FLOAT32_BYTES for linear in spec.linears)


def stride_text(stride: int) -> str:
    """Which boundaries are kept, for people."""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(stride % 10 if stride // 10 % 10 != 1 else 0, "th")
    return "all" if stride == 1 else f"every {stride}{ending}"


def thinned_out(stride: int) -> str:
    """For messages on a disk that is too small: that fewer boundaries were tried, if they were."""
    return f", even if of the boundary states it keeps {stride_text(stride)}" if stride > 1 else ""


def choose_stride(work: DiskWork, *limits: int | None) -> DiskUse:
    """The smallest stride that fits all limits in bytes; where none does, the one that takes the least disk."""
    limit = min((limit for limit in limits if limit is not None), default=None)
    least: DiskUse | None = None
    for stride in range(1, max(1, work.num_blocks - work.lowest) + 1):
        use = _Walk(work, stride).run()
        if limit is None or use.disk_bytes <= limit:
            return use
        if least is None or use.disk_bytes < least.disk_bytes:
            least = use
    assert least is not None
    return least


class _Walk:
    """A run without tensors: the order of its units, and where each of them is."""

    def __init__(self, work: DiskWork, stride: int) -> None:
        self._work, self._stride = work, stride
        self._in_memory: set[str] = set()
        self._on_disk: dict[str, int] = {}
        self._now = self._peak = 0
        self._again: list[int] = []
        self._written = {"boundaries": 0, "gradients": 0, "statistics": 0, "solutions": 0}
        self._read = {"boundaries": 0, "gradients": 0, "statistics": 0}

    def run(self) -> DiskUse:
        work, top = self._work, self._work.num_blocks
        self._make_boundary("acts0")
        self._go_up((*self._needed(top - 1), top))
        self._read_boundary(f"acts{top}", "boundaries")
        self._write(f"grads{top}", work.boundary_bytes, "gradients")
        self._drop(f"acts{top}")
        for index in range(top - 1, work.lowest - 1, -1):
            if f"acts{index}" not in self._in_memory and f"acts{index}" not in self._on_disk:
                self._again += self._go_up(self._needed(index))
            self._collect(index)
            # from disk a block is solved while the next one is committed: the statistics of two are there at a time
            self._solve(index + 1 if work.spill_statistics else index)
            self._drop(f"acts{index}")
            self._drop(f"grads{index + 1}")
        if work.spill_statistics:
            self._solve(work.lowest)
        boundary = BOUNDARY_RECORD_BYTES + MICRO_BATCH_RECORD_BYTES * work.num_micro_batches
        records = RUN_RECORD_BYTES + sum(work.record_bytes) + (top + 2) * boundary
        return DiskUse(self._stride, self._peak + records, tuple(self._again), self._written, self._read)

    def _solve(self, index: int) -> None:
        work = self._work
        if index == work.num_blocks or not (work.statistics_bytes[index] or work.solution_bytes[index]):
            return
        self._peak = max(self._peak, self._now + work.scratch_bytes)
        self._write(f"solution{index}", work.solution_bytes[index], "solutions")
        self._read["statistics"] += work.statistics_bytes[index] if work.solution_bytes[index] else 0
        if not work.keep_statistics:
            self._drop(f"statistics{index}")

    def _needed(self, following: int) -> tuple[int, ...]:
        return needed_boundaries(following, self._work.lowest, self._work.num_blocks, self._stride)

    def _go_up(self, wanted: tuple[int, ...]) -> list[int]:
        """Makes the boundaries below the highest wanted one, from the highest there is; the blocks that it takes."""
        start = wanted[-1]
        while f"acts{start}" not in self._in_memory and f"acts{start}" not in self._on_disk:
            start -= 1
        for index in range(start, wanted[-1]):
            self._read_boundary(f"acts{index}", "boundaries")
            self._make_boundary(f"acts{index + 1}")
            if index not in wanted:
                self._drop(f"acts{index}")
        return list(range(start, wanted[-1]))

    def _collect(self, index: int) -> None:
        work = self._work
        push = index > work.lowest
        for number, replay in enumerate(work.replays[index] or (Replay(()),)):
            self._read_boundary(f"acts{index}", "boundaries")
            if replay.needs_backward or (push and number == 0):
                self._read_boundary(f"grads{index + 1}", "gradients")
        if push:
            self._write(f"grads{index}", work.boundary_bytes, "gradients")
        if work.statistics_bytes[index]:
            self._write(f"statistics{index}", work.statistics_bytes[index], "statistics")

    def _make_boundary(self, name: str) -> None:
        if len(self._in_memory) < self._work.slots:
            self._in_memory.add(name)
        else:
            self._write(name, self._work.boundary_bytes, "boundaries")

    def _read_boundary(self, name: str, kind: str) -> None:
        self._read[kind] += self._on_disk.get(name, 0)

    def _write(self, name: str, size: int, kind: str) -> None:
        self._on_disk[name] = size
        self._written[kind] += size
        self._now += size
        self._peak = max(self._peak, self._now)

    def _drop(self, name: str) -> None:
        self._in_memory.discard(name)
        self._now -= self._on_disk.pop(name, 0)
