"""The values of a shard, read with ``pread`` by chunks, checked on the way, and cast.

Into their place where nothing is cast, and past the system's page cache where that would not keep them. A memory-mapped
shard would count as resident memory, and kill the process with SIGBUS if it were truncated meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from streamda.errors import ModelError
from streamda.file_reader import ALIGNMENT, FileReader
from streamda.files import shown
from streamda.memory import READ_CHUNK_BYTES, DeviceCopier
from streamda.quoting import one_line
from streamda.shards import StoredTensor, reading
from streamda.spare_memory import SpareMemory

READ_MARGIN = 3 * ALIGNMENT
"""What a direct read takes beside the bytes that are wanted: up to a page before, behind, and for its own place."""


class NonFiniteWeightError(ModelError):
    """A weight holds NaN or Inf."""

    def __init__(self, tensor: StoredTensor, dtype: torch.dtype, count: int) -> None:
        """Takes the tensor, the dtype it is read in, and how many of its values are not finite in it."""
        self.target = tensor.target
        """Name of the parameter in the model."""
        self.count = count
        numel = torch.Size(tensor.shape).numel()
        super().__init__(
            f"{shown(tensor.file.name)}: {one_line(tensor.key)} holds NaN or Inf: {count} of its {numel} values in "
            f"{str(dtype).removeprefix('torch.')}; the checkpoint is damaged, so download or convert it again"
        )


@contextmanager
def opened(shard: Path, *, direct: bool = False) -> Iterator[FileReader]:
    """A shard's values, to be read past the page cache if asked for.

    Raises:
        ModelError: it cannot be opened.
    """
    with reading(shard):
        reader = FileReader(shard, direct=direct)
    try:
        yield reader
    finally:
        reader.close()


def read_tensor(
    reader: FileReader,
    tensor: StoredTensor,
    dtype: torch.dtype,
    copier: DeviceCopier,
    spare: SpareMemory,
    *,
    zero_not_finite: bool = False,
) -> tuple[torch.Tensor, int]:
    """Reads one tensor in some dtype, by chunks, so that no two whole copies of it exist at a time.

    Args:
        reader: from `opened`.
        tensor: what to read.
        dtype: what to cast it to.
        copier: knows the device.
        spare: memory that the tensor may take.
        zero_not_finite: puts zeros in the place of NaN and Inf.

    Returns:
        The tensor, and the crc32c of its bytes in the file.

    Raises:
        NonFiniteWeightError: it holds NaN or Inf, before or after the cast.
        ModelError: it cannot be read.
    """
    value = spare.empty(tensor.shape, dtype, copier.device)
    flat = value.view(-1)
    # past the page cache only into memory that is aligned
    in_place = copier.device.type == "cpu" and dtype == tensor.dtype and not reader.is_direct
    largest = min(torch.finfo(dtype).max, torch.finfo(tensor.dtype).max)
    rows = values_per_chunk(tensor)
    checksum = 0
    for start in range(0, flat.numel(), rows):
        target = flat[start : start + rows]
        memory = target if in_place else copier.buffer(target.numel() * tensor.dtype.itemsize + READ_MARGIN)
        part = _read_values(reader, tensor, start, target.numel(), memory)
        stored: Any = part.view(torch.uint8).numpy()  # it takes arrays without a copy, and writable views not at all
        checksum = google_crc32c.extend(checksum, stored)
        low, high = torch.aminmax(part)
        if not (float(low) >= -largest and float(high) <= largest):  # NaN is neither
            if not zero_not_finite:
                raise NonFiniteWeightError(tensor, dtype, _count_not_within(largest, reader, tensor))
            part.masked_fill_(~(part.abs() <= largest), 0.0)
        if not in_place:
            copier.copy_(target, part)
    return value, checksum


def _count_not_within(largest: float, reader: FileReader, tensor: StoredTensor) -> int:
    count, numel = 0, torch.Size(tensor.shape).numel()
    rows = values_per_chunk(tensor)
    memory = torch.empty(rows * tensor.dtype.itemsize + READ_MARGIN, dtype=torch.uint8)
    for start in range(0, numel, rows):
        part = _read_values(reader, tensor, start, min(rows, numel - start), memory)
        count += part.numel() - int((part.abs() <= largest).sum())
    return count


def values_per_chunk(tensor: StoredTensor) -> int:
    """How many values of a tensor are read at a time."""
    # with its margin no more than that: pinned memory rounds up to a power of two
    return max(1, (READ_CHUNK_BYTES - READ_MARGIN) // tensor.dtype.itemsize)


def _read_values(
    reader: FileReader, tensor: StoredTensor, start: int, numel: int, memory: torch.Tensor
) -> torch.Tensor:
    """Values of a tensor from some value on, in memory that holds them and `READ_MARGIN` if the reads are direct."""
    offset, num_bytes = tensor.offset + start * tensor.dtype.itemsize, numel * tensor.dtype.itemsize
    room = memory.view(torch.uint8)
    before = offset % ALIGNMENT  # bytes that come with them
    direct = reader.is_direct and before % tensor.dtype.itemsize == 0  # else no view could show the values
    if direct:
        room = room[-room.data_ptr() % ALIGNMENT :][: -(-(before + num_bytes) // ALIGNMENT) * ALIGNMENT]
    else:
        before = 0
    view: Any = room.numpy().data
    with reading(tensor.file):
        missing = before + num_bytes - reader.read_into(view, offset - before, before + num_bytes, aligned=direct)
        if missing:
            raise OSError(f"it ends {missing} bytes before the end of {tensor.key}")
    return room[before : before + num_bytes].view(tensor.dtype)
