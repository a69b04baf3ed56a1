"""Asking the system to read parts of files into its page cache before they are wanted."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

WINDOW_BYTES = 128 << 10
"""Asked for at a time: of a longer range Linux reads one readahead window (this by default) and forgets the rest."""


def ask(descriptor: int, offset: int, num_bytes: int, dropped: threading.Event | None = None) -> None:
    """Asks for a range of a file; waits only where the disk's queue is full.

    Args:
        descriptor: of the file.
        offset: of the first byte.
        num_bytes: how many.
        dropped: once it is set, the rest is not asked for.
    """
    with suppress(OSError):  # a hint, which some file systems do not take
        for start in range(offset, offset + num_bytes, WINDOW_BYTES):
            if dropped is not None and dropped.is_set():
                return
            os.posix_fadvise(descriptor, start, min(WINDOW_BYTES, offset + num_bytes - start), os.POSIX_FADV_WILLNEED)
