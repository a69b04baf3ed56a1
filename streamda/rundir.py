"""The directory of a run: who is using it, what it was started with, and its units.

``RUN/`` holds ``LOCK`` (a flock; its text is only for the message to others), ``run.json`` (the parts, which decide
the numbers and must not change, and the settings, which may), ``units/`` and, if the caller makes it, ``model/``
(copies of config files). ``run.json`` appears last and goes first: a folder without it is new, half-made or
half-removed, and is made anew if nothing foreign is in it. No path, clock or inode is ever compared, so a copied
directory is as good as the first.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from streamda import files
from streamda.errors import ConfigError, DamagedError, MismatchError, StreamdaError
from streamda.files import JSON, reached, shown
from streamda.filesystem import PROBE, clear_probes
from streamda.folder_lock import LOCK_FORMAT, FolderLock
from streamda.run_parts import canonical_digest, require_equal
from streamda.sealed_json import read_sealed_json, write_sealed_json
from streamda.units import UnitStore

FORMAT = "streamda-run"
VERSION = 1

_LOCK, _RECORD, _UNITS, MODEL_FOLDER = "LOCK", "run.json", "units", "model"
WORK_SUFFIX = ".work"
"""Behind the adapter's folder: where its run lies unless told otherwise."""
OWN_NAMES = (_LOCK, _RECORD, _UNITS, MODEL_FOLDER)
"""All that streamda puts at the top of a run's folder."""
_LOCK_TEXT_START = b'{"format":"%b"' % LOCK_FORMAT.encode()
_RECORD_TEMPORARY = re.compile(r"run\.json\.[0-9a-f]{8}\.tmp")
_RECORD_TRASH = re.compile(r"run\.json\.[0-9a-f]{8}\.trash")
_FOLDER_STAYS = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTEMPTY)
"""Why the folder of a removed run may stay: a mount point, a parent that cannot be written, a file come meanwhile."""


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
        self.was_killed = lock.was_left
        """Whether the last process at work here was killed, or the machine stopped."""

    @classmethod
    def open(
        cls,
        path: Path | str,
        parts: Mapping[str, Mapping[str, JSON]],
        *,
        settings: Mapping[str, JSON],
        new: Callable[[], Mapping[str, JSON]] = dict,
        resume: bool = True,
        restart: bool | Callable[[Mapping[str, Any]], bool] = False,
        ignore_parts: Collection[str] = (),
    ) -> Self:
        """Start a run in ``path``, or continue the one that is there; no other process may use it meanwhile.

        Args:
            path: Made with its parents if missing.
            parts: Everything that decides the numbers. A run is only continued with equal parts.
            settings: Everything else worth keeping. On continuing they are merged into the stored ones.
            new: Called before a new run is begun or an old one thrown away: what only new ones keep, or an error.
            resume: Whether an existing run may be continued.
            restart: Throw an existing run away and start over; a function decides by the content of ``run.json``.
            ignore_parts: Names of parts that may differ; the stored ones stay.

        Raises:
            ConfigError: The folder holds something else, or a run although ``resume`` is false.
            MismatchError: The run has other parts, or a format that this version does not know.
            LockedError: Another process uses the directory.
            DamagedError: ``run.json`` or a unit is damaged (looked at without reading the data), or a symbolic link
                is where none should be.
        """
        path = Path(os.path.realpath(path))
        with ExitStack() as undo:
            lock, record = _locked(path, exclusive=True)
            undo.callback(lock.release)
            if record is not None and not isinstance(restart, bool):
                restart = restart(record)
            if record is not None and not restart:
                if not resume:
                    raise ConfigError(f"{shown(path)} holds a run; allow it to be continued, or use --overwrite")
                require_equal(path, record["parts"], parts, ignore_parts)
            if record is None or restart:
                settings = {**new(), **settings}
            lock.sign()
            if record is not None and restart:
                _retire(path)
            if record is None or restart:
                _clear(path)
                record = _create(path, parts, settings)
            run = cls(path, lock, record)
            _sweep(path)
            run.units.sweep()
            run.units.check_all()
            run.update_settings(settings)
            undo.pop_all()
        return run

    @classmethod
    def open_existing(cls, path: Path | str, *, exclusive: bool, check: bool = True) -> Self:
        """Open the run that is there, whatever its parts: alone, or beside other readers. Raises as `open` does.

        Args:
            path: Of the run.
            exclusive: Alone, to change it; else for reading only, and the units are not looked at.
            check: False opens a run with damaged units.
        """
        path = Path(os.path.realpath(path))
        require_run(path)
        with ExitStack() as undo:
            lock, record = _locked(path, exclusive=exclusive)
            undo.callback(lock.release)
            if record is None:
                raise ConfigError(_no_run(path))
            run = cls(path, lock, record)
            if exclusive:
                lock.sign()
                _sweep(path)
                run.units.sweep()
                if check:
                    run.units.check_all()
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
        _clear_away(self.path)
        self.close()

    @staticmethod
    def finish_removal(path: Path | str) -> None:
        """Remove what is left of a run whose removal was cut short; anything else stays as it is."""
        path = Path(os.path.realpath(path))
        with files.storage_errors("look at", path):
            try:
                names = set(files.system_calls.listdir(path))
            except FileNotFoundError:
                return
        # an empty folder may be the user's own
        if _RECORD not in names and (names == {_LOCK} or any(map(_RECORD_TRASH.fullmatch, names))):
            lock, record = _locked(path, exclusive=True)
            if record is None:  # nor has another process begun anew meanwhile
                _clear_away(path)
            lock.release()

    def _require_exclusive(self) -> None:
        if not self._lock.exclusive:
            raise ValueError("the run directory is open for reading only")


