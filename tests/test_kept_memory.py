"""Kept memory stays below the highest peak, or the budget, and goes where it is worth most.

Not covered: what it is worth; that was measured (docs/performance.md).
"""

from __future__ import annotations

import dataclasses

import pytest

from streamda.costs import Workload
from streamda.heap import HEAP_BLOCK_BYTES, HEAP_ROOM_BYTES, HEAP_STRETCH_BYTES
from streamda.kept_memory import between_micro_batches, room_bytes, spare_bytes, stretch_bytes
from tests.test_plan import MODELS, llama_workload

ROOM, STRETCH = HEAP_ROOM_BYTES, HEAP_STRETCH_BYTES


def workload(*, rows: bool) -> Workload:
    """Of two blocks, the second with the larger weights; every group keeps rows, or sums."""
    whole = llama_workload(MODELS["Llama-2-7B"], 1024)
    blocks = []
    for cost, size in zip(whole.blocks[:2], (1000, 3000), strict=True):
        groups = tuple(dataclasses.replace(group, token_rows=100 * rows) for group in cost.spec.groups)
        spec = dataclasses.replace(cost.spec, groups=groups)
        blocks.append(dataclasses.replace(cost, spec=spec, weight_bytes=size, stored_weight_bytes=size // 2))
    return dataclasses.replace(whole, blocks=tuple(blocks))


@pytest.mark.parametrize(("keep_stored", "weights"), [(False, 3000), (True, 1500)])
@pytest.mark.parametrize(("rows", "needed"), [(True, 0), (False, ROOM)])
def test_weights_stay_where_that_leaves_room_for_what_is_worth_more(
    rows: bool, needed: int, keep_stored: bool, weights: int
) -> None:
    for missing in (0, 1):
        peaks = {"backward": 5000 + weights + needed - missing, "solve": 5000}
        expected = 0 if missing else weights
        assert spare_bytes(workload(rows=rows), peaks, keep_stored) == expected
    assert spare_bytes(workload(rows=rows), {"backward": 10 * ROOM}, keep_stored) == 0  # nothing is solved


def test_the_heap_keeps_what_leaves_a_phase_below_the_highest() -> None:
    peaks = {"prologue": 9 * ROOM, "forward": 8 * ROOM + 10, "backward": 9 * ROOM - 5, "solve": ROOM}
    assert room_bytes(peaks, 0) == {"forward": ROOM - 10, "backward": 5, "solve": ROOM}
    assert room_bytes(peaks, ROOM) == {"forward": ROOM - 10, "backward": 5, "solve": 2 * ROOM}
    assert room_bytes({"forward": 10}, 0) == {"forward": 0}


def test_the_heap_is_stretched_where_activations_gain_by_it_and_the_budget_has_room() -> None:
    plain = workload(rows=True)

    def of(largest: int, saved: int = 0) -> Workload:
        blocks = tuple(dataclasses.replace(cost, largest_bytes=largest, saved_bytes=saved) for cost in plain.blocks)
        return dataclasses.replace(plain, blocks=blocks)

    peak, wide = 7 * STRETCH, of(HEAP_BLOCK_BYTES + 1)
    assert stretch_bytes(wide, peak, peak + STRETCH) == STRETCH
    assert stretch_bytes(wide, peak, peak + STRETCH - 1) == 0
    assert stretch_bytes(wide, peak - 1, peak + STRETCH) == 0  # the plan would be far above what is taken
    assert stretch_bytes(of(HEAP_BLOCK_BYTES), peak, peak + STRETCH) == 0  # the heap keeps those in any case
    fused = dataclasses.replace(wide, blocks=(dataclasses.replace(wide.blocks[0], fused_count=1),))
    assert stretch_bytes(fused, peak, peak + STRETCH) == 0  # they take the room while they are loaded
    assert between_micro_batches(of(0, saved=70), STRETCH) == STRETCH + 70
    assert between_micro_batches(of(0, saved=10 * STRETCH), STRETCH) == 2 * STRETCH
    assert between_micro_batches(of(0, saved=70), 0) == 0
