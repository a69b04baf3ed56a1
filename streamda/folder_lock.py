"""A lock on a folder: a flock on a file in it, whose text says who holds it.

The lock is the flock, not the file: what a dead process leaves stops nobody.
"""

from __future__ import annotations

import fcntl
import json
import os
import weakref
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

from streamda import files
from streamda.errors import LockedError
from streamda.files import shown

LOCK_FORMAT = "streamda-lock"
"""What the text of the file begins with, as the value of ``format``."""


class FolderLock:
    """A flock on a file, held until `release` or the end of the process; a `LockedError` at once if it is not free.

    The file that a dead process leaves is no lock.
    """

    def __init__(self, path: Path, *, exclusive: bool) -> None:
        self.path = path
        self.exclusive = exclusive
        self._signed = False
        self._descriptor = self._locked_descriptor()
        self.was_left = os.fstat(self._descriptor).st_size > 0
        """Whether the last process that signed it ended without `release`: it was killed, or the machine stopped."""
        # A forked child inherits the lock and would go on holding it when this process is killed.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: FolderLock._forget(reference()))

    def sign(self) -> None:
        """Say in the file who holds the lock, for the message that others get."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        text = files.canonical_json(
            {"format": LOCK_FORMAT, "host": os.uname().nodename, "pid": os.getpid(), "since": since}
        )
        self._signed = True
        with files.storage_errors("write", self.path):
            files.system_calls.ftruncate(self._descriptor, 0)
            files.write_all(self._descriptor, text)

    def release(self) -> None:
        """Let others in. Safe to call again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError), files.closing(descriptor):
                if self._signed:  # the text would only mislead, but nothing depends on it
                    files.system_calls.ftruncate(descriptor, 0)

    def _locked_descriptor(self) -> int:
        flags = (os.O_RDWR if self.exclusive else os.O_RDONLY) | os.O_CREAT
        kind = fcntl.LOCK_EX if self.exclusive else fcntl.LOCK_SH
        while True:
            with files.storage_errors("lock", self.path), ExitStack() as undo:
                descriptor = files.open_descriptor(self.path, flags)
                undo.callback(files.system_calls.close, descriptor)
                try:
                    files.system_calls.flock(descriptor, kind | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise LockedError(self._holder(descriptor)) from error
                # Who held it may have removed the file since it was opened: the lock must be on the one others see.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), files.system_calls.lstat(self.path)):
                        undo.pop_all()
                        return descriptor

    def _holder(self, descriptor: int) -> str:
        who = "another process"
        with suppress(ValueError, TypeError, KeyError):  # the text may be missing or half written
            text = json.loads(files.system_calls.read(descriptor, 4096))
            who = shown(f"process {text['pid']} on {text['host']} since {text['since']}")
        return f"{shown(self.path.parent)} is in use by {who}; wait for it, or choose another directory"

    @staticmethod
    def _forget(lock: FolderLock | None) -> None:
        if lock is not None and lock._descriptor >= 0:
            os.close(lock._descriptor)
            lock._descriptor = -1
