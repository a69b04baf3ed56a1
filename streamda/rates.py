"""Rates of this machine: matrix products in two precisions, and one file on the disk; in a second, or along a run."""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from streamda import files
from streamda.bounds import Rates
from streamda.errors import StorageError
from streamda.file_reader import FileReader
from streamda.heap import free_product_buffers
from streamda.products import ONEDNN, ONEDNN_LARGE, by_onednn, linear, product_library

GEMM_SECONDS = 0.15
"""Spent per precision at least. The first products start threads and pick kernels; much less would
measure that, and more shows in a run of half a minute."""
SAMPLE_SIZE, SAMPLE_SECONDS = 1024, 20.0
"""Rows of the products that are timed while a run goes on, and the time between two samples at least."""
MAX_SHARE = 0.01
"""Of a run's time for them, once the first has shown what they take: bfloat16 may take a CPU seconds."""
FILE_BYTES = 128 << 20
"""Written and read back. Less would measure a disk's latencies and caches, more takes longer than it is worth."""
DISK_SECONDS = 1.0
"""Written for at most, on a slow disk; then the file is smaller."""
CHUNK_BYTES = 8 << 20
SPARE_BYTES = 1 << 30
"""Free space below which the disk is left alone: a run may need all of it."""


def measure_rates(device: torch.device, dtype: torch.dtype, folder: Path, known: Rates) -> tuple[Rates, str | None]:
    """Measures what is not known yet.

    Args:
        device: that computes.
        dtype: in which it computes.
        folder: on the file system to measure; the nearest parent that exists stands for one that does not.
        known: rates that need no measuring.

    Returns:
        The rates, and why those of the disk are not among them, if they are not.
    """
    measured = Rates(
        flops=known.flops or measure_flops(device, dtype), flops64=known.flops64 or measure_flops(device, torch.float64)
    )
    if known.read is not None and known.write is not None:
        return known.or_else(measured), None
    try:
        read, write = measure_disk(folder)
    except StorageError as error:
        return known.or_else(measured), f"the rates of the disk were not measured: {error}"
    return known.or_else(measured).or_else(Rates(read=read, write=write)), None


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of a square matrix product here and now, in floating point operations per second.

    Takes about 60 MB of a CPU's memory or 100 MB of a GPU's, for `GEMM_SECONDS` and a little.
    """
    # a GPU finishes small products before the next is launched; two large float64 matrices would show in a small budget
    size, repeats = (1536, 1) if device.type == "cpu" else (4096 if dtype.itemsize < 8 else 2048, 16)
    multiply = _product(device, dtype, size)
    best, deadline = math.inf, time.monotonic() + GEMM_SECONDS
    for run in itertools.count():
        started = time.monotonic()
        if started > deadline and run > 1:
            break
        for _ in range(repeats):
            result = None  # the one before is gone before the next is made
            result = multiply()
        assert result is not None
        result[0, 0].item()  # waits for the device
        best = min(best, time.monotonic() - started)
    return 2.0 * size**3 * repeats / best


def _product(device: torch.device, dtype: torch.dtype, size: int) -> Callable[[], torch.Tensor]:
    """A product of a square matrix with itself, as a run multiplies large ones, that holds no third one."""
    own = torch.Generator(device).manual_seed(0)  # a run's random numbers are not to depend on when this is asked
    left = torch.randn(size, size, device=device, generator=own).to(dtype)
    if dtype == torch.float32 and product_library(device) in (ONEDNN, ONEDNN_LARGE):
        return functools.partial(by_onednn, torch.empty_like(left), left, left)
    # a plain product in bfloat16 takes a CPU ten times as long as a model's layers do
    if device.type == "cpu" and dtype.itemsize < 4:
        return functools.partial(linear, left, left)
    return functools.partial(torch.mm, left, left, out=torch.empty_like(left))


class ProductRates:
    """Rates of products as a CPU gives them while a run goes on, of each precision now and then, between two blocks.

    The speed of a shared machine changes within seconds, and what it does when a run is over says little of how fast
    the run could have been. The next block's weights may be read meanwhile, as they are while blocks compute.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Measures nothing yet, nor ever on a device that is no CPU.

        Args:
            device: that computes.
            dtype: in which it computes.
        """
        self._device, self._dtype = device, dtype
        self._due = math.inf if device.type != "cpu" else time.monotonic() + SAMPLE_SECONDS
        self._seconds: dict[torch.dtype, list[float]] = {dtype: [], torch.float64: []}

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next sample."""
        return time.monotonic() >= self._due

    def sample(self) -> None:
        """Takes some 30 MB, in float32 for a fifth of a second."""
        began = time.monotonic()
        for dtype, seconds in self._seconds.items():
            multiply = _product(self._device, dtype, SAMPLE_SIZE)
            multiply()  # its threads may have fallen asleep
            taken: list[float] = []
            for _ in range(3):
                started = time.monotonic()
                multiply()
                taken.append(time.monotonic() - started)
            seconds.append(statistics.median(taken))  # one that waits for other work tells nothing
        free_product_buffers()  # or a run long enough to be sampled would have a higher peak than a short one
        ended = time.monotonic()
        self._due = ended + max(SAMPLE_SECONDS, (ended - began) / MAX_SHARE)

    @property
    def mean(self) -> Rates:
        """All operations over all their time; of no sample nothing is known."""
        mine, double = (
            2.0 * SAMPLE_SIZE**3 * len(seconds) / sum(seconds) if seconds else None
            for seconds in (self._seconds[self._dtype], self._seconds[torch.float64])
        )
        return Rates(flops=mine, flops64=double)


def measure_disk(folder: Path, num_bytes: int = FILE_BYTES) -> tuple[float, float]:
    """Rates of reading and of durable writing on a folder's file system, in bytes per second.

    The file has no name where the system can do so, and is gone when this returns or the process dies. Reading it back
    goes past the page cache where it can, as that of a model which memory does not hold; a disk's own cache, or a
    host's below a virtual machine, is not dropped.

    Raises:
        StorageError: the folder cannot be written, or has too little space for an honest measurement.
    """
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if files.free_bytes(folder) < num_bytes + SPARE_BYTES:
        raise StorageError(f"{files.shown(folder)} has too little free space for a file of {num_bytes >> 20} MiB")
    chunk = bytearray(os.urandom(min(CHUNK_BYTES, num_bytes)))  # random: some file systems compress
    with files.storage_errors("measure the disk in", folder), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.monotonic()
        for _ in range(0, num_bytes, len(chunk)):
            file.write(chunk)
            if time.monotonic() - started > DISK_SECONDS:
                break
        os.fsync(file.fileno())
        write = file.tell() / (time.monotonic() - started)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with (
            mmap.mmap(-1, len(chunk)) as memory,
            closing(FileReader(f"/proc/self/fd/{file.fileno()}", direct=True)) as reader,
        ):
            started = time.monotonic()
            with memoryview(memory) as view:
                done = 0
                while count := reader.read_into(view, done, aligned=True):
                    done += count
            read = done / (time.monotonic() - started)
    return read, write
