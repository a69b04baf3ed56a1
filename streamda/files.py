"""Durable file operations: the only module through which streamda makes, seals, renames and removes its own files.

Everything ends in `system_calls`, an object that a test replaces to make the N-th call fail, and in `reached`, which
kills the process at a named point. An ``OSError`` is translated once, here: a failure while writing is a
`StorageError`, a committed file that cannot be read is a `DamagedError`. Existing files are never written into; they
are replaced by a rename, so that a reader sees the old bytes or the new ones.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import secrets
import signal
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

import google_crc32c

from streamda.errors import DamagedError, StorageError
from streamda.quoting import printable

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

_BLOCK_BYTES = 1 << 20  # 1 MiB: smaller costs a system call per few microseconds of checksum, larger only memory
_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose another file system",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "the disk reports a failure: check it before running again",
}
_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of libraries that write by themselves: safetensors loses the errno ("os error 28"), NumPy never had it.
_TEXT = re.compile(r"os error (5|13|27|28|30|122)\b|no space left|not enough free space|quota exceeded", re.IGNORECASE)


class SystemCalls:
    """The system calls that durability rests on, one attribute each. A test double has the same attributes."""

    open = staticmethod(os.open)
    close = staticmethod(os.close)
    read = staticmethod(os.read)
    preadv = staticmethod(os.preadv)
    write = staticmethod(os.write)
    ftruncate = staticmethod(os.ftruncate)
    fsync = staticmethod(os.fsync)
    flock = staticmethod(fcntl.flock)
    replace = staticmethod(os.replace)
    rename = staticmethod(os.rename)
    mkdir = staticmethod(os.mkdir)
    unlink = staticmethod(os.unlink)
    rmdir = staticmethod(os.rmdir)
    listdir = staticmethod(os.listdir)
    lstat = staticmethod(os.lstat)
    statvfs = staticmethod(os.statvfs)


system_calls: SystemCalls = SystemCalls()
"""What every function below calls, looked up at each call."""
_times_reached: Counter[str] = Counter()


def reached(point: str) -> None:
    """Kill this process if the environment variable ``STREAMDA_KILL_AT`` is ``point`` or ``point:N`` (the N-th time).

    Crash tests set it; otherwise this does nothing. SIGKILL, because nothing may clean up behind it.
    """
    wanted, _, times = os.environ.get("STREAMDA_KILL_AT", "").partition(":")
    if wanted == point:
        _times_reached[point] += 1
        if _times_reached[point] == int(times or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def shown(path: Path | str) -> str:
    """The path as printable text on one line: file names may hold newlines, escapes and bytes that are not UTF-8."""
    return printable(str(path))


def free_bytes(path: Path) -> int:
    """Bytes that can still be written to the file system of ``path``, which need not exist yet."""
    with storage_errors("look at", path):
        return _free_bytes(path)


def _free_bytes(path: Path) -> int:
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    answer = system_calls.statvfs(path)
    return answer.f_bavail * answer.f_frsize


def storage_error(error: OSError, action: str, path: Path) -> StorageError:
    """The one line that tells the user what could not be done, where, and what to do about it."""
    code = error.errno or 0
    reason = os.strerror(code) if code else str(error)
    if code in _SPACE_ERRORS:
        with suppress(OSError):  # the free bytes are a courtesy; the error itself must come through
            reason += f" ({_free_bytes(path)} bytes free)"
    advice = _ADVICE.get(code, "choose a place that can be written, or change its permissions")
    return StorageError(f"cannot {action} {shown(path)}: {reason}; {advice}")


def foreign_storage_error(error: BaseException, action: str, folder: Path) -> StorageError | None:
    """A `StorageError` if ``error``, raised by whatever wrote into ``folder``, is about storage; else None.

    An ``OSError`` without a file name counts if it is one that writing raises; one with a name only inside ``folder``,
    because the same code may have been reading elsewhere. Other exceptions are judged by their text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        if isinstance(error.filename, str | bytes):
            of_writing = folder in Path(os.fsdecode(error.filename)).parents
        else:
            of_writing = error.errno in (errno.EROFS, errno.EIO)
        return storage_error(error, action, folder) if of_writing or error.errno in _SPACE_ERRORS else None
    if isinstance(error, Exception) and (found := _TEXT.search(str(error))) is not None:
        return storage_error(OSError(int(found[1] or errno.ENOSPC), str(error)), action, folder)
    return None


@contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Translate an ``OSError`` of the block, which writes, into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, action, path) from error


