"""Copies of a model's configuration inside a run: all that `solve` needs of the model, which may be gone by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from streamda import files
from streamda.errors import DamagedError
from streamda.files import shown
from streamda.rundir import MODEL_FOLDER


def copy_configuration(source: Path, run: Path, with_code: bool) -> dict[str, list[int]]:
    """Copies a model's configuration, and its code where that is used, into a run.

    Args:
        source: the model's folder; in a hub cache its files are links into a store of blobs.
        run: the run's folder.
        with_code: also its Python files.

    Returns:
        Size and crc32c of each copy, by name, for `check_configuration`.
    """
    target = run / MODEL_FOLDER
    files.make_folders(target)
    copies = {}
    for path in (source / "config.json", *(sorted(source.glob("*.py")) if with_code else ())):
        with files.storage_errors("copy to", target):
            content = path.read_bytes()
            copy = target / path.name
            if not copy.is_file() or copy.read_bytes() != content:
                with suppress(FileNotFoundError):
                    copy.unlink()
                with files.FileWriter(copy) as stream:
                    stream.write(content)
        copies[path.name] = [len(content), files.crc32c_of_file(copy)]
    files.fsync_folder(target)  # before the run remembers that they are there
    return copies


def check_configuration(run: Path, copies: Mapping[str, Sequence[int]]) -> None:
    """Compares the copies with what `copy_configuration` returned.

    Raises:
        DamagedError: naming the file and what to do.
    """
    for name, (size, crc) in copies.items():
        path = run / MODEL_FOLDER / name
        try:
            found = (path.stat().st_size if path.is_file() else -1, files.crc32c_of_file(path))
            if found != (size, crc):
                raise DamagedError(f"{shown(path)} does not have the bytes that were copied")
        except DamagedError as error:
            raise DamagedError(
                f"{error}; run `streamda collect --statistics {shown(run)}` with the options of the run: it copies "
                "the model's configuration again, and collects nothing anew"
            ) from error
