"""Units: committed whole or not at all, in the right order, and any later change to their files is noticed."""

from __future__ import annotations

import errno
import json
import os
import random
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda import files
from streamda.errors import DamagedError, MismatchError, StorageError
from streamda.units import UnitStore, is_unit_name

CONTENT = {"a.bin": bytes(range(256)) * 5, "deep/er/b.bin": b"\0" * 700, "deep/c.json": b"{}", "empty": b""}


def put(folder: Path, content: dict[str, bytes]) -> None:
    for relpath, data in content.items():
        (folder / relpath).parent.mkdir(parents=True, exist_ok=True)
        (folder / relpath).write_bytes(data)


def put_and_raise(store: UnitStore, error: BaseException) -> None:
    with store.create("one") as draft:
        put(draft.path, CONTENT)
        raise error


def a_store(folder: Path, fingerprint: str = "f") -> UnitStore:
    """A store with the two units "one" and "two" of the same files, sizes and metadata."""
    store = UnitStore(folder, fingerprint)
    for name, first in ("one", b"1"), ("two", b"2"):
        with store.create(name) as draft:
            put(draft.path, CONTENT)
            put(draft.path, {"a.bin": first + CONTENT["a.bin"][1:]})
            draft.metadata["tokens"] = [1, 2.5, "x"]
    return store


def assert_damaged(store: UnitStore, name: str, file: str = "") -> None:
    """Damage is reported in one line with unit, file and repair, by an old store and by a new one."""
    for each in (store, UnitStore(store.folder, store.fingerprint)):
        with pytest.raises(DamagedError) as caught:
            each.verify(name)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert file in message
        assert message.startswith(f"unit {name} is")
        assert f"run `streamda repair {store.folder.parent} --drop {name}`, then what it names" in message


def test_a_committed_unit_is_found_again_with_its_files_metadata_and_fingerprint(tmp_path: Path) -> None:
    a_store(tmp_path)
    store = UnitStore(tmp_path, "f")
    with store.create("solve-0", fingerprint="another") as draft:
        draft.metadata["rank"] = 8
    assert store.names() == ["one", "solve-0", "two"]
    assert sorted(os.listdir(tmp_path)) == store.names()
    assert "one" in store
    assert "three" not in store
    assert {name: (store.path("one") / name).read_bytes() for name in CONTENT if name != "a.bin"} == {
        name: data for name, data in CONTENT.items() if name != "a.bin"
    }
    assert dict(store.metadata("one")) == {"tokens": [1, 2.5, "x"]}
    assert store.metadata("one") is store.metadata("one")
    assert store.metadata("one").fingerprint == "f"
    assert store.metadata("solve-0").fingerprint == "another"
    assert store.metadata("solve-0")["rank"] == 8
    assert {name: record.size for name, record in store.metadata("two").files.items()} == {
        name: len(data) for name, data in CONTENT.items()
    }
    for name in store.names():
        store.check(name)
        store.verify(name)


def test_equal_units_have_equal_bytes(tmp_path: Path) -> None:
    manifests = []
    for folder in (tmp_path / "x", tmp_path / "y"):
        folder.mkdir()
        manifests.append((a_store(folder).path("one") / "COMMIT.json").read_bytes())
    assert manifests[0] == manifests[1]


def test_a_draft_left_by_an_exception_leaves_nothing(tmp_path: Path) -> None:
    store = UnitStore(tmp_path, "f")
    for error in (KeyError("x"), KeyboardInterrupt(), StorageError("full")):
        with pytest.raises(type(error)):
            put_and_raise(store, error)
        assert os.listdir(tmp_path) == []
    with pytest.raises(StorageError, match=r"cannot write unit one in .*No space left .*bytes free"):
        put_and_raise(store, RuntimeError("I/O error (os error 28)"))
    with pytest.raises(
        StorageError, match=r"^cannot write .*one\.[0-9a-f]{8}\.part/x: No space left"
    ):  # not told twice
        put_and_raise(store, files.storage_error(OSError(errno.ENOSPC, ""), "write", store.create("one").path / "x"))
    with pytest.raises(ValueError, match="JSON"), store.create("one") as draft:
        draft.metadata["loss"] = float("nan")
    assert os.listdir(tmp_path) == []


