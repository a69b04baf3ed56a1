"""The C heap gives back what is freed, but what a phase may keep.

In processes of their own, since thresholds hold for the rest of one. Not covered: what keeping is worth; that was
measured (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streamda import heap

CPU = torch.device("cpu")
MIB = 1 << 20
COUNTS = hasattr(ctypes.CDLL(None), "mallinfo2")


HEAP_SCRIPT = """
import sys, types
package = types.ModuleType("streamda")  # the real one imports all that there is, which takes seconds
package.__path__ = [sys.argv[1]]
sys.modules["streamda"] = package
import torch
from streamda.heap import bound_allocator
from streamda.memory import anonymous_bytes

def touched(size):
    return torch.ones(size, dtype=torch.uint8)

def kept():
    before = anonymous_bytes()
    held = [(touched(20 << 20), touched(100 << 10)) for _ in range(10)]
    pins.extend(small for _, small in held)  # so that what is freed does not lie at the end of the heap
    del held
    return anonymous_bytes() - before

pins = []
touched(31 << 20)  # once it is freed, glibc takes blocks of up to 31 MiB from its heap
alone = kept()
bound_allocator(torch.device("cpu"))
print(alone, kept())
"""


def test_a_bounded_heap_gives_large_blocks_back_when_they_are_freed() -> None:
    command = [sys.executable, "-c", HEAP_SCRIPT, str(Path(heap.__file__).parent)]
    alone, bounded = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert bounded < 8 * MIB
    assert alone > 100 * MIB  # or there would be nothing to bound


@pytest.mark.parametrize(
    ("reused", "slack", "large", "block", "kept", "stays"),
    [
        (0, 191 * MIB, True, 1 * MIB, 1 * MIB, 0),
        (0, 192 * MIB, True, 8 * MIB, 64 * MIB, 0),
        (191 * MIB, 0, True, 1 * MIB, 1 * MIB, 190 * MIB),
        (100 * MIB, 92 * MIB, True, 8 * MIB, 64 * MIB, 128 * MIB),
        (40 * MIB, 400 * MIB, True, 8 * MIB, 64 * MIB, 120 * MIB),
        (80 * MIB, 400 * MIB, False, 8 * MIB, 64 * MIB, 192 * MIB),
        (192 * MIB, 0, False, 8 * MIB, 64 * MIB, 128 * MIB),
        (192 * MIB, 0, True, 32 * MIB, 128 * MIB, 64 * MIB),
        (319 * MIB, 0, False, 8 * MIB, 64 * MIB, 255 * MIB),
        (320 * MIB, 0, False, 32 * MIB, 128 * MIB, 192 * MIB),
        (500 * MIB, 100 * MIB, False, 32 * MIB, 128 * MIB, 472 * MIB),
    ],
)
def test_a_phase_keeps_blocks_as_its_room_allows(
    monkeypatch: pytest.MonkeyPatch, reused: int, slack: int, large: bool, block: int, kept: int, stays: int
) -> None:
    asked: list[tuple[int, int]] = []
    allowed: list[tuple[int, int]] = []
    monkeypatch.setattr(heap._heap, "set_thresholds", lambda *sizes: asked.append(sizes))
    monkeypatch.setattr(heap._heap, "allow", lambda *given: allowed.append(given))
    heap.reuse_heap(CPU, reused, slack, large=large)
    assert (asked, allowed) == ([(block, kept)], [(stays, kept if kept > MIB else 0)])


KEEPING = """
import sys
import torch
from streamda.heap import bound_allocator, reuse_heap
from streamda.memory import anonymous_bytes, release_unused

