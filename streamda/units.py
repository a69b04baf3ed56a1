"""Units: folders of files that are committed whole or not at all.

A unit is built in ``<name>.<8 hex>.part``. To commit it, every file is fsynced and its size and crc32c recorded, the
folders are fsynced, ``COMMIT.json`` is added, and the folder is renamed to ``<name>``: a folder under a unit's name is
a committed unit. A unit that is no longer needed is renamed to ``<name>.<8 hex>.trash`` before it is removed, so that
no half of it is ever taken for the whole. What a killed process leaves ends in one of `LEFTOVER_SUFFIXES`.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from streamda import files
from streamda.errors import DamagedError, MismatchError, StorageError, StreamdaError
from streamda.files import JSON, reached, shown
from streamda.sealed_json import read_sealed_json, write_sealed_json

FORMAT = "streamda-unit-1"
LEFTOVER_SUFFIXES = (".part", ".trash", ".tmp", ".partial")
"""Of names that no unit may have, because a sweep removes them."""

_MARKER = "COMMIT.json"
_NAME = re.compile(r"[a-z0-9_-][a-z0-9_.-]{0,63}")


def is_unit_name(name: str) -> bool:
    """Whether a unit may have this name: short, lower case (unique on any file system), not hidden, no leftover."""
    return _NAME.fullmatch(name) is not None and not name.endswith(LEFTOVER_SUFFIXES)


class FileRecord(NamedTuple):
    """What the manifest says of one file."""

    size: int
    crc32c: int
    end: int | None = None
    """The last four bytes, little-endian; None where the file was checksummed while it was written. A chunk of Zarr
    ends in the crc32c of what is before, and the crc32c of any such file is the same number: this tells two apart."""


@dataclass(frozen=True, slots=True, eq=False)
class UnitMetadata(Mapping[str, Any]):
    """What a unit's ``COMMIT.json`` says: a mapping of the metadata, with the rest as attributes."""

    values_by_key: Mapping[str, Any]
    fingerprint: str
    """Of what the unit was computed from."""
    files: Mapping[str, FileRecord]
    """By path relative to the unit's folder."""

    def __getitem__(self, key: str) -> Any:
        return self.values_by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)


class UnitDraft:
    """A unit being written: a context manager that commits it, or removes it if its block is left by an exception."""

    def __init__(self, store: UnitStore, name: str, fingerprint: str) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.path = store.folder / f"{name}.{secrets.token_hex(4)}.part"
        """The folder that the caller writes the unit's files into, by any means."""
        self.metadata: dict[str, JSON] = {}
        """Goes into ``COMMIT.json``; may be filled until the block is left."""
        self.records: dict[str, FileRecord] = {}
        self._store = store

    def record(self, relpath: str, size: int, crc: int) -> None:
        """Tell the size and crc32c of a file that was checksummed while it was written; it is not read again."""
        self.records[relpath] = FileRecord(size, crc)

    def __enter__(self) -> Self:
        files.make_folder(self.path)
        reached("draft-made")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        storage_error = None
        try:
            if error is None:
                self._store.commit(self)
            elif not isinstance(error, StreamdaError):
                storage_error = files.foreign_storage_error(error, f"write unit {self.name} in", self.path)
        finally:
            # Gone by now if committed. What cannot be removed is swept at the next start: it must not hide an error.
            with suppress(StorageError):
                files.remove_tree(self.path)
        if storage_error is not None:
            raise storage_error from error


