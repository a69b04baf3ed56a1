"""Float32 products in full, whatever the program around a run has allowed PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the block float32 matrices are multiplied in float32.

    Programs that train allow less, for good: TF32 on a GPU, bfloat16 on some CPUs. Convolutions are left as they are.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # asked for by PyTorch's newer interface, which has one setting for each kind of device
        backends: Any = torch.backends
        devices = backends.cuda.matmul, backends.mkldnn.matmul
        settings = [device.fp32_precision for device in devices]
        for device in devices:
            device.fp32_precision = "ieee"
        try:
            yield
        finally:
            for device, setting in zip(devices, settings, strict=True):
                device.fp32_precision = setting
        return
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
