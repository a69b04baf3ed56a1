"""Whatever happens to a file of a run or of an adapter: it is named with its repair, or the bits are the right ones.

Every file x every damage, on a finished store, on a half-finished run and on an adapter; all of it under the mark
`faults`, a sample of it always. A damage may go unnoticed only where the file is not needed, and then what comes out is
compared bit for bit. What is not tested: damage while a run is reading, and files that somebody sealed again.
"""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
import signal
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamda
from streamda import units
from streamda.errors import ConfigError, DamagedError, MismatchError, StoppedError
from tests.golden_options import golden_options
from tests.killed import run_until, weights

SMALL = {"num_samples": 4, "target_modules": "q_proj,k_proj,down_proj"}
STRAY = "stray.txt"
HALF = 10  # units committed: statistics of one block are unsolved, another is solved, the lowest is not begun
READ = ("acts-0000", "grads-0001", "stats-0001", "solve-0002")  # what the rest of such a run needs


def flip(path: Path, place: random.Random) -> None:
    data = bytearray(path.read_bytes())
    bit = place.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def swap(path: Path, place: random.Random) -> None:
    other = counterpart(path)
    mine, others = path.read_bytes(), other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(mine)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def counterpart(path: Path) -> Path:
    """The same file of another unit, if there is one, else the largest other one beside it."""
    parts = list(path.parts)
    if "units" in parts:
        place = parts.index("units") + 1
        for unit in sorted(Path(*parts[:place]).iterdir()):
            other = unit.joinpath(*parts[place + 1 :])
            if unit.name != parts[place] and other.is_file():
                return other
    tops = (
        above for above in path.parents if above.parent.name == "units" or {"run.json", "README.md"} & names_in(above)
    )
    top = next(tops)
    everything = sorted(each for each in top.rglob("*") if each.is_file() and each != path)
    return max(everything, key=lambda each: each.stat().st_size)


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "deleted": lambda path, _: path.unlink(),
    "emptied": lambda path, _: path.write_bytes(b""),
    "truncated": lambda path, place: path.write_bytes(path.read_bytes()[: place.randrange(path.stat().st_size)]),
    "flipped": flip,
    "zero-filled": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "swapped": swap,
    "joined by a stray file": lambda path, _: (path.parent / STRAY).write_bytes(b"hello"),
}


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def damage(folder: Path, name: str, how: str, seed: int = 0) -> set[str]:
    """Damages a file; the names, one of which an error has to say. None where the file is as it was."""
    path = folder / name
    if how in ("truncated", "flipped", "zero-filled") and not path.stat().st_size:
        return set()
    names = {path.name, STRAY if "stray" in how else path.name}
    if how == "swapped":
        names.add(counterpart(path).name)
    before = path.read_bytes()
    DAMAGES[how](path, random.Random(f"{name} {how} {seed}"))
    same = path.is_file() and path.read_bytes() == before  # as after a swap of two descriptions of equal arrays
    return set() if same and "stray" not in how else names


def outcome(command: Callable[[], object], result: Path | None = None) -> bytes | str:
    """The adapter that a command made, or the one line with which it refused."""
    try:
        command()
    except DamagedError as error:
        assert "\n" not in str(error)  # noqa: PT017 - what else it says depends on the case
        return str(error)
    except MismatchError as error:  # a flip in the words that say whose run.json it is
        return f"run.json: {error}"
    return (result / "adapter_model.safetensors").read_bytes() if result is not None else b""


