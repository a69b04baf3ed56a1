"""Memory of weights that were let go becomes that of the next ones, never while anybody still looks at it.

Not covered: what it saves; that is for a machine and a model of some size (docs/performance.md).
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import streamda
from streamda import spare_memory
from streamda.checkpoint import Checkpoint
from streamda.setup import Prepared
from streamda.solve_stage import Solver
from streamda.spare_memory import SpareMemory
from streamda.stored_weights import StoredWeight
from streamda.sweep import Sweep
from tests.golden_options import golden_options
from tests.killed import weights
from tests.models import write_checkpoint
from tests.test_checkpoint import CPU, opened, stored


@pytest.fixture(autouse=True)
def _small_blocks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_memory, "LARGE_BLOCK_BYTES", 64)


def a_place(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def spare_of(*shapes: tuple[int, ...]) -> SpareMemory:
    """Whose last read was of such tensors."""
    spare = SpareMemory()
    spare.trim_to((shape, torch.float32) for shape in shapes)
    return spare


def kept_by(checkpoint: Checkpoint) -> int:
    return sum(map(len, checkpoint._spare._storages.values()))


def test_memory_is_taken_by_whatever_has_its_size_once() -> None:
    spare = spare_of((6, 8))
    gone = torch.zeros(6, 8)
    place = a_place(gone)
    spare.keep(gone)
    del gone
    taken = spare.empty((12, 8), torch.bfloat16, CPU)
    assert (a_place(taken), taken.shape, taken.dtype, taken.is_contiguous()) == (place, (12, 8), torch.bfloat16, True)
    assert a_place(spare.empty((6, 8), torch.float32, CPU)) != place


@pytest.mark.parametrize("holds", [lambda tensor: tensor, lambda tensor: tensor[1:].T, lambda tensor: tensor.numpy()])
def test_memory_that_is_still_looked_at_is_left_alone(holds: Any) -> None:
    spare = spare_of((6, 8))
    value = torch.arange(48.0)
    seen = holds(value.view(6, 8))
    before = torch.as_tensor(seen).clone()
    spare.keep(value)
    del value
    spare.empty((6, 8), torch.float32, CPU).fill_(-1)
    assert torch.equal(torch.as_tensor(seen), before)


def test_memory_that_is_kept_twice_is_given_once() -> None:
    spare = spare_of((6, 8))
    value = torch.zeros(6, 8)
    spare.keep(value)
    spare.keep(value)
    del value
    first, second = (spare.empty((6, 8), torch.float32, CPU) for _ in range(2))
    assert a_place(first) != a_place(second)


def test_a_stored_weight_whose_graph_is_alive_is_left_alone() -> None:
    spare = SpareMemory()
    spare.trim_to([((8, 8), torch.bfloat16)])
    stored = torch.randn(8, 8).bfloat16()
    weight, x = StoredWeight.keep(stored, torch.float32), torch.randn(3, 8, requires_grad=True)
    expected = torch.ones(3, 8) @ stored.float()
    output = torch.nn.functional.linear(x, weight)
    spare.keep(weight)
    del weight, stored
    spare.empty((8, 8), torch.bfloat16, CPU).fill_(0)
    output.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, expected)


def test_autograd_keeps_what_it_will_read() -> None:
    spare = spare_of((8, 8))
    weight, x = torch.randn(8, 8), torch.randn(3, 8, requires_grad=True)
    expected = torch.ones(3, 8) @ weight
    output = torch.nn.functional.linear(x, weight)
    spare.keep(weight)
    del weight
    spare.empty((8, 8), torch.float32, CPU).fill_(0)
    output.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, expected)


def test_what_nobody_will_take_is_freed_and_small_blocks_are_not_kept() -> None:
    spare = spare_of((32,), (48,), (2,))
    kept = [torch.zeros(32), torch.zeros(32), torch.zeros(48), torch.zeros(2), torch.zeros(40)]
    places = [StorageWeakRef(tensor.untyped_storage()) for tensor in kept]
    for tensor in kept:
        spare.keep(tensor)
    del kept, tensor
    # the third is below the smallest size, the last of a size that was not read
    assert [place.expired() for place in places] == [False, False, False, True, True]
    spare.trim_to([((32,), torch.float32), ((1000,), torch.float32)])
    assert sorted(place.expired() for place in places[:2]) == [False, True]
    assert places[2].expired()
    spare.clear()
    assert all(place.expired() for place in places)


def test_a_torch_that_cannot_tell_who_looks_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_memory, "_use_count", None)
    spare = spare_of((6, 8))
    value = torch.zeros(6, 8)
    place = StorageWeakRef(value.untyped_storage())
    spare.keep(value)
    del value
    assert place.expired()
    assert spare.empty((6, 8), torch.float32, CPU).shape == (6, 8)


def test_threads_may_add_take_and_free_at_the_same_time() -> None:
    spare = spare_of((32,), (48,))
    stop = threading.Event()

    def free() -> None:
        while not stop.is_set():
            spare.clear()

    thread = threading.Thread(target=free)
    thread.start()
    try:
        for _ in range(300):
            spare.keep(torch.zeros(32))
            spare.keep(torch.zeros(48))
            spare.trim_to([((32,), torch.float32), ((48,), torch.float32)])
            spare.empty((48,), torch.float32, CPU)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("keep_stored", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_block_read_into_the_memory_of_another_is_that_block(family: str, keep_stored: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    fresh, checkpoint = opened(tmp_path), opened(tmp_path)
    prefix = {"gpt2": "transformer.h."}.get(family, "model.layers.")
    fresh.load([prefix + "1"], keep_stored=keep_stored)
    checkpoint.load([prefix + "0"], keep_stored=keep_stored)
    before = {a_place(value) for value in checkpoint._model.get_submodule(prefix + "0").parameters()}
    checkpoint.release([prefix + "0"], spare=True)
    checkpoint.load([prefix + "1"], keep_stored=keep_stored)
    ours = dict(checkpoint._model.get_submodule(prefix + "1").named_parameters())
    for name, value in fresh._model.get_submodule(prefix + "1").named_parameters():
        assert torch.equal(ours[name], value), name
    assert before & {a_place(value) for value in ours.values()}


def test_a_weight_that_somebody_holds_is_not_overwritten(tmp_path: Path) -> None:
    checkpoint = opened(write_checkpoint(tmp_path, "llama"))
    checkpoint.load(["model.layers.0"])
    held, second = (checkpoint._model.get_submodule(f"model.layers.{index}.mlp.up_proj") for index in (0, 1))
    weight = held.weight
    checkpoint.release(["model.layers.0"], spare=True)
    checkpoint.load(["model.layers.1"])
    assert torch.equal(weight, stored(tmp_path)["model.layers.0.mlp.up_proj.weight"])
    assert a_place(second.weight) != a_place(weight)


def test_a_read_of_other_weights_frees_what_it_does_not_take(tmp_path: Path) -> None:
    checkpoint = opened(write_checkpoint(tmp_path, "llama"))
    checkpoint.load(["model.layers.0"])
    checkpoint.release(["model.layers.0"], spare=True)
    assert kept_by(checkpoint) > 5
    checkpoint.load(["lm_head"])
    assert kept_by(checkpoint) == 0


def test_fused_experts_are_not_made_beside_kept_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While they are fused there are up to three of each weight."""
    checkpoint = opened(write_checkpoint(tmp_path, "qwen3_moe"))
    checkpoint.load(["model.layers.0"])
    following = checkpoint.read(["model.layers.1"])
    checkpoint.release(["model.layers.0"], spare=True)
    attention = [name for name, _ in checkpoint._model.named_parameters() if ".0.self_attn" in name and "proj" in name]
    assert kept_by(checkpoint) <= len(attention) + 3  # norms, but no experts: no read asks for their size
    convert, kept = Checkpoint._convert, []

    def watched(self: Checkpoint, tensors: Any) -> None:
        kept.append(kept_by(self))
        convert(self, tensors)

    monkeypatch.setattr(Checkpoint, "_convert", watched)
    checkpoint.place(following)
    assert kept == [0]


