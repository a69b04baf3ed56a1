"""Boundary states: memory and disk give back the same bits, once, in order, or say that they cannot.

All of it at once, as on a CPU, and by threads, as beside a GPU.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

from streamda.boundary import STATES_FILE, BoundaryStore
from streamda.errors import DamagedError, StorageError
from streamda.files import FileWriter
from streamda.timeline import Timeline
from streamda.units import UnitStore

CPU = torch.device("cpu")
SHAPES = [(2, 9, 16), (1, 30, 16), (3, 1, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def states(dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    # what no comparison of values would notice: a NaN with a payload of its own, and a negative zero
    batches[0].view(torch.int16)[0, 0, 0] = -37
    batches[1][0, 0, 0] = -0.0
    return batches


def write(store: BoundaryStore, name: str, batches: list[torch.Tensor], *, durable: bool = False) -> None:
    with store.write(name, durable=durable) as writer:
        for batch in batches:
            writer.append(batch)


def write_and_fail(store: BoundaryStore, name: str) -> None:
    with store.write(name) as writer:
        writer.append(states(torch.float32)[0])
        raise ZeroDivisionError


def read_into(given: list[torch.Tensor], store: BoundaryStore, name: str) -> None:
    for batch in store.read(name, CPU):
        given.append(batch)  # one by one, so that those before an error stay


def bits(batches: list[torch.Tensor]) -> list[bytes]:
    return [batch.contiguous().view(torch.uint8).numpy().tobytes() for batch in batches]


MakeStore: TypeAlias = Callable[..., BoundaryStore]


@pytest.fixture(params=[False, True], ids=["at once", "by threads"])
def make_store(request: pytest.FixtureRequest) -> MakeStore:
    return functools.partial(BoundaryStore, beside_device=request.param)


@pytest.fixture
def units(tmp_path: Path) -> UnitStore:
    return UnitStore(tmp_path, "run")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [0, 1], ids=["disk", "memory"])
def test_memory_and_disk_give_back_the_very_bits_in_order_as_often_as_asked(
    units: UnitStore, dtype: torch.dtype, slots: int, make_store: MakeStore
) -> None:
    store = make_store(units, SHAPES, dtype, slots)
    write(store, "acts-0001", states(dtype))
    for _ in range(2):
        found = list(store.read("acts-0001", CPU))
        assert bits(found) == bits(states(dtype))
        assert [(batch.dtype, tuple(batch.shape)) for batch in found] == [(dtype, shape) for shape in SHAPES]
    assert units.names() == ([] if slots else ["acts-0001"])


def test_what_is_on_disk_outlives_the_process_and_what_is_in_memory_does_not(
    units: UnitStore, make_store: MakeStore
) -> None:
    first = make_store(units, SHAPES, torch.bfloat16, slots=1)
    write(first, "acts-0001", states(torch.bfloat16, 1))
    write(first, "acts-0002", states(torch.bfloat16, 2))
    second = make_store(UnitStore(units.folder, "run"), SHAPES, torch.bfloat16, slots=1)
    assert "acts-0001" in first
    assert "acts-0001" not in second
    assert bits(list(second.read("acts-0002", CPU))) == bits(states(torch.bfloat16, 2))


def test_as_many_boundaries_as_there_are_slots_are_in_memory_and_a_dropped_one_makes_room(
    units: UnitStore, make_store: MakeStore
) -> None:
    store = make_store(units, SHAPES, torch.float32, slots=2)
    for index in range(4):
        write(store, f"acts-{index}", states(torch.float32, index))
    assert units.names() == ["acts-2", "acts-3"]
    store.drop("acts-0")
    write(store, "acts-4", states(torch.float32, 4))
    assert units.names() == ["acts-2", "acts-3"]
    assert bits(list(store.read("acts-4", CPU))) == bits(states(torch.float32, 4))


def test_a_durable_boundary_is_on_disk_whatever_memory_is_free(units: UnitStore, make_store: MakeStore) -> None:
    store = make_store(units, SHAPES, torch.float32, slots=9)
    write(store, "grads-3", states(torch.float32), durable=True)
    assert units.names() == ["grads-3"]


@pytest.mark.parametrize("slots", [0, 1], ids=["disk", "memory"])
def test_a_dropped_boundary_is_gone_and_dropping_it_again_is_no_error(
    units: UnitStore, slots: int, make_store: MakeStore
) -> None:
    store = make_store(units, SHAPES, torch.float32, slots)
    write(store, "acts-0", states(torch.float32))
    assert "acts-0" in store
    store.drop("acts-0")
    store.drop("acts-0")
    assert "acts-0" not in store
    assert units.names() == []
    with pytest.raises(KeyError):
        list(store.read("acts-0", CPU))


@pytest.mark.parametrize("slots", [0, 1], ids=["disk", "memory"])
def test_a_boundary_whose_writing_fails_never_existed(units: UnitStore, slots: int, make_store: MakeStore) -> None:
    store = make_store(units, SHAPES, torch.float32, slots)
    with pytest.raises(ZeroDivisionError):
        write_and_fail(store, "acts-0")
    assert "acts-0" not in store
    assert list(units.folder.iterdir()) == []


@pytest.mark.parametrize("batch", [0, 2], ids=["first", "last"])
def test_a_micro_batch_that_cannot_be_written_ends_the_boundary(
    units: UnitStore, make_store: MakeStore, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a thread writes it, and of the last one nobody but the end of the boundary would hear."""

    def write_until_full(self: FileWriter, data: memoryview) -> None:
        if data.nbytes == sizes[batch]:
            raise StorageError("disk full")
        real_write(self, data)

    sizes = [4 * torch.Size(shape).numel() for shape in SHAPES]
    real_write = FileWriter.write
    monkeypatch.setattr(FileWriter, "write", write_until_full)
    store, before = make_store(units, SHAPES, torch.float32, slots=0), threading.active_count()
    with pytest.raises(StorageError, match="disk full"):
        write(store, "acts-0", states(torch.float32))
    assert "acts-0" not in store
    assert list(units.folder.iterdir()) == []
    assert threading.active_count() == before


