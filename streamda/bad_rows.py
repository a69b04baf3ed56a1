"""What is wrong with a single row of the data, and how many such rows may be skipped."""

from __future__ import annotations

from streamda.errors import DataError


class BadRowError(DataError):
    """One row is at fault, and not the tokenizer, the options or the file: it may be skipped if the user says so."""


class BadRows:
    """Counts the rows that are skipped, and refuses one too many."""

    def __init__(self, allowed: int = 0) -> None:
        self.count = 0
        self.first: str | None = None
        """What was wrong with the first of them, and where."""
        self._allowed = allowed

    def skip(self, error: DataError) -> None:
        """Counts a bad row.

        Args:
            error: What is wrong with it; it names the place.

        Raises:
            DataError: This is one more than is allowed, of which there may be none.
        """
        if self.count == self._allowed:
            if self._allowed == 0:
                raise DataError(f"{error}; --skip-bad-lines N leaves out up to N such rows") from error
            raise DataError(
                f"{error}; this is bad line {self.count + 1}, and --skip-bad-lines allows {self._allowed}"
            ) from error
        self.count += 1
        self.first = self.first or str(error)