class UnitStore:
    """The committed units in one folder, which must exist and be used by one process at a time.

    Args:
        folder: Holds one folder per unit.
        fingerprint: Of the run. A unit committed under another one is refused; it is also what a unit is said to be
            computed from unless `create` is told otherwise.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self._metadata: dict[str, UnitMetadata] = {}

    def names(self) -> list[str]:
        """The committed units, sorted."""
        with files.damage_errors(self.folder):
            entries = files.system_calls.listdir(self.folder)
        return sorted(name for name in entries if name in self)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or not is_unit_name(name):
            return False
        path = self.folder / name
        with files.damage_errors(path):
            try:
                mode = files.system_calls.lstat(path).st_mode
            except FileNotFoundError:
                return False
        # A link counts as a unit, so that it is refused when used and not taken for a free name.
        return stat.S_ISDIR(mode) or stat.S_ISLNK(mode)

    def path(self, name: str) -> Path:
        """The folder of a committed unit."""
        if name not in self:
            raise KeyError(f"no unit {name!r} in {self.folder}")
        path = self.folder / name
        if path.is_symlink():
            raise DamagedError(f"unit {name} is a symbolic link; {self.repair(name)}")
        return path

    def create(self, name: str, fingerprint: str | None = None) -> UnitDraft:
        """A draft of a new unit for a ``with`` block, at whose normal end the unit is committed.

        Args:
            name: 1 to 64 of ``a-z 0-9 _ . -``, no leading dot, none of `LEFTOVER_SUFFIXES` at its end.
            fingerprint: Of what the unit is computed from, where that is not what the whole run is computed from.

        Raises:
            ValueError: The name is not legal or already committed.
        """
        if not is_unit_name(name):
            raise ValueError(f"{name!r} is no unit name")
        if name in self:
            raise ValueError(f"unit {name} is already committed")
        return UnitDraft(self, name, self.fingerprint if fingerprint is None else fingerprint)

    def commit(self, draft: UnitDraft) -> None:
        """Make the draft durable and a unit; called at the end of its block."""
        with files.storage_errors("look through", draft.path):
            tree = files.tree(draft.path)
        unexpected = [*tree.others, *(draft.records.keys() - tree.sizes.keys()), *({_MARKER} & tree.sizes.keys())]
        if unexpected:
            raise ValueError(f"unit {draft.name} cannot hold, or does not hold, {', '.join(sorted(unexpected))}")
        records = {}
        for relpath, size in tree.sizes.items():
            file = draft.path / relpath
            files.fsync_file(file)
            records[relpath] = draft.records.get(relpath) or _record_of(file, size)
            if records[relpath].size != size:
                raise StorageError(f"{shown(file)} has {size} of {records[relpath].size} bytes; check the disk")
        reached("files-synced")
        for folder in tree.folders:
            files.fsync_folder(folder)
        reached("folders-synced")
        manifest: dict[str, JSON] = {
            "format": FORMAT,
            "unit": draft.name,
            "run": self.fingerprint,
            "fingerprint": draft.fingerprint,
            "metadata": draft.metadata,
            "files": records,
        }
        write_sealed_json(draft.path / _MARKER, manifest)
        reached("unit-sealed")
        files.rename(draft.path, self.folder / draft.name)
        reached("unit-renamed")
        try:
            files.fsync_folder(self.folder)
        except StorageError:
            # After a failed fsync the rename may be lost in a power cut though it is seen now. Take it back.
            with suppress(StorageError):
                files.rename(self.folder / draft.name, draft.path)
            raise
        self._metadata.pop(draft.name, None)
        reached("unit-committed")

    def metadata(self, name: str) -> UnitMetadata:
        """The metadata of a committed unit; read, and its seal, unit name and run checked, at the first call."""
        if name not in self._metadata:
            with self._damage_of(name):
                self._metadata[name] = self._read_manifest(name)
        return self._metadata[name]

    def check_all(self) -> None:
        """`check` of all units: what is opened for continuing must hold what was committed."""
        for name in self.names():
            self.check(name)

    def check(self, name: str) -> None:
        """Shallow check: the manifest is whole, and exactly its files are there, with their sizes.

        Raises:
            DamagedError: With the unit, the file and the repair.
        """
        with self._damage_of(name):
            self._check(name)

    def check_ends(self, name: str) -> None:
        """`check`, and the last bytes of every file: with checksums of their own inside the files, all of them."""
        with self._damage_of(name):
            for relpath, record in self._check(name).files.items():
                self._check_end(self.folder / name / relpath, record)

    def verify(self, name: str) -> None:
        """Deep check: `check`, and the crc32c of every file. Reads the whole unit."""
        with self._damage_of(name):
            for relpath, record in self._check(name).files.items():
                file = self.folder / name / relpath
                if files.crc32c_of_file(file) != record.crc32c:
                    raise DamagedError(f"{shown(file)} does not have the bytes that were committed")
                self._check_end(file, record)

    def drop(self, name: str) -> None:
        """Remove a committed unit, damaged or not."""
        if name not in self:
            raise KeyError(f"no unit {name!r} in {self.folder}")
        self._metadata.pop(name, None)
        trash = self.folder / f"{name}.{secrets.token_hex(4)}.trash"
        files.rename(self.folder / name, trash)
        reached("drop-renamed")
        files.fsync_folder(self.folder)
        reached("drop-synced")
        files.remove_tree(trash)
        reached("drop-removed")

    def sweep(self) -> None:
        """Remove what a killed process left in the folder. Only for the process that holds the lock."""
        with files.damage_errors(self.folder):
            entries = files.system_calls.listdir(self.folder)
        for name in sorted(entries):
            if name.endswith(LEFTOVER_SUFFIXES):
                reached("sweep-found")
                files.remove_tree(self.folder / name)

    def _read_manifest(self, name: str) -> UnitMetadata:
        marker = self.path(name) / _MARKER
        manifest = read_sealed_json(marker)
        if manifest.get("format") != FORMAT:
            raise MismatchError(
                f"{shown(marker)} has format {manifest.get('format')!r}, this streamda reads {FORMAT!r}; "
                "use the streamda that wrote it, or start over in another directory"
            )
        if manifest["unit"] != name:
            raise DamagedError(f"{shown(marker)} belongs to unit {manifest['unit']}")
        if manifest["run"] != self.fingerprint:
            raise DamagedError(f"{shown(marker)} belongs to another run")
        records = {relpath: FileRecord(*record) for relpath, record in manifest["files"].items()}
        return UnitMetadata(manifest["metadata"], manifest["fingerprint"], records)

    def _check(self, name: str) -> UnitMetadata:
        self._metadata.pop(name, None)  # what was read an hour ago says nothing about the disk now
        metadata = self._metadata[name] = self._read_manifest(name)
        folder = self.folder / name
        with files.damage_errors(folder):
            tree = files.tree(folder)
        sizes = {_MARKER: tree.sizes.get(_MARKER, 0), **{path: record.size for path, record in metadata.files.items()}}
        for relpath in sorted({*sizes, *tree.sizes, *tree.others}):
            file = shown(folder / relpath)
            if relpath not in sizes:
                raise DamagedError(f"{file} was not committed with it")
            if relpath not in tree.sizes:
                raise DamagedError(f"{file} is missing")
            if tree.sizes[relpath] != sizes[relpath]:
                raise DamagedError(f"{file} has {tree.sizes[relpath]} bytes, committed were {sizes[relpath]}")
        return metadata

    @staticmethod
    def _check_end(file: Path, record: FileRecord) -> None:
        if record.end is not None and _end_of(file, record.size) != record.end:
            raise DamagedError(f"{shown(file)} does not have the bytes that were committed")

    def repair(self, name: str) -> str:
        """What to do about a damaged unit, for the message."""
        run = shlex.quote(shown(self.folder.parent))
        return f"run `streamda repair {run} --drop {name}`, then what it names"

    @contextmanager
    def _damage_of(self, name: str) -> Iterator[None]:
        """Add the unit and the repair to a `DamagedError` of the block."""
        path = self.path(name)  # its own errors say it already
        try:
            yield
        except DamagedError as error:
            raise DamagedError(f"unit {path.name} is damaged: {error}; {self.repair(name)}") from error


def _record_of(file: Path, size: int) -> FileRecord:
    try:
        return FileRecord(size, files.crc32c_of_file(file), _end_of(file, size))
    except DamagedError as error:  # nothing is damaged that was ever committed
        raise StorageError(f"what was just written {error}; check the disk") from error


def _end_of(file: Path, size: int) -> int:
    """The last four bytes of a file."""
    end = bytearray(min(4, size))
    with files.damage_errors(file), files.closing(files.open_descriptor(file, os.O_RDONLY)) as descriptor:
        files.system_calls.preadv(descriptor, [end], size - len(end))
    return int.from_bytes(end, "little")
