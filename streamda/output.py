"""An output folder that appears whole, or not at all, and replaces nothing but what is streamda's own.

It is built in ``FOLDER.<8 hex>.part`` beside the target and renamed when complete. Where an older one is replaced, that
one is ``FOLDER.<8 hex>.trash`` for the moment between two renames; a crash there leaves the old one in ``.trash`` and
the new one in ``.part``, and the next run first puts the old one back. The folder in work is flocked, which tells a
living process's work from the leftovers of a crash. Only files that are ours by name are ever removed, one by one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from streamda import files
from streamda.errors import ConfigError, StorageError
from streamda.quoting import named


class NotEmptyError(ConfigError):
    """The folder holds what may be replaced, and was not allowed to be."""


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """Where the result goes, and what may be replaced there."""

    path: Path
    """Without symbolic links: see `resolved`."""
    overwrite: bool
    """Replace a folder that holds nothing but our own files."""
    is_own: Callable[[Path], bool]
    """Whether an existing regular file under one of ``names`` is ours to replace."""
    names: tuple[str, ...]
    """All file names that the folder may have."""

    def prepare(self) -> None:
        """Makes the parents, clears away what a crash left, and refuses a folder that may not be replaced.

        Raises:
            ConfigError: it holds anything and ``overwrite`` is off, or anything that is not ours.
            StorageError: the parent cannot be written.
        """
        files.make_folders(self.path.parent)
        self._clear_leftovers()
        self._require_replaceable(self.path)

    def probe(self) -> None:
        """Writes and removes a folder where the result will be built; a `StorageError` if that is impossible."""
        probe = self._beside("part")
        files.make_folder(probe)
        try:
            with _locked(probe), files.FileWriter(probe / self.names[0]) as file:
                file.write(b"probe")
        finally:
            self._remove_own(probe)

    @contextmanager
    def building(self) -> Iterator[Path]:
        """A new folder to write and fsync files in; it takes its place when the block is left normally.

        Raises:
            ConfigError: meanwhile something that is not ours appeared in its place.
            StorageError: it cannot be built or renamed.
        """
        part = self._beside("part")
        files.make_folder(part)
        try:
            with _locked(part):
                yield part
                files.fsync_folder(part)
                files.reached("output-built")
                self._publish(part)
        except BaseException:  # a stop clears away as an error does; it is raised again
            with suppress(StorageError):  # the error itself must come through; the next run clears the rest away
                self._remove_own(part)
            raise

    def _publish(self, part: Path) -> None:
        self._require_replaceable(self.path)  # again: hours may have passed
        if not os.path.lexists(self.path) or not files.system_calls.listdir(self.path):
            files.rename(part, self.path)  # takes the place of an empty folder too
            files.reached("output-renamed")
            files.fsync_folder(self.path.parent)
            return
        trash = self._beside("trash")
        with _locked(self.path):
            files.rename(self.path, trash)
            files.reached("output-displaced")
            try:
                self._require_replaceable(trash)  # from here on nobody can add to it by the folder's name
                files.rename(part, self.path)
            except (ConfigError, StorageError):
                files.rename(trash, self.path)
                raise
            files.fsync_folder(self.path.parent)
            files.reached("output-replaced")
            with suppress(StorageError):  # the result is in place; the next run clears the rest away
                self._remove_own(trash)

    def _require_replaceable(self, folder: Path) -> None:
        shown = files.shown(self.path)
        with files.storage_errors("look at", folder):
            if not os.path.lexists(folder):
                return
            if os.path.ismount(folder):
                raise ConfigError(f"{shown} is a mount point, which cannot be replaced; name a folder inside it")
            found = sorted(files.system_calls.listdir(folder))
            if not found:
                return
            foreign = [files.shown(name) for name in found if not self._is_own(folder / name)]
        if {"run.json", "units"} <= set(found):
            raise ConfigError(f"{shown} is not empty; it holds a run, or its statistics: give another --output-dir")
        if foreign:
            raise ConfigError(
                f"{shown} is not empty; it holds {named(foreign)}, not written by streamda or changed since, and "
                "--overwrite replaces only streamda's own files: give another --output-dir, or move it away"
            )
        if not self.overwrite:
            raise NotEmptyError(f"{shown} is not empty; give another --output-dir, or add --overwrite")

    def _is_own(self, file: Path) -> bool:
        return file.name in self.names and stat.S_ISREG(files.system_calls.lstat(file).st_mode) and self.is_own(file)

    def _clear_leftovers(self) -> None:
        pattern = re.compile(re.escape(self.path.name) + r"\.[0-9a-f]{8}\.(part|trash)")
        with files.storage_errors("look at", self.path.parent):
            names = sorted(filter(pattern.fullmatch, files.system_calls.listdir(self.path.parent)))
        for leftover in (self.path.with_name(name) for name in names):
            with suppress(StorageError), _locked(leftover):  # in use by a living process, or not ours: let it be
                if leftover.suffix == ".trash" and not os.path.lexists(self.path):
                    files.rename(leftover, self.path)
                    files.fsync_folder(self.path.parent)
                else:
                    self._remove_own(leftover)

    def _remove_own(self, folder: Path) -> None:
        """Removes our files and then the folder, which fails where anything else lies in it."""
        with files.storage_errors("remove", folder):
            for name in self.names:
                with suppress(FileNotFoundError):
                    files.system_calls.unlink(folder / name)
            files.system_calls.rmdir(folder)

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}.{suffix}")


def resolved(folder: Path) -> Path:
    """The folder itself where ``folder`` is, or lies behind, a symbolic link: links stay as they are.

    Raises:
        StorageError: a loop of links, a file where a folder should be, or a place that cannot be looked at.
    """
    try:
        folder = folder.resolve()
        if not os.path.lexists(folder) or stat.S_ISDIR(files.system_calls.lstat(folder).st_mode):
            return folder
    except RuntimeError as error:  # how Python 3.11 and 3.12 report a loop of links
        raise files.storage_error(OSError(errno.ELOOP, str(error)), "write", folder) from error
    except OSError as error:
        raise files.storage_error(error, "write", folder) from error
    raise files.storage_error(OSError(errno.ENOTDIR, "not a folder"), "write", folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's flock, across renames too; a `StorageError` if another process has it."""
    with files.storage_errors("lock", folder):
        descriptor = files.open_descriptor(folder, os.O_RDONLY | os.O_DIRECTORY)
    with files.closing(descriptor):
        with files.storage_errors("lock", folder):
            files.system_calls.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
