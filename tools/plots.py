"""The plots of docs/performance.md, from what the measuring tools write.

    python -m tools.compare_speed MODEL DATA --json .cache/speed.json
    python -m tools.check_plan --json .cache/plan.json
    python -m tools.check_scaling --json .cache/scaling.json
    python -m tools.plots docs/plots --speed .cache/speed.json --plan .cache/plan.json --scaling .cache/scaling.json

Needs matplotlib (`pip install 'streamda[plots]'`). Measures nothing; of the files that are not given no plot is made.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.check_plan import LEAST_SHARE
from tools.check_scaling import line_through

GB = 1e9
WIDTH, HEIGHT = 9.0, 3.2
"""Of a plot with two parts, in inches."""
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")
"""Told apart with any colour vision: Paul Tol's bright scheme."""
MARKERS = "os^D"


def plot_speed(facts: dict[str, Any]) -> Figure:
    """Seconds by phase and peak memory, of streamda and of the plain method."""
    runs = facts["runs"]
    figure, (seconds, memory) = two_parts()
    shades = matplotlib.colormaps["tab20"]
    phases = list(dict.fromkeys(phase for run in runs.values() for phase in run["seconds"]))
    for place, run in enumerate(runs.values()):
        left = 0.0
        for phase, taken in run["seconds"].items():
            label = phase if phase not in {text.get_label() for text in seconds.containers} else None
            seconds.barh(place, taken, left=left, color=shades(phases.index(phase)), label=label)
            left += taken
        rest = max(0.0, run["total_seconds"] - left)
        seconds.barh(place, rest, left=left, color="#dddddd", label="all else" if place == 0 else None)
    memory.barh(range(len(runs)), [run["peak_bytes"] / GB for run in runs.values()], color=COLOURS[0])
    for part, label in ((seconds, "seconds"), (memory, "peak memory above the imports, GB")):
        part.set_yticks(range(len(runs)), list(runs) if part is seconds else [""] * len(runs))
        part.invert_yaxis()
        part.set_xlabel(label)
    figure.legend(fontsize=7, ncols=len(phases) + 1, loc="outside lower center")
    return figure


def plot_plan(facts: Sequence[dict[str, Any]]) -> Figure:
    """Measured over planned peaks, and the two lines that they are to stay between."""
    figure, (peaks, shares) = two_parts()
    highest = max(each["planned_peak"] for each in facts) / GB
    looks = [(colour, marker) for marker in MARKERS for colour in COLOURS]
    for (colour, marker), shape in zip(itertools.cycle(looks), dict.fromkeys(each["shape"] for each in facts)):
        runs = [each for each in facts if each["shape"] == shape]
        planned, measured = ([each[key] / GB for each in runs] for key in ("planned_peak", "measured_peak"))
        peaks.plot(planned, measured, marker, color=colour, label=shape, markersize=4)
        shares.plot([each["factor"] for each in runs], [m / p for m, p in zip(measured, planned, strict=True)], marker,
                    color=colour, markersize=4)  # fmt: skip
    for share, style in ((1.0, "-"), (LEAST_SHARE, "--")):
        peaks.plot([0, highest], [0, share * highest], style, color="black", linewidth=0.8)
        shares.axhline(share, linestyle=style, color="black", linewidth=0.8)
    peaks.set(xlabel="planned peak, GB", ylabel="measured peak, GB")
    shares.set(xlabel="budget, times the smallest", ylabel="measured / planned", ylim=(0.5, 1.05))
    peaks.legend(fontsize=7)
    return figure


def plot_scaling(facts: dict[str, Sequence[dict[str, Any]]]) -> Figure:
    """Peaks and seconds over layers and over tokens, with straight lines through the seconds."""
    figure, parts = two_parts()
    for part, unit in zip(parts, ("layers", "tokens"), strict=True):
        series = facts[unit]
        points = [(float(each[unit]), float(each["seconds"])) for each in series]
        slope, intercept = line_through(points)
        ends = [0.0, max(x for x, _ in points)]
        part.plot(*zip(*points, strict=True), "o", color=COLOURS[0], label="seconds")
        part.plot(ends, [intercept + slope * x for x in ends], "-", color=COLOURS[0], linewidth=0.8)
        part.set(xlabel=unit, ylabel="seconds", ylim=(0, None))
        beside = part.twinx()
        beside.plot([each[unit] for each in series], [each["peak_bytes"] / 1e6 for each in series], "s-",
                    color=COLOURS[1], markersize=4, label="peak")  # fmt: skip
        beside.set(ylabel="peak, MB", ylim=(0, 1.2 * max(each["peak_bytes"] for each in series) / 1e6))
        part.legend(handles=[*part.lines[:1], *beside.lines], fontsize=7, loc="lower right")
    return figure


def two_parts() -> tuple[Figure, Sequence[Axes]]:
    """An empty figure of two plots side by side."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    return figure, figure.subplots(1, 2)


PLOTS = {"speed": plot_speed, "plan": plot_plan, "scaling": plot_scaling}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws what was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in PLOTS:
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    # the same file from the same figures, whenever it is drawn; text stays text
    with matplotlib.rc_context({"svg.hashsalt": "streamda", "svg.fonttype": "none"}):
        for name, plot in PLOTS.items():
            if file := getattr(chosen, name):
                target = chosen.folder / f"{name}.svg"
                plot(json.loads(file.read_text(encoding="utf-8"))).savefig(target, metadata={"Date": None})
                print(target)


if __name__ == "__main__":
    main()
