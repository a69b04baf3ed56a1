"""Large tensors on huge pages, where the system gives them to those who ask.

A run makes and frees gigabytes of tensors for every block; on pages of 4 kB a tenth of a CPU run is page faults.
"""

import os
from contextlib import suppress
from pathlib import Path

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""What the kernel does; the word in brackets counts."""
SWITCH = "THP_MEM_ALLOC_ENABLE"
"""PyTorch's own: tensors of 2 MB and more are then advised to lie on huge pages."""


def request() -> None:
    """Has PyTorch ask for huge pages, unless the user has decided.

    It looks at its switch when this process makes its first tensor; later, this does nothing.
    """
    with suppress(OSError):  # a system without huge pages
        if "[madvise]" in SETTING.read_text(encoding="ascii", errors="replace"):
            os.environ.setdefault(SWITCH, "1")
