"""Boundary states: the hidden states that enter a block, for all samples, and their gradients.

A boundary is written once, micro-batch by micro-batch, read as often as needed, and dropped. The first few stay in
memory if the plan allows; the others are committed units on disk, read with ``pread`` one micro-batch at a time, and
each is checked against its checksum when it is read.

Beside an accelerator threads do all that, while it computes: one for each boundary that is read, a micro-batch ahead,
and one for what is written, a micro-batch behind. Some more of them are in host memory then, see `staged_bytes`.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import google_crc32c
import torch

from streamda import files, read_ahead
from streamda.disk_space import require_room
from streamda.errors import DamagedError
from streamda.memory import CopyMark, begin_copy_to_host, host_buffer, mark_copies, wait_for_copy
from streamda.timeline import Timeline
from streamda.units import UnitDraft, UnitStore
from streamda.workers import DoneBehind, taken_ahead

STATES_FILE = "states.bin"
ANNOUNCED_BYTES = 64 << 20
"""Of a boundary, ahead of a block's weights: enough to begin with, and little for the page cache to hold meanwhile."""
_PIECE_BYTES = 8 << 20  # a multiple of every dtype's size; smaller only costs calls


class BoundaryWriter:
    """Takes the micro-batches of one boundary, in order."""

    def __init__(
        self,
        target: files.FileWriter | list[torch.Tensor],
        timeline: Timeline,
        behind: DoneBehind | None = None,
        room: int = 0,
    ) -> None:
        """Takes nothing yet.

        Args:
            target: where they go.
            timeline: records what is done behind.
            behind: brings them there while the next one is made; None for doing so at once.
            room: bytes of the largest of them, if they are brought there behind.
        """
        self._target = target
        self._timeline = timeline
        self._behind = behind
        self._room = room
        self.checksums: list[int] = []

    def append(self, states: torch.Tensor) -> None:
        """Adds the states of the next micro-batch, [batch, tokens, hidden]."""
        if self._behind is not None:
            self._behind.do(functools.partial(self._take_copy, *begin_copy_to_host(states, self._room)))
            return
        host = states.detach().to("cpu").contiguous()
        if isinstance(self._target, list) and host.data_ptr() == states.data_ptr():
            # a view would keep the whole graph's storage alive, and be changed in place by what follows
            host = host.clone()
        self._take(host)

    def _take_copy(self, host: torch.Tensor, copied: CopyMark) -> None:
        with self._timeline.span("write boundary", "boundary writer"):
            wait_for_copy(copied)
            # what is held is not to be pinned: the system could not page it out, and PyTorch rounds it up
            self._take(host.clone() if isinstance(self._target, list) else host)

    def _take(self, host: torch.Tensor) -> None:
        if isinstance(self._target, list):
            self._target.append(host)
            return
        data = _as_bytes(host)
        self.checksums.append(google_crc32c.value(data))
        self._target.write(data.data)