@pytest.mark.parametrize("slots", [0, 1], ids=["disk", "memory"])
def test_what_is_kept_is_a_copy_without_a_graph(units: UnitStore, slots: int, make_store: MakeStore) -> None:
    """A block may change its output in place afterwards, and must be free to go."""
    store = make_store(units, SHAPES[:1], torch.float32, slots)
    original = states(torch.float32)[0].nan_to_num()
    leaf = original.clone().requires_grad_(True)
    output = leaf * 1.0
    write(store, "acts-0", [output])
    with torch.no_grad():
        output.zero_()
    (found,) = store.read("acts-0", CPU)
    assert torch.equal(found, original)
    assert not found.requires_grad


@pytest.mark.parametrize("slots", [0, 1], ids=["disk", "memory"])
def test_states_that_are_not_contiguous_are_stored_as_they_read(
    units: UnitStore, slots: int, make_store: MakeStore
) -> None:
    store = make_store(units, [(2, 9, 16)], torch.float32, slots)
    values = torch.arange(288.0).reshape(16, 9, 2).permute(2, 1, 0)
    write(store, "acts-0", [values])
    (found,) = store.read("acts-0", CPU)
    assert torch.equal(found, values)


def test_facts_are_kept_beside_a_durable_boundary(units: UnitStore, make_store: MakeStore) -> None:
    store = make_store(units, SHAPES, torch.bfloat16, slots=0)
    kept: dict[str, float] = {}
    with store.write("grads-3", durable=True, facts=kept) as writer:
        for batch in states(torch.bfloat16):
            writer.append(batch)
        kept["loss"] = 2.5  # known at the end only
    assert store.facts("grads-3")["loss"] == 2.5
    assert store.facts("grads-3")["dtype"] == "torch.bfloat16"


def test_bytes_to_and_from_disk_are_counted_and_memory_is_free(units: UnitStore, make_store: MakeStore) -> None:
    size = sum(torch.Size(shape).numel() for shape in SHAPES) * 2
    store = make_store(units, SHAPES, torch.bfloat16, slots=1)
    write(store, "acts-0", states(torch.bfloat16))
    list(store.read("acts-0", CPU))
    assert (store.bytes_written, store.bytes_read) == (0, 0)
    write(store, "acts-1", states(torch.bfloat16))
    for _ in range(3):
        list(store.read("acts-1", CPU))
    assert (store.bytes_written, store.bytes_read) == (size, 3 * size)
    assert (units.path("acts-1") / STATES_FILE).stat().st_size == size


