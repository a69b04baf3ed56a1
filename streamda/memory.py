"""Bytes: sizes as users write them, the budget, and meters of what was really used.

The only module that calls torch's CUDA memory functions or reads the process's memory from the system.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from streamda.errors import ConfigError
from streamda.quoting import quoted

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1000**_power, _letter + "b": 1000**_power, _letter + "ib": 1024**_power}
_MAX_DIGITS = 18
_LEAST_PLAIN_BYTES = 10_000
"""A number alone below it lacks its unit: nobody means so few bytes, but more may be what a script has computed."""


def parse_size(text: str | int, name: str = "size") -> int:
    """Bytes of ``24GB`` (24e9), ``24GiB`` (24 * 2^30), ``512m`` or a bare number; upper and lower case alike.

    Accelerate's parser is not used: it reads a lower-case ``gb`` as gigabits.

    Raises:
        ConfigError: not a size, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower(), flags=re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{name} is {quoted(text)}; expected a size such as 24GB, 22GiB, 512MB or a number of bytes")
    if len(match[1]) > _MAX_DIGITS:
        raise ConfigError(f"{name} is {quoted(text)}; no machine has that much")
    size = int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]
    if size <= 0:
        raise ConfigError(f"{name} is {quoted(text)}; it must be above zero")
    return size


def parse_budget(text: str | int, name: str) -> int:
    """Bytes of a budget; as `parse_size`, but no number alone that can only lack its unit."""
    size = parse_size(text, name)
    if size < _LEAST_PLAIN_BYTES and str(text).strip()[-1:].isdigit():
        raise ConfigError(f"{name} is {quoted(text)}, which is {size} bytes; give a unit, such as 24GB")
    return size


def format_size(size: float) -> str:
    """A size for people, in decimal units: ``24.0 GB``."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # 999.5 and more would be shown as 1000 of the smaller unit
        if abs(size) >= 0.9995 * factor:
            return f"{size / factor:.0f} {unit}" if abs(size) >= 99.5 * factor else f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"


READ_CHUNK_BYTES = 32 << 20
"""What a tensor read in another dtype than its file's holds beside itself. Larger saves calls, smaller saves memory."""
LARGE_BLOCK_BYTES = 1 << 20
HEAP_BLOCK_BYTES, HEAP_KEPT_BYTES = 8 << 20, 64 << 20
"""Thresholds where the budget has `HEAP_SLACK_BYTES` more than a phase needs: what passes through a layer is then found
again on the heap, and what the bug below leaves behind is given back between blocks. A fresh page for each of it took
a tenth of the time of a 135M model, whose backward pass takes 73 MB more so."""
HEAP_SLACK_BYTES = 192 << 20
HEAP_ROOM_BYTES = 192 << 20
"""Most freed memory that a phase keeps from one block to the next, where that leaves it below another phase's peak.
Giving it back and taking it anew was another tenth of the time of a 135M model."""
ROOMY_BLOCK_BYTES, ROOMY_KEPT_BYTES = 32 << 20, 128 << 20
"""Thresholds of the solution where it may keep all of that; they made it a sixth faster for a 13B block. The first is
the highest that glibc takes; tiles of statistics are below it."""
SMALL_BLOCK_BYTES = 256 << 10
"""Threshold while a skeleton is built: each weight is allocated, never touched, and dropped, and would stretch the heap
by the size of the model."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What a run may use."""

    device_bytes: int
    """On CUDA: the device's memory. Without one: the process's anonymous memory above its baseline."""
    host_bytes: int
    """Host memory for boundary states; without an accelerator it is taken out of `device_bytes`."""
    disk_bytes: int | None
    """Disk for the work directory; None is what the file system has free."""


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process: heap, stacks and private mappings, without any file's pages."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status names no RssAnon")


def bound_allocator(
    device: torch.device, large_block_bytes: int = LARGE_BLOCK_BYTES, kept_bytes: int | None = None
) -> None:
    """Makes the C heap of a CPU run give large blocks back when they are freed, for the rest of the process.

    glibc raises its own threshold with every large block that is freed, up to 32 MB, and then keeps what lies below it.
    Worse, before 2.38 it does not find an aligned block again after it was freed (glibc bug 14581), so every pass over
    the data stretches the heap a little more. From 1 MiB on blocks are mapped one by one instead.

    Args:
        device: nothing is done for a CUDA device.
        large_block_bytes: blocks from this size on are mapped one by one.
        kept_bytes: free at the end of the heap that are not handed back; the same where none are given.
    """
    if device.type == "cpu":
        _heap.set_thresholds(large_block_bytes, large_block_bytes if kept_bytes is None else kept_bytes)
        _heap.allow(0)


def reuse_heap(device: torch.device, reused_bytes: int, slack_bytes: int, *, large: bool) -> None:
    """Lets a phase of a CPU run keep memory that it frees, and take it again.

    Args:
        device: nothing is done for a CUDA device.
        reused_bytes: that it may keep from one block to the next.
        slack_bytes: of the budget above the phase's planned peak, which holds those.
        large: whether large blocks may be kept as well, if there is `HEAP_ROOM_BYTES` for them. Not in a pass over
            micro-batches: each of them would stretch the heap, where an input group gives all of it back.
    """
    if device.type != "cpu":
        return
    if large and reused_bytes >= HEAP_ROOM_BYTES:
        block, kept = ROOMY_BLOCK_BYTES, ROOMY_KEPT_BYTES
    elif reused_bytes + slack_bytes >= HEAP_SLACK_BYTES:
        block, kept = HEAP_BLOCK_BYTES, HEAP_KEPT_BYTES
    else:
        block = kept = LARGE_BLOCK_BYTES
    _heap.set_thresholds(block, kept)
    # what gathers within a block comes on top of what is kept between them
    _heap.allow(min(reused_bytes, max(0, reused_bytes + slack_bytes - kept)))


