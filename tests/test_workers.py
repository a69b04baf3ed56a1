"""Workers compute on one core each, and nobody else's threads change for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from streamda.workers import one_core_workers

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


def test_each_worker_has_one_core_and_all_others_what_they_had() -> None:
    with one_core_workers(3, "few") as workers:
        together = threading.Barrier(3)

        def meet() -> tuple[str, int]:
            together.wait(timeout=30)  # so that each of the three answers once
            return threading.current_thread().name, torch.get_num_threads()

        answers = [future.result() for future in [workers.submit(meet) for _ in range(3)]]
        assert {name for name, _ in answers} == {"few_0", "few_1", "few_2"}
        assert [count for _, count in answers] == [1, 1, 1]
        assert torch.get_num_threads() == 2
        assert in_new_thread(torch.get_num_threads) == 2
        # a worker keeps to it, also once it has computed and the default was asked for elsewhere
        assert workers.submit(lambda: float(torch.rand(1 << 20).exp().sum())).result() > 0
        assert workers.submit(torch.get_num_threads).result() == 1


def test_a_worker_starts_no_team() -> None:
    def kernel_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    torch.rand(1 << 20).exp()  # the team of this thread
    with one_core_workers(1, "alone") as workers:
        before = kernel_threads()
        workers.submit(lambda: torch.rand(1 << 20).exp().sum()).result()
        assert kernel_threads() == before


def test_an_interrupt_at_the_start_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(threading.Barrier):
        def wait(self, timeout: float | None = None) -> int:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(threading, "Barrier", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        one_core_workers(2, "streamda-interrupted")
    assert not [each for each in threading.enumerate() if each.name.startswith("streamda-interrupted")]
    assert torch.get_num_threads() == 2
