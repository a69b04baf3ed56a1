"""Text from others in our messages: printable, on one line, of bounded length.

Data, file names and options may hold terminal escapes, line breaks, overrides of the writing direction and bytes that
are no text. None of it reaches a terminal as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence

NUM_NAMED = 5
"""Names in a message: more hide the first, fewer hide the pattern."""

_KINDS = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}


def kind(value: object) -> str:
    """What a value is, in words for a message."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def printable(text: str) -> str:
    """`text` with every character that is not printable (terminal escapes, line breaks, ...) written as its escape."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def printable_lines(text: str) -> str:
    """The same for text of several lines, whose line breaks and tabs stay."""
    return "".join(char if char in "\n\t" else printable(char) for char in text)


def one_line(text: str, limit: int = 300) -> str:
    """`text` from someone else as one printable line of bounded length."""
    joined = " ".join(text[: 4 * limit].split())
    return printable(joined if len(joined) <= limit else joined[:limit] + "...")


def named(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more


def counted(number: int, noun: str) -> str:
    """A number of things, such as ``1 layer`` and ``2 layers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quoted(value: object, limit: int = 80) -> str:
    """A value from someone else as Python would write it, printable and of bounded length."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[:limit] + "...")
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write out thousands of digits
        return "a number of more than 77 digits"
    try:
        return one_line(repr(value), limit)
    except (ValueError, RecursionError):  # such a number inside of it, or a list within itself a thousand times
        return kind(value)
