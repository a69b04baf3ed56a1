"""Rows of JSON files, each checked when the file is opened; they stay on disk until they are read.

Two kinds of files: one object per line (`JsonLines`), and objects in a list, or one after the other, over any number of
lines (`JsonDocument`). Both refuse what Python's own reader lets pass: duplicate keys, NaN and Infinity, numbers beyond
any float, halves of surrogate pairs. The tables of `datasets` would take all of it, guess dates into texts, and end the
process (pyarrow's reader on a file that holds ``null``).
"""

from __future__ import annotations

import codecs
import json
import math
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from streamda.bad_rows import BadRowError, BadRows
from streamda.errors import DataError
from streamda.quoting import kind, one_line, printable, quoted

Row = dict[str, Any]

MAX_ROW_BYTES = 8 << 20
"""Longest line, and longest object in a list: two million tokens of plain text. More is refused before it is read."""
_CHUNK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonLines:
    """A file of one JSON object per line.

    Accepted: a byte order mark, CRLF, a missing final newline, blank lines. Refused, by line: bytes that are not UTF-8,
    half of a surrogate pair, NaN and Infinity, duplicate keys, anything but an object, text after it, and a line of
    more than `MAX_ROW_BYTES`.

    Args:
        path: The file.
        name: What messages call it; its path unless given.
        bad: Counts the lines that are skipped; none may be unless given.
    """

    def __init__(self, path: Path, name: str | None = None, bad: BadRows | None = None) -> None:
        self.columns: tuple[str, ...] = ()
        self._path = path
        self._name = printable(name or str(path))
        self._offsets = array("q")  # of the lines that hold a row
        self._line_numbers = array("q")
        bad = bad or BadRows()
        with _readable(path, self._name) as file:
            offset = 0
            for number, line, rest in _lines(file):
                try:
                    row = self._parse(line, number)
                except BadRowError as error:
                    bad.skip(error)
                    row = None
                if row is not None:
                    self.columns = self.columns or tuple(row)
                    self._offsets.append(offset)
                    self._line_numbers.append(number)
                offset += len(line) + sum(map(len, rest))

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, index: int) -> Row:
        """Row `index`; checked again, for the file may have changed since it was opened."""
        with _readable(self._path, self._name) as file:
            file.seek(self._offsets[index])
            row = self._parse(file.readline(MAX_ROW_BYTES + 1), self._line_numbers[index])
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
            if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                raise ValueError(f"longer than {MAX_ROW_BYTES >> 20} MiB")
            return _parse_object(line.rstrip(b"\r\n"))  # or a line that is cut off would end in column 1 of the next
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1})"
        except json.JSONDecodeError as error:
            reason = f"not JSON ({error.msg} at column {error.colno})"
        except RecursionError:
            reason = "nested too deeply"
        except ValueError as error:  # our own, and the limit on the digits of an integer
            reason = one_line(str(error))
        raise BadRowError(f"{self._name}:{number}: {printable(reason)}")


class JsonDocument:
    """A file of one JSON list of objects; one object, or several without commas between them, will do too.

    A row is at most `MAX_ROW_BYTES` long. A value that is no row may be skipped; a mistake in the JSON itself ends the
    file, for nothing tells where the next row begins.

    Args:
        path: The file.
        bad: Counts the rows that are skipped.
    """

    def __init__(self, path: Path, bad: BadRows) -> None:
        self.columns: tuple[str, ...] = ()
        self._path = path
        self._name = printable(str(path))
        self._spans = array("q")  # offset and length in bytes of each row
        self._numbers = array("q")  # of the row in the file, from 1
        with _readable(path, self._name) as file:
            for number, (offset, raw) in enumerate(_Document(file, self._name).values(), start=1):
                try:
                    row = self._parse(raw, number)
                except BadRowError as error:
                    bad.skip(error)
                    continue
                self.columns = self.columns or tuple(row)
                self._spans.extend((offset, len(raw)))
                self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> Row:
        """Row `index`; checked again, for the file may have changed since it was opened."""
        with _readable(self._path, self._name) as file:
            file.seek(self._spans[2 * index])
            return self._parse(file.read(self._spans[2 * index + 1]), self._numbers[index])

    def locate(self, index: int) -> str:
        """File and number of row `index`."""
        return f"{self._name}: row {self._numbers[index]}"

    def _parse(self, raw: bytes, number: int) -> Row:
        try:
            return _parse_object(raw)
        except RecursionError:
            raise BadRowError(f"{self._name}: row {number}: nested too deeply") from None
        except ValueError as error:  # of the file's own mistakes only those are left that its syntax allows
            raise BadRowError(f"{self._name}: row {number}: {one_line(str(error))}") from None


