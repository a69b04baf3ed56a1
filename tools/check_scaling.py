"""Flat in memory, linear in time: whole runs over layers and over samples, each in a process of its own.

    python -m tools.check_scaling [--layers 4 8 16 32] [--samples 8 32 128 256] [--tokens 256]
                                  [--work-dir .cache/check-scaling] [--json FILE]

One small model of as many blocks as asked for; boundary states go to disk, the micro-batch size is fixed, so that
nothing grows with the run but the run; even the fewest samples have 1.5 times as many tokens as a layer has inputs, so
all runs keep sums. Layers vary at the first of the sample counts, samples at the first of the layer counts. Float32 on
the CPU. The peak is the run's own: anonymous memory above the baseline, sampled every 10 ms. Time is the report's,
from the first look at the model to the last solved block; imports and the writing of the adapter are not in it.

Prints the runs, how far the peaks lie apart, and the straight line through the times with the largest distance from it.
Exits with 1 where the peaks of a series lie more than 3 % apart.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamda.memory import format_size
from streamda.report import table
from tools.check_plan import SHARD_BYTES, run
from tools.make_checkpoint import LLAMA_2, make, write_samples

SHAPE = {
    "hidden_size": 1344,
    "intermediate_size": 1344,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 8000,
}
BUDGET = "301MB"
"""The plan is 300 MB. With more, what the C heap keeps of freed memory (`streamda.heap.reuse_heap`) grows by some
megabytes over the first blocks."""
HOST_BYTES = "1MB"
"""Boundary states beyond it lie on disk, whatever their number."""
SAMPLES_AT_A_TIME = 2
"""Per micro-batch, so that there are several of the fewest samples, too."""
POPULATION_SIZE = 7473
"""Of all runs: it weighs the variance, and with that decides the steps of the eigensolver. As many as there are samples
would be few, hard to solve for, and differ between the runs."""
MAX_SPREAD = 0.03


def measure(layers: int, samples: int, tokens: int, folder: Path) -> dict[str, Any]:
    """One run; its seconds and its peak in bytes."""
    name = f"{layers}-layers-{SHAPE['hidden_size']}"
    model = folder / name
    if not model.exists():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(LLAMA_2 | SHAPE | {"num_hidden_layers": layers}))
        make(str(file), model, None, 0, SHARD_BYTES)
    data = folder / f"{samples}x{tokens}.jsonl"
    write_samples(data, samples, tokens, SHAPE["vocab_size"], seed=0)
    scratch = Path(tempfile.mkdtemp(dir=folder))
    options = {"model": str(model), "dataset": str(data), "num_samples": samples, "device": "cpu"}
    options["population_size"] = POPULATION_SIZE
    limits = {"max_gpu_mem": BUDGET, "max_host_mem": HOST_BYTES, "micro_batch_tokens": str(SAMPLES_AT_A_TIME * tokens)}
    try:
        facts = run(options | limits, scratch)
    finally:
        shutil.rmtree(scratch)
    return {
        "layers": layers,
        "samples": samples,
        "tokens": samples * tokens,
        "peak_bytes": max(facts["peaks"].values()),
        "seconds": facts["seconds"],
    }


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares: slope and intercept of y over x."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return slope, mean_y - slope * mean_x


def spread_of(series: Sequence[dict[str, Any]]) -> float:
    """How far the largest peak lies above the smallest one, relative."""
    peaks = [each["peak_bytes"] for each in series]
    return float(max(peaks) / min(peaks) - 1)


def describe(series: Sequence[dict[str, Any]], unit: str) -> str:
    """The fit of a series in one sentence."""
    points = [(float(each[unit]), float(each["seconds"])) for each in series]
    slope, intercept = line_through(points)
    worst = max(abs(y - (slope * x + intercept)) / y for x, y in points)
    return (
        f"{unit}: peaks within {spread_of(series):.1%}; seconds = {intercept:.2f} + {slope:.4f} x {unit}, "
        f"no run further than {worst:.0%} from it"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both series and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--samples", nargs="+", type=int, default=[8, 32, 128, 256])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/check-scaling"))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    chosen.work_dir.mkdir(parents=True, exist_ok=True)
    known: dict[tuple[int, int], dict[str, Any]] = {}

    def runs(pairs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        for layers, samples in pairs:
            if (layers, samples) not in known:
                known[layers, samples] = measure(layers, samples, chosen.tokens, chosen.work_dir)
                print("  ".join(row(known[layers, samples])), file=sys.stderr, flush=True)
        return [known[pair] for pair in pairs]

    deeper = runs([(layers, chosen.samples[0]) for layers in chosen.layers])
    longer = runs([(chosen.layers[0], samples) for samples in chosen.samples])
    print("\n".join(table(HEADER, [row(each) for each in known.values()])))
    print(describe(deeper, "layers"))
    print(describe(longer, "tokens"))
    if chosen.json:
        chosen.json.write_text(json.dumps({"layers": deeper, "tokens": longer}, indent=2) + "\n", encoding="utf-8")
    if max(spread_of(deeper), spread_of(longer)) > MAX_SPREAD:
        raise SystemExit(1)


HEADER = ["layers", "samples", "tokens", "peak", "s"]


def row(facts: dict[str, Any]) -> list[str]:
    """A row of the table."""
    return [
        str(facts["layers"]),
        str(facts["samples"]),
        str(facts["tokens"]),
        format_size(facts["peak_bytes"]),
        f"{facts['seconds']:.1f}",
    ]


if __name__ == "__main__":
    main()
