"""Errors that streamda raises on purpose, each with the exit code that the command line returns for it.

A message is one line that says what is wrong, where, and what to do about it. Anything else that escapes is a bug
and exits with 1.
"""

from __future__ import annotations

from typing import ClassVar


class StreamdaError(Exception):
    """Base of all errors raised on purpose. Catch this to catch them all."""

    exit_code: ClassVar[int] = 1


class ConfigError(StreamdaError):
    """Wrong usage or an option outside its legal range."""

    exit_code = 2


class ModelError(StreamdaError):
    """The model is missing, damaged, contradicts its configuration, or has a structure that cannot be streamed."""

    exit_code = 3


class DataError(StreamdaError):
    """The calibration data is missing, malformed or empty."""

    exit_code = 4


class MismatchError(StreamdaError):
    """A directory that was to be continued belongs to another run. The message names the fields that differ."""

    exit_code = 5


class LockedError(StreamdaError):
    """Another run is using the directory."""

    exit_code = 6


class StorageError(StreamdaError):
    """No space left, or the place cannot be written."""

    exit_code = 7


class BudgetError(StreamdaError):
    """The memory budget is too small. The message names need, have and the smallest budget that would do."""

    exit_code = 8


class NumericalError(StreamdaError):
    """A non-finite value, or a matrix that is no second moment. Never papered over."""

    exit_code = 9


class DamagedError(StreamdaError):
    """A committed file does not have the bytes that were committed."""

    exit_code = 10


class StoppedError(StreamdaError):
    """Stopped on request at a safe point; the same command continues from there."""

    exit_code = 75
