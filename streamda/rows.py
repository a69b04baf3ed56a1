"""Rows of a data set: JSON checked row by row, every other source read through `datasets`.

Nothing in a file is trusted. Whatever is wrong with it ends as one `DataError` of one printable line that names the
file and the line or row; data is never executed, and never echoed without its control characters escaped.
"""

from __future__ import annotations

import codecs
import csv
import errno
import glob
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from streamda import stopping
from streamda.bad_rows import BadRows
from streamda.errors import ConfigError, DataError, StorageError
from streamda.json_rows import JsonDocument, JsonLines, Row
from streamda.quoting import one_line, printable, quoted

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

# What pyarrow, pandas, fsspec and the hub's client raise, most of it derived from these
_READ_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError)


class Rows(Protocol):
    """The rows of one split, read one at a time."""

    columns: tuple[str, ...]
    """Column names; where rows differ, those of the first row."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Row:
        """Row `index`, from 0."""

    def locate(self, index: int) -> str:
        """Where row `index` stands, for a message: ``file:line``, or the source and the row's number from 1."""


@contextmanager
def open_rows(dataset: str, dataset_config: str | None, split: str, bad: BadRows | None = None) -> Iterator[Rows]:
    """Opens a local file, a folder (data files, or one written by ``save_to_disk``) or a data set of the hub.

    What `datasets` converts from a local file lies in a temporary folder until the context ends.

    Args:
        dataset: Path, or hub id. A path that exists wins.
        dataset_config: Name of the configuration on the hub.
        split: Name of the split. A single file has one, ``train``.
        bad: Counts the malformed lines that are skipped; none may be unless given.

    Raises:
        DataError: Nothing is there, it cannot be read, or it has no such split.
        ConfigError: `dataset_config` is given with a file.
        StorageError: No space for the converted file.
    """
    if not dataset.strip():
        raise DataError("the name of the dataset is empty: no such file or folder")
    try:
        path = Path(dataset).expanduser()
        is_local = path.exists()
    except (OSError, RuntimeError) as error:  # too long a name, a folder that may not be entered, an unknown ~user
        raise DataError(f"{one_line(dataset)}: {one_line(str(error))}") from error
    if not is_local:
        looks_local = dataset.startswith((".", "~", "/")) or dataset.count("/") > 1
        if looks_local or path.suffix.lower() in DATA_SUFFIXES:
            raise DataError(f"{printable(dataset)}: no such file or folder")
    if dataset_config is not None and path.is_file():
        raise ConfigError(f"dataset_config names a configuration on the hub, but {printable(dataset)} is a file")
    if path.is_file() and path.suffix.lower() in (".jsonl", ".json"):
        _require_split(dataset, split, ["train"])
        bad = bad or BadRows()
        yield JsonLines(path, bad=bad) if path.suffix.lower() == ".jsonl" else JsonDocument(path, bad)
        return
    with tempfile.TemporaryDirectory(prefix="streamda-", ignore_cleanup_errors=True) as cache, _quiet():
        yield _TableRows(dataset, path, dataset_config, split, cache)


class _TableRows:
    """Rows of a `datasets` table."""

    def __init__(self, dataset: str, path: Path, dataset_config: str | None, split: str, cache: str) -> None:
        self._name = printable(dataset)
        with _as_data_error(self._name if path.exists() else _unreachable(dataset)):
            self._table = _load_table(dataset, path, dataset_config, split, cache)
        self.columns: tuple[str, ...] = tuple(self._table.column_names)

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> Row:
        """Row `index`."""
        with _as_data_error(self.locate(index)):  # a column of images may not decode
            return dict(self._table[index])

    def locate(self, index: int) -> str:
        """Source and number of row `index`."""
        return f"{self._name}: row {index + 1}"


def _load_table(dataset: str, path: Path, dataset_config: str | None, split: str, cache: str) -> Any:
    import datasets  # seconds of import that JSON lines, the shipped set and --help do without

    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        saved = datasets.load_from_disk(str(path))
        splits = saved if isinstance(saved, dict) else {"train": saved}
        _require_split(dataset, split, list(splits))
        return splits[split]
    if not path.is_file():
        if path.is_dir():
            _require_no_null_first(path)
        # a folder is converted aside like a file; what comes from the hub stays in the user's cache of the hub
        place = str(path) if path.is_dir() else dataset
        return datasets.load_dataset(place, dataset_config, split=split, cache_dir=cache if path.is_dir() else None)
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        raise ValueError(f"unknown kind of file; known are {', '.join(DATA_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    options: dict[str, Any] = {}
    if suffix == ".csv":
        # guessing types would turn the answer "007" into 7, and "NA" and "None" into nothing
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
        if len(set(header)) < len(header):
            raise ValueError(f"two columns of one name among {quoted(', '.join(header))}")
        features = datasets.Features(dict.fromkeys(header, datasets.Value("string")))
        # index_col: a row with one field too many would otherwise lose its first as an index, without a word
        options = {"features": features, "keep_default_na": False, "index_col": False}
    files = glob.escape(str(path))  # `datasets` expands patterns
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Length of header")  # all that pandas does about fields too many
        return datasets.load_dataset(suffix[1:], data_files=files, split=split, cache_dir=cache, **options)


def _require_no_null_first(folder: Path) -> None:
    """Refuses what ends the process in pyarrow's reader, beyond any handling: JSON whose first value is null."""
    for path in (file for suffix in (".json", ".jsonl") for file in folder.rglob(f"*{suffix}") if file.is_file()):
        with path.open("rb") as file:
            if file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"null"):
                raise ValueError(f"{path.name} begins with null, which is no row")


def _require_split(dataset: str, split: str, known: list[str]) -> None:
    if split not in known:
        raise DataError(f"{printable(dataset)}: no split {quoted(split)}; there is {one_line(', '.join(known))}")


def _unreachable(dataset: str) -> str:
    advice = "check name, split and network, or give a local file"
    return f"{printable(dataset)}: no local file or folder, and not loaded from the hub ({advice})"


@contextmanager
def _as_data_error(place: str) -> Iterator[None]:
    """Turns what `datasets` and the readers below it raise on bad data into one line of the root cause."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, csv.Error, Warning, *_READ_ERRORS) as error:
        stopping.check()  # this may be what the library made of it
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        if isinstance(root, OSError) and root.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"{place}: no space left in the temporary folder or the cache of the hub") from error
        raise DataError(f"{place}: {one_line(str(root)) or type(root).__name__}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars and log lines of `datasets` off the terminal: what goes wrong is raised."""
    import datasets
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    had_bars = not datasets.are_progress_bars_disabled(), not are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars[0]:
            datasets.enable_progress_bars()
        if had_bars[1]:
            enable_progress_bars()
