"""Bands of a matrix that does not fit in memory: the first ones stay there, the others lie in a file.

The file has no name: it is unlinked as soon as it is open, so that whatever ends the process frees its space.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from streamda import files, stopping
from streamda.errors import DamagedError


class SpilledBands:
    """Bands of a factor, a basis or a gradient, written once each and in order; a context manager.

    As `streamda.cholesky.Bands`.
    """

    def __init__(self, folder: Path, in_memory: int, device: torch.device) -> None:
        """Makes an empty triangle.

        Args:
            folder: on the disk that takes what does not fit.
            in_memory: bands that are kept in memory, from the first on.
            device: where bands are handed out.
        """
        self._folder = folder
        self._in_memory = in_memory
        self._device = device
        self._held: dict[int, torch.Tensor] = {}
        self._places: dict[int, tuple[int, torch.Size, torch.dtype, int]] = {}
        self._end = 0
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
        if self._descriptor is not None:
            files.system_calls.close(self._descriptor)
            self._descriptor = None

    def clear(self) -> None:
        """Forgets all bands; what is written next takes their place in the file."""
        self._held.clear()
        self._places.clear()
        self._end = 0

    def __len__(self) -> int:
        return len(self._held) + len(self._places)

    def __setitem__(self, index: int, band: torch.Tensor) -> None:
        if index < self._in_memory:
            self._held[index] = band
            return
        descriptor = self._open()
        host = band.to("cpu").contiguous()
        with files.storage_errors("write", self._folder):
            os.lseek(descriptor, self._end, os.SEEK_SET)
            files.write_all(descriptor, host.view(torch.uint8).reshape(-1).numpy().data)
        self._places[index] = (self._end, host.shape, host.dtype, _checksum(host))
        self._end += host.nbytes

    def __getitem__(self, index: int) -> torch.Tensor:
        stopping.check()  # what iterates with a factor asks for its bands again and again
        if index in self._held:
            return self._held[index]
        offset, shape, dtype, total = self._places[index]
        host = torch.empty(shape, dtype=dtype)
        view = memoryview(host.view(torch.uint8).reshape(-1).numpy().data)
        assert self._descriptor is not None
        with files.damage_errors(self._folder):
            while view:
                count = files.system_calls.preadv(self._descriptor, [view], offset)
                if count == 0:
                    break
                view, offset = view[count:], offset + count
        if view or _checksum(host) != total:
            raise DamagedError(
                f"{self._folder} gave back other bytes than were written to it; check the disk, and run the same "
                "command again"
            )
        return host.to(self._device)

    def _open(self) -> int:
        if self._descriptor is None:
            path = self._folder / f"factor.{secrets.token_hex(4)}.tmp"
            with files.storage_errors("write", path):
                self._descriptor = files.open_descriptor(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                files.unlink(path)
        return self._descriptor


def _checksum(band: torch.Tensor) -> int:
    """The sum of a band's bits, whatever the order of its terms: a checksum that runs as fast as memory does."""
    # of 8 bytes each, or the sum would begin with a copy of that width
    flat = band.view(torch.uint8).reshape(-1)
    whole = flat.numel() - flat.numel() % 8
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())
