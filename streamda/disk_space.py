"""Room on the work directory's file system: asked for before a run begins, and again before each of its units."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from streamda import files
from streamda.errors import StorageError
from streamda.files import shown
from streamda.memory import format_size

START_RESERVE_BYTES = 500_000_000
"""Left free beside what a run needs, so that a full disk stops us before it stops others."""
UNIT_RESERVE_BYTES = 200_000_000
"""Left free beside each unit while a run goes; less than at its start, because others write meanwhile."""


def room_for_run(work: Path) -> int:
    """Bytes that a work directory may grow to: what is free, less a reserve, and what is in it already."""
    used = 0
    for folder, _, names in os.walk(work):  # which passes over what is not there
        for name in names:
            with suppress(OSError):  # another process may be at work here; its lock is looked at later
                used += files.system_calls.lstat(Path(folder, name)).st_size
    return max(0, files.free_bytes(work) - START_RESERVE_BYTES + used)


def require_output_room(output: Path, work: Path, need: int) -> None:
    """Refuses a run whose adapter its disk cannot hold; on the run's own disk there is the reserve for it.

    Args:
        output: the adapter's folder, whose parent exists.
        work: the run's folder.
        need: bytes of the adapter.

    Raises:
        StorageError: as `require_room` does.
    """
    with files.storage_errors("look at", output):
        elsewhere = os.stat(output.parent).st_dev != os.stat(work).st_dev
    if elsewhere:
        require_room(output.parent, need, "the adapter")


def require_room(folder: Path, need: int, what: str) -> None:
    """Stops a run before it begins what the disk cannot hold.

    Args:
        folder: where it will be written.
        need: bytes.
        what: for the message.

    Raises:
        StorageError: with what is free and needed.
    """
    free = files.free_bytes(folder)
    if free < need + UNIT_RESERVE_BYTES:
        raise StorageError(
            f"{shown(folder)} has {format_size(free)} free; {what} needs {format_size(need)} and a reserve of "
            f"{format_size(UNIT_RESERVE_BYTES)}; nothing that is done is lost: free some space, and the same command "
            "continues from here"
        )
