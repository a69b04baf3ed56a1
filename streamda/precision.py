"""Float32 products in full, whatever the program around a run has allowed PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the block float32 matrices are multiplied in float32.

    Programs that train allow less, for good: TF32 on a GPU, bfloat16 on some CPUs. Convolutions are left as they are.
    """
    with ExitStack() as undo:
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:  # asked for by PyTorch's newer interface, which has one setting for each kind of device
            backends: Any = torch.backends
            for device in (backends.cuda.matmul, backends.mkldnn.matmul):
                undo.callback(setattr, device, "fp32_precision", device.fp32_precision)
                device.fp32_precision = "ieee"
        else:
            if before != "highest":
                undo.callback(torch.set_float32_matmul_precision, before)
                torch.set_float32_matmul_precision("highest")
        yield