def init_options(folder: Path, **options: Any) -> dict[str, Any]:
    return golden_options(folder, **SMALL, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose statistics and solutions are kept, and its adapter."""
    folder = tmp_path_factory.mktemp("finished")
    streamda.initialize(**init_options(folder, keep_statistics=True))
    return folder


@pytest.fixture(scope="module")
def right(finished: Path) -> bytes:
    return weights(finished)


@pytest.fixture(scope="module")
def collected(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The statistics alone: solving has to read all of them."""
    folder = tmp_path_factory.mktemp("collected") / "store"
    shutil.copytree(finished / "adapter.work", folder)
    streamda.repair(folder, drop=[f"solve-000{index}" for index in range(3)])
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run left that ended in its middle."""
    folder = tmp_path_factory.mktemp("half")
    times = Counter[str]()

    def reached(point: str) -> None:
        times[point] += 1
        if (point, times[point]) == ("unit-committed", HALF):
            raise StoppedError("here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "reached", reached)
        with pytest.raises(StoppedError):
            streamda.initialize(**init_options(folder))
    assert {path.name for path in (folder / "adapter.work" / "units").iterdir()} >= set(READ)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of the same command unbroken, which makes no sums of so few tokens as one does that keeps them."""
    folder = tmp_path_factory.mktemp("whole")
    streamda.initialize(**init_options(folder))
    return weights(folder)


def sample(folder: Path, seed: int, count: int) -> list[tuple[str, str]]:
    """Files of every sort, each with a few damages."""
    sorts: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, how in every(folder):
        sorts.setdefault((re.sub(r"\d+", "0", name), how), []).append((name, how))
    chooser = random.Random(seed)
    return chooser.sample([chooser.choice(cases) for cases in sorts.values()], min(count, len(sorts)))


def every(folder: Path) -> list[tuple[str, str]]:
    return [case for name in files_of(folder) for how in DAMAGES if (case := (name, how)) != ("LOCK", "swapped")]


def is_needed(name: str, how: str) -> bool:
    """Whether a damage to this file of a run may not pass a full check: all but the lock, and strays outside units."""
    return name != "LOCK" and not ("stray" in how and name.count("/") < 2)


def assert_collected_store_survives(store: Path, right: bytes, name: str, how: str, seed: int = 0) -> None:
    """Both the check and the solver name the file, or the solver gives the right bits."""
    before = {each: (store / each).read_bytes() for each in files_of(store)}
    result = store.with_name("result")
    try:
        names = damage(store, name, how, seed)
        if not names:
            return
        checked = outcome(lambda: streamda.verify(store))
        sound = not is_needed(name, how)
        assert checked == b"" if sound else any(each in str(checked) for each in names), (name, how, checked)
        solved = outcome(lambda: streamda.solve(statistics=str(store), output_dir=str(result)), result)
        if isinstance(solved, bytes):
            assert solved == right
            assert sound, (name, how)
        else:
            assert any(each in solved for each in names), (name, how, solved)
    finally:
        restore(store, before)
        shutil.rmtree(result, ignore_errors=True)


def restore(folder: Path, before: dict[str, bytes]) -> None:
    for name in set(files_of(folder)) - set(before):
        (folder / name).unlink()
    for name, data in before.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != data:
            (folder / name).write_bytes(data)
    for path in sorted((folder / "units").glob("solve-*")):
        if not any(name.startswith(f"units/{path.name}/") for name in before):
            shutil.rmtree(path)


def test_a_sample_of_damages_to_collected_statistics(collected: Path, right: bytes) -> None:
    for name, how in sample(collected, 1, 24):
        assert_collected_store_survives(collected, right, name, how)


@pytest.mark.faults
def test_every_damage_to_every_file_of_collected_statistics(collected: Path, right: bytes) -> None:
    for name, how in every(collected):
        assert_collected_store_survives(collected, right, name, how)


@pytest.mark.faults
def test_two_hundred_random_bit_flips_in_collected_statistics(collected: Path, right: bytes) -> None:
    chooser = random.Random(2)
    names = files_of(collected)
    for seed in range(200):
        assert_collected_store_survives(collected, right, chooser.choice(names), "flipped", seed)


def test_chunks_of_equal_arrays_cannot_change_places(collected: Path, right: bytes) -> None:
    """Each is whole by its own checksum, and the crc32c of any file that ends in its own crc32c is the same number."""
    chunks = [name for name in files_of(collected) if "/c/" in name and name.startswith("units/stats-0000/")]
    assert len(chunks) == 3 + 3 + 2 + 2
    for name in chunks:
        assert_collected_store_survives(collected, right, name, "swapped")


def continued(half: Path, folder: Path, right: bytes, name: str, how: str, *, repairs: bool) -> None:
    """The run is continued in a copy with one damage: refused by name or right; and right after the repair."""
    shutil.copytree(half, folder)
    work = folder / "adapter.work"
    try:
        names = damage(work, name, how)
        if not names:
            return
        run = functools.partial(streamda.initialize, **init_options(folder))
        found = outcome(run, folder / "adapter")
        if isinstance(found, bytes):
            assert found == right
            # the model's configuration is copied again from the model, and data that nobody reads are only measured
            unread = how in ("flipped", "zero-filled", "swapped") and not name.startswith(
                tuple(f"units/{unit}/" for unit in READ)
            )
            unread = unread and "COMMIT.json" not in name and name != "run.json"
            assert not is_needed(name, how) or name.startswith("model/") or unread, (name, how)
            return
        assert any(each in found for each in names), (name, how, found)
        assert not (folder / "adapter").exists()
        if repairs and name != "run.json":
            for _ in range(2):  # a swap damages two units
                if isinstance(found, str):
                    repair_as_told(found)
                    found = outcome(run, folder / "adapter")
            assert found == right
    finally:
        shutil.rmtree(folder)


def repair_as_told(message: str) -> None:
    command = re.search(r"run `streamda repair (\S+) --drop (\S+)`, then what it names", message)
    assert command is not None, message
    streamda.repair(command[1], drop=[command[2]])


def test_a_sample_of_damages_to_a_half_finished_run(half: Path, whole: bytes, tmp_path: Path) -> None:
    for name, how in sample(half / "adapter.work", 3, 8):
        continued(half, tmp_path / "copy", whole, name, how, repairs=False)


@pytest.mark.faults
def test_every_damage_to_every_file_of_a_half_finished_run(half: Path, whole: bytes, tmp_path: Path) -> None:
    for name, how in every(half / "adapter.work"):
        continued(half, tmp_path / "copy", whole, name, how, repairs=False)


@pytest.mark.parametrize("kind", ["acts", "grads", "stats", "solve"])
def test_after_the_repair_that_the_error_names_the_run_ends_with_the_same_bits(
    half: Path, whole: bytes, tmp_path: Path, kind: str
) -> None:
    """Where even the manifest is damaged, too."""
    names = [name for name in files_of(half / "adapter.work") if name.startswith(f"units/{kind}-")]
    manifest = random.Random(kind).choice([name for name in names if name.endswith("COMMIT.json")])
    continued(half, tmp_path / "copy", whole, manifest, "flipped", repairs=True)


@pytest.mark.faults
def test_after_the_repair_of_any_file_the_run_ends_with_the_same_bits(half: Path, whole: bytes, tmp_path: Path) -> None:
    for number, name in enumerate(files_of(half / "adapter.work")):
        continued(half, tmp_path / "copy", whole, name, list(DAMAGES)[number % len(DAMAGES)], repairs=True)


@pytest.mark.parametrize("unit", ["stats-0001", "solve-0002"])
def test_a_repaired_finished_run_is_completed_with_the_same_bits(
    finished: Path, right: bytes, tmp_path: Path, unit: str
) -> None:
    shutil.copytree(finished / "adapter.work", tmp_path / "adapter.work")
    repaired = streamda.repair(tmp_path / "adapter.work", drop=[unit])
    assert repaired.dependents == (("solve-0001",) if unit == "stats-0001" else ())
    before = {name: (finished / "adapter.work" / name).read_bytes() for name in files_of(finished / "adapter.work")}
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "adapter.work" / "units").iterdir()}
    if unit.startswith("stats"):
        with pytest.raises(ConfigError, match=r"lacks the statistics of 1 block; first run, .*: streamda collect"):
            streamda.solve(statistics=str(tmp_path / "adapter.work"), output_dir=str(tmp_path / "adapter"))
    streamda.initialize(**init_options(tmp_path, keep_statistics=True))
    assert weights(tmp_path) == right
    after = files_of(tmp_path / "adapter.work")
    assert set(after) == set(before)
    now = {path.name: path.stat().st_ino for path in (tmp_path / "adapter.work" / "units").iterdir()}
    assert {name: now[name] for name in kept} == kept  # what is sound is neither made nor touched again
    same = [name for name in after if "stats-" in name and not name.endswith("COMMIT.json")]
    assert all((tmp_path / "adapter.work" / name).read_bytes() == before[name] for name in same)
    assert streamda.verify(tmp_path / "adapter.work").is_sound


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("unit-committed:5", marks=pytest.mark.faults),
        "unit-committed:6",  # the gradient that leads to the dropped statistics
        pytest.param("drop-renamed:4", marks=pytest.mark.faults),
        pytest.param("unit-sealed:7", marks=pytest.mark.faults),
    ],
)
def test_a_repaired_run_that_is_killed_makes_nothing_sound_again(
    finished: Path, right: bytes, tmp_path: Path, point: str
) -> None:
    shutil.copytree(finished / "adapter.work", tmp_path / "adapter.work")
    streamda.repair(tmp_path / "adapter.work", drop=["stats-0001"])
    units = tmp_path / "adapter.work" / "units"
    kept = {path.name: path.stat().st_ino for path in units.iterdir()}
    options = init_options(tmp_path, keep_statistics=True)
    assert run_until(point, options) == -signal.SIGKILL
    streamda.initialize(**options)
    assert weights(tmp_path) == right
    now = {path.name: path.stat().st_ino for path in units.iterdir()}
    assert now.keys() - kept.keys() == {"stats-0001", "solve-0001"}
    assert {name: now[name] for name in kept} == kept


