"""What the planner says of the named models: from their configurations alone, no weight exists.

    python -m tools.plan_models [--max-gpu-mem 24GB] [--samples 256] [--tokens 200] [--dtype bfloat16] [--json FILE]

Prints per model the smallest budget that would do, and at the given budget: replays per block, whether weights stay in
their stored dtype, peaks by phase, disk, bytes of weights read, operations, and seconds at rates that are given (by
default those of one mid-range GPU on paper; they are assumptions, and nothing here is a measurement).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamda import pipeline
from streamda.config import RunConfig
from streamda.memory import format_size
from streamda.report import table
from tools.make_checkpoint import CONFIGS, build_config, load_fields, write_samples

RATES = "flops=60e12,flops64=0.5e12,read=2e9,write=1e9"


def plan_model(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The plan of one model, and how long planning took."""
    config = build_config(load_fields(name))
    config.save_pretrained(folder)
    data = folder / "samples.jsonl"
    write_samples(data, arguments.samples, arguments.tokens, config.vocab_size, seed=0)
    started = time.monotonic()
    made, facts = pipeline.plan(
        RunConfig.from_options(
            {
                "model": str(folder),
                "dataset": str(data),
                "num_samples": arguments.samples,
                "max_gpu_mem": arguments.max_gpu_mem,
                "dtype": arguments.dtype,
                "rates": arguments.rates,
            }
        )
    )
    return {"model": name, "plan": made.to_dict(), "facts": facts, "planned_in": time.monotonic() - started}


def main(arguments: Sequence[str] | None = None) -> None:
    """Plans every model and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-gpu-mem", default="24GB")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rates", default=RATES)
    parser.add_argument("--models", nargs="+", choices=sorted(CONFIGS), default=sorted(CONFIGS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found = []
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            entry = plan_model(name, Path(folder), options)
        found.append(entry)
        plan, facts = entry["plan"], entry["facts"]
        rows.append(
            (
                name,
                format_size(facts["smallest_budget_bytes"]),
                str(max(plan["replays"])),
                "yes" if plan["keep_stored"] else "no",
                *(format_size(plan["peaks"][phase]) for phase in ("forward", "epilogue", "backward", "solve")),
                format_size(plan["disk_bytes"]),
                format_size(plan["weight_bytes_read"]),
                f"{sum(plan['flops'].values()) / 1e15:.1f}",
                f"{entry['planned_in']:.0f} s",
            )
        )
    header = ("model", "smallest", "replays", "stored", "forward", "head", "backward", "solve", "disk", "weights read")
    print("\n".join(table((*header, "PFLOP", "planned in"), rows)))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
