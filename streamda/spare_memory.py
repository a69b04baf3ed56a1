"""Memory of weights that are not needed any more, for the next ones of the same size.

The C library gives large blocks back to the system, which fills every page with zeros before it hands it out again: for
the weights of a decoder block that can take longer than to read and cast them. On a CPU only.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from streamda.heap import LARGE_BLOCK_BYTES

_use_count = getattr(torch._C, "_storage_Use_Count", None)
"""How many tensors, views and graphs hold a storage, and one more for Python's name of it. Private, and the only way to
ask: without it nothing is kept."""


class SpareMemory:
    """Storages that were let go, by size; any thread may add, take and free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._storages: dict[int, list[torch.UntypedStorage]] = {}
        self._wanted: frozenset[int] = frozenset()

    def keep(self, tensor: torch.Tensor) -> None:
        """Adds a tensor's memory, unless the last read had none of its size, or it is small enough for the heap.

        The tensor need not be gone yet; until it is, and all that shares its memory, that is not handed out.
        """
        if _use_count is None or tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        with self._lock:
            if storage.nbytes() >= LARGE_BLOCK_BYTES and storage.nbytes() in self._wanted:
                self._storages.setdefault(storage.nbytes(), []).append(storage)

    def trim_to(self, wanted: Iterable[tuple[Sequence[int], torch.dtype]]) -> None:
        """Frees all but what tensors of these shapes and dtypes can take, before they are read."""
        counts = Counter(_num_bytes(shape, dtype) for shape, dtype in wanted)
        with self._lock:
            self._wanted = frozenset(counts)
            kept = {size: storages[: counts[size]] for size, storages in self._storages.items() if size in counts}
            self._storages = kept

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `torch.empty`, in memory that was kept where there is some of just this size."""
        with self._lock:
            kept = self._storages.get(_num_bytes(shape, dtype), []) if device.type == "cpu" else []
            while kept:
                storage = kept.pop()
                if _use_count is not None and _use_count(storage._cdata) == 1:  # this name alone
                    tensor = torch.empty(0, dtype=dtype)
                    # torch's types know no untyped storages here
                    return tensor.set_(storage, 0, torch.Size(shape))  # type: ignore[call-overload,no-any-return]
        return torch.empty(shape, dtype=dtype, device=device)

    def clear(self) -> None:
        """Frees all of it."""
        with self._lock:
            self._storages.clear()


def _num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
