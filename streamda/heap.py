"""The C heap of a CPU run: what of freed memory goes back to the system, and what stays for the next block."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from collections.abc import Callable
from pathlib import Path

import torch

LARGE_BLOCK_BYTES = 1 << 20
HEAP_BLOCK_BYTES, HEAP_KEPT_BYTES = 8 << 20, 64 << 20
"""Thresholds where the budget has `HEAP_SLACK_BYTES` more than a phase needs: what passes through a layer is then found
again on the heap, and what glibc's bug 14581 (see `bound_allocator`) leaves behind is given back between blocks. Fresh
pages for all of it took a tenth of the time of a 135M model, whose backward pass takes 73 MB more so."""
HEAP_SLACK_BYTES = 192 << 20
HEAP_ROOM_BYTES = 192 << 20
"""Most freed memory that a phase keeps from one block to the next, where that leaves it below another phase's peak.
With a stretched heap it is more. Giving it back and taking it anew was another tenth of the time of a 135M model."""
FOUND_AGAIN = 3
"""Times what may be left over, which may be free between two blocks: the next one takes most of it again. A 135M
model's run gave 110 MB back and took them anew, block after block, because they were a few too many: a twentieth of its
time. A phase that took none of it again would outgrow its plan by twice what may be left over, and never the budget; of
those measured none was above its plan (docs/performance.md)."""
ROOMY_BLOCK_BYTES, ROOMY_KEPT_BYTES = 32 << 20, 128 << 20
"""Thresholds of the solution where it may keep all of that, which made it a sixth faster for a 13B block, and of all
phases with a stretched heap. The first is the highest that glibc takes; tiles of statistics are below it."""
HEAP_STRETCH_BYTES = 320 << 20
"""Kept where activations are above `HEAP_BLOCK_BYTES` and the budget has room for this on top of all else. With the
bug below, and the thresholds above, 512 and 1024 tokens of a 13B model leave 230 and 290 MB behind in a block; its
backward pass takes a sixth less time for it, as its activations need no fresh pages."""
COUNTED_EVERY = 4
"""Micro-batches. Counting the free pages of a 135M model's heap takes 1.5 ms: for each, 1 % of the run. Holes of so
many may gather above what may stay."""
SMALL_BLOCK_BYTES = 256 << 10
"""Threshold while a skeleton is built: each weight is allocated, never touched, and dropped, and would stretch the heap
by the size of the model."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h


def bound_allocator(device: torch.device, large_block_bytes: int = LARGE_BLOCK_BYTES) -> None:
    """Makes the C heap of a CPU run give large blocks back when they are freed, for the rest of the process.

    glibc raises its own threshold with every large block that is freed, up to 32 MB, and then keeps what lies below it.
    Worse, before 2.38 it does not find an aligned block again after it was freed (glibc bug 14581), so every pass over
    the data stretches the heap a little more. From 1 MiB on blocks are mapped one by one instead.

    Args:
        device: nothing is done for a CUDA device.
        large_block_bytes: blocks from this size on are mapped one by one; at the end of the heap this much may stay
            free.
    """
    if device.type == "cpu":
        _heap.set_thresholds(large_block_bytes, large_block_bytes)
        _heap.allow(0)


def reuse_heap(device: torch.device, reused_bytes: int, slack_bytes: int, *, large: bool) -> None:
    """Lets a phase of a CPU run keep memory that it frees, and take it again.

    Args:
        device: nothing is done for a CUDA device.
        reused_bytes: of free memory that may be left over while a block is computed. Between two blocks up to
            `FOUND_AGAIN` times as much may be free.
        slack_bytes: of the budget above the phase's planned peak, which holds those.
        large: whether large blocks may be kept as well, if there is `HEAP_ROOM_BYTES` for them. A pass over
            micro-batches takes more: each of them stretches the heap, where an input group gives all of it back.
    """
    if device.type != "cpu":
        return
    if reused_bytes >= (HEAP_ROOM_BYTES if large else HEAP_STRETCH_BYTES):
        block, kept = ROOMY_BLOCK_BYTES, ROOMY_KEPT_BYTES
    elif reused_bytes + slack_bytes >= HEAP_SLACK_BYTES:
        block, kept = HEAP_BLOCK_BYTES, HEAP_KEPT_BYTES
    else:
        block = kept = LARGE_BLOCK_BYTES
    _heap.set_thresholds(block, kept)
    # what the next block takes again is in its peak already; that would be all of it, but for glibc bug 14581
    left = max(reused_bytes, min(FOUND_AGAIN * reused_bytes, HEAP_ROOM_BYTES))
    # what gathers within a block comes on top of what is kept between them
    _heap.allow(min(left, max(0, reused_bytes + slack_bytes - kept)), 0 if kept == LARGE_BLOCK_BYTES else kept)


def release() -> None:
    """Gives back what is free, unless the phase may keep it."""
    _heap.release()


