"""The directory of a run: who is using it, what it was started with, and its units.

``RUN/`` holds ``LOCK`` (a flock; its text is only for the message to others), ``run.json`` (the parts, which decide
the numbers and must not change, and the settings, which may), ``units/`` and, if the caller makes it, ``model/``
(copies of config files). ``run.json`` appears last and goes first: a folder without it is new, half-made or
half-removed, and is made anew if nothing foreign is in it. No path, clock or inode is ever compared, so a copied
directory is as good as the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from streamda import files
from streamda.errors import ConfigError, DamagedError, LockedError, MismatchError, StreamdaError
from streamda.files import JSON, reached, shown
from streamda.units import UnitStore, read_sealed_json, write_sealed_json

FORMAT = "streamda-run"
VERSION = 1

_LOCK, _RECORD, _UNITS, _MODEL = "LOCK", "run.json", "units", "model"
_LOCK_TEXT_START = b'{"format":"streamda-lock"'
_RECORD_TEMPORARY = re.compile(r"run\.json\.[0-9a-f]{8}\.tmp")
_RECORD_TRASH = re.compile(r"run\.json\.[0-9a-f]{8}\.trash")
_ABSENT = object()
_MOST_FIELDS = 5  # of a mismatch in a message: enough to recognize the cause, and still one line
_MOST_CHARACTERS = 60  # of one value


def canonical_digest(obj: JSON) -> str:
    """The sha256 of the canonical JSON of ``obj``, in hexadecimal."""
    return hashlib.sha256(files.canonical_json(obj)).hexdigest()


class FolderLock:
    """A flock on a file, held until `release` or the end of the process; a `LockedError` at once if it is not free.

    The file that a dead process leaves is no lock.
    """

    def __init__(self, path: Path, *, exclusive: bool) -> None:
        self.path = path
        self.exclusive = exclusive
        self._signed = False
        self._descriptor = self._locked_descriptor()
        # A forked child inherits the lock and would go on holding it when this process is killed.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: FolderLock._forget(reference()))

    def sign(self) -> None:
        """Say in the file who holds the lock, for the message that others get."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        text = files.canonical_json(
            {"format": "streamda-lock", "host": os.uname().nodename, "pid": os.getpid(), "since": since}
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


