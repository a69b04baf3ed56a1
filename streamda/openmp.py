"""How long PyTorch's threads on a CPU spin for each other before they sleep.

At the end of each parallel region a thread of GNU's OpenMP spins for some milliseconds in case there is more to do.
Where other programs want the cores, too, it spins in the place of the very thread that it waits for, at each of the
many small products of a solution: a run of 15 seconds had not ended after 150 beside two busy processes.
"""

import os

SWITCHES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPINS = "1000"
"""Rounds before a thread sleeps; of libgomp's own numbers the one for more threads than cores. With no round at all
each region waits for the kernel to wake a thread, and a solution takes twice as long on an idle machine."""


def spin_briefly() -> None:
    """Has threads sleep soon, unless the user has decided.

    libgomp looks at its switches when PyTorch is imported; later, this does nothing.
    """
    if not any(switch in os.environ for switch in SWITCHES):
        os.environ["GOMP_SPINCOUNT"] = SPINS
