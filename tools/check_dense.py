"""Holds every layer of an adapter against a dense float64 solution of the same statistics.

    python -m tools.check_dense STATISTICS_DIR ADAPTER_DIR        from the repository's root

STATISTICS_DIR is what `collect` wrote, or the work directory of `init --keep-statistics`; ADAPTER_DIR an adapter solved
from it with default settings of the method but for its rank. Prints the worst relative Frobenius errors of B A. Takes
minutes: the dense solution inverts and diagonalizes a matrix of the input's width for every layer.
"""

import json
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

import streamda
from tests.oracles import dense_lora_da


def main(statistics_dir: Path, adapter_dir: Path) -> None:
    """Prints the worst five layers, the median, and how many there are."""
    started = time.monotonic()
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    report = json.loads((adapter_dir / "streamda_report.json").read_text(encoding="utf-8"))
    errors = []
    with streamda.open_statistics(statistics_dir) as statistics:
        for name in statistics:
            layer = statistics[name]
            dense = dense_lora_da(
                layer.gradient,
                layer.input_moment,
                layer.output_moment,
                rank=report["config"]["solve"]["rank"],
                population_size=report["data"]["population_size"],
            )
            expected = dense.product
            key = f"base_model.model.{name}.lora_"
            product = tensors[key + "B.weight"].double() @ tensors[key + "A.weight"].double()
            errors.append((float((product - expected).norm() / expected.norm()), name))
    errors.sort(reverse=True)
    for error, name in errors[:5]:
        print(f"{error:.2e}  {name}")
    print(
        f"{errors[len(errors) // 2][0]:.2e}  median of {len(errors)} layers; {time.monotonic() - started:.0f} seconds"
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