class RunDirectory:
    """An open and locked run directory; a context manager. Made by `open` and `open_existing`."""

    def __init__(self, path: Path, lock: FolderLock, record: Mapping[str, Any]) -> None:
        self.path = path
        self.parts: Mapping[str, Mapping[str, Any]] = record["parts"]
        """What the run was started with, as stored: by name of the part, then of the field."""
        self.settings: Mapping[str, Any] = record["settings"]
        """What may change from one start to the next."""
        self.fingerprint = canonical_digest(self.parts)
        """Digest of the parts."""
        self.units = UnitStore(path / _UNITS, self.fingerprint)
        self._created: str = record["created"]
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: Path | str,
        parts: Mapping[str, Mapping[str, JSON]],
        *,
        settings: Mapping[str, JSON],
        resume: bool = True,
        restart: bool = False,
        ignore_parts: Collection[str] = (),
    ) -> Self:
        """Start a run in ``path``, or continue the one that is there; no other process may use it meanwhile.

        Args:
            path: Made with its parents if missing.
            parts: Everything that decides the numbers. A run is only continued with equal parts.
            settings: Everything else worth keeping. On continuing they are merged into the stored ones.
            resume: Whether an existing run may be continued.
            restart: Throw an existing run away and start over.
            ignore_parts: Names of parts that may differ; the stored ones stay.

        Raises:
            ConfigError: The folder holds something else, or a run although ``resume`` is false.
            MismatchError: The run has other parts, or a format that this version does not know.
            LockedError: Another process uses the directory.
            DamagedError: ``run.json`` is damaged, or a symbolic link is where none should be.
        """
        path = Path(os.path.realpath(path))
        with ExitStack() as undo:
            lock, record = _locked(path, exclusive=True)
            undo.callback(lock.release)
            if record is not None and not restart:
                if not resume:
                    raise ConfigError(f"{shown(path)} holds a run; allow it to be continued, or use --overwrite")
                _compare(path, record["parts"], parts, ignore_parts)
            lock.sign()
            if record is not None and restart:
                _retire(path)
            if record is None or restart:
                _clear(path)
                record = _create(path, parts, settings)
            run = cls(path, lock, record)
            _sweep(path)
            run.units.sweep()
            run.update_settings(settings)
            undo.pop_all()
        return run

    @classmethod
    def open_existing(cls, path: Path | str, *, exclusive: bool) -> Self:
        """Open the run that is there, whatever its parts: alone, or beside other readers. Raises as `open` does."""
        path = Path(os.path.realpath(path))
        if not os.path.lexists(path / _RECORD):
            raise ConfigError(f"there is no streamda run in {shown(path)}")
        with ExitStack() as undo:
            lock, record = _locked(path, exclusive=exclusive)
            undo.callback(lock.release)
            if record is None:
                raise ConfigError(f"there is no streamda run in {shown(path)}")
            run = cls(path, lock, record)
            if exclusive:
                lock.sign()
                _sweep(path)
                run.units.sweep()
            undo.pop_all()
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others in. Safe to call again."""
        self._lock.release()

    def update_settings(self, settings: Mapping[str, JSON]) -> None:
        """Merge ``settings`` into the stored ones."""
        self._require_exclusive()
        merged = json.loads(files.canonical_json({**self.settings, **settings}))
        if files.canonical_json(merged) != files.canonical_json(self.settings):
            _write_record(self.path, self.parts, merged, self._created)
            self.settings = merged

    def remove(self) -> None:
        """Remove the run and close it. What is not ours stays, and with it the folder."""
        self._require_exclusive()
        _retire(self.path)
        _clear(self.path)
        files.remove_tree(self.path / _LOCK)
        reached("run-lock-removed")
        with files.storage_errors("remove", self.path):
            if not files.system_calls.listdir(self.path):
                files.system_calls.rmdir(self.path)
        self.close()

    def _require_exclusive(self) -> None:
        if not self._lock.exclusive:
            raise ValueError("the run directory is open for reading only")


def _locked(path: Path, *, exclusive: bool) -> tuple[FolderLock, dict[str, Any] | None]:
    """The lock and the stored record, None if a run has yet to be made. A folder that is not ours is not changed."""
    for name in (_LOCK, _RECORD, _UNITS, _MODEL):
        if os.path.islink(path / name):
            raise DamagedError(f"{shown(path / name)} is a symbolic link; put the real thing in its place")
    # LOCK is the first of our files to appear and the last to go: without it, nobody is at work here.
    if not os.path.lexists(path / _LOCK):
        _find_record(path)
        files.make_folders(path)
        reached("run-folder-made")
    lock = FolderLock(path / _LOCK, exclusive=exclusive)
    reached("run-locked")
    try:
        return lock, _find_record(path)
    except StreamdaError:
        lock.release()
        raise


def _find_record(path: Path) -> dict[str, Any] | None:
    """The content of ``run.json``; None where nothing is, or only what a killed process left of a run."""
    with files.storage_errors("use", path):
        try:
            names = set(files.system_calls.listdir(path))
        except FileNotFoundError:
            return None
        if _RECORD not in names:
            half_removed = any(_RECORD_TRASH.fullmatch(name) for name in names)
            if half_removed or all(_is_half_made(path / name) for name in names):
                return None
            raise ConfigError(f"{shown(path)} is not a streamda run directory, and not empty; choose another")
    record = files.read_json(path / _RECORD)
    if not isinstance(record, dict) or "format" not in record:
        raise ConfigError(f"{shown(path)} is not a streamda run directory; choose another")
    found = (record["format"], record.get("version"))
    if found != (FORMAT, VERSION):
        raise MismatchError(
            f"{shown(path)} has format {found[0]!r} version {found[1]!r}, this streamda reads {FORMAT!r} version "
            f"{VERSION}; use the streamda that wrote it, or choose another directory"
        )
    record = read_sealed_json(path / _RECORD)
    if not os.path.isdir(path / _UNITS):
        raise DamagedError(f"{shown(path / _UNITS)} is missing; delete {shown(path)} and run the same command again")
    return record


def _is_half_made(entry: Path) -> bool:
    """Whether a run that was killed while it was made may have left this."""
    if entry.name == _LOCK:
        text = files.read_bytes(entry)  # may have been cut short by a full disk
        return text.startswith(_LOCK_TEXT_START) or _LOCK_TEXT_START.startswith(text)
    if entry.name == _UNITS:
        return not files.system_calls.listdir(entry)
    return _RECORD_TEMPORARY.fullmatch(entry.name) is not None


def _create(path: Path, parts: Mapping[str, JSON], settings: Mapping[str, JSON]) -> dict[str, Any]:
    files.make_folder(path / _UNITS)
    files.fsync_folder(path)
    reached("run-units-made")
    return _write_record(path, parts, settings, datetime.now(UTC).isoformat(timespec="seconds"))


def _write_record(path: Path, parts: Mapping[str, JSON], settings: Mapping[str, JSON], created: str) -> dict[str, Any]:
    head: dict[str, JSON] = {"format": FORMAT, "version": VERSION, "created": created}
    record: dict[str, JSON] = {**head, "parts": parts, "settings": settings}
    write_sealed_json(path / _RECORD, record)
    reached("run-recorded")
    return json.loads(files.canonical_json(record))  # type: ignore[no-any-return]  # tuples are lists from now on


def _retire(path: Path) -> None:
    """End the run: from here on its files are rubbish, whoever is to remove it."""
    files.rename(path / _RECORD, path / f"{_RECORD}.{secrets.token_hex(4)}.trash")
    reached("run-retired")
    files.fsync_folder(path)


def _clear(path: Path) -> None:
    """Remove all of a retired or half-made run but LOCK; the renamed record last, since it says whose the rest is."""
    files.remove_tree(path / _UNITS)
    files.remove_tree(path / _MODEL)
    _sweep(path)
    files.fsync_folder(path)
    reached("run-cleared")
    _sweep(path, _RECORD_TRASH)


def _sweep(path: Path, leftover: re.Pattern[str] = _RECORD_TEMPORARY) -> None:
    with files.storage_errors("look through", path):
        for name in filter(leftover.fullmatch, files.system_calls.listdir(path)):
            files.remove_tree(path / name)


def _compare(path: Path, old: Mapping[str, Any], new: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Raise a `MismatchError` that names the first few fields in which the parts differ."""
    old, new = ({name: part for name, part in parts.items() if name not in ignored} for parts in (old, new))
    found = list(_differences(old, json.loads(files.canonical_json(new)), ""))
    if found:
        more = f" and {len(found) - _MOST_FIELDS} more" if len(found) > _MOST_FIELDS else ""
        raise MismatchError(
            f"{shown(path)} belongs to another run: {', '.join(found[:_MOST_FIELDS])}{more}; "
            "choose another --work-dir, or --overwrite to start over"
        )


def _differences(old: Any, new: Any, field: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{field}.{key}" if field else key)
    elif old is _ABSENT or new is _ABSENT or files.canonical_json(old) != files.canonical_json(new):
        yield f"{shown(field)} was {_shortened(old)} and is now {_shortened(new)}"


def _shortened(value: Any) -> str:
    text = "absent" if value is _ABSENT else files.canonical_json(value).decode("ascii")
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]}...{text[-half:]}"