def _locked(path: Path, *, exclusive: bool) -> tuple[FolderLock, dict[str, Any] | None]:
    """The lock and the stored record, None if a run has yet to be made. A folder that is not ours is not changed."""
    for name in OWN_NAMES:
        if os.path.islink(path / name):
            raise DamagedError(f"{shown(path / name)} is a symbolic link; put the real thing in its place")
    # LOCK is the first of our files to appear and the last to go: without it, nobody is at work here.
    if exclusive and not os.path.lexists(path / _LOCK):
        find_record(path)
        files.make_folders(path)
        reached("run-folder-made")
    lock = FolderLock(path / _LOCK, exclusive=exclusive)
    reached("run-locked")
    try:
        return lock, find_record(path)
    except StreamdaError:
        lock.release()
        raise


def find_record(path: Path) -> dict[str, Any] | None:
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
            _require_no_lost_record(path)
            raise ConfigError(f"{shown(path)} is not a streamda run directory, and not empty; choose another")
    with _damage_of_record(path):
        record = files.read_json(path / _RECORD)
        if not isinstance(record, dict) or not {"format", "self_crc"} & set(record):
            raise ConfigError(f"{shown(path)} is not a streamda run directory; choose another")
        if "format" not in record:
            raise DamagedError(f"{shown(path / _RECORD)} does not say its format")
    found = (record["format"], record.get("version"))
    if found != (FORMAT, VERSION):
        raise MismatchError(
            f"{shown(path)} has format {found[0]!r} version {found[1]!r}, this streamda reads {FORMAT!r} version "
            f"{VERSION}; use the streamda that wrote it, or choose another directory"
        )
    with _damage_of_record(path):
        record = read_sealed_json(path / _RECORD)
    if not os.path.isdir(path / _UNITS):
        raise DamagedError(f"{shown(path / _UNITS)} is missing; {_start_over(path)}")
    return record


def require_run(path: Path | str) -> None:
    """Refuses a folder that holds no run (`ConfigError`, with what it is instead), or one without its record."""
    path = Path(os.path.realpath(path))
    if not os.path.lexists(path / _RECORD):
        _require_no_lost_record(path)
        raise ConfigError(_no_run(path))


def _no_run(path: Path) -> str:
    """Why a folder cannot be opened as a run, with what it seems to be instead."""
    if not os.path.lexists(path):
        return f"there is no streamda run in {shown(path)}, which does not exist"
    is_adapter = os.path.lexists(path / "adapter_config.json")
    work = f"{path}{WORK_SUFFIX}"
    beside = f"; there is one in {shown(work)}" if os.path.lexists(f"{work}/{_RECORD}") else ""
    return f"there is no streamda run in {shown(path)}" + (", but an adapter" if is_adapter else "") + beside


def unit_names(path: Path) -> list[str]:
    """Units that are committed at this moment, sorted, whoever is at work here."""
    return UnitStore(path / _UNITS, "").names()


def _require_no_lost_record(path: Path) -> None:
    """Raise a `DamagedError` if the folder holds units without the record that says whose they are."""
    if os.path.lexists(path / _LOCK) and any((path / _UNITS).glob("*/COMMIT.json")):
        raise DamagedError(f"{shown(path / _RECORD)} is missing; {_start_over(path)}")


@contextmanager
def _damage_of_record(path: Path) -> Iterator[None]:
    """Add what to do to a `DamagedError` of the block, which reads ``run.json``."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"{error}; {_start_over(path)}") from error


def _start_over(path: Path) -> str:
    return f"restore it from a copy, or delete {shown(path)} and run the same command again, which starts over"


def _is_half_made(entry: Path) -> bool:
    """Whether a run that was killed while it was made may have left this."""
    if entry.name == _LOCK:
        text = files.read_bytes(entry).rstrip(b"\0")  # a full disk or a power failure may have cut it short
        return text.startswith(_LOCK_TEXT_START) or _LOCK_TEXT_START.startswith(text)
    if entry.name == _UNITS:
        return not files.system_calls.listdir(entry)
    return any(pattern.fullmatch(entry.name) for pattern in (_RECORD_TEMPORARY, PROBE))


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
    files.remove_tree(path / MODEL_FOLDER)
    _sweep(path)
    files.fsync_folder(path)
    reached("run-cleared")
    _sweep(path, _RECORD_TRASH)


def _clear_away(path: Path) -> None:
    """Remove all of a retired run, and the folder where that is possible and nothing foreign is in it."""
    _clear(path)
    files.remove_tree(path / _LOCK)
    reached("run-lock-removed")
    with files.storage_errors("remove", path):
        if files.system_calls.listdir(path):
            return
        try:
            files.system_calls.rmdir(path)
        except OSError as error:
            if error.errno not in _FOLDER_STAYS:
                raise


def _sweep(path: Path, leftover: re.Pattern[str] = _RECORD_TEMPORARY) -> None:
    clear_probes(path)
    with files.storage_errors("look through", path):
        for name in filter(leftover.fullmatch, files.system_calls.listdir(path)):
            files.remove_tree(path / name)
