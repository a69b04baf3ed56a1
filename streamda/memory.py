"""Bytes: sizes as users write them, the budget, and meters of what was really used.

The only module that calls torch's CUDA memory functions. What the system says of the C heap is in `streamda.heap`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from streamda import heap
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
"""What a tensor that is not read into its place holds beside itself. Larger saves calls, smaller saves memory."""


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


def release_unused(device: torch.device) -> None:
    """Hands memory that is free but still held by an allocator back: CUDA's cache, or the C heap.

    On the heap what the phase may keep stays.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        # smaller blocks stay on the heap when they are freed; without this they pile up between the phases
        heap.release()


def release_between_micro_batches(device: torch.device) -> None:
    """Gives back what micro-batches leave behind on the C heap, and the phase may not keep.

    Small blocks come to lie in ever more of its pages, which would make the peak grow with the number of micro-batches.
    Nothing is done for a CUDA device: its cache serves the next one.
    """
    if device.type == "cpu":
        heap.release_between_micro_batches()


class PeakMeter:
    """Measures the peak of a phase against the budget's own yardstick.

    Both above a baseline at construction. On CUDA it is the allocator's reserved peak, on CPU anonymous memory,
    sampled by a thread: a spike shorter than the interval can be missed, which is why the tests prove the bound with a
    kernel limit and not with this meter.
    """

    def __init__(self, device: torch.device, interval_seconds: float = 0.01) -> None:
        self._device = device
        self._interval = interval_seconds
        self._baseline = 0
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or what it gives back later would count as ours
        self._baseline = self.current()
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
            peak = int(torch.cuda.max_memory_reserved(self._device)) - self._baseline
            torch.cuda.reset_peak_memory_stats(self._device)
            return max(0, peak)
        with self._lock:
            peak = max(self._peak, anonymous_bytes() - self._baseline)
            self._peak = 0
        return peak

    def current(self) -> int:
        """Bytes in use now, by the same yardstick."""
        if self._device.type == "cuda":
            return int(torch.cuda.memory_reserved(self._device)) - self._baseline
        return anonymous_bytes() - self._baseline


def total_device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device, in use or not."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def free_device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that nobody uses; what this process's allocator keeps unused is given back for it."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


@contextmanager
def device_limit(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """On CUDA, makes the budget a hard cap of the caching allocator within the block; on CPU the plan is all there is.

    What the process holds on the device before, such as another model, is not in the budget.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    before = torch.cuda.get_per_process_memory_fraction(device)
    limit_bytes += int(torch.cuda.memory_reserved(device))
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total_device_bytes(device)), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
        torch._C._host_emptyCache()  # or what was pinned would stay so until the process ends


MOST_BLAS_BYTES = 32 << 20
"""Of cuBLAS's workspaces, that on compute capability 9.0; others have a quarter of it."""


def blas_workspace_bytes(device: torch.device) -> int:
    """What CUDA's library of products keeps of the budget once it has multiplied; nothing on a CPU.

    Once for the main thread, and once for the one in which autograd goes backward.
    """
    if device.type != "cuda":
        return 0
    ask = getattr(torch.backends.cuda, "cublas_workspace_size", None)
    with torch.cuda.device(device):
        return 2 * (MOST_BLAS_BYTES if ask is None else int(ask()))


RING_BUFFERS = 2
"""Of `READ_CHUNK_BYTES` each: the disk is slower than the bus, so a third would never be needed."""
RING_BYTES = RING_BUFFERS * READ_CHUNK_BYTES
"""Pinned memory that weights pass through on their way to a CUDA device."""

CopyMark = torch.cuda.Event | None
"""A point behind some copies; None where they are done as soon as they are asked for."""


def host_buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, room: int = 0) -> torch.Tensor:
    """Host memory for what passes to or from a device: pinned for CUDA, which then copies without the host.

    PyTorch hands pinned memory out again only when the copies into or from it are over, and only for what rounds to the
    same power of two.

    Args:
        shape: of what is to pass.
        dtype: of it.
        device: that copies.
        room: bytes of the largest buffer that a run asks for; all are made as large, so that each serves any.
    """
    if device.type != "cuda":
        return torch.empty(tuple(shape), dtype=dtype)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    with torch.cuda.device(device):  # a thread begins on the first one
        memory = torch.empty(max(num_bytes, room), dtype=torch.uint8, pin_memory=True)
    return memory[:num_bytes].view(dtype).reshape(tuple(shape))


class DeviceCopier:
    """Brings chunks of weights from host memory to the device.

    On a CPU that is a copy. On CUDA chunks pass through a ring of pinned buffers and a stream of their own: one is
    filled while another travels and the main stream computes. Used by one thread at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ring: list[torch.Tensor | None] = [None] * (RING_BUFFERS if device.type == "cuda" else 1)
        self._copied: list[CopyMark] = [None] * len(self._ring)
        self._turn = 0
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
            self.close()  # pinned ones are expensive to make and stay until the run ends

    def close(self) -> None:
        """Frees the buffers; memory that a copy still reads is handed out again only when that is over."""
        self._ring = [None] * len(self._ring)

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Host memory [num_bytes] uint8, valid until the next call."""
        self._turn = (self._turn + 1) % len(self._ring)
        wait_for_copy(self._copied[self._turn])
        buffer = self._ring[self._turn]
        if buffer is None or buffer.numel() < num_bytes:
            self._ring[self._turn] = buffer = None  # or its memory would be there twice
            # all of one size at once: what one that has grown leaves behind stays pinned
            self._ring[self._turn] = buffer = host_buffer((num_bytes,), torch.uint8, self.device, room=READ_CHUNK_BYTES)
        return buffer[:num_bytes]

    def copy_(self, target: torch.Tensor, chunk: torch.Tensor) -> None:
        """Copies a chunk of the last `buffer` into a tensor of the same shape on the device, cast to its dtype."""
        if self._stream is None:
            target.copy_(chunk)
            return
        # cast on the device: a copy that also casts would do so in pageable host memory
        target.copy_(chunk.to(self.device, non_blocking=True))
        self._copied[self._turn] = self.mark()  # until then the buffer may not be filled again

    def mark(self) -> CopyMark:
        """Behind all copies so far."""
        return None if self._stream is None else self._stream.record_event()


def staged_bytes(state_bytes: int) -> int:
    """Pinned memory that boundary states pass through at most, from the size of the largest of them.

    Each of two readers has one in use, one ready and one that a copy still reads, the writer two; PyTorch rounds each
    up to a power of two.
    """
    return 8 * 2 * state_bytes


def begin_copy_to_host(states: torch.Tensor, room: int) -> tuple[torch.Tensor, CopyMark]:
    """A contiguous copy in a `host_buffer`, that holds the values once `wait_for_copy` has returned."""
    host = host_buffer(states.shape, states.dtype, states.device, room=room)
    host.copy_(states.detach(), non_blocking=True)
    return host, mark_copies(states.device)


def mark_copies(device: torch.device) -> CopyMark:
    """Behind all copies that the current stream of a device was asked for so far."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def wait_for_copy(mark: CopyMark) -> None:
    """Returns when the copies before a mark are done."""
    if mark is not None:
        with torch.cuda.device(mark.device):
            mark.synchronize()


def hand_over(tensors: Iterable[torch.Tensor], filled: CopyMark, device: torch.device) -> None:
    """Lets the main stream use what a `DeviceCopier` has filled, and keeps its memory until that use is over."""
    if filled is not None:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(filled)
        for tensor in tensors:
            tensor.record_stream(stream)
