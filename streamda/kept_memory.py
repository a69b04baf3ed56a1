"""What a CPU run keeps of the memory that it frees, to take it again, for its speed alone.

All that may be left over lies below the peak of the run but what the heap is stretched by, where the budget has room
for that. Between two blocks more may be free, which the next one takes again (`streamda.heap.FOUND_AGAIN`).
"""

from __future__ import annotations

from collections.abc import Mapping

from streamda.costs import Workload
from streamda.heap import HEAP_BLOCK_BYTES, HEAP_ROOM_BYTES, HEAP_STRETCH_BYTES

REUSING_PHASES = ("forward", "backward", "solve")
"""Where the same sizes are needed again and again: block by block, and micro-batch by micro-batch."""


LEAST_PEAK_PER_STRETCH = 7
"""The backward pass's peak must be at least this many times what the heap may be stretched by."""


def stretch_bytes(workload: Workload, backward_peak: int, available: int) -> int:
    """By what the heap may outgrow the activations of the backward pass, or 0.

    Args:
        workload: the model and the samples.
        backward_peak: of that pass.
        available: of the budget, for this and all else.
    """
    largest = max(cost.largest_bytes for cost in workload.blocks)
    has_room = available - backward_peak >= HEAP_STRETCH_BYTES
    # weights that are fused while they are loaded would have to share the room with all that is kept
    gains = largest > HEAP_BLOCK_BYTES and not any(cost.fused_count for cost in workload.blocks)
    # smaller models make less of it, and their plan would be far above what they take
    is_large = backward_peak >= LEAST_PEAK_PER_STRETCH * HEAP_STRETCH_BYTES
    return HEAP_STRETCH_BYTES if has_room and gains and is_large else 0


def between_micro_batches(workload: Workload, stretch: int) -> int:
    """What is free of a stretched heap when a micro-batch has gone through a block: what autograd kept of it, too."""
    return stretch + min(stretch, max(cost.saved_bytes for cost in workload.blocks))


def spare_bytes(workload: Workload, peaks: Mapping[str, int], keep_stored: bool) -> int:
    """A block's weights, whose memory stays for the next one's while the block is solved, or 0.

    That is worth half a second for a block of a 13B model. What the heap may keep instead is worth a sixth of a
    solution: minutes where there are sums to be factorized, nothing that shows where there are rows.

    Args:
        workload: the model and the samples.
        peaks: by phase, with nothing kept but what the heap is stretched by.
        keep_stored: whether weights stay in the dtype of their files.
    """
    if "solve" not in peaks:
        return 0
    weights = workload.block_bytes(keep_stored)
    has_sums = any(not group.token_rows for cost in workload.blocks for group in cost.spec.groups)
    left = max(peaks.values()) - peaks["solve"] - weights
    return weights if left >= (HEAP_ROOM_BYTES if has_sums else 0) else 0


def room_bytes(peaks: Mapping[str, int], stretch: int) -> dict[str, int]:
    """What may be left over on the heap by phase: as much as leaves the phase below the highest of them.

    Args:
        peaks: by phase, with nothing kept but what the heap is stretched by.
        stretch: of `stretch_bytes`. When a block is through, what it was stretched by is free, and the activations with
            it; a phase that gave it back would leave the next block to fresh pages.
    """
    highest = max(peaks.values())
    most = 2 * stretch if stretch else HEAP_ROOM_BYTES
    return {phase: min(most, highest - peaks[phase]) for phase in REUSING_PHASES if phase in peaks}