def assert_adapter_survives(finished: Path, folder: Path, right: bytes, name: str, how: str, seed: int = 0) -> None:
    shutil.copytree(finished, folder)
    try:
        names = damage(folder / "adapter", name, how, seed)
        needed = name != "README.md" and "stray" not in how
        run = functools.partial(streamda.initialize, **init_options(folder, keep_statistics=True))
        if (how, name) == ("deleted", "streamda_report.json"):
            with pytest.raises(ConfigError, match="is not empty"):
                run()
            found: bytes | str = str(names)
        else:
            found = outcome(run, folder / "adapter")
        assert (folder / "adapter" / "README.md").exists() or name == "README.md"  # nothing was rewritten
        checked = streamda.verify(folder / "adapter", strict=False)
        if isinstance(found, bytes):
            assert found == right
            assert not needed or how == "swapped"  # with the card, whatever its length
        else:
            assert any(each in found for each in names), found
        assert checked.is_sound == (not needed and (how, name) != ("swapped", "README.md"))
        assert checked.is_sound or any(each in checked.damages[0] for each in names)
    finally:
        shutil.rmtree(folder)


def test_a_sample_of_damages_to_an_adapter(finished: Path, right: bytes, tmp_path: Path) -> None:
    for name, how in sample(finished / "adapter", 4, 7):
        assert_adapter_survives(finished, tmp_path / "copy", right, name, how)


