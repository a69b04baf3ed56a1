"""streamda against the plain whole-model method: seconds, memory, ratios.

    python -m tools.compare_speed MODEL DATA [--num-samples 16] [--max-length 1024] [--max-gpu-mem 512MB] [--threads N]
                                             [--repeats 1] [--json FILE]
    python tools/make_smollm2.py .cache/smollm2-135m
    python -m tools.compare_speed .cache/smollm2-135m gsm8k_train.jsonl --num-samples 16 --json .cache/speed.json

Runs `streamda init` and the baseline of tools/baseline.py, which makes its Fisher passes over 8 decoder blocks or over
all of them, and as whole passes or as short ones: one after another, each in a process of its own with the same number
of threads, on the same samples. The checkpoint is read once before, so that none of them is the first to wait for the
disk. Time and memory count from the end of the imports on: streamda's to the written adapter, the baseline's to the
last solved layer. With `--repeats` the fastest run of each counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from streamda.memory import format_size
from streamda.report import table

STREAMDA = """
import json, sys, time
import streamda  # first, as its command does: it decides how threads of torch wait
import torch
from streamda.memory import PeakMeter
options, facts = json.loads(sys.argv[1]), sys.argv[2]
started = time.monotonic()
with PeakMeter(torch.device("cpu")) as meter:
    report = streamda.initialize(**options)
    peak = meter.take_peak()
total = time.monotonic() - started
with open(facts, "w", encoding="utf-8") as file:
    # its own meter is the tighter one of the two, since it starts later
    peak = max(peak, *report.peaks.values())
    json.dump({"seconds": report.seconds, "total_seconds": total, "peak_bytes": peak}, file)
"""
BASELINE = "import sys; from tools import baseline; baseline.main(sys.argv[1:])"


def run_streamda(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds and peak of `streamda init`, from nothing."""
    settings = {
        "model": str(options.model),
        "dataset": options.data,
        "num_samples": options.num_samples,
        "max_length": options.max_length,
        "max_gpu_mem": options.max_gpu_mem,
        "output_dir": str(scratch / "adapter"),
        "device": "cpu",
    }
    return _run(STREAMDA, [json.dumps(settings), str(scratch / "facts.json")], options.threads, scratch)


def run_baseline(options: argparse.Namespace, scratch: Path, layers_per_pass: str, passes: str) -> dict[str, Any]:
    """Seconds and peak of the baseline, with passes `whole` or `short`."""
    arguments = [str(options.model), options.data, "--num-samples", str(options.num_samples)]
    arguments += ["--max-length", str(options.max_length), "--layers-per-pass", layers_per_pass, "--passes", passes]
    arguments += ["--output", str(scratch / "adapter.safetensors"), "--json", str(scratch / "facts.json")]
    return _run(BASELINE, arguments, options.threads, scratch)


def _run(code: str, arguments: Sequence[str], threads: int, scratch: Path) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    facts: dict[str, Any] = json.loads((scratch / "facts.json").read_text(encoding="utf-8"))
    return facts


def warm_page_cache(model: Path) -> None:
    """Reads the weights once."""
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            while file.read(16 << 20):
                pass


def compare(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The fastest run of each contestant, by name."""
    runs: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {"streamda": run_streamda}
    for passes in ("whole", "short"):
        for blocks, count in (("8", "8 blocks per"), ("all", "all in one")):
            runs[f"baseline, {count} {passes} pass"] = partial(run_baseline, layers_per_pass=blocks, passes=passes)
    warm_page_cache(options.model)
    best: dict[str, dict[str, Any]] = {}
    for _ in range(options.repeats):  # in turns, so that a busy spell of the machine hits all of them
        for name, run in runs.items():
            print(f"running {name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as scratch:
                facts = run(options, Path(scratch))
            if name not in best or facts["total_seconds"] < best[name]["total_seconds"]:
                best[name] = facts
    return best


def describe(facts: dict[str, dict[str, Any]]) -> str:
    """Two tables: totals with ratios, and seconds by phase."""
    reference = facts["streamda"]
    totals = [
        [
            name,
            f"{each['total_seconds']:.1f}",
            f"{each['total_seconds'] / reference['total_seconds']:.2f}",
            format_size(each["peak_bytes"]),
            f"{each['peak_bytes'] / max(reference['peak_bytes'], 1):.2f}",
        ]
        for name, each in facts.items()
    ]
    phases = [
        [name, ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in each["seconds"].items())]
        for name, each in facts.items()
    ]
    lines = table(["", "seconds", "times streamda's", "peak memory", "times streamda's"], totals)
    return "\n".join([*lines, "", *table(["", "seconds by phase"], phases)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--max-gpu-mem", default="512MB", help="streamda's budget")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    facts = compare(options)
    print(describe(facts))
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "runs": facts}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