class _MallocInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


class _Heap:
    """The C heap, of which a process has one. Everything here does nothing where the C library is not glibc."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._mallopt, self._trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
        self._info = getattr(libc, "mallinfo2", None)  # of 2.33 and later
        if self._info is not None:
            self._info.restype = _MallocInfo
        self._allowed = 0
        self._elsewhere = 0  # anonymous memory that malloc does not account for

    def set_thresholds(self, large_block_bytes: int, kept_bytes: int) -> None:
        """Block size from which on blocks are mapped one by one, and free bytes that the heap's end may have."""
        if self._mallopt is not None:
            self._mallopt(_M_ARENA_MAX, 1)  # each thread's own heap would keep as much again
            self._mallopt(_M_MMAP_THRESHOLD, large_block_bytes)
            self._mallopt(_M_TRIM_THRESHOLD, kept_bytes)

    def allow(self, num_bytes: int) -> None:
        """Sets how much free memory may stay; more of it is given back now."""
        before, self._allowed = self._allowed, num_bytes
        if num_bytes < before:
            self.release()
        elif num_bytes and not before:
            self._give_back()

    def release(self) -> None:
        """Gives back what is free, unless all of it may stay."""
        if self._trim is None:
            return
        if self._info is None or not self._allowed:
            self._trim(0)
        elif self._unaccounted() - self._elsewhere > self._allowed:
            self._give_back()

    def _give_back(self) -> None:
        if self._trim is not None and self._info is not None:
            self._trim(0)
            self._elsewhere = self._unaccounted()

    def _unaccounted(self) -> int:
        """Anonymous memory beside what is in use: free blocks whose pages are there, and all that is not malloc's.

        Too little by what is in use and was never touched, as of a tensor that is being read: the plan allows for it.
        """
        info = self._info()  # type: ignore[misc]  # the caller has looked
        return anonymous_bytes() - int(info.uordblks) - int(info.hblkhd)


_heap = _Heap()


def release_unused(device: torch.device) -> None:
    """Hands memory that is free but still held by an allocator back: CUDA's cache, or the C heap.

    On the heap what the phase may keep stays.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        # smaller blocks stay on the heap when they are freed; without this they pile up between the phases
        _heap.release()


class PeakMeter:
    """Measures the peak of a phase against the budget's own yardstick.

    On CUDA that is the allocator's reserved peak. On CPU it is anonymous memory above the baseline at construction,
    sampled by a thread: a spike shorter than the interval can be missed, which is why the tests prove the bound with a
    kernel limit and not with this meter.
    """

    def __init__(self, device: torch.device, interval_seconds: float = 0.01) -> None:
        self._device = device
        self._interval = interval_seconds
        self._baseline = 0 if device.type == "cuda" else anonymous_bytes()
        self._peak = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMeter:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread = threading.Thread(target=self._sample, name="streamda-peak-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            with self._lock:  # a reading from before a reset must not be written after it
                self._peak = max(self._peak, anonymous_bytes() - self._baseline)

    def take_peak(self) -> int:
        """Peak in bytes since the last call (or since entering), and starts a new period."""
        if self._device.type == "cuda":
            peak = int(torch.cuda.max_memory_reserved(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
            return peak
        with self._lock:
            peak = max(self._peak, anonymous_bytes() - self._baseline)
            self._peak = 0
        return peak

    def current(self) -> int:
        """Bytes in use now, by the same yardstick."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_reserved(self._device))
        return anonymous_bytes() - self._baseline


def total_device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device, in use or not."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def enforce_device_limit(device: torch.device, limit_bytes: int) -> None:
    """On CUDA, makes the budget a hard cap of the caching allocator; the plan is all there is on CPU."""
    if device.type == "cuda":
        fraction = min(1.0, limit_bytes / total_device_bytes(device))
        torch.cuda.set_per_process_memory_fraction(fraction, device)


CopyMark = torch.cuda.Event | None
"""A point behind some copies; None where they are done as soon as they are asked for."""


class DeviceCopier:
    """Brings chunks of weights from host memory to the device.

    On a CPU that is a copy. On CUDA chunks pass through one pinned buffer and a stream of their own, so that they
    travel while the main stream computes; used by one thread at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffer: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it
        self._entered: AbstractContextManager[object] = nullcontext()

    def __enter__(self) -> DeviceCopier:
        self._entered = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        self._entered.__enter__()  # what is allocated inside belongs to the stream that fills it
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.__exit__(kind, error, trace)
        if self._stream is None:
            self._buffer = None  # the pinned one is expensive to make and stays

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Host memory [num_bytes] uint8, valid until the next call."""
        if self._buffer is None or self._buffer.numel() < num_bytes:
            self._buffer = None  # never two at a time
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
        return self._buffer[:num_bytes]

    def copy_(self, target: torch.Tensor, chunk: torch.Tensor) -> None:
        """Copies a chunk of `buffer` into a tensor of the same shape on the device, cast to its dtype."""
        if self._stream is None:
            target.copy_(chunk)
            return
        # cast on the device: a copy that also casts would do so in pageable host memory
        target.copy_(chunk.to(self.device, non_blocking=True))
        self._stream.synchronize()  # the buffer is filled again next; this thread has nothing else to do

    def mark(self) -> CopyMark:
        """Behind all copies so far."""
        return None if self._stream is None else self._stream.record_event()


def hand_over(tensors: Iterable[torch.Tensor], filled: CopyMark, device: torch.device) -> None:
    """Lets the main stream use what a `DeviceCopier` has filled, and keeps its memory until that use is over."""
    if filled is not None:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(filled)
        for tensor in tensors:
            tensor.record_stream(stream)
