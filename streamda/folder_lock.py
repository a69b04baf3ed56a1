"""A lock on a folder: a flock on a file in it, whose text says who holds it.

The lock is the flock, not the file: what a dead process leaves stops nobody.
"""

from __future__ import annotations

import errno
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

_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class FolderLock:
    """A flock on a file, held until `release` or the end of the process; a `LockedError` at once if it is not free.

    The file that a dead process leaves is no lock. Readers, who share the lock, make no file, and go on without a lock
    where the file is missing or the file system knows none: a read-only copy can be looked at too.
    """

    def __init__(self, path: Path, *, exclusive: bool) -> None:
        self.path = path
        self.exclusive = exclusive
        self._signed = False
        self._descriptor = self._locked_descriptor()
        self.was_left = self._descriptor >= 0 and os.fstat(self._descriptor).st_size > 0
        """Whether the last process that signed it ended without `release`: it was killed, or the machine stopped."""
        _held.add(self)

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
        _held.discard(self)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError), files.closing(descriptor):
                if self._signed:  # the text would only mislead, but nothing depends on it
                    files.system_calls.ftruncate(descriptor, 0)

    def _locked_descriptor(self) -> int:
        """The open and locked file; -1 for a reader who goes on without."""
        flags = os.O_RDWR | os.O_CREAT if self.exclusive else os.O_RDONLY
        kind = fcntl.LOCK_EX if self.exclusive else fcntl.LOCK_SH
        while True:
            with files.storage_errors("lock", self.path), ExitStack() as undo:
                try:
                    descriptor = files.open_descriptor(self.path, flags)
                except FileNotFoundError:
                    if self.exclusive:
                        raise
                    return -1
                undo.callback(files.system_calls.close, descriptor)
                try:
                    files.system_calls.flock(descriptor, kind | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise LockedError(self._holder(descriptor)) from error
                except OSError as error:
                    if self.exclusive or error.errno not in _CANNOT_LOCK:
                        raise
                    return -1
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

    def _forget(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_all() -> None:
    """A forked child inherits the locks and would go on holding them when the parent is killed."""
    for lock in tuple(_held):
        lock._forget()


os.register_at_fork(after_in_child=_forget_all)  # once: what is registered is never let go
