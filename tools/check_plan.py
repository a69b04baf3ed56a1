"""The plan against what was measured: a grid of whole runs, each in a process of its own.

    python -m tools.check_plan [--shapes 1b mlp] [--budgets 1.05 2 6] [--samples 4x128 16x128]
                               [--work-dir .cache/check-plan] [--json FILE]

Shapes are two blocks of real models, with random weights: `1b` (TinyLlama's), `mlp` (narrow with a very wide MLP, as a
70B model's blocks are cut: one input moment above everything else), `vocab` (128k entries, so that the head is large),
`7b` (Llama-2-7B's). Budgets are multiples of the smallest one that the plan gives; samples are COUNTxTOKENS.
Few of them for each input are kept as rows in place of sums. Float32 on the CPU, measured by the run's own
meter: anonymous memory above the baseline, sampled every 10 ms.

Prints per run the planned and the measured peak and their ratio, and the phases that outgrew their plan. Exits with 1
where a measured peak is above the plan or below three quarters of it. Blocks much smaller than these are dwarfed by the
plan's fixed allowances.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamda import pipeline
from streamda.config import RunConfig
from streamda.memory import format_size
from streamda.report import table
from tools.make_checkpoint import LLAMA_2, make, write_samples

LEAST_SHARE = 0.75
"""Of a plan that its measured peak is to be."""
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4},
    "mlp": {"hidden_size": 2048, "intermediate_size": 14336, "num_attention_heads": 16, "num_key_value_heads": 4},
    "vocab": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
}
NUM_LAYERS = 2
SHARD_BYTES = 2_000_000_000
ROOMY = "100GB"
RUN = """
import json, sys
import streamda
report = streamda.initialize(**json.loads(sys.argv[1]))
print(json.dumps({"plan": report.plan, "peaks": report.peaks, "seconds": report.wall_seconds}))
"""


def make_shape(name: str, folder: Path) -> Path:
    """Writes a shape's checkpoint, unless it is there."""
    target = folder / name
    if not target.exists():
        config = LLAMA_2 | {"num_hidden_layers": NUM_LAYERS} | SHAPES[name]
        file = folder / f"{name}.json"
        file.write_text(json.dumps(config))
        make(str(file), target, None, 0, SHARD_BYTES)
    return target


def smallest_budget(options: dict[str, Any]) -> int:
    """What `streamda plan` calls the smallest budget that would do."""
    _, facts = pipeline.plan(RunConfig.from_options(options | {"max_gpu_mem": ROOMY}))
    return int(facts["smallest_budget_bytes"])


def run(options: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One run in a process of its own; its plan and its peaks."""
    settings = json.dumps(options | {"output_dir": str(scratch / "adapter")})
    done = subprocess.run([sys.executable, "-c", RUN, settings], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"a run failed with {settings}:\n{done.stderr}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the grid and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--budgets", nargs="+", type=float, default=[1.05, 2, 6])
    parser.add_argument("--samples", nargs="+", default=["4x128", "16x128"], metavar="COUNTxTOKENS")
    parser.add_argument("--work-dir", type=Path, default=Path(".cache/check-plan"))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    chosen.work_dir.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for shape in chosen.shapes:
        model = make_shape(shape, chosen.work_dir)
        for samples in chosen.samples:
            count, tokens = map(int, samples.split("x"))
            data = chosen.work_dir / f"{shape}-{samples}.jsonl"
            write_samples(data, count, tokens, SHAPES[shape].get("vocab_size", LLAMA_2["vocab_size"]), seed=0)
            options = {"model": str(model), "dataset": str(data), "num_samples": count, "device": "cpu"}
            smallest = smallest_budget(options)
            for factor in chosen.budgets:
                budget = int(factor * smallest)
                scratch = Path(tempfile.mkdtemp(dir=chosen.work_dir))
                try:
                    facts = run(options | {"max_gpu_mem": str(budget)}, scratch)
                finally:
                    shutil.rmtree(scratch)
                planned, measured = facts["plan"]["peaks"], facts["peaks"]
                found.append(
                    facts
                    | {
                        "shape": shape,
                        "samples": samples,
                        "budget": budget,
                        "factor": factor,
                        "planned_peak": facts["plan"]["peak_bytes"],
                        "measured_peak": max(measured.values()),
                        "above": [phase for phase in planned if measured.get(phase, 0) > planned[phase]],
                    }
                )
                print("  ".join(describe(found[-1])), file=sys.stderr, flush=True)
                if chosen.json:  # after each run, since a grid takes its time
                    chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(HEADER, [describe(each) for each in found])))
    if any(not LEAST_SHARE <= each["measured_peak"] / each["planned_peak"] <= 1 for each in found):
        raise SystemExit(1)


HEADER = ["shape", "samples", "budget", "planned peak", "measured", "measured / planned", "replays", "s", "above plan"]


def describe(facts: dict[str, Any]) -> list[str]:
    """A row of the table."""
    return [
        facts["shape"],
        facts["samples"],
        f"{format_size(facts['budget'])} ({facts['factor']:g} x)",
        format_size(facts["planned_peak"]),
        format_size(facts["measured_peak"]),
        f"{facts['measured_peak'] / facts['planned_peak']:.2f}",
        str(max(facts["plan"]["replays"])),
        f"{facts['seconds']:.0f}",
        ", ".join(facts["above"]),
    ]


if __name__ == "__main__":
    main()
