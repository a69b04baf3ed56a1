"""One file's bytes, through the system's page cache or past it.

Through the cache a page is found, filled and copied for each 4 KiB, and in a full cache another one is given up for it
first. That takes a processor as long as a second and more per gigabyte, which a file that memory cannot keep from one
reading to the next gains nothing by. Past it (``O_DIRECT``) the disk writes into the reader's own memory.
"""

from __future__ import annotations

import os
from contextlib import suppress

ALIGNMENT = 4096
"""What a direct read's place in memory and in the file, and its length, are multiples of: no disk asks for more."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


class FileReader:
    """An open file; close it whatever happened."""

    def __init__(self, path: str | os.PathLike[str], *, direct: bool = False) -> None:
        """Opens a file.

        Args:
            path: of the file.
            direct: read past the page cache where the file system can do so; it is no error where it cannot.

        Raises:
            OSError: it cannot be opened.
        """
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct: int | None = None
        try:
            if direct and _O_DIRECT:
                with suppress(OSError):
                    self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT)
                    if not os.path.sameopenfile(self.descriptor, self._direct):  # it was replaced in between
                        self._drop_direct()
        except BaseException:  # a stop, too, leaves no open file behind; it is raised again
            self.close()
            raise

    @property
    def is_direct(self) -> bool:
        """Whether aligned reads go past the page cache."""
        return self._direct is not None

    def read_into(self, memory: memoryview, offset: int, needed: int | None = None, *, aligned: bool = False) -> int:
        """Reads what begins at an offset.

        Args:
            memory: of bytes, contiguous.
            offset: in the file.
            needed: how many bytes, all by default. What lies behind them in memory may be filled or not.
            aligned: the memory, its length and the offset are multiples of `ALIGNMENT`, so that the page cache can be
                passed by.

        Returns:
            How many of the needed bytes are there: fewer only where the file ends.

        Raises:
            OSError: they cannot be read.
        """
        needed = len(memory) if needed is None else needed
        done = 0
        if aligned and self._direct is not None:
            try:
                done = os.preadv(self._direct, [memory], offset)
            except OSError:  # this disk wants more than a page, or is broken, which the reads below meet as well
                self._drop_direct()
        while done < needed:
            count = os.preadv(self.descriptor, [memory[done:needed]], offset + done)
            if count == 0:
                break
            done += count
        return min(done, needed)

    def close(self) -> None:
        """Closes the file."""
        self._drop_direct()
        os.close(self.descriptor)

    def _drop_direct(self) -> None:
        direct, self._direct = self._direct, None
        if direct is not None:
            os.close(direct)
