"""What a CPU run keeps of the memory that it frees, to take it again: within its peak, and for its speed alone."""

from __future__ import annotations

from collections.abc import Mapping

from streamda.costs import Workload
from streamda.memory import HEAP_ROOM_BYTES

REUSING_PHASES = ("forward", "backward", "solve")
"""Where the same sizes are needed again and again: block by block, and micro-batch by micro-batch."""


def spare_bytes(workload: Workload, peaks: Mapping[str, int], keep_stored: bool, unknown: int) -> int:
    """A block's weights, whose memory stays for the next one's while the block is solved, or 0.

    That is worth half a second for a block of a 13B model. What the heap may keep instead is worth a sixth of a
    solution: minutes where there are sums to be factorized, nothing that shows where there are rows.

    Args:
        workload: the model and the samples.
        peaks: by phase, with nothing kept.
        keep_stored: whether weights stay in the dtype of their files.
        unknown: as for `reused_bytes`.
    """
    if "solve" not in peaks:
        return 0
    weights = workload.block_bytes(keep_stored)
    has_sums = any(not group.token_rows for cost in workload.blocks for group in cost.spec.groups)
    left = max(peaks.values()) - peaks["solve"] - weights
    return weights if left >= (HEAP_ROOM_BYTES + unknown if has_sums else 0) else 0


def reused_bytes(peaks: Mapping[str, int], unknown: int) -> dict[str, int]:
    """Of the C heap, by phase: as much as leaves the phase below the highest of them.

    Args:
        peaks: by phase.
        unknown: bytes of which nobody knows how much is there already, as of a tensor that is read ahead.
    """
    highest = max(peaks.values())
    return {
        phase: min(HEAP_ROOM_BYTES, max(0, highest - peaks[phase] - unknown))
        for phase in REUSING_PHASES
        if phase in peaks
    }
