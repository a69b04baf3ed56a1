"""Memory of weights that are not needed any more, for the next ones of the same size.

The C library gives large blocks back to the system, which fills every page with zeros before it hands it out again: for
the weights of a decoder block that can take longer than to read and cast them. CUDA's allocator keeps blocks by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from streamda.memory import LARGE_BLOCK_BYTES


class SpareMemory:
    """Storages that nobody reads any more, by size; one thread may add to them while another takes."""

    def __init__(self) -> None:
        self._storages: dict[int, list[torch.UntypedStorage]] = {}

    def keep(self, tensor: torch.Tensor) -> None:
        """Adds a tensor's memory, unless it is small enough to stay on the heap anyway.

        The tensor need not be gone yet; until it is, and all that shares its memory, that is not handed out.
        """
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and storage.nbytes() >= LARGE_BLOCK_BYTES:
            self._storages.setdefault(storage.nbytes(), []).append(storage)

    def hold_for(self, sizes: Iterable[int]) -> None:
        """Frees all that tensors of these sizes in bytes will not take."""
        wanted = Counter(sizes)
        for size in list(self._storages):
            del self._storages[size][wanted[size] :]

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `torch.empty`, in memory that was kept where there is some of just this size."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        kept = self._storages.get(num_bytes, []) if device.type == "cpu" else []
        while kept:
            storage = kept.pop()
            if torch._C._storage_Use_Count(storage._cdata) == 1:
                tensor = torch.empty(0, dtype=dtype)
                return tensor.set_(storage, 0, torch.Size(shape))  # type: ignore[call-overload,no-any-return]
        return torch.empty(shape, dtype=dtype, device=device)

    def clear(self) -> None:
        """Frees all of it."""
        self._storages.clear()
