"""The worker computes on one core, and nobody else's threads change for it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
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
