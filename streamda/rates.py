"""Rates of this machine, measured in a second or two: matrix products in two precisions, and one file on the disk."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from streamda import files
from streamda.bounds import Rates
from streamda.errors import StorageError
from streamda.file_reader import FileReader
from streamda.products import ONEDNN, linear, product_library

GEMM_SECONDS = 0.15
"""Spent per precision at least. The first products start threads and pick kernels; much less would
measure that, and more shows in a run of half a minute."""
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
    left = torch.randn(size, size, device=device).to(dtype)
    by_onednn = dtype == torch.float32 and product_library(device) == ONEDNN
    result = None if by_onednn else torch.empty_like(left)
    best, deadline = math.inf, time.monotonic() + GEMM_SECONDS
    for run in itertools.count():
        started = time.monotonic()
        if started > deadline and run > 1:
            break
        for _ in range(repeats):
            if by_onednn:  # as a run multiplies
                result = None  # not a third matrix while the next one is made
                result = linear(left, left)
            else:
                result = torch.mm(left, left, out=result)
        assert result is not None
        result[0, 0].item()  # waits for the device
        best = min(best, time.monotonic() - started)
    return 2.0 * size**3 * repeats / best


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
