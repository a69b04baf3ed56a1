"""Threads that compute beside the main one, each on one core.

OpenMP gives a team of threads to every thread that computes. Once all teams together count more threads than the
machine has cores, libgomp stops spinning at the end of a parallel region and lets the kernel wake its threads, and
every small product of the main thread pays for it: casting the next block's weights in a thread beside it made the
initialization of a 135M model a quarter slower.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def one_core_workers(count: int, name: str) -> ThreadPoolExecutor:
    """Threads that have all begun and compute on one core each; the threads of others compute as before.

    Args:
        count: of threads.
        name: prefix of their names.
    """
    default = torch.get_num_threads()
    begun = threading.Barrier(count + 1)
    workers = ThreadPoolExecutor(count, name, _compute_alone)
    try:
        for _ in range(count):
            workers.submit(begun.wait)  # a thread that waits is not idle, so that each call begins another one
        begun.wait()
    except BaseException:
        begun.abort()
        workers.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(default)
    return workers


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread takes the default over when it first asks, which must not be later
    torch.set_num_threads(1)  # of this thread, and the default of later ones: the caller puts that back
