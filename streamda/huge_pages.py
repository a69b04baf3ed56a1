"""Large tensors on huge pages, where the system gives them to those who ask (``transparent_hugepage`` is ``madvise``).

A run makes and frees gigabytes of tensors for every block. In pages of 4 kB a tenth of a CPU run is page faults.
"""

import os

SWITCH = "THP_MEM_ALLOC_ENABLE"
"""PyTorch's own: tensors of 2 MB and more are then advised to lie on huge pages."""


def request() -> None:
    """Has PyTorch ask for huge pages, unless the user has decided.

    It looks at its switch when this process makes its first tensor; later, this does nothing.
    """
    os.environ.setdefault(SWITCH, "1")
