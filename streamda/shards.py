"""The safetensors files of a model folder: which there are, what is in them, and their bytes.

Headers are read and checked by safetensors; values are read with ``pread`` by chunks, into their place where nothing
is cast. A memory-mapped shard would count as resident memory, and kill the process with SIGBUS if it were truncated
meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from streamda.errors import ModelError
from streamda.memory import READ_CHUNK_BYTES, DeviceCopier

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One tensor in a shard."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    """As the file calls it; see `STORED_DTYPES`."""
    offset: int
    """Of its first byte in the file."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the model in a shard."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    target: str
    """Name in the model; of the first target where a conversion has several."""
    converted: bool
    """True where transformers fuses or splits it on the way."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def find_shards(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder, in the order of their names.

    Raises:
        ModelError: there are none, or the index is damaged or names one that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is no index of a sharded checkpoint: {first_line(error)}") from error
        for name in names:
            if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
                raise ModelError(f"{index} names the shard {name!r}; it must be a plain file name")
            if not (folder / name).is_file():
                raise ModelError(f"{folder} lacks the shard {name} that its index names")
        return tuple(folder / name for name in names)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"{folder} holds pickled weights only; convert them once with transformers' save_pretrained, which writes "
            "safetensors"
        )
    raise ModelError(f"{folder} holds no model.safetensors and no model.safetensors.index.json")


def read_header(shard: Path) -> list[ShardEntry]:
    """What is in a shard, in the order of safetensors' own names.

    Raises:
        ModelError: it is damaged or cannot be read.
    """
    with _reading(shard):
        with safe_open(shard, framework="pt", backend="pread") as handle:  # checks sizes and offsets
            keys = list(handle.keys())
        with shard.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    return [
        ShardEntry(key, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for key, entry in ((key, header[key]) for key in keys)
    ]


@contextmanager
def opened(shard: Path) -> Iterator[int]:
    """A descriptor to read a shard's values by.

    Raises:
        ModelError: it cannot be opened.
    """
    with _reading(shard):
        descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_tensor(descriptor: int, tensor: StoredTensor, dtype: torch.dtype, copier: DeviceCopier) -> torch.Tensor:
    """Reads one tensor in some dtype, by chunks, so that no two whole copies of it exist at a time.

    Args:
        descriptor: from `opened`.
        tensor: what to read.
        dtype: what to cast it to.
        copier: knows the device.

    Raises:
        ModelError: it cannot be read, or holds NaN or Inf, before or after the cast.
    """
    value = torch.empty(tensor.shape, dtype=dtype, device=copier.device)
    flat = value.view(-1)
    in_place = copier.device.type == "cpu" and dtype == tensor.dtype
    largest = min(torch.finfo(dtype).max, torch.finfo(tensor.dtype).max)
    rows = max(1, READ_CHUNK_BYTES // tensor.dtype.itemsize)
    for start in range(0, flat.numel(), rows):
        target = flat[start : start + rows]
        part = target if in_place else copier.buffer(target.numel() * tensor.dtype.itemsize).view(tensor.dtype)
        _read_into(part, descriptor, tensor, tensor.offset + start * tensor.dtype.itemsize)
        low, high = torch.aminmax(part)
        if not (float(low) >= -largest and float(high) <= largest):  # NaN is neither
            raise ModelError(f"{tensor.file.name}: {tensor.key} holds NaN or Inf")
        if not in_place:
            copier.copy_(target, part)
    return value


def announce(descriptor: int, tensor: StoredTensor) -> None:
    """Asks the system to read a tensor into its page cache; returns at once."""
    with suppress(OSError):  # a hint, which some file systems do not take
        os.posix_fadvise(descriptor, tensor.offset, tensor.num_bytes, os.POSIX_FADV_WILLNEED)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _read_into(part: torch.Tensor, descriptor: int, tensor: StoredTensor, offset: int) -> None:
    left: Any = part.view(torch.uint8).numpy().data
    with _reading(tensor.file):
        while left:
            count = os.preadv(descriptor, [left], offset)
            if count == 0:
                raise OSError(f"it ends {len(left)} bytes before the end of {tensor.key}")
            left, offset = left[count:], offset + count


@contextmanager
def _reading(shard: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        hint = ""
        with suppress(OSError), shard.open("rb") as stream:
            hint = (
                " (a git-lfs pointer: run `git lfs pull`)" if stream.read(20).startswith(b"version https://git") else ""
            )
        raise ModelError(f"{shard} cannot be read: {first_line(error)}{hint}") from error