def release_between_micro_batches() -> None:
    """As `release`, for what is called often."""
    _heap.release_now_and_then()


def free_product_buffers() -> None:
    """Frees what MKL keeps for products to come, where torch has one; the next product takes it anew.

    That is what it packs operands into: for each thread the largest of each precision so far, 1.4 and 3.1 MB.
    """
    if (free := _mkl_free_buffers()) is not None:
        free()


@functools.cache
def _mkl_free_buffers() -> Callable[[], object] | None:
    """``mkl_free_buffers`` under the name that torch's own MKL gives it."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None
    function = getattr(library, "mkl_serv_free_buffers", None)
    if function is not None:
        function.restype, function.argtypes = None, []
    return function


class _MallocInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


@functools.cache
def _heap_start() -> int:
    """Address of the heap's first page, which stays the same.

    Raises:
        OSError: the system does not say.
    """
    with open("/proc/self/maps", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.endswith("[heap]\n"):
                return int(line.split("-")[0], 16)
    raise OSError("/proc/self/maps names no heap")


class _Heap:
    """The C heap, of which a process has one. Without glibc only `resident_bytes` does anything, or raises."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._mallopt, self._trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
        self._info = getattr(libc, "mallinfo2", None)  # of 2.33 and later
        if self._info is not None:
            self._info.restype = _MallocInfo
        self._end, self._resident = getattr(libc, "sbrk", None), getattr(libc, "mincore", None)
        if self._end is not None:
            self._end.restype, self._end.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        if self._resident is not None:
            self._resident.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._allowed = self._within = 0
        self._calls = 0

    def set_thresholds(self, large_block_bytes: int, kept_bytes: int) -> None:
        """Block size from which on blocks are mapped one by one, and free bytes that the heap's end may have."""
        if self._mallopt is not None:
            self._mallopt(_M_ARENA_MAX, 1)  # each thread's own heap would keep as much again
            self._mallopt(_M_MMAP_THRESHOLD, large_block_bytes)
            self._mallopt(_M_TRIM_THRESHOLD, kept_bytes)

    def allow(self, num_bytes: int, within: int = 0) -> None:
        """Sets how much free memory may stay, and how much more within a block; what is above the first goes now."""
        before, self._allowed, self._within = self._allowed, num_bytes, within
        if num_bytes < before:
            self.release()

    def release(self) -> None:
        """Gives back what is free, unless all of it may stay."""
        self._trim_above(self._allowed)

    def release_now_and_then(self) -> None:
        """As `release` within a block; where something may stay, only every `COUNTED_EVERY` calls."""
        self._calls += 1
        may_stay = self._allowed + self._within
        if not may_stay or self._calls % COUNTED_EVERY == 0:
            self._trim_above(may_stay)

    def _trim_above(self, num_bytes: int) -> None:
        """Gives back what is free, unless it is no more than that; of nothing that may stay nothing is counted."""
        if self._trim is not None and not (num_bytes and self._stays_below(num_bytes)):
            self._trim(0)

    def _stays_below(self, num_bytes: int) -> bool:
        """Whether no more than that is free."""
        if self._info is None:
            return False
        info = self._info()
        # what the C library counts is too much: free blocks whose pages it has given back, too
        return int(info.fordblks) <= num_bytes or self._free_bytes(int(info.uordblks)) <= num_bytes

    def resident_bytes(self) -> int:
        """Memory of the heap, without the large blocks that are mapped one by one.

        The kernel says it page by page: a twentieth of what its sums in /proc/self/smaps take, which were read after
        each input group and made a 135M model slower by a sixteenth.

        Raises:
            OSError: the system does not say.
        """
        if self._end is None or self._resident is None:
            raise OSError("the C library does not say where the heap ends")
        first = _heap_start()
        num_bytes = int(self._end(0)) - first
        if num_bytes <= 0:
            raise OSError("the heap is not where it was")
        pages = torch.empty(-(-num_bytes // mmap.PAGESIZE), dtype=torch.uint8, device="cpu")
        if self._resident(first, num_bytes, pages.data_ptr()):
            # another thread has made the heap smaller since, or a sandbox forbids the question
            raise OSError("the system does not say which pages of the heap lie in memory")
        # the other bits may be anything; a sum would be one of 64-bit copies
        return int(torch.count_nonzero(pages.bitwise_and_(1))) * mmap.PAGESIZE

    def _free_bytes(self, in_use: int) -> float:
        """Bytes of the heap that are in memory beyond those in use, infinite where nobody counts.

        Too little by what is in use and was never touched, a few tensors below the thresholds at most, and by what is
        in use on heaps of their own that threads have made before (none in a run by the command line).
        """
        try:
            free = self.resident_bytes() - in_use
        except OSError:
            return math.inf
        return free if free >= 0 else math.inf  # what is in use lies elsewhere, too


_heap = _Heap()
