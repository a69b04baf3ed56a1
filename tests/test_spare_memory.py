"""Memory of weights that were let go becomes that of the next ones, never while anybody still looks at it.

Not covered: what it saves; that is for a machine and a model of some size (docs/performance.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import streamda
from streamda import spare_memory
from streamda.checkpoint import Checkpoint
from streamda.skeleton import build_skeleton, load_config
from streamda.spare_memory import SpareMemory
from streamda.sweep import Sweep
from tests.golden_options import golden_options
from tests.killed import weights
from tests.models import write_checkpoint
from tests.test_checkpoint import stored

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_blocks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare_memory, "LARGE_BLOCK_BYTES", 64)


def a_place(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def test_memory_is_taken_by_whatever_has_its_size_once() -> None:
    spare = SpareMemory()
    gone = torch.zeros(6, 8)
    place = a_place(gone)
    spare.keep(gone)
    del gone
    taken = spare.empty((12, 8), torch.bfloat16, CPU)
    assert (a_place(taken), taken.shape, taken.dtype, taken.is_contiguous()) == (place, (12, 8), torch.bfloat16, True)
    assert a_place(spare.empty((6, 8), torch.float32, CPU)) != place


@pytest.mark.parametrize("holds", [lambda tensor: tensor, lambda tensor: tensor[1:].T])
def test_memory_that_is_still_looked_at_is_left_alone(holds: Any) -> None:
    spare = SpareMemory()
    value = torch.arange(48.0)
    seen = holds(value.view(6, 8))
    before = seen.clone()
    spare.keep(value)
    del value
    spare.empty((6, 8), torch.float32, CPU).fill_(-1)
    assert torch.equal(seen, before)


def test_autograd_keeps_what_it_will_read() -> None:
    spare = SpareMemory()
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
    spare = SpareMemory()
    kept = [torch.zeros(32), torch.zeros(32), torch.zeros(48), torch.zeros(2)]
    places = [StorageWeakRef(tensor.untyped_storage()) for tensor in kept]
    for tensor in kept:
        spare.keep(tensor)
    del kept, tensor
    assert [place.expired() for place in places] == [False, False, False, True]
    spare.hold_for([128, 64, 1000])
    assert sorted(place.expired() for place in places[:2]) == [False, True]
    assert places[2].expired()
    spare.clear()
    assert all(place.expired() for place in places)


@pytest.mark.parametrize("keep_stored", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_block_read_into_the_memory_of_another_is_that_block(family: str, keep_stored: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family, dtype=torch.bfloat16)
    fresh = Checkpoint(tmp_path, build_skeleton(load_config(tmp_path, False), torch.float32), CPU)
    checkpoint = Checkpoint(tmp_path, build_skeleton(load_config(tmp_path, False), torch.float32), CPU)
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


def test_a_weight_that_two_blocks_share_is_not_overwritten(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    checkpoint = Checkpoint(tmp_path, build_skeleton(load_config(tmp_path, False), torch.float32), CPU)
    checkpoint.load(["model.layers.0"])
    first, second = (checkpoint._model.get_submodule(f"model.layers.{index}.mlp.up_proj") for index in (0, 1))
    shared = first.weight
    checkpoint.release(["model.layers.0"], spare=True)
    checkpoint.load(["model.layers.1"])
    assert torch.equal(shared, stored(tmp_path)["model.layers.0.mlp.up_proj.weight"])
    assert a_place(second.weight) != a_place(shared)


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_run_takes_it_and_has_the_same_bits(prefetch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Sweep.__init__

    def with_prefetch(self: Sweep, *args: Any, **options: Any) -> None:
        made(self, *args, **(options | {"prefetch": prefetch}))

    monkeypatch.setattr(Sweep, "__init__", with_prefetch)
    taken = []
    empty = SpareMemory.empty

    def counted(self: SpareMemory, shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        before = sum(map(len, self._storages.values()))
        value = empty(self, shape, dtype, device)
        taken.append(before - sum(map(len, self._storages.values())))
        return value

    monkeypatch.setattr(SpareMemory, "empty", counted)
    streamda.initialize(**golden_options(tmp_path / "with"))
    assert sum(taken) > 10
    monkeypatch.setattr(SpareMemory, "keep", lambda self, tensor: None)
    streamda.initialize(**golden_options(tmp_path / "without"))
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