@contextmanager
def damage_errors(path: Path) -> Iterator[None]:
    """Translate an ``OSError`` of the block, which reads what was committed, into a `DamagedError`.

    Lack of permission or of file descriptors is no damage and stays a `StorageError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise storage_error(error, "read", path) from error
        raise DamagedError(f"{shown(path)} cannot be read: {os.strerror(error.errno or errno.EIO)}") from error


def open_descriptor(path: Path, flags: int) -> int:
    """The file descriptor of ``path``, never through a symbolic link; a file created by it obeys the umask."""
    return system_calls.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Close the descriptor at the end of the block."""
    try:
        yield descriptor
    finally:
        system_calls.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview[int]) -> None:
    """Write all of ``data``: the system may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[system_calls.write(descriptor, view) :]


class FileWriter:
    """A new file that is checksummed while it is written and fsynced when its block is left normally."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.crc32c = 0
        with storage_errors("create", path):
            self._descriptor = open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``, a contiguous buffer; no more than one block of it is copied at a time."""
        view = memoryview(data).cast("B")
        with storage_errors("write", self.path):
            for start in range(0, len(view), _BLOCK_BYTES):
                block = bytes(view[start : start + _BLOCK_BYTES])
                write_all(self._descriptor, block)
                self.crc32c = google_crc32c.extend(self.crc32c, block)
                self.size += len(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with storage_errors("write", self.path), closing(self._descriptor):
            if error is None:
                system_calls.fsync(self._descriptor)


def fsync_file(path: Path) -> None:
    """Return once the bytes of the file are on the disk."""
    with storage_errors("sync", path), closing(open_descriptor(path, os.O_RDONLY)) as descriptor:
        system_calls.fsync(descriptor)


def fsync_folder(path: Path) -> None:
    """Return once the names in the folder are on the disk: a rename is not durable before that."""
    with storage_errors("sync", path), closing(open_descriptor(path, os.O_RDONLY | os.O_DIRECTORY)) as descriptor:
        system_calls.fsync(descriptor)


def replace(source: Path, target: Path) -> None:
    """Rename a file, taking the place of an existing one."""
    with storage_errors("replace", target):
        system_calls.replace(source, target)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that is free."""
    with storage_errors("rename to", target):
        system_calls.rename(source, target)


def unlink(path: Path) -> None:
    """Remove a file or a symbolic link, not what the link points at."""
    with storage_errors("remove", path):
        system_calls.unlink(path)


def make_folder(path: Path) -> None:
    """Make a folder; its parent is not fsynced."""
    with storage_errors("create", path):
        system_calls.mkdir(path)


def make_folders(path: Path) -> None:
    """Make the folder and its missing parents, each durable in its own parent; existing ones are left alone."""
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    for folder in reversed(missing):
        with storage_errors("create", folder), suppress(FileExistsError):  # another process may be as fast
            system_calls.mkdir(folder)
        fsync_folder(folder.parent)


class Tree(NamedTuple):
    """What lies below a folder."""

    sizes: dict[str, int]
    """Bytes of each regular file, by its path relative to the folder, with ``/``."""
    folders: list[Path]
    """All folders, deepest first, the top one last."""
    others: list[str]
    """Relative paths of whatever is neither file nor folder, symbolic links above all."""


def tree(top: Path) -> Tree:
    """List everything below ``top`` without following links. Raises ``OSError``: the caller knows what it means."""
    found = Tree({}, [], [])

    def visit(folder: Path) -> None:
        for name in sorted(system_calls.listdir(folder)):
            entry = folder / name
            status = system_calls.lstat(entry)
            if stat.S_ISDIR(status.st_mode):
                visit(entry)
            elif stat.S_ISREG(status.st_mode):
                found.sizes[entry.relative_to(top).as_posix()] = status.st_size
            else:
                found.others.append(entry.relative_to(top).as_posix())
        found.folders.append(folder)

    visit(top)
    return found


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a folder with all below it, entry by entry; what is missing is as good as removed."""
    with storage_errors("remove", path), suppress(FileNotFoundError):
        if stat.S_ISDIR(system_calls.lstat(path).st_mode):
            for name in sorted(system_calls.listdir(path)):
                remove_tree(path / name)
            system_calls.rmdir(path)
        else:
            system_calls.unlink(path)
        reached("entry-removed")


def crc32c_of_file(path: Path) -> int:
    """The crc32c of the file's bytes, read in blocks; a `DamagedError` if they cannot be read."""
    crc = 0
    with damage_errors(path), closing(open_descriptor(path, os.O_RDONLY)) as descriptor:
        while block := system_calls.read(descriptor, _BLOCK_BYTES):
            crc = google_crc32c.extend(crc, block)
    return crc


def canonical_json(obj: JSON) -> bytes:
    """The one spelling of ``obj`` that digests and checksums are taken of: sorted, compact, ASCII."""
    return json.dumps(obj, sort_keys=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def json_text(obj: JSON) -> bytes:
    """What `write_json_atomic` puts into a file. Raises ValueError for NaN and TypeError for what is no JSON.

    ASCII, because a path that is not UTF-8 is a string with lone surrogates, which only an escape can carry.
    """
    return (json.dumps(obj, sort_keys=True, allow_nan=False, indent=1) + "\n").encode("ascii")


def write_json_atomic(path: Path, obj: JSON) -> None:
    """Write ``obj`` to ``path``, which then holds either what it held before or all of ``obj``, whatever happens."""
    text = json_text(obj)  # raises before any file is touched
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with FileWriter(temporary) as file:
            file.write(text)
        reached("json-written")
        replace(temporary, path)
    except StorageError:
        with suppress(StorageError):
            remove_tree(temporary)
        raise
    reached("json-replaced")
    fsync_folder(path.parent)


def read_bytes(path: Path) -> bytes:
    """All bytes of a small file; a `DamagedError` if they cannot be read."""
    with damage_errors(path), closing(open_descriptor(path, os.O_RDONLY)) as descriptor:
        return b"".join(iter(lambda: system_calls.read(descriptor, _BLOCK_BYTES), b""))


def read_json(path: Path) -> Any:
    """Read UTF-8 JSON without NaN and infinity. Anything else is a `DamagedError` naming the file."""

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text} is not a finite number")
        return float(text)

    try:
        return json.loads(read_bytes(path).decode(), parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{shown(path)} is not valid JSON ({error})") from error