def test_wrong_use_is_a_programming_error(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    with pytest.raises(ValueError, match="already committed"):
        store.create("one")
    for call in (store.path, store.metadata, store.check, store.verify, store.drop):
        with pytest.raises(KeyError, match="three"):
            call("three")
    with pytest.raises(ValueError, match="link"), store.create("three") as draft:
        (draft.path / "link").symlink_to("a")
    with pytest.raises(ValueError, match=r"COMMIT\.json"), store.create("three") as draft:
        put(draft.path, {"COMMIT.json": b"{}"})
    with pytest.raises(ValueError, match=r"never\.bin"), store.create("three") as draft:
        draft.record("never.bin", 0, 0)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_recorded_files_are_not_read_again_but_their_size_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = UnitStore(tmp_path, "f")
    read: list[Path] = []
    original = files.crc32c_of_file
    monkeypatch.setattr(files, "crc32c_of_file", lambda path: (read.append(path), original(path))[1])
    with store.create("one") as draft:
        put(draft.path, {"other": b"abc"})
        with files.FileWriter(draft.path / "big") as writer:
            writer.write(b"12345")
        draft.record("big", writer.size, writer.crc32c)
    assert [path.name for path in read] == ["other"]
    store.verify("one")
    short = store.create("two")
    short.record("file", 4, google_crc32c.value(b"abcd"))
    with pytest.raises(StorageError, match="has 3 of 4 bytes"), short:
        put(short.path, {"file": b"abc"})


def test_everything_is_fsynced_before_the_rename_and_the_rename_before_the_commit_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, str]] = []
    paths: dict[int, str] = {}

    class Recorded(files.SystemCalls):
        @staticmethod
        def open(path: Path, *args: int) -> int:
            descriptor = os.open(path, *args)
            paths[descriptor] = os.path.relpath(path, tmp_path)
            return descriptor

        @staticmethod
        def fsync(descriptor: int) -> None:
            log.append(("fsync", paths[descriptor]))

        @staticmethod
        def rename(source: Path, target: Path) -> None:
            log.append(("rename", os.path.relpath(source, tmp_path)))
            os.rename(source, target)

        @staticmethod
        def replace(source: Path, target: Path) -> None:
            log.append(("replace", os.path.relpath(source, tmp_path)))
            os.replace(source, target)

    monkeypatch.setattr(files, "system_calls", Recorded())
    store = UnitStore(tmp_path, "f")
    with store.create("one") as draft:
        put(draft.path, CONTENT)
    part = draft.path.name
    sealing = next(path for call, path in log if call == "replace")
    assert Path(sealing).parent == Path(part)
    assert log == [
        *[("fsync", f"{part}/{name}") for name in ("a.bin", "deep/c.json", "deep/er/b.bin", "empty")],
        *[("fsync", name) for name in (f"{part}/deep/er", f"{part}/deep", part)],
        ("fsync", sealing),
        ("replace", sealing),
        ("fsync", part),
        ("rename", part),
        ("fsync", "."),
    ]
    log.clear()
    store.drop("one")
    assert log == [("rename", "one"), ("fsync", ".")]
    assert os.listdir(tmp_path) == []


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "delete": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "extend": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "zero-fill": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "replace by a link": lambda path: (
        path.rename(path.parent.parent / "x"),
        path.symlink_to(path.parent.parent / "x"),
    ),
    "replace by a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["a.bin", "deep/c.json", "COMMIT.json"])
def test_damage_to_a_file_is_detected(tmp_path: Path, damage: str, file: str) -> None:
    store = a_store(tmp_path)
    store.verify("one")
    DAMAGES[damage](tmp_path / "one" / file)
    assert_damaged(store, "one", file)
    store.verify("two")
    store.drop("one")  # the repair command's way, and then the unit can be made again
    assert store.names() == ["two"]
    with store.create("one"):
        pass
    store.verify("one")


@pytest.mark.parametrize("file", ["a.bin", "deep/er/b.bin", "COMMIT.json"])
def test_fifty_bit_flips_are_detected(tmp_path: Path, file: str) -> None:
    store = a_store(tmp_path)
    path = tmp_path / "one" / file
    good = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(good)), 50):
        path.write_bytes(flip(good, bit))
        assert_damaged(store, "one", file)
        path.write_bytes(good)
        store.verify("one")