def with_spare(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Makes every plan say so much of the memory that stays beside a solution."""
    plan = Prepared.plan
    monkeypatch.setattr(
        Prepared, "plan", lambda self, **options: dataclasses.replace(plan(self, **options), spare_bytes=num_bytes)
    )


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_run_takes_it_and_has_the_same_bits(prefetch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, empty, keep = Sweep.__init__, SpareMemory.empty, SpareMemory.keep
    kept: set[int] = set()
    taken: list[int] = []
    checkpoints: list[Checkpoint] = []

    def with_prefetch(self: Sweep, stack: Any, checkpoint: Checkpoint, *args: Any, **options: Any) -> None:
        checkpoints.append(checkpoint)
        made(self, stack, checkpoint, *args, **(options | {"prefetch": prefetch}))

    def noting(self: SpareMemory, tensor: torch.Tensor) -> None:
        kept.add(a_place(tensor))
        keep(self, tensor)

    def counted(self: SpareMemory, shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        before = {storage.data_ptr() for storages in self._storages.values() for storage in storages}
        value = empty(self, shape, dtype, device)
        taken.append(a_place(value) in before & kept)
        return value

    with_spare(monkeypatch, 1)
    monkeypatch.setattr(Sweep, "__init__", with_prefetch)
    monkeypatch.setattr(SpareMemory, "empty", counted)
    monkeypatch.setattr(SpareMemory, "keep", noting)
    options = golden_options(tmp_path / "with")
    streamda.initialize(**options)
    matrices = sum(value.ndim > 1 for name, value in stored(Path(options["model"])).items() if ".layers.0." in name)
    # on the way up and down every block but the first of each; one more each where the next is there already
    blocks = len(checkpoints[0]._model.model.layers)
    assert sum(taken) >= 2 * matrices * (blocks - (2 if prefetch else 1))
    assert kept_by(checkpoints[0]) == 0
    monkeypatch.setattr(SpareMemory, "keep", lambda self, tensor: None)
    streamda.initialize(**golden_options(tmp_path / "without"))
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


@pytest.mark.parametrize("planned", [False, True])
def test_it_stays_beside_a_solution_only_where_that_is_planned(
    planned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve, release = Solver.solve, Checkpoint.release
    checkpoints: list[Checkpoint] = []
    seen = []

    def noting(self: Checkpoint, names: Any, **options: Any) -> None:
        checkpoints.append(self)
        release(self, names, **options)

    def watched(self: Solver, *args: Any) -> None:
        seen.append(kept_by(checkpoints[-1]) > 0)
        solve(self, *args)

    with_spare(monkeypatch, int(planned))
    monkeypatch.setattr(Checkpoint, "release", noting)
    monkeypatch.setattr(Solver, "solve", watched)
    streamda.initialize(**golden_options(tmp_path))
    assert len(seen) > 1
    assert any(seen) == planned
