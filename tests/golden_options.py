"""Options that run the golden model of tests/golden, as tests that only need some small real run use it."""

from pathlib import Path
from typing import Any

from tests.conftest import GOLDEN


def golden_options(folder: Path, **options: Any) -> dict[str, Any]:
    """Keyword arguments of `streamda.initialize` with the output under `folder`."""
    defaults = {
        "model": str(GOLDEN / "model"),
        "dataset": str(GOLDEN / "calibration.jsonl"),
        "output_dir": str(folder / "adapter"),
        "max_gpu_mem": "400MB",
    }
    return defaults | options
