"""Durable file operations: what they leave behind, how they fail, and what they say when they do."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda import files
from streamda.errors import DamagedError, StorageError


class OneCallFails(files.SystemCalls):
    """The real system calls, but one of them fails."""

    def __init__(self, call: str, code: int) -> None:
        def fail(*args: Any) -> Any:
            raise OSError(code, os.strerror(code))

        setattr(self, call, fail)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=[])),  # with lone surrogates: paths that are not UTF-8
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_json_comes_back_equal_and_has_one_spelling(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "value.json"
        files.write_json_atomic(path, value)
        back = files.read_json(path)
        assert back == value
        assert files.canonical_json(back) == files.canonical_json(value)
        assert os.listdir(folder) == ["value.json"]


def test_json_is_sorted_utf8_and_obeys_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_json_atomic(tmp_path / "a.json", {"b": "é", "a": [1]})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640
    text = (tmp_path / "a.json").read_text("utf-8")
    assert text.index('"a"') < text.index('"b"')
    assert json.loads(text) == {"a": [1], "b": "é"}


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            files.write_json_atomic(tmp_path / "a.json", value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\0\0\0", b"\xff", b"NaN", b"[1e999]", b"[-Infinity]", b"[" * 100_000, b"{} x", b"9" * 5000]
)
def test_json_that_is_damaged_names_the_file(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "run.json").write_bytes(raw)
    with pytest.raises(DamagedError, match=r"run\.json is not valid JSON"):
        files.read_json(tmp_path / "run.json")


def test_a_file_that_cannot_be_read_is_damaged_but_one_that_may_not_be_read_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(DamagedError, match=r"a\.json cannot be read: No such file"):
        files.read_json(path)
    path.mkdir()
    with pytest.raises(DamagedError, match="Is a directory"):
        files.read_json(path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match="symbolic links"):
        files.read_json(tmp_path / "link")
    monkeypatch.setattr(files, "system_calls", OneCallFails("open", errno.EIO))
    with pytest.raises(DamagedError, match="Input/output error"):
        files.crc32c_of_file(path)
    monkeypatch.setattr(files, "system_calls", OneCallFails("open", errno.EACCES))
    with pytest.raises(StorageError, match=r"cannot read .*Permission denied"):
        files.crc32c_of_file(path)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, r"\(\d+ bytes free\); free some space"),
        (errno.EDQUOT, r"\(\d+ bytes free\); free some of your quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EROFS, "choose a place that can be written"),
        (errno.EACCES, "choose a place that can be written"),
        (errno.EIO, "check it before running again"),
    ],
)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_failed_write_is_one_line_with_place_reason_and_advice_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, advice: str
) -> None:
    path = tmp_path / "new\nline" / "run.json"
    path.parent.mkdir()
    path.write_bytes(b"1\n")
    monkeypatch.setattr(files, "system_calls", OneCallFails(call, code))
    with pytest.raises(StorageError, match=advice) as caught:
        files.write_json_atomic(path, 2)
    message = str(caught.value)
    assert os.strerror(code) in message
    assert r"new\nline/run.json" in message
    assert len(message.splitlines()) == 1
    monkeypatch.undo()
    assert files.read_json(path) == 1
    assert os.listdir(path.parent) == ["run.json"]


def test_the_free_bytes_are_those_of_the_nearest_existing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answer:
        f_bavail, f_bfree, f_frsize = 7, 1000, 4096

    monkeypatch.setattr(files.SystemCalls, "statvfs", staticmethod(lambda path: Answer() if path == tmp_path else None))
    assert files.free_bytes(tmp_path / "not" / "yet") == 7 * 4096
    monkeypatch.setattr(files, "system_calls", OneCallFails("statvfs", errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left on device; free"):
        files.free_bytes(tmp_path)


def test_errors_of_other_libraries_about_space_are_recognized(tmp_path: Path) -> None:
    inside, outside = str(tmp_path / "a" / "b"), "/elsewhere/model.safetensors"

    def translated(error: BaseException) -> StorageError | None:
        return files.foreign_storage_error(error, "write", tmp_path)

    for error in (
        OSError(errno.ENOSPC, "no space"),
        OSError(errno.EIO, "written without a name"),
        OSError(errno.EACCES, "denied", inside),
        OSError("10 requested and 0 written: Not enough free space to write 80 bytes"),
        RuntimeError('I/O error: No space left on device (os error 28)"'),
        RuntimeError("I/O error: Input/output error (os error 5)"),
        RuntimeError("I/O error: Read-only file system (os error 30)"),
    ):
        assert isinstance(translated(error), StorageError)
    for other in (
        OSError(errno.EIO, "read", outside),
        OSError(errno.EPIPE, "stdout is closed"),
        ValueError("shape (28, 27)"),
        RuntimeError("os error 281"),
        KeyboardInterrupt("no space left"),
    ):
        assert translated(other) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=5000), max_size=5), st.integers(1, 700))
def test_the_writer_knows_size_and_checksum_however_little_the_system_takes_at_once(
    pieces: list[bytes], most: int
) -> None:
    class TakesLittle(files.SystemCalls):
        write = staticmethod(lambda descriptor, data: os.write(descriptor, data[:most]))

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "system_calls", TakesLittle())
        patch.setattr(files, "_BLOCK_BYTES", 1000)
        with files.FileWriter(Path(folder) / "data") as writer:
            for piece in pieces:
                writer.write(bytearray(piece))
        content = b"".join(pieces)
        assert (Path(folder) / "data").read_bytes() == content
        assert writer.size == len(content)
        assert writer.crc32c == files.crc32c_of_file(writer.path) == google_crc32c.value(content)


def test_the_writer_makes_only_new_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "old").write_bytes(b"old")
    for name in ("link", "old"):
        with pytest.raises(StorageError, match="File exists"):
            files.FileWriter(tmp_path / name)
    assert not (tmp_path / "target").exists()
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_tree_is_removed_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "file").write_bytes(b"keep")
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "file").write_bytes(b"")
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "keep")
    found = files.tree(tmp_path / "tree")
    assert found.sizes == {"deep/file": 0}
    assert found.folders == [tmp_path / "tree" / "deep", tmp_path / "tree"]
    assert found.others == ["link"]
    files.remove_tree(tmp_path / "tree")
    files.remove_tree(tmp_path / "tree")  # gone is gone
    assert os.listdir(tmp_path) == ["keep"]
    assert (tmp_path / "keep" / "file").read_bytes() == b"keep"


def test_folders_are_made_with_parents_and_not_under_a_file(tmp_path: Path) -> None:
    files.make_folders(tmp_path / "a" / "b")
    files.make_folders(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="Not a directory"):
        files.make_folders(tmp_path / "file" / "b")
    with pytest.raises(StorageError, match="File name too long"):
        files.make_folder(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("wanted", "reached"), [("", 3), ("other", 3), ("here", 0), ("here:2", 1), ("here:3", 2), ("here:4", 3)]
)
def test_a_kill_point_kills_at_the_nth_time_and_only_when_named(wanted: str, reached: int) -> None:
    script = """
import sys, types
package = types.ModuleType("streamda")  # the real one imports torch, which takes seconds
package.__path__ = [sys.argv[1]]
sys.modules["streamda"] = package
from streamda.files import reached
for _ in range(3):
    reached("here")
    print("x", flush=True)
"""
    command = [sys.executable, "-c", script, str(Path(files.__file__).parent)]
    done = subprocess.run(command, env={**os.environ, "STREAMDA_KILL_AT": wanted}, capture_output=True, check=False)
    assert done.stdout.count(b"x") == reached
    assert done.returncode == (0 if reached == 3 else -9)