class BoundaryStore:
    """All boundaries of a run, by name."""

    def __init__(
        self,
        units: UnitStore,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        slots: int,
        *,
        timeline: Timeline | None = None,
        beside_device: bool = False,
    ) -> None:
        """Makes the store.

        Args:
            units: where boundaries on disk are committed.
            shapes: per micro-batch, [batch, tokens, hidden].
            dtype: of the states.
            slots: boundaries that may be held in memory at a time.
            timeline: records what threads do, each in a lane of its own.
            beside_device: reads and writes in threads; without an accelerator they would take its cores from a run.
        """
        self._units = units
        self._shapes = [tuple(shape) for shape in shapes]
        self._sizes = [dtype.itemsize * torch.Size(shape).numel() for shape in self._shapes]
        self._room = max(self._sizes, default=0)
        self._dtype = dtype
        self._slots = slots
        self._timeline = Timeline() if timeline is None else timeline
        self._beside_device = beside_device
        self._held: dict[str, list[torch.Tensor]] = {}
        self.bytes_written = 0
        self.bytes_read = 0

    def __contains__(self, name: str) -> bool:
        return name in self._held or name in self._units

    @contextmanager
    def write(
        self, name: str, *, durable: bool = False, facts: dict[str, Any] | None = None
    ) -> Iterator[BoundaryWriter]:
        """Opens a boundary for writing; it exists once the block is left normally.

        Args:
            name: unit name.
            durable: on disk whatever memory is free; a killed run continues from these.
            facts: plain JSON to keep beside it; may be filled until the block is left.

        Raises:
            StorageError: the disk has no room for it.
        """
        if not durable and len(self._held) < self._slots:
            held: list[torch.Tensor] = []
            with self._writing_to(held) as writer:
                yield writer
            self._held[name] = held
            return
        require_room(self._units.folder, sum(self._sizes), f"boundary {name}")
        draft: UnitDraft
        with self._units.create(name) as draft:
            with files.FileWriter(draft.path / STATES_FILE) as stream, self._writing_to(stream) as writer:
                yield writer
            draft.record(STATES_FILE, stream.size, stream.crc32c)
            draft.metadata |= {"checksums": list(writer.checksums), "dtype": str(self._dtype)} | (facts or {})
            self.bytes_written += stream.size

    def facts(self, name: str) -> dict[str, Any]:
        """What was kept beside a boundary on disk."""
        return dict(self._units.metadata(name))

    def read(self, name: str, device: torch.device) -> Iterator[torch.Tensor]:
        """The micro-batches of a boundary, in order, on a device.

        Raises:
            DamagedError: the file does not hold what was committed.
        """
        stored = self._stored(name, device)
        counted = name not in self._held
        if self._beside_device:
            stored = taken_ahead(self._recorded(stored, f"{name.partition('-')[0]} reader"), "streamda-boundary")
        copied: CopyMark = None
        for states in stored:
            wait_for_copy(copied)  # of the one before, whose buffer the one after next takes
            if counted:
                self.bytes_read += states.numel() * states.element_size()
            read = [states.to(device, non_blocking=True)]
            copied = mark_copies(device)
            del states
            yield read.pop()  # so that whoever has taken them holds them alone

    @contextmanager
    def _writing_to(self, target: files.FileWriter | list[torch.Tensor]) -> Iterator[BoundaryWriter]:
        with DoneBehind("streamda-boundary") if self._beside_device else nullcontext() as behind:
            yield BoundaryWriter(target, self._timeline, behind, self._room)

    def _recorded(self, stored: Iterator[torch.Tensor], lane: str) -> Iterator[torch.Tensor]:
        """The same, with a span for each; a block reads states and gradients at a time, and has a lane for either."""
        while True:
            with self._timeline.span("read boundary", lane):
                read = list(itertools.islice(stored, 1))
            if not read:
                return
            yield read.pop()

    def _stored(self, name: str, device: torch.device) -> Iterator[torch.Tensor]:
        """The micro-batches of a boundary in host memory, from which a device takes them."""
        if name in self._held:
            assert len(self._held[name]) == len(self._shapes)
            for states in self._held[name]:
                yield self._buffer(states.shape, device).copy_(states) if self._beside_device else states
            return
        path = self._units.path(name) / STATES_FILE
        checksums = self._units.metadata(name)["checksums"]
        self._units.check(name)
        if len(checksums) != len(self._shapes):
            raise DamagedError(f"{files.shown(path)} holds another number of micro-batches; {self._units.repair(name)}")
        with files.damage_errors(path):
            opened = files.open_descriptor(path, os.O_RDONLY)
        with files.closing(opened) as descriptor:
            offset = 0
            for shape, size, checksum in zip(self._shapes, self._sizes, checksums, strict=True):
                states = self._buffer(shape, device)
                stored = _as_bytes(states)
                with files.damage_errors(path):
                    count = files.system_calls.preadv(descriptor, [stored.data], offset)
                if count != size or google_crc32c.value(stored) != checksum:
                    raise DamagedError(
                        f"{path} does not have the bytes that were committed; {self._units.repair(name)}"
                    )
                offset += size
                read = [states]
                del states, stored
                yield read.pop()  # so that whoever has taken them holds them alone

    def _buffer(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Host memory for states on their way to a device; pinned only where that is planned for."""
        copies = device if self._beside_device else torch.device("cpu")
        return host_buffer(shape, self._dtype, copies, room=self._room)

    def announce(self, name: str) -> None:
        """Asks the system to read the beginning of a boundary into its page cache; nothing where it is not on disk."""
        if name in self._held or name not in self._units:
            return
        with suppress(OSError), (self._units.path(name) / STATES_FILE).open("rb") as stream:
            read_ahead.ask(stream.fileno(), 0, min(ANNOUNCED_BYTES, sum(self._sizes)))

    def drop(self, name: str) -> None:
        """Forgets a boundary; one that is not there is no error."""
        self._held.pop(name, None)
        if name in self._units:
            self._units.drop(name)


def _as_bytes(states: torch.Tensor) -> Any:
    """The bytes of contiguous states as an array over the same memory: neither a checksum nor a file makes a copy."""
    return states.view(torch.uint8).reshape(-1).numpy()


def require_finite_states(units: UnitStore, name: str) -> None:
    """Reads a committed boundary piece by piece.

    Raises:
        DamagedError: it holds NaN or Inf, or states of no known dtype.
    """
    path = units.path(name) / STATES_FILE
    dtype = getattr(torch, str(units.metadata(name).get("dtype")).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not _is_finite(path, dtype):
        raise DamagedError(f"{files.shown(path)} holds what no boundary state can be; {units.repair(name)}")


def _is_finite(path: Path, dtype: torch.dtype) -> bool:
    with files.damage_errors(path), path.open("rb") as stream:
        while piece := bytearray(stream.read(_PIECE_BYTES)):
            if len(piece) % dtype.itemsize or not bool(torch.frombuffer(piece, dtype=dtype).isfinite().all()):
                return False
    return True
