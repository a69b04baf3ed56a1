"""A thread that computes beside the main one, on one core.

OpenMP gives a team of threads to every thread that computes. Once all teams together count more threads than the
machine has cores, libgomp stops spinning at the end of a parallel region and lets the kernel wake its threads, and
every small product of the main thread pays for it: casting the next block's weights in a thread beside it made the
solution of a 135M model take half as long again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def settle_threads() -> None:
    """Sets torch's number of threads to what it is.

    Setting it, to whatever number, forbids MKL to use fewer, for the rest of the process. `one_core_worker` must set
    it, and a run without one is to compute with the same bits.
    """
    torch.set_num_threads(torch.get_num_threads())


def one_core_worker(name: str) -> ThreadPoolExecutor:
    """A thread that computes on one core; all others compute with as many as before.

    Another thread that begins in the same moment may take over the one core as its own default.

    Args:
        name: prefix of its name.
    """
    default = torch.get_num_threads()
    worker = ThreadPoolExecutor(1, name, _compute_alone)
    try:
        worker.submit(int).result()  # until then it has not begun
    except BaseException:
        worker.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        torch.set_num_threads(default)
    return worker


def _compute_alone() -> None:
    torch.get_num_threads()  # a thread takes the default over when it first asks, which must not be later
    torch.set_num_threads(1)  # of this thread, and the default of later ones: the caller puts that back