class _Document:
    """The values of a JSON file, one at a time, through a window on its text."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        start = file.read(len(codecs.BOM_UTF8))
        if not start:
            raise DataError(f"{name}: the file is empty")
        # of the first character of the window
        self._offset = self._num_read = file.seek(len(start) if start == codecs.BOM_UTF8 else 0)
        self._text = ""
        self._next = 0  # in the window
        self._line = 1
        self._row = 1
        self._is_all = False

    def values(self) -> Iterator[tuple[int, bytes]]:
        """Offset and text of each value."""
        is_list = self._peek() == "["
        if is_list:
            self._advance(self._next + 1)
        separator = ","
        while (char := self._peek()) != "":
            if is_list and char == "]" and (separator != "," or self._row == 1):
                self._advance(self._next + 1)
                if self._peek() != "":
                    raise self._error("text after the list")
                return
            if is_list and separator != ",":
                raise self._error("no comma between two rows")
            yield self._value()
            self._row += 1
            if is_list and (separator := self._peek()) == ",":
                self._advance(self._next + 1)
        if is_list:
            raise self._error("the list is not closed, so the file is cut off")

    def _value(self) -> tuple[int, bytes]:
        while True:
            try:
                _, stop = self._json.raw_decode(self._text, self._next)
                if stop < len(self._text) or not self._more():  # a number may go on in the next chunk
                    break
            except json.JSONDecodeError as error:
                if len(self._text) - self._next > MAX_ROW_BYTES:
                    raise self._error(f"no JSON value within {MAX_ROW_BYTES >> 20} MiB ({error.msg})") from None
                if not self._more():
                    self._line += self._text.count("\n", self._next, error.pos)
                    raise self._error(f"not JSON ({error.msg})") from None
            except RecursionError:
                raise self._error("nested too deeply") from None
            except ValueError as error:  # the limit on the digits of an integer
                raise self._error(one_line(str(error))) from None
        raw = self._text[self._next : stop].encode()
        if len(raw) > MAX_ROW_BYTES:
            raise self._error(f"longer than {MAX_ROW_BYTES >> 20} MiB")
        offset = self._offset
        self._advance(stop)
        return offset, raw

    def _peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._next)
            self._advance(match.end() if match else self._next)
            if self._next < len(self._text):
                return self._text[self._next]
            if not self._more():
                return ""

    def _advance(self, stop: int) -> None:
        piece = self._text[self._next : stop]
        self._offset += len(piece.encode())
        self._line += piece.count("\n")
        self._next = stop

    def _more(self) -> bool:
        """Adds what comes next to the window, and drops what is done; False at the end of the file."""
        if self._is_all:
            return False
        rest = self._text[self._next :]
        raw = self._file.read(max(_CHUNK_BYTES, len(rest)))  # twice the window: a long row is tried few times
        self._is_all = not raw
        self._num_read += len(raw)
        try:
            added = self._decoder.decode(raw, final=self._is_all)
        except UnicodeDecodeError as error:
            place = self._num_read - len(error.object) + error.start
            reason = f"not UTF-8 (byte 0x{error.object[error.start]:02x} at byte {place + 1} of the file)"
            raise DataError(f"{self._name}: {reason}") from None
        self._text, self._next = rest + added, 0
        return True

    def _error(self, reason: str) -> DataError:
        return DataError(f"{self._name}: row {self._row}, line {self._line}: {printable(reason)}")


@contextmanager
def _readable(path: Path, name: str) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or one_line(str(error))})") from error


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes, Iterator[bytes]]]:
    """Number and bytes of each line, at most `MAX_ROW_BYTES` and its end, and what of it lies beyond, read when asked.

    A binary file is cut at line feeds only: U+2028 and its like may stand inside a string.
    """
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        yield number, line, _rest_of_line(file) if len(line) > MAX_ROW_BYTES and line[-1:] != b"\n" else iter(())


def _rest_of_line(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.readline(_CHUNK_BYTES):
        yield piece
        if piece.endswith(b"\n"):
            return


def _parse_object(raw: bytes) -> Row:
    """An object.

    Raises:
        ValueError: It is none, or one that no table can hold.
        RecursionError: It is nested too deeply.
    """
    row = json.loads(
        raw.decode("utf-8"), parse_constant=_refuse_number, parse_float=_finite, object_pairs_hook=_unique_keys
    )
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, this is {kind(row)}")
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        # JSON may spell half of a surrogate pair, which is no text and which no tokenizer takes
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no text") from None
    return row


def _refuse_number(literal: str) -> float:
    raise ValueError(f"{quoted(literal, 30)[1:-1]} is no JSON number")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{quoted(literal, 30)[1:-1]} is beyond any float")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {quoted(next(key for key in keys if keys.count(key) > 1))}")
    return row
