"""Whether a file system does what a run's safety rests on: locks that exclude, folders that rename, syncs that return.

Network and user-space file systems leave one or the other out, and would say so hours into a run, or never. It is tried
out where the run will be, before it begins.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from streamda import files
from streamda.errors import StorageError
from streamda.files import shown

_PLAIN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE)
"""Reasons for which any file system may fail; they are no sign of one that cannot."""
PROBE = re.compile(r"probe\.[0-9a-f]{8}\.part")
"""Names of the folders in which a file system is tried out."""
_PROBE_LOCK = "file"
_TRIES = 3
_CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EISDIR)


class _Lenient:
    """System calls on a file system that cannot lock or sync: there both do nothing."""

    def __init__(self, calls: files.SystemCalls) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calls, name)

    def flock(self, descriptor: int, kind: int) -> None:
        """Locks where that is possible; who has the lock still keeps others out."""
        try:
            self._calls.flock(descriptor, kind)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in _PLAIN:
                raise

    def fsync(self, descriptor: int) -> None:
        """Syncs where that is possible; a failing disk is still an error."""
        try:
            self._calls.fsync(descriptor)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise


@contextmanager
def tolerated(unsafe: bool) -> Iterator[None]:
    """Within the block, what a file system cannot do is left out if ``unsafe``, for the whole process."""
    before = files.system_calls
    if unsafe:
        files.system_calls = cast(files.SystemCalls, _Lenient(before))
    try:
        yield
    finally:
        files.system_calls = before


def require_safe(folder: Path, unsafe: bool) -> None:
    """Tries out the file system in a folder, which must exist, and leaves nothing there.

    Args:
        folder: where the run is, or will be made.
        unsafe: whether to go on with one that cannot lock, rename or sync.

    Raises:
        StorageError: it cannot, or the folder cannot be written at all.
    """
    clear_probes(folder)
    for tries_left in reversed(range(_TRIES)):
        try:
            return _try_out(folder, unsafe)
        except StorageError as error:
            # another run may take a probe for a leftover in the moment before it is locked
            if not tries_left or _errno(error) not in (errno.ENOENT, errno.EAGAIN):
                raise


def _try_out(folder: Path, unsafe: bool) -> None:
    place, moved = (folder / f"probe.{secrets.token_hex(4)}.part" for _ in range(2))
    with files.storage_errors("write to", folder):  # the probe's name says nothing to who reads of it
        files.system_calls.mkdir(place)
    try:
        with ExitStack() as held:  # a lock, unlike the number of a process, means the same on every host
            for what, attempt in (
                ("lock a file", lambda: held.enter_context(_locked(place / _PROBE_LOCK))),
                ("sync a folder", lambda: files.fsync_folder(place)),
                ("rename a folder", lambda: _rename(place, moved)),
            ):
                _try(folder, what, attempt, unsafe)
    finally:
        with suppress(StorageError):  # what stopped the attempts may stop this too
            for each in (place, moved):
                files.remove_tree(each)


def clear_probes(folder: Path) -> None:
    """Removes what killed processes left of their attempts, not what another is trying out at this moment."""
    with files.storage_errors("look through", folder):
        names = files.system_calls.listdir(folder)
    for name in filter(PROBE.fullmatch, names):
        with suppress(OSError, StorageError):  # it is locked, or that cannot be told: let it be
            with suppress(FileNotFoundError), ExitStack() as undo:
                descriptor = files.open_descriptor(folder / name / _PROBE_LOCK, os.O_RDWR)
                undo.callback(files.system_calls.close, descriptor)
                files.system_calls.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            files.remove_tree(folder / name)


def _errno(error: BaseException | None) -> int | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error.errno if error is not None else None


def _try(folder: Path, what: str, attempt: Callable[[], None], unsafe: bool) -> None:
    try:
        attempt()
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _PLAIN:
            raise
        if not unsafe:
            reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(error)
            raise StorageError(
                f"the file system of {shown(folder)} cannot {what} ({reason}), so a run there would not survive a "
                "crash; choose another --work-dir on a local disk, or accept the risk with --unsafe-filesystem"
            ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Locks a file for the block, after a second lock on it was seen refused."""
    with ExitStack() as stack:
        with files.storage_errors("lock", path):
            first, second = (
                stack.enter_context(files.closing(files.open_descriptor(path, os.O_RDWR | os.O_CREAT)))
                for _ in range(2)
            )
            files.system_calls.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                files.system_calls.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                raise StorageError("a second lock is granted beside the first")
        yield


def _rename(source: Path, target: Path) -> None:
    files.rename(source, target)
    files.fsync_folder(target.parent)
    with files.storage_errors("find", target):
        files.system_calls.lstat(target)
