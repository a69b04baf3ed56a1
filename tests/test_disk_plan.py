"""Which boundaries are kept: what the way down needs is there or can be made, and little disk goes a long way."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda.disk_plan import DiskUse, DiskWork, choose_stride, needed_boundaries, stride_text
from streamda.panels import Panel, Replay

BOUNDARY = 10**9
ONE_REPLAY = (Replay((Panel("gradient", "m", 0, 1, 1),)),)


def disk_work(
    num_blocks: int, *, lowest: int = 0, slots: int = 0, statistics: int = 0, scratch: int = 0, keep: bool = False
) -> DiskWork:
    adapted = [int(index >= lowest) for index in range(num_blocks)]
    return DiskWork(
        lowest=lowest,
        boundary_bytes=BOUNDARY,
        num_micro_batches=0,
        slots=slots,
        statistics_bytes=tuple(each * max(1, statistics) for each in adapted),
        solution_bytes=(0,) * num_blocks,
        record_bytes=(0,) * num_blocks,
        scratch_bytes=scratch,
        replays=tuple(ONE_REPLAY if each else () for each in adapted),
        keep_statistics=keep,
        spill_statistics=True,
    )


def boundaries_at_peak(use: DiskUse) -> int:
    return use.disk_bytes // BOUNDARY


def least_limit(work: DiskWork) -> int:
    return choose_stride(work, 0).disk_bytes


SIZES = st.tuples(st.integers(1, 40), st.integers(0, 39), st.integers(1, 50)).filter(lambda size: size[1] < size[0])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SIZES)
def test_each_step_down_needs_nothing_that_the_step_above_it_dropped(size: tuple[int, int, int]) -> None:
    """What is kept below a segment was kept when the segment above it was made."""
    num_blocks, lowest, stride = size
    above: set[int] = set(range(num_blocks))
    for following in range(num_blocks - 1, lowest - 1, -1):
        needed = needed_boundaries(following, lowest, num_blocks, stride)
        assert list(needed) == sorted(set(needed))
        assert needed[0] == lowest
        assert needed[-1] == following
        kept_below = [index for index in needed if index not in above]
        # what is not there any more can be made from one that is, and is one segment at most
        assert all(any(start in above for start in needed if start < index) for index in kept_below)
        assert len(kept_below) < stride
        above = set(needed)


@pytest.mark.parametrize(("num_blocks", "stride", "peak", "again"), [(32, 1, 34, 0), (32, 4, 13, 21), (80, 8, 19, 63)])
def test_peak_and_repeated_blocks_are_those_counted_by_hand(
    num_blocks: int, stride: int, peak: int, again: int
) -> None:
    """Kept ones, a segment's others, and two gradients; of each lower segment all blocks but its last run again."""
    work = disk_work(num_blocks)
    use = choose_stride(work, peak * BOUNDARY + BOUNDARY // 2)
    assert use.stride == stride
    assert boundaries_at_peak(use) == peak
    assert len(use.blocks_again) == len(set(use.blocks_again)) == again


def test_without_a_limit_all_are_kept_and_no_block_runs_again() -> None:
    use = choose_stride(disk_work(32), None)
    assert (use.stride, use.blocks_again) == (1, ())
    assert use.bytes_written["boundaries"] == 33 * BOUNDARY
    assert use.bytes_written["gradients"] == 32 * BOUNDARY  # of the last boundary, and below each block but the first
    assert use.bytes_read["boundaries"] == (32 + 1 + 32) * BOUNDARY  # up, epilogue, down


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIZES, st.integers(0, 5), st.booleans())
def test_the_smallest_stride_that_fits_is_taken(size: tuple[int, int, int], slots: int, keep: bool) -> None:
    num_blocks, lowest, tenths = size
    work = disk_work(num_blocks, lowest=lowest, slots=slots, statistics=BOUNDARY // 3, keep=keep)
    least, most = least_limit(work), choose_stride(work, None).disk_bytes
    assert least <= most
    limit = least + (most - least) * min(tenths, 10) // 10
    use = choose_stride(work, limit)
    assert use.disk_bytes <= limit
    assert choose_stride(work, None, limit, 10**15) == use
    if use.stride > 1:
        assert most > limit
    assert set(use.blocks_again) <= set(range(lowest, num_blocks))


def test_no_disk_at_all_gives_the_stride_that_takes_the_least() -> None:
    """Near the square root: 80 blocks in 19 boundaries of disk instead of 82."""
    assert boundaries_at_peak(choose_stride(disk_work(80), 0)) == 19


def test_boundaries_in_memory_take_no_disk_with_any_stride() -> None:
    for limit in (None, 0):
        on_disk = choose_stride(disk_work(32), limit)
        in_memory = choose_stride(disk_work(32, slots=40), limit)
        some = choose_stride(disk_work(32, slots=3), limit)
        assert boundaries_at_peak(in_memory) == 2  # gradients are always on disk
        assert in_memory.bytes_written["boundaries"] == in_memory.bytes_read["boundaries"] == 0
        assert in_memory.disk_bytes < some.disk_bytes < on_disk.disk_bytes


def test_statistics_that_are_kept_gather_while_boundaries_go() -> None:
    for statistics, peak in ((BOUNDARY, 35), (3 * BOUNDARY, 3 * 32 + 2)):
        use = choose_stride(disk_work(32, statistics=statistics, keep=True), None)
        assert boundaries_at_peak(use) == peak
        assert use.bytes_written["statistics"] == 32 * statistics


def test_what_a_solution_spills_lies_beside_the_boundaries_for_a_while() -> None:
    for limit in (None, 0):
        use = choose_stride(disk_work(32, scratch=3 * BOUNDARY), limit)
        # a block is solved when the next one's boundaries are gone, so the two peaks do not quite meet
        assert 0 < boundaries_at_peak(use) - boundaries_at_peak(choose_stride(disk_work(32), limit)) <= 3
        assert sum(use.bytes_written.values()) == sum(choose_stride(disk_work(32), limit).bytes_written.values())


@pytest.mark.parametrize(
    ("stride", "text"),
    [(1, "all"), (2, "every 2nd"), (3, "every 3rd"), (4, "every 4th"), (11, "every 11th"), (21, "every 21st")],
)
def test_a_stride_in_words(stride: int, text: str) -> None:
    assert stride_text(stride) == text
