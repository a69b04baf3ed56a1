"""Reading ahead and keeping weights in their stored dtype change no bit, read nothing twice, and leave no thread.

Whole runs, small enough that the planner is told what to choose. Not covered: that it is faster; CUDA's streams.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import streamda
from streamda import plan as plan_module
from streamda import setup
from streamda.checkpoint import Checkpoint
from streamda.errors import ModelError
from streamda.file_reader import FileReader
from streamda.memory import MemoryBudget
from streamda.plan import Plan
from streamda.prefetch import Prefetcher
from streamda.skeleton import build_skeleton, load_config
from streamda.timeline import Timeline
from tests.models import make_samples, write_checkpoint, write_samples

CPU = torch.device("cpu")
BLOCKS = ["model.layers.0", "model.layers.1"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama", dtype=torch.bfloat16)


def opened(folder: Path) -> Checkpoint:
    return Checkpoint(folder, build_skeleton(load_config(folder, False), torch.float32), CPU)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streamda-prefetch")]


def collected(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, **choice: bool) -> tuple[dict[str, Any], Any]:
    """Statistics and report of a run whose plan is changed."""
    data = write_samples(folder / "samples.jsonl", make_samples())

    def changed(*args: Any, **kwargs: Any) -> Plan:
        return dataclasses.replace(plan_module.make_plan(*args, **kwargs), **choice)

    monkeypatch.setattr(setup, "make_plan", changed)
    where = folder / "-".join(str(value) for value in choice.values())
    options: dict[str, Any] = {
        "model": str(model),
        "dataset": str(data),
        "device": "cpu",
        "target_modules": "all-linear",
    }
    report = streamda.collect(statistics=str(where), max_gpu_mem="900MB", micro_batch_tokens="40", **options)
    monkeypatch.undo()
    with streamda.open_statistics(where) as statistics:
        return dict(statistics), report


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "qwen3_moe"])
def test_runs_are_the_same_to_the_bit_and_read_as_much(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16, num_hidden_layers=3)
    expected, plain = collected(tmp_path, model, monkeypatch, keep_stored=False, prefetch=False)
    assert len(expected) >= 6
    for keep_stored, prefetch in ((True, False), (False, True), (True, True)):
        actual, report = collected(tmp_path, model, monkeypatch, keep_stored=keep_stored, prefetch=prefetch)
        assert report.plan["keep_stored"] is keep_stored
        assert report.plan["prefetch"] is prefetch
        assert report.bytes["weights_read"] == plain.bytes["weights_read"] <= 2.01 * plain.bytes["checkpoint"]
        assert report.loss == plain.loss
        assert set(actual) == set(expected)
        for name, layer in expected.items():
            for kind in ("gradient", "input_moment", "output_moment"):
                assert torch.equal(getattr(actual[name], kind), getattr(layer, kind)), (name, kind)
            assert actual[name].weight_norm == layer.weight_norm
        assert threads() == []


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_run_of_what_memory_cannot_hold_reads_past_the_cache_with_the_same_bits(
    prefetch: bool, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, opened_directly = FileReader.__init__, []

    def noted(self: FileReader, path: Any, *, direct: bool = False) -> None:
        opened_directly.append(direct)
        make(self, path, direct=direct)

    results = []
    for name, available in (("held", 1 << 60), ("not-held", 900_000_000)):
        monkeypatch.setattr(FileReader, "__init__", noted)
        monkeypatch.setattr(setup, "memory_of_machine", lambda _, available=available: available)
        monkeypatch.setattr(setup, "memory_limit", lambda: None)
        (tmp_path / name).mkdir()
        results.append(collected(tmp_path / name, llama, monkeypatch, keep_stored=False, prefetch=prefetch))
        assert any(opened_directly) == (name == "not-held")
    (expected, plain), (actual, report) = results
    assert report.bytes["weights_read"] == plain.bytes["weights_read"]
    for module, layer in expected.items():
        for kind in ("gradient", "input_moment", "output_moment"):
            assert torch.equal(getattr(actual[module], kind), getattr(layer, kind)), (module, kind)


@pytest.mark.parametrize(
    ("available", "limit", "device", "expected"),
    [
        (20, None, "cpu", 8),  # the host's part is one of the device's
        (20, 15, "cpu", 3),
        (20, 30, "cuda", 12),
        (5, 30, "cpu", 0),
        (0, None, "cpu", 0),
        (None, None, "cpu", sys.maxsize),
    ],
)
def test_the_page_cache_has_what_the_run_leaves(
    available: int | None, limit: int | None, device: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "memory_of_machine", lambda _: available)
    monkeypatch.setattr(setup, "memory_limit", lambda: limit)
    assert setup._page_cache_bytes(MemoryBudget(12, 8, None), torch.device(device)) == expected


def test_what_is_announced_is_read_by_the_thread_and_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, plain, readers = opened(llama), opened(llama), []
    read = Checkpoint.read

    def noted(self: Checkpoint, *args: Any, **kwargs: Any) -> Any:
        readers.append(threading.current_thread().name)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "read", noted)
    timeline = Timeline()
    with closing(Prefetcher(checkpoint, timeline, in_memory=True)) as ahead:
        ahead.take(BLOCKS[:1])
        ahead.start(BLOCKS[1:])
        ahead.take(BLOCKS[1:])
    assert [name.startswith("streamda-prefetch") for name in readers] == [False, True]
    assert [span.lane for span in timeline.spans()] == ["prefetch"]
    plain.load(BLOCKS)
    assert checkpoint.bytes_read == plain.bytes_read
    for name, value in plain._model.get_submodule(BLOCKS[1]).named_parameters():
        assert torch.equal(checkpoint._model.get_submodule(BLOCKS[1]).get_parameter(name), value)


def test_what_was_not_announced_is_read_all_the_same(llama: Path) -> None:
    checkpoint = opened(llama)
    with closing(Prefetcher(checkpoint, Timeline(), in_memory=True)) as ahead:
        ahead.start(BLOCKS[1:])
        ahead.take(BLOCKS[:1])
    model = checkpoint._model
    assert not any(weight.is_meta for weight in model.get_submodule(BLOCKS[0]).parameters())
    assert all(weight.is_meta for weight in model.get_submodule(BLOCKS[1]).parameters())


def test_without_room_the_system_is_asked_in_ranges_that_it_reads_whole(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("os.posix_fadvise", lambda _fd, offset, length, _advice: asked.append((offset, length)))
    monkeypatch.setattr("streamda.read_ahead.WINDOW_BYTES", 1000)
    checkpoint = opened(llama)
    with closing(Prefetcher(checkpoint, Timeline(), in_memory=False)) as ahead:
        ahead.start(BLOCKS[1:])
        ahead._executor.submit(int).result(timeout=10)  # behind the hint
        assert checkpoint.bytes_read == 0
        ahead.take(BLOCKS[1:])
    assert sum(length for _, length in asked) == checkpoint.bytes_read > 0
    assert max(length for _, length in asked) == 1000
    assert len({offset for offset, _ in asked}) == len(asked)
    assert threads() == []


def test_a_file_system_that_takes_no_hints_is_no_error(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refused(*arguments: int) -> None:
        asked.append(arguments[1])
        raise OSError("not here")

    monkeypatch.setattr("os.posix_fadvise", refused)
    checkpoint = opened(llama)
    checkpoint.announce(BLOCKS, threading.Event())
    assert len(asked) > len(BLOCKS)


def test_the_system_is_not_asked_for_what_is_read_past_its_cache(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("os.posix_fadvise", lambda *arguments: asked.append(arguments[1]))
    skeleton = build_skeleton(load_config(llama, False), torch.float32)
    Checkpoint(llama, skeleton, CPU, cache_bytes=0).announce(BLOCKS, threading.Event())
    assert asked == []


@pytest.mark.parametrize("ends", ["close", "another hint"])
def test_a_hint_that_nobody_waits_for_any_more_ends(llama: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    begun, go_on, asked = threading.Event(), threading.Event(), []

    def slow(_fd: int, offset: int, _length: int, _advice: int) -> None:
        asked.append(offset)
        begun.set()
        assert go_on.wait(10)

    monkeypatch.setattr("os.posix_fadvise", slow)
    monkeypatch.setattr("streamda.read_ahead.WINDOW_BYTES", 100)
    ahead = Prefetcher(opened(llama), Timeline(), in_memory=False)
    ahead.start(BLOCKS)
    assert begun.wait(10)
    if ends == "another hint":
        ahead.start(())
        go_on.set()
        ahead.close()
    else:
        closer = threading.Thread(target=ahead.close)
        closer.start()
        while not ahead._hint_dropped.is_set():
            time.sleep(0.001)
        go_on.set()
        closer.join(10)
    # of each tensor at most its first range: the loop over tensors ends with the next one's
    assert len(asked) == 1
    assert threads() == []


def test_an_error_of_the_thread_comes_out_where_the_weights_are_wanted(tmp_path: Path) -> None:
    checkpoint = opened(write_checkpoint(tmp_path, "llama"))
    for shard in checkpoint.shards:
        shard.write_bytes(shard.read_bytes()[:-200])
    with closing(Prefetcher(checkpoint, Timeline(), in_memory=True)) as ahead:
        ahead.start(BLOCKS)
        with pytest.raises(ModelError, match="cannot be read: it ends"):
            ahead.take(BLOCKS)
    assert threads() == []


def test_an_error_of_weights_that_nobody_wants_is_none(tmp_path: Path) -> None:
    checkpoint = opened(write_checkpoint(tmp_path, "llama"))
    for shard in checkpoint.shards:
        shard.write_bytes(b"")
    with closing(Prefetcher(checkpoint, Timeline(), in_memory=True)) as ahead:
        ahead.start(BLOCKS)
    assert threads() == []


def test_a_run_that_fails_leaves_no_thread(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def failing(*_args: Any, **_kwargs: Any) -> None:
        seen.extend(threads())
        raise ModelError("stopped here")

    monkeypatch.setattr("streamda.sweep.PanelCollector.bad_layers", failing)
    with pytest.raises(ModelError, match="stopped here"):
        collected(tmp_path, llama, monkeypatch, keep_stored=False, prefetch=True)
    assert seen
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == []
