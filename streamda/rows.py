"""Rows of a data set: JSON lines checked line by line, every other source read through `datasets`.

Nothing in a file is trusted. Whatever is wrong with it ends as one `DataError` of one printable line that names the
file and the line or row; data is never executed, and never echoed without its control characters escaped.
"""

from __future__ import annotations

import codecs
import csv
import errno
import glob
import json
import logging
import re
import tempfile
import warnings
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from streamda.errors import ConfigError, DataError, StorageError

Row = dict[str, Any]

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_KINDS = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}


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
def open_rows(dataset: str, dataset_config: str | None, split: str) -> Iterator[Rows]:
    """Opens a local file, a folder (data files, or one written by ``save_to_disk``) or a data set of the hub.

    What `datasets` converts from a local file lies in a temporary folder until the context ends.

    Args:
        dataset: Path, or hub id. A path that exists wins.
        dataset_config: Name of the configuration on the hub.
        split: Name of the split. A single file has one, ``train``.

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
    if path.is_file() and path.suffix.lower() == ".jsonl":
        _require_split(dataset, split, ["train"])
        yield JsonLines(path)
        return
    with tempfile.TemporaryDirectory(prefix="streamda-", ignore_cleanup_errors=True) as cache, _quiet():
        yield _TableRows(dataset, path, dataset_config, split, cache)


class JsonLines:
    """A file of one JSON object per line, all of it checked when opened; rows stay on disk until they are read.

    Accepted: a byte order mark, CRLF, a missing final newline, blank lines. Refused, by line: bytes that are not UTF-8,
    half of a surrogate pair, NaN and Infinity, duplicate keys, anything but an object, and text after it.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.columns: tuple[str, ...] = ()
        self._path = path
        self._name = printable(name or str(path))
        self._offsets = array("q")  # of the lines that hold a row
        self._line_numbers = array("q")
        try:
            with path.open("rb") as file:
                offset = 0
                # a binary file is cut at b"\n" only: U+2028 and its like may stand inside a string
                for number, line in enumerate(file, start=1):
                    row = self._parse(line, number)
                    if row is not None:
                        self.columns = self.columns or tuple(row)
                        self._offsets.append(offset)
                        self._line_numbers.append(number)
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{self._name}: cannot be read ({error.strerror})") from error

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> Row:
        """Row `index`; checked again, for the file may have changed since it was opened."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offsets[index])
                row = self._parse(file.readline(), self._line_numbers[index])
        except OSError as error:
            raise DataError(f"{self._name}: cannot be read ({error.strerror})") from error
        if row is None:
            raise DataError(f"{self.locate(index)}: the file changed while it was read")
        return row

    def locate(self, index: int) -> str:
        """File and line of row `index`."""
        return f"{self._name}:{self._line_numbers[index]}"

    def _parse(self, line: bytes, number: int) -> Row | None:
        """The row in a line, or None where the line is blank."""
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            return None
        try:
            return _parse_object(line)
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1})"
        except json.JSONDecodeError as error:
            reason = f"not JSON ({error.msg} at column {error.colno})"
        except RecursionError:
            reason = "nested too deeply"
        except ValueError as error:  # our own, and the limit on the digits of an integer
            reason = one_line(str(error))
        raise DataError(f"{self._name}:{number}: {printable(reason)}")


def _parse_object(line: bytes) -> Row:
    row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, this is {kind(row)}")
    if re.search(rb"\\u[dD][89a-fA-F]", line):
        # JSON may spell half of a surrogate pair, which is no text and which no tokenizer takes
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no text") from None
    return row


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {quoted(next(key for key in keys if keys.count(key) > 1))}")
    return row


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


def kind(value: object) -> str:
    """What a value is, in words for a message."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def printable(text: str) -> str:
    """`text` with every character that is not printable (terminal escapes, line breaks, ...) written as its escape."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def one_line(text: str, limit: int = 300) -> str:
    """`text` from someone else as one printable line of bounded length."""
    joined = " ".join(text[: 4 * limit].split())
    return printable(joined if len(joined) <= limit else joined[:limit] + "...")


def quoted(text: str, limit: int = 80) -> str:
    """`text` from someone else in quotes, printable and of bounded length."""
    return repr(text if len(text) <= limit else text[:limit] + "...")
