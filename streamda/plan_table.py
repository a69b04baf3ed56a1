"""What `plan` shows: a plan, how long it would take, and what it would need, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamda.batches import micro_batch_text
from streamda.disk_plan import stride_text
from streamda.memory import format_size
from streamda.quoting import printable
from streamda.report import format_seconds, note_lines, table


def plan_table(plan: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """A plan for people.

    Args:
        plan: `Plan.to_dict`.
        facts: what was planned: model, samples, budget, bounds, notices; see `streamda.pipeline.plan`.
    """
    replays = plan["replays"]
    adapted = [count for count in replays if count]
    spread = f"{min(adapted)}" if min(adapted) == max(adapted) else f"{min(adapted)} to {max(adapted)}"
    rows = [[phase, format_size(peak)] for phase, peak in plan["peaks"].items()]
    bounds = facts["bounds"]
    flops = [
        [
            phase,
            f"{count / 1e12:.3g}",
            facts["dtype"] if bounds["precision"][phase] == "compute" else bounds["precision"][phase],
            format_seconds(bounds["phase_seconds"][phase]),
        ]
        for phase, count in plan["flops"].items()
        if count
    ]
    statistics = "go to disk" if plan["spill_statistics"] else "stay in memory until their block is solved"
    if facts["num_layers_from_rows"]:
        statistics += f"; few tokens: their rows stand for the sums of {facts['num_layers_from_rows']} layers"
    lines = [
        f"plan for {printable(facts['model'])}  ({facts['num_blocks']} blocks, {facts['num_layers']} adapted layers, "
        f"{facts['dtype']})",
        f"  budget             {format_size(facts['budget_bytes'])}; smallest that would do "
        f"{format_size(facts['smallest_budget_bytes'])}",
        f"  data               {facts['num_samples']} samples, {facts['num_tokens']} tokens, "
        f"{facts['num_rows']} with padding",
        f"  micro-batch        {micro_batch_text(plan['micro_batch_tokens'])}",
        f"  replays per block  {spread}",
        f"  statistics         {statistics}",
        f"  boundaries in RAM  {plan['boundaries_in_memory']}",
        f"  disk               {format_size(plan['disk_bytes'])}",
        f"  boundaries kept    {stride_text(plan['boundary_stride'])}; weights are read {plan['weight_passes']:.1f} "
        f"times ({format_size(plan['weight_bytes_read'])})",
        *_estimate(bounds),
        "",
        *table(["phase", "peak"], rows),
        "",
        *table(["phase", "TFLOP", "precision", "compute time"], flops),
        *note_lines(facts["notices"]),
    ]
    return "\n".join(lines)


def _estimate(bounds: Mapping[str, Any]) -> list[str]:
    rates = bounds["rates"]
    read, write = (
        "an unknown rate" if rates[name] is None else f"{format_size(rates[name])}/s" for name in ("read", "write")
    )
    return [
        f"  time at full rates {format_seconds(bounds['at_least_seconds'])} with disk and compute overlapped, "
        f"{format_seconds(bounds['in_turn_seconds'])} one after the other",
        "    on CPUs a run took 1.3 times the first of these (a 13B model) to over 3 times (135M weights, few samples)",
        f"    compute          {format_seconds(bounds['compute_seconds'])} at {_flop_rate(rates['flops'])}, "
        f"{_flop_rate(rates['flops64'])} in float64",
        f"    reading          {format_seconds(bounds['read_seconds'])}: {format_size(bounds['bytes_read'])} at {read}",
        f"    writing          {format_seconds(bounds['write_seconds'])}: {format_size(bounds['bytes_written'])} at "
        f"{write}",
    ]


def _flop_rate(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