class TestDamage:
    @pytest.fixture
    def store(self, units: UnitStore, make_store: MakeStore) -> BoundaryStore:
        store = make_store(units, SHAPES, torch.bfloat16, slots=0)
        write(store, "acts-0", states(torch.bfloat16))
        return store

    @staticmethod
    def file(units: UnitStore) -> Path:
        return units.path("acts-0") / STATES_FILE

    @pytest.mark.parametrize("batch", [0, 1, 2])
    def test_a_flipped_bit_is_noticed_before_its_micro_batch_is_used(
        self, store: BoundaryStore, units: UnitStore, batch: int
    ) -> None:
        """The micro-batches before it are whole, and are given."""
        sizes = [2 * torch.Size(shape).numel() for shape in SHAPES]
        data = bytearray(self.file(units).read_bytes())
        data[sum(sizes[:batch]) + 7] ^= 1
        self.file(units).write_bytes(bytes(data))
        given: list[torch.Tensor] = []
        with pytest.raises(
            DamagedError, match=r"states\.bin does not have the bytes .*streamda repair .* --drop acts-0"
        ):
            read_into(given, store, "acts-0")
        assert bits(given) == bits(states(torch.bfloat16)[:batch])

    def test_two_micro_batches_that_changed_places_are_noticed(self, units: UnitStore, make_store: MakeStore) -> None:
        shapes = [(1, 4, 4), (1, 4, 4)]
        store = make_store(units, shapes, torch.float32, slots=0)
        write(store, "acts-1", [torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
        path = units.path("acts-1") / STATES_FILE
        data = path.read_bytes()
        path.write_bytes(data[64:] + data[:64])
        with pytest.raises(DamagedError):
            list(store.read("acts-1", CPU))

    @pytest.mark.parametrize("change", [-1, 1, -(10**9)], ids=["a byte less", "a byte more", "empty"])
    def test_another_length_is_noticed(self, store: BoundaryStore, units: UnitStore, change: int) -> None:
        data = self.file(units).read_bytes()
        self.file(units).write_bytes(data + b"x" if change > 0 else data[: max(0, len(data) + change)])
        with pytest.raises(DamagedError):
            list(store.read("acts-0", CPU))

    def test_a_missing_file_is_noticed(self, store: BoundaryStore, units: UnitStore) -> None:
        self.file(units).unlink()
        with pytest.raises(DamagedError):
            list(store.read("acts-0", CPU))


def test_what_lies_on_disk_is_announced_from_its_beginning_and_only_that(
    units: UnitStore, monkeypatch: pytest.MonkeyPatch, make_store: MakeStore
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda _fd, offset, length, _advice: asked.append((offset, length)))
    monkeypatch.setattr("streamda.read_ahead.WINDOW_BYTES", 100)
    store = make_store(units, SHAPES, torch.float32, 1)
    write(store, "held", states(torch.float32))
    write(store, "acts-0001", states(torch.float32))
    store.announce("held")
    store.announce("acts-0002")
    assert asked == []
    store.announce("acts-0001")
    size = (units.path("acts-0001") / "states.bin").stat().st_size
    assert [offset for offset, _ in asked] == list(range(0, size, 100))
    assert sum(length for _, length in asked) == size
    asked.clear()
    monkeypatch.setattr("streamda.boundary.ANNOUNCED_BYTES", 150)
    store.announce("acts-0001")
    assert asked == [(0, 100), (100, 50)]


@pytest.mark.parametrize("count", [2, 4], ids=["fewer", "more"])
def test_a_boundary_of_another_number_of_micro_batches_is_damaged(
    units: UnitStore, count: int, make_store: MakeStore
) -> None:
    write(make_store(units, SHAPES, torch.float32, slots=0), "acts-0001", states(torch.float32))
    store = make_store(units, [*SHAPES, SHAPES[0]][:count], torch.float32, slots=0)
    with pytest.raises(DamagedError, match=r"another number of micro-batches.*streamda repair .* --drop acts-0001"):
        next(store.read("acts-0001", CPU))


def test_what_threads_do_is_on_the_timeline_each_in_its_own_lane(units: UnitStore) -> None:
    timeline = Timeline()
    store = BoundaryStore(units, SHAPES, torch.float32, 0, timeline=timeline, beside_device=True)
    for name in ("acts-0001", "grads-0001"):
        write(store, name, states(torch.float32))
    for _ in zip(store.read("acts-0001", CPU), store.read("grads-0001", CPU), strict=True):
        pass
    lanes = [(span.lane, span.name) for span in timeline.spans()]
    assert lanes.count(("boundary writer", "write boundary")) == 2 * len(SHAPES)
    for kind in ("acts", "grads"):  # and one for finding out that there are no more
        assert lanes.count((f"{kind} reader", "read boundary")) == len(SHAPES) + 1