cpu, mib = torch.device("cpu"), 1 << 20
bound_allocator(cpu)
reuse_heap(cpu, int(sys.argv[1]) * mib, 1 << 40, large=False)
release_unused(cpu)
before = anonymous_bytes()
many = [torch.ones(mib) for _ in range(20)]  # 80 MB, none of them large enough to be mapped
last = torch.ones(mib)  # above them on the heap, whose end it keeps from being given back
many.clear()
release_unused(cpu)
print((anonymous_bytes() - before) // mib)
bound_allocator(cpu)
print((anonymous_bytes() - before) // mib)
"""


@pytest.mark.skipif(not COUNTS, reason="the C library is not glibc 2.33 or later")
@pytest.mark.parametrize(("allowed", "stays"), [(0, False), (20, False), (40, True), (120, True)])
def test_freed_memory_stays_where_a_phase_may_keep_as_much(allowed: int, stays: bool) -> None:
    command = [sys.executable, "-c", KEEPING, str(allowed)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    kept, left = map(int, shown)
    assert (kept > 75) == stays, kept
    assert left < 15  # and none of it once it may not


@pytest.mark.parametrize(
    ("allowed", "within", "free", "times"), [(0, 0, 0, 12), (1, 0, 0, 0), (1, 0, 2, 3), (1, 5, 2, 0), (0, 5, 6, 3)]
)
def test_between_micro_batches_pages_are_counted_seldom_where_some_may_stay(
    monkeypatch: pytest.MonkeyPatch, allowed: int, within: int, free: int, times: int
) -> None:
    made = heap._Heap()
    trimmed: list[int] = []
    monkeypatch.setattr(made, "_trim", trimmed.append)
    monkeypatch.setattr(made, "_stays_below", lambda num_bytes: free <= num_bytes)
    monkeypatch.setattr(heap, "_heap", made)
    made.allow(allowed, within)
    for _ in range(3 * heap.COUNTED_EVERY):
        heap.release_between_micro_batches()
    assert len(trimmed) == times


BUFFERS = """
import torch
from streamda import heap
from streamda.rates import ProductRates

def in_use():
    info = heap._heap._info()
    return int(info.uordblks + info.hblkhd)

rates = ProductRates(torch.device("cpu"), torch.float32)
rates.sample()
before = in_use()
wide = torch.ones(1024, 1024, dtype=torch.float64)
result = torch.empty_like(wide)
held = in_use()
torch.mm(wide, wide, out=result)
kept = in_use() - held
del wide, result
rates.sample()
print(kept, in_use() - before)
"""


@pytest.mark.skipif(not COUNTS, reason="the C library is not glibc 2.33 or later")
@pytest.mark.skipif(heap._mkl_free_buffers() is None, reason="torch has no MKL")
def test_measuring_rates_along_a_run_leaves_no_memory_behind() -> None:
    shown = subprocess.run([sys.executable, "-c", BUFFERS], check=True, capture_output=True, text=True).stdout.split()
    kept, left = map(int, shown)
    assert kept > MIB  # or MKL would keep nothing
    assert left < MIB // 2


COUNTING = """
import torch
from streamda import heap
from streamda.heap import bound_allocator

heap_bytes = heap._heap.resident_bytes
bound_allocator(torch.device("cpu"), 8 << 20)
before = heap_bytes()
small = [torch.ones(1 << 18) for _ in range(40)]
between = heap_bytes()
large = torch.ones(1 << 24)
print((between - before) >> 20, (heap_bytes() - between) >> 20)
last = torch.ones(1 << 18)  # keeps the heap's end where it is
full = heap_bytes()
small.clear()
heap.release()
print((full - heap_bytes()) >> 20)
lines = iter(open("/proc/self/smaps"))
next(line for line in lines if line.endswith("[heap]\\n"))
in_kernel = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
print(abs(heap_bytes() - in_kernel * 1024) >> 20)
"""


@pytest.mark.skipif(not COUNTS, reason="the C library is not glibc 2.33 or later")
def test_the_heap_is_counted_without_large_blocks() -> None:
    shown = subprocess.run([sys.executable, "-c", COUNTING], check=True, capture_output=True, text=True).stdout.split()
    small, large, gone, apart = map(int, shown)
    assert 38 <= small <= 44  # of 40 MB
    assert large <= 2  # of 64 MB
    assert 38 <= gone <= 44  # of 40 MB that were given back below the heap's end
    assert apart <= 2  # from what the kernel sums up


def hidden() -> int:
    raise PermissionError


@pytest.mark.parametrize("count", [hidden, lambda: 1000])  # or the system shows less than there is
def test_where_nobody_counts_all_that_is_free_goes_back(
    monkeypatch: pytest.MonkeyPatch, count: Callable[[], int]
) -> None:
    trimmed: list[int] = []
    ours = heap._Heap()
    monkeypatch.setattr(ours, "_trim", trimmed.append)
    monkeypatch.setattr(ours, "_allowed", 32 << 10)  # less than the C library holds free, given back or not
    if COUNTS:
        monkeypatch.setattr(ours, "resident_bytes", lambda: int(ours._info().uordblks) + (16 << 10))
        ours.release()
        assert trimmed == []
    monkeypatch.setattr(ours, "resident_bytes", count)
    ours.release()
    assert trimmed == [0]


@pytest.mark.parametrize("missing", ["end", "resident", "refused", "start"])
def test_what_the_system_does_not_say_is_an_os_error(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    ours = heap._Heap()
    if missing == "start":

        def start() -> int:
            raise FileNotFoundError("no heap is named")

        monkeypatch.setattr(heap, "_heap_start", start)
    elif missing == "refused":
        monkeypatch.setattr(ours, "_resident", lambda *_: -1)
    else:
        monkeypatch.setattr(ours, f"_{missing}", None)
    with pytest.raises(OSError, match="heap"):
        ours.resident_bytes()
    assert ours._free_bytes(0) == math.inf


@pytest.mark.skipif(not COUNTS, reason="the C library is not glibc 2.33 or later")
def test_pages_are_counted_only_where_the_c_library_says_that_more_may_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[float] = []
    trimmed: list[int] = []
    ours = heap._Heap()
    monkeypatch.setattr(ours, "_trim", trimmed.append)
    monkeypatch.setattr(ours, "_free_bytes", lambda _in_use: counted.append(0.0) or 0.0)
    ours._allowed = 1 << 60
    ours.release()
    assert (counted, trimmed) == ([], [])
    ours._allowed = 1
    ours.release()
    assert (counted, trimmed) == ([0.0], [])
    ours._allowed = 0
    ours.release()
    assert (counted, trimmed) == ([0.0], [0])
