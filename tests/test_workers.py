"""The worker computes on one core, and nobody else's threads change for it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

import streamda
from streamda import workers
from streamda.workers import one_core_worker
from tests.models import run_options, write_inputs

T = TypeVar("T")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_new_thread(function: Callable[[], T]) -> T:
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_it_has_one_core_and_all_others_what_they_had() -> None:
    with one_core_worker("alone") as worker:
        assert worker.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        assert in_new_thread(torch.get_num_threads) == 2
        # it keeps to it, also once it has computed and the default was asked for elsewhere
        assert worker.submit(lambda: float(torch.rand(1 << 20).exp().sum())).result() > 0
        assert worker.submit(torch.get_num_threads).result() == 1


def test_it_starts_no_team() -> None:
    def kernel_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    torch.rand(1 << 20).exp()  # the team of this thread
    with one_core_worker("alone") as worker:
        before = kernel_threads()
        worker.submit(lambda: torch.rand(1 << 20).exp().sum()).result()
        assert kernel_threads() == before


def test_one_that_cannot_begin_is_an_error_and_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no thread today")

    monkeypatch.setattr(workers, "_compute_alone", fail)
    with pytest.raises(BrokenExecutor):
        one_core_worker("streamda-broken")
    assert not [each for each in threading.enumerate() if each.name.startswith("streamda-broken")]
    assert torch.get_num_threads() == 2


def test_a_run_with_it_and_a_solution_without_it_have_the_same_bits(tmp_path: Path) -> None:
    options = run_options(write_inputs(tmp_path), device="cpu", max_gpu_mem="4GB")
    streamda.initialize(**options, output_dir=str(tmp_path / "a"), keep_statistics=True, quiet=True)
    again = [sys.executable, "-m", "streamda", "solve", "--statistics", str(tmp_path / "a.work"), "--quiet"]
    again += ["--output-dir", str(tmp_path / "b")]
    subprocess.run(again, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"}, stdout=subprocess.DEVNULL)
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


class TestTakenAhead:
    def test_each_item_is_made_while_the_one_before_is_in_use_and_no_more_of_them(self) -> None:
        made = threading.Semaphore(0)
        count: list[int] = []

        def items() -> Iterator[int]:
            for number in range(5):
                count.append(number)
                made.release()
                yield number

        taken = []
        for number in workers.taken_ahead(items(), "ahead"):
            taken.append(number)
            for _ in range(2 if number == 0 else 1 if number < 4 else 0):
                assert made.acquire(timeout=10)  # the next one is being made though nobody has asked for it
            assert len(count) == min(5, number + 2)
        assert taken == list(range(5))

    def test_an_error_comes_where_its_item_would_have_and_the_thread_ends(self) -> None:
        def items() -> Iterator[int]:
            yield 1
            yield 2
            raise OSError("no third")

        before = threading.active_count()
        stream = workers.taken_ahead(items(), "ahead")
        assert [next(stream), next(stream)] == [1, 2]
        with pytest.raises(OSError, match="no third"):
            next(stream)
        assert threading.active_count() == before

    def test_the_thread_ends_when_the_rest_is_not_wanted(self) -> None:
        before = threading.active_count()
        stream = workers.taken_ahead(iter(range(10)), "ahead")
        assert next(stream) == 0
        assert threading.active_count() == before + 1
        del stream
        assert threading.active_count() == before

    def test_nothing_is_kept_of_an_item_that_was_taken(self) -> None:
        class Item:
            pass

        stream = workers.taken_ahead((Item() for _ in range(3)), "ahead")
        seen = weakref.ref(next(stream))
        next(stream)  # by now the thread is done with the first one
        assert seen() is None


def do_all(things: Iterable[Callable[[], object]]) -> None:
    with workers.DoneBehind("behind") as behind:
        for thing in things:
            behind.do(thing)


class TestDoneBehind:
    def test_things_are_done_in_order_and_all_of_them_when_the_block_is_left(self) -> None:
        done: list[int] = []
        with workers.DoneBehind("behind") as behind:
            for number in range(20):
                behind.do(functools.partial(done.append, number))
        assert done == list(range(20))

    def test_one_thing_at_most_is_unfinished(self) -> None:
        begun, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            begun.set()
            assert go_on.wait(timeout=10)

        done: list[str] = []
        with workers.DoneBehind("behind") as behind:
            behind.do(wait)  # this one returns though it is not done
            assert begun.wait(timeout=10)
            threading.Timer(0.2, go_on.set).start()
            behind.do(functools.partial(done.append, "next"))
            assert go_on.is_set()
        assert done == ["next"]

    def test_an_error_meets_whoever_does_the_next_thing_or_leaves(self) -> None:
        def fail() -> None:
            raise OSError("disk full")

        before = threading.active_count()
        done: list[str] = []
        for things in ([fail, functools.partial(done.append, "never")], [fail]):
            with pytest.raises(OSError, match="disk full"):
                do_all(things)
        assert done == []
        assert threading.active_count() == before

    def test_an_error_of_the_block_itself_comes_first(self) -> None:
        def fail() -> None:
            raise OSError("disk full")

        def give_up() -> Iterator[Callable[[], None]]:
            yield fail
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            do_all(give_up())
