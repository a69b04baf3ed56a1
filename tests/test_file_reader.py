"""Bytes are the same past the page cache and through it, whatever a place, a file system or a disk allows.

Not covered: that it is faster, and that the cache stays empty; both were measured (docs/performance.md).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from streamda.file_reader import ALIGNMENT, FileReader

SIZE = 5 * ALIGNMENT + 123
CONTENT = bytes(index * index % 251 for index in range(SIZE))
Memory = Callable[[int], memoryview]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    return file


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Makes memory that begins on a page."""
    maps: list[tuple[memoryview, mmap.mmap]] = []

    def make(num_bytes: int) -> memoryview:
        whole = mmap.mmap(-1, num_bytes)
        maps.append((memoryview(whole), whole))
        return maps[-1][0]

    yield make
    for view, whole in maps:
        view.release()
        whole.close()


@pytest.fixture
def direct_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read past the page cache gave."""
    counts: list[int] = []
    real = os.preadv

    def noted(descriptor: int, buffers: Any, offset: int) -> int:
        count = real(descriptor, buffers, offset)
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            counts.append(count)
        return count

    monkeypatch.setattr(os, "preadv", noted)
    return counts


def test_aligned_reads_go_past_the_cache_and_give_the_same_bytes(
    path: Path, memory: Memory, direct_reads: list[int]
) -> None:
    view = memory(2 * ALIGNMENT)
    with closing(FileReader(path, direct=True)) as reader:
        if not reader.is_direct:
            pytest.skip("the file system of the temporary folder has no direct reads")
        assert reader.read_into(view, ALIGNMENT, aligned=True) == 2 * ALIGNMENT
    assert bytes(view) == CONTENT[ALIGNMENT : 3 * ALIGNMENT]
    assert direct_reads == [2 * ALIGNMENT]


def test_without_being_asked_nothing_goes_past_the_cache(path: Path, memory: Memory, direct_reads: list[int]) -> None:
    view = memory(ALIGNMENT)
    with closing(FileReader(path)) as reader:
        assert not reader.is_direct
        assert reader.read_into(view, 0, aligned=True) == ALIGNMENT
    assert bytes(view) == CONTENT[:ALIGNMENT]
    assert direct_reads == []


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("place", "offset", "length"), [(1, 0, 4096), (0, 17, 4096), (0, 0, 1000), (3, 5, 7)])
def test_what_is_not_aligned_is_read_all_the_same(
    path: Path, memory: Memory, direct: bool, place: int, offset: int, length: int
) -> None:
    view = memory(2 * ALIGNMENT)[place : place + length]
    with closing(FileReader(path, direct=direct)) as reader:
        assert reader.read_into(view, offset) == length
    assert bytes(view) == CONTENT[offset : offset + length]
    view.release()


@pytest.mark.parametrize("direct", [False, True])
def test_at_the_end_of_the_file_it_says_how_much_there_was(path: Path, memory: Memory, direct: bool) -> None:
    view = memory(2 * ALIGNMENT)
    with closing(FileReader(path, direct=direct)) as reader:
        assert reader.read_into(view, 5 * ALIGNMENT, 123, aligned=True) == 123  # all that is needed
        assert bytes(view[:123]) == CONTENT[-123:]
        assert reader.read_into(view, 5 * ALIGNMENT, 200, aligned=True) == 123
        assert reader.read_into(view, 7 * ALIGNMENT, aligned=True) == 0


def require_reads_through_the_cache(path: Path, view: memoryview) -> None:
    """Checks a reader that was asked for direct reads, and has none."""
    with closing(FileReader(path, direct=True)) as reader:
        assert not reader.is_direct
        assert reader.read_into(view, 0, aligned=True) == ALIGNMENT
    assert bytes(view) == CONTENT[:ALIGNMENT]


def test_a_file_system_without_direct_reads_is_no_error(
    path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(file: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    require_reads_through_the_cache(path, memory(ALIGNMENT))


@pytest.mark.parametrize("given", [None, 0, ALIGNMENT])
def test_where_a_direct_read_fails_or_stops_short_the_rest_comes_through_the_cache(
    path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch, given: int | None
) -> None:
    real, asked = os.preadv, []

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        asked.append(offset)
        if len(asked) == 1:
            if given is None:
                raise OSError(errno.EIO, "Input/output error")
            buffers = [buffers[0][:given]]
        return real(descriptor, buffers, offset)

    view = memory(3 * ALIGNMENT)
    with closing(FileReader(path, direct=True)) as reader:
        if not reader.is_direct:
            pytest.skip("the file system of the temporary folder has no direct reads")
        monkeypatch.setattr(os, "preadv", failing)
        assert reader.read_into(view, ALIGNMENT, aligned=True) == 3 * ALIGNMENT
        assert reader.is_direct == (given is not None)  # what refused once is not asked again
    assert bytes(view) == CONTENT[ALIGNMENT : 4 * ALIGNMENT]
    assert asked[:2] == [ALIGNMENT, ALIGNMENT + (given or 0)]


def test_an_error_of_the_disk_comes_out(path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with closing(FileReader(path, direct=True)) as reader, pytest.raises(OSError, match="Input/output"):
        reader.read_into(memory(ALIGNMENT), 0, aligned=True)


def test_a_file_that_is_replaced_while_it_is_opened_is_one_file(
    path: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked of the one descriptor holds for all that is read."""
    real = os.open

    def replacing(file: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            other = path.with_name("other")
            other.write_bytes(CONTENT[::-1])
            other.replace(path)
        return real(file, flags, *more)

    monkeypatch.setattr(os, "open", replacing)
    require_reads_through_the_cache(path, memory(ALIGNMENT))
    assert path.read_bytes() == CONTENT[::-1]


def test_it_leaves_no_descriptor(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for direct in (False, True):
        FileReader(path, direct=direct).close()
    with pytest.raises(FileNotFoundError):
        FileReader(path.with_name("nowhere"), direct=True)
    assert len(os.listdir("/proc/self/fd")) == before