@pytest.mark.faults
def test_every_damage_to_every_file_of_an_adapter(finished: Path, right: bytes, tmp_path: Path) -> None:
    for name, how in every(finished / "adapter"):
        assert_adapter_survives(finished, tmp_path / "copy", right, name, how)


@pytest.mark.faults
def test_two_hundred_random_bit_flips_in_an_adapter(finished: Path, right: bytes, tmp_path: Path) -> None:
    for seed in range(200):
        name = ("adapter_config.json", "adapter_model.safetensors", "streamda_report.json")[seed % 3]
        assert_adapter_survives(finished, tmp_path / "copy", right, name, "flipped", seed)


def test_a_finished_run_without_its_adapter_gives_it_back_from_what_is_solved(
    finished: Path, right: bytes, tmp_path: Path
) -> None:
    shutil.copytree(finished / "adapter.work", tmp_path / "adapter.work")
    report = streamda.initialize(**init_options(tmp_path, keep_statistics=True))
    assert weights(tmp_path) == right
    assert report.bytes["weights_read"] == 0
    assert streamda.verify(tmp_path / "adapter").is_sound
    again = streamda.initialize(**init_options(tmp_path, keep_statistics=True))
    assert again.already_done


def test_a_copied_run_continues_elsewhere(half: Path, whole: bytes, tmp_path: Path) -> None:
    """No path, inode or time of the first place is in it."""
    shutil.copytree(half / "adapter.work", tmp_path / "elsewhere" / "work", copy_function=shutil.copyfile)
    report = streamda.initialize(**init_options(tmp_path, work_dir=str(tmp_path / "elsewhere" / "work")))
    assert report.resumed
    assert weights(tmp_path) == whole


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_files_of_an_adapter_obey_the_umask(finished: Path, tmp_path: Path, umask: int) -> None:
    shutil.copytree(finished / "adapter.work", tmp_path / "adapter.work")
    before = os.umask(umask)
    try:
        streamda.solve(statistics=str(tmp_path / "adapter.work"), output_dir=str(tmp_path / "adapter"))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "adapter").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes
