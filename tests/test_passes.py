"""Passes over the micro-batches of a boundary, and what of one is still in memory when the next is asked for."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import streamda
from streamda import collect_stage, passes, stopping, sweep
from streamda.batches import Batch
from streamda.boundary import BoundaryStore
from streamda.errors import StoppedError
from streamda.passes import Passes
from streamda.timeline import Timeline
from streamda.units import UnitStore
from streamda.unread import Replayed

CPU = torch.device("cpu")
SHAPES = [(2, 3), (1, 4), (3, 2)]
HIDDEN = 8


def make_batch(first: int, shape: tuple[int, int]) -> Batch:
    ids = tuple(torch.zeros(shape[1], dtype=torch.long) for _ in range(shape[0]))
    return Batch(tuple(range(first, first + shape[0])), shape, None, True, ids, ids, CPU)


def make_passes(folder: Path, slots: int) -> tuple[Passes, list[Batch]]:
    batches = [make_batch(10 * number, shape) for number, shape in enumerate(SHAPES)]
    store = BoundaryStore(UnitStore(folder, "run"), [(*shape, HIDDEN) for shape in SHAPES], torch.float32, slots)
    made = Passes(batches, store, Timeline(), CPU)
    for name, offset in (("acts-0001", 0.0), ("grads-0002", 100.0)):
        with made.writing(name) as writer:
            for number, shape in enumerate(SHAPES):
                writer.append(torch.full((*shape, HIDDEN), offset + number))
    return made, batches


@pytest.mark.parametrize("slots", [0, 2], ids=["disk", "memory"])
def test_micro_batches_come_in_order_with_their_states_at_each_boundary(tmp_path: Path, slots: int) -> None:
    made, batches = make_passes(tmp_path, slots)
    pairs = made.over("acts-0001", "grads-0002")
    found = [(batch, states.mean().item(), above.mean().item()) for batch, states, above in pairs]
    assert found == [(batches[0], 0.0, 100.0), (batches[1], 1.0, 101.0), (batches[2], 2.0, 102.0)]
    assert [tuple(states.shape) for _, states in made.over("acts-0001")] == [(*shape, HIDDEN) for shape in SHAPES]


@pytest.mark.parametrize("max_host_mem", ["1KB", "1GB"], ids=["disk", "memory"])
def test_a_run_whose_boundaries_threads_bring_gives_the_same_bits(
    max_host_mem: str, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside a GPU. Micro-batches of one sample, so that there are some to be ahead of and behind."""
    threads: set[str] = set()

    def stored(*arguments: Any) -> Any:
        for states in real_stored(*arguments):
            threads.add(threading.current_thread().name)
            yield states

    options = tiny | {"max_host_mem": max_host_mem, "micro_batch_tokens": "1"}
    plain = streamda.initialize(**options | {"output_dir": str(tmp_path / "plain")})
    real_stored = BoundaryStore._stored
    monkeypatch.setattr(BoundaryStore, "_stored", stored)
    by_threads = functools.partial(BoundaryStore, beside_device=True)
    monkeypatch.setattr(collect_stage, "BoundaryStore", lambda *arguments, **_: by_threads(*arguments))
    before = threading.active_count()
    report = streamda.initialize(**options | {"output_dir": str(tmp_path / "by-threads")})
    assert threading.active_count() == before
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "by-threads")]
    assert weights[0] == weights[1]
    assert report.bytes == plain.bytes
    assert threads == {"streamda-boundary_0"}


def test_a_pass_stops_before_a_micro_batch_and_reads_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, batches = make_passes(tmp_path, slots=0)
    asked = iter([False, True])

    def check() -> None:
        if next(asked):
            raise StoppedError("stopped")

    monkeypatch.setattr(stopping, "check", check)
    stream = made.over("acts-0001")
    assert next(stream)[0] is batches[0]
    before = made._boundaries.bytes_read
    with pytest.raises(StoppedError):
        next(stream)
    assert made._boundaries.bytes_read == before > 0


def test_nothing_of_a_micro_batch_is_in_memory_when_the_next_is_asked_for(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states, what they became, and the gradients of both: by storage, whatever tensor or graph holds it."""
    states: list[StorageWeakRef] = []
    held: list[int] = []

    def note(tensor: torch.Tensor) -> None:
        states.append(StorageWeakRef(tensor.untyped_storage()))

    def read(self: BoundaryStore, name: str, device: torch.device) -> Any:
        for tensor in real_read(self, name, device):
            note(tensor)
            kept = [tensor]
            del tensor
            yield kept.pop()

    def bad_samples(tensor: torch.Tensor) -> list[int]:
        if tensor.dim() == 3:  # no losses
            note(tensor)
        return real_bad_samples(tensor)

    def run(self: Replayed, *arguments: Any) -> torch.Tensor:
        output = real_run(self, *arguments)
        note(output)
        return output

    def ask(device: torch.device) -> None:
        held.append(sum(not each.expired() for each in states))

    real_read, real_bad_samples, real_run = BoundaryStore.read, sweep.bad_samples, Replayed.run
    monkeypatch.setattr(BoundaryStore, "read", read)
    monkeypatch.setattr(sweep, "bad_samples", bad_samples)
    monkeypatch.setattr(Replayed, "run", run)
    monkeypatch.setattr(passes, "release_between_micro_batches", ask)
    limits = {"max_host_mem": "1KB", "micro_batch_tokens": "1"}  # every boundary on disk, every sample alone
    streamda.initialize(**tiny | limits | {"output_dir": str(tmp_path / "adapter")})
    assert len(held) > 20
    assert len(states) > 2 * len(held)
    assert set(held) == {0}
