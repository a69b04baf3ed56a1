"""Passes over the micro-batches of a boundary: timed, stopped between two of them, nothing kept of one for the next.

Whoever loops over them drops what it has of one (``del``) before it asks for the next: a name that is still bound holds
the memory of a hidden state for as long, which a peak that is to be the same for every number of micro-batches shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from streamda import stopping
from streamda.batches import Batch
from streamda.boundary import BoundaryStore, BoundaryWriter
from streamda.memory import release_between_micro_batches
from streamda.timeline import Timeline


class TimedWriter:
    """A `BoundaryWriter` whose time does not count for the block that it writes for."""

    def __init__(self, writer: BoundaryWriter, timeline: Timeline) -> None:
        self._writer, self._timeline = writer, timeline

    def append(self, states: torch.Tensor) -> None:
        """As `BoundaryWriter.append`."""
        with self._timeline.span("write boundary"):
            self._writer.append(states)


class Passes:
    """Reads and writes the boundaries of a run, micro-batch by micro-batch."""

    def __init__(
        self, batches: Sequence[Batch], boundaries: BoundaryStore, timeline: Timeline, device: torch.device
    ) -> None:
        """Reads nothing yet.

        Args:
            batches: the samples, as collated micro-batches.
            boundaries: where their states lie.
            timeline: takes what reading and writing took.
            device: that the states are brought to.
        """
        self._batches = batches
        self._boundaries = boundaries
        self._timeline = timeline
        self._device = device

    def over(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Micro-batches together with their states at each of some boundaries, [batch, tokens, hidden] on the device.

        Raises:
            DamagedError: a boundary's file does not hold what was committed.
            StoppedError: a signal has asked for it.
        """
        readers = [self._boundaries.read(name, self._device) for name in names]
        for batch in self._batches:
            stopping.check()
            release_between_micro_batches(self._device)
            # without a name here, or a zip, which would keep what they gave last until they have the next
            yield batch, *self._next_of(readers)

    def _next_of(self, readers: Sequence[Iterator[torch.Tensor]]) -> list[torch.Tensor]:
        with self._timeline.span("read boundary"):
            return [next(reader) for reader in readers]

    @contextmanager
    def writing(self, name: str, **options: Any) -> Iterator[TimedWriter]:
        """Opens a boundary for writing; options as for `BoundaryStore.write`."""
        with self._timeline.at_exit("commit", self._boundaries.write(name, **options)) as writer:
            yield TimedWriter(writer, self._timeline)
