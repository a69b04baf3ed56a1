"""Kept memory stays below the highest peak, and goes where it is worth most.

Not covered: what it is worth; that was measured (docs/performance.md).
"""

from __future__ import annotations

import dataclasses

import pytest

from streamda.costs import Workload
from streamda.kept_memory import reused_bytes, spare_bytes
from streamda.memory import HEAP_ROOM_BYTES
from tests.test_plan import MODELS, llama_workload

ROOM = HEAP_ROOM_BYTES


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
@pytest.mark.parametrize(("rows", "needed"), [(True, 0), (False, ROOM + 7)])
def test_weights_stay_where_that_leaves_room_for_what_is_worth_more(
    rows: bool, needed: int, keep_stored: bool, weights: int
) -> None:
    for missing in (0, 1):
        peaks = {"backward": 5000 + weights + needed - missing, "solve": 5000}
        expected = 0 if missing else weights
        assert spare_bytes(workload(rows=rows), peaks, keep_stored, 7) == expected
    assert spare_bytes(workload(rows=rows), {"backward": 10 * ROOM}, keep_stored, 7) == 0  # nothing is solved


def test_the_heap_keeps_what_leaves_a_phase_below_the_highest() -> None:
    peaks = {"prologue": 9 * ROOM, "forward": 8 * ROOM + 10, "backward": 9 * ROOM - 5, "solve": ROOM}
    assert reused_bytes(peaks, 3) == {"forward": ROOM - 13, "backward": 2, "solve": ROOM}
    assert reused_bytes({"forward": 10}, 0) == {"forward": 0}