def test_swapped_strayed_and_misplaced_files_are_detected(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    one, two = (tmp_path / name / "a.bin" for name in ("one", "two"))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert_damaged(store, "one", "a.bin")
    assert_damaged(store, "two", "a.bin")
    one.write_bytes(first)
    two.write_bytes(second)
    store.verify("one")
    for stray in (".DS_Store", "deep/er/c.bin.tmp"):
        (tmp_path / "one" / stray).write_bytes(b"")
        assert_damaged(store, "one", stray)
        (tmp_path / "one" / stray).unlink()
    (tmp_path / "one").rename(tmp_path / "three")  # a whole unit under another's name
    assert_damaged(UnitStore(tmp_path, "f"), "three", "belongs to unit one")


def test_a_unit_of_another_run_or_format_and_a_linked_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    store = a_store(tmp_path / "a")
    assert_damaged(UnitStore(tmp_path / "a", "g"), "one", "belongs to another run")
    marker = store.path("one") / "COMMIT.json"
    obj = json.loads(marker.read_bytes())
    del obj["self_crc"]
    obj["format"] = "streamda-unit-2"
    obj["self_crc"] = google_crc32c.value(files.canonical_json(obj))
    files.write_json_atomic(marker, obj)
    with pytest.raises(MismatchError, match="'streamda-unit-2', this streamda reads 'streamda-unit-1'"):
        UnitStore(tmp_path / "a", "f").metadata("one")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two").symlink_to(tmp_path / "a" / "two")
    linked = UnitStore(tmp_path / "b", "f")
    assert_damaged(linked, "two", "symbolic link")
    with pytest.raises(ValueError, match="already committed"):
        linked.create("two")
    linked.drop("two")
    store.verify("two")


def test_the_shallow_check_reads_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = a_store(tmp_path)
    monkeypatch.setattr(files, "crc32c_of_file", None)
    store.check("one")
    (tmp_path / "one" / "a.bin").write_bytes(b"")
    with pytest.raises(DamagedError, match=r"a\.bin has 0 bytes, committed were 1280"):
        store.check("one")


def test_a_sweep_removes_what_a_dead_process_left_and_nothing_else(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    for name in ("one.0123abcd.part", "two.0123abcd.trash", "x.part", "y.tmp", "z.partial"):
        put(tmp_path, {f"{name}/deep/file": b""})
    put(tmp_path, {"c.tmp": b"", ".DS_Store": b"", "notes": b"", "one/inner.tmp": b"", "Folder/x.part": b""})
    (tmp_path / "link.trash").symlink_to(tmp_path / "one")
    store.sweep()
    assert sorted(os.listdir(tmp_path)) == [".DS_Store", "Folder", "notes", "one", "two"]
    assert store.names() == ["one", "two"]
    assert (tmp_path / "one" / "inner.tmp").exists()
    assert (tmp_path / "Folder" / "x.part").exists()


LETTERS = string.ascii_lowercase + string.digits + "_.-"


@settings(max_examples=300, deadline=None)
@given(st.text(LETTERS, max_size=70) | st.text(max_size=70) | st.sampled_from(["..", "a.part", "a\n", "é", "A", "a/b"]))
def test_unit_names(name: str) -> None:
    legal = (
        0 < len(name) <= 64
        and set(name) <= set(LETTERS)
        and name[0] != "."
        and not any(name.endswith(suffix) for suffix in (".part", ".trash", ".tmp", ".partial"))
    )
    assert is_unit_name(name) == legal
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.SystemCalls, "fsync", staticmethod(lambda descriptor: None))
        store = UnitStore(Path(folder), "f")
        assert name not in store
        if legal:
            with store.create(name):
                pass
            assert os.listdir(folder) == [name]
            assert store.names() == [name]
            store.verify(name)
        else:
            with pytest.raises(ValueError, match="no unit name"):
                store.create(name)
            assert os.listdir(folder) == []


relpaths = st.lists(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=9), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(relpaths.map("/".join), st.binary(max_size=50), max_size=4),
    st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)),
)
def test_whatever_files_and_metadata_a_unit_has_it_comes_back(
    content: dict[str, bytes], metadata: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.SystemCalls, "fsync", staticmethod(lambda descriptor: None))
        written = {}
        with UnitStore(Path(folder), "f").create("unit") as draft:
            for relpath, data in content.items():
                path = draft.path / relpath
                if set(relpath.split("/")) & {".", ".."} or path.exists() or "COMMIT.json" in relpath:
                    continue
                try:
                    put(draft.path, {relpath: data})
                except (FileExistsError, NotADirectoryError, UnicodeEncodeError):
                    continue
                written[path.relative_to(draft.path).as_posix()] = data
            draft.metadata.update(metadata)
        store = UnitStore(Path(folder), "f")
        store.verify("unit")
        assert dict(store.metadata("unit")) == metadata
        assert {path: record.size for path, record in store.metadata("unit").files.items()} == {
            path: len(data) for path, data in written.items()
        }


def test_a_commit_whose_last_fsync_fails_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = a_store(tmp_path)
    original = files.fsync_folder

    def failing(path: Path) -> None:
        if path == tmp_path:
            raise files.storage_error(OSError(errno.EIO, ""), "sync", path)
        original(path)

    monkeypatch.setattr(files, "fsync_folder", failing)
    with pytest.raises(StorageError), store.create("three") as draft:
        put(draft.path, CONTENT)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    monkeypatch.undo()
    with store.create("three") as draft:
        put(draft.path, CONTENT)
    store.verify("three")


def test_damage_while_reading_a_draft_back_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> bytes:
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(files.SystemCalls, "read", staticmethod(failing))
    with pytest.raises(StorageError, match=r"a\.bin cannot be read"), UnitStore(tmp_path, "f").create("one") as draft:
        put(draft.path, CONTENT)
    assert os.listdir(tmp_path) == []
