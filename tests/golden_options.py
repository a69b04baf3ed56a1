"""Options that run the golden model of tests/golden, and what compares the adapters that come out."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.conftest import GOLDEN


def golden_options(folder: Path, **options: Any) -> dict[str, Any]:
    """Keyword arguments of `streamda.initialize` with the output under `folder`."""
    defaults = {
        "model": str(GOLDEN / "model"),
        "dataset": str(GOLDEN / "calibration.jsonl"),
        "output_dir": str(folder / "adapter"),
        "max_gpu_mem": "400MB",
        # most tests are about what lies on disk; tests/test_held_statistics.py is about the other way
        "spill_statistics": True,
    }
    return defaults | options


def products(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B A in float64 by module, from PEFT's names or the golden files'."""
    modules = [key.removesuffix(".lora_A.weight") for key in adapter if key.endswith(".lora_A.weight")]
    return {
        module.removeprefix("base_model.model."): adapter[f"{module}.lora_B.weight"].double()
        @ adapter[f"{module}.lora_A.weight"].double()
        for module in modules
    }


def worst_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative Frobenius error over all modules, which must be the same ones."""
    assert set(found) == set(expected)
    assert len(expected) == 3 * 7
    return max(float((found[module] - expected[module]).norm() / expected[module].norm()) for module in expected)


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")
