"""Plots show the figures they are given, and are the same files from the same figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from tools import plots

RUNS = {
    name: {"seconds": {"forward": 2.0, "solve": 3.0}, "total_seconds": 6.0 * factor, "peak_bytes": int(3e8 * factor)}
    for name, factor in (("streamda", 1), ("baseline", 3))
}
PLANS = [
    {"shape": shape, "factor": factor, "planned_peak": 10**9 * factor, "measured_peak": 9 * 10**8 * factor}
    for shape in ("a", "b", "c", "d", "fifth")
    for factor in (1, 2)
]
SERIES: dict[str, list[dict[str, Any]]] = {
    unit: [{unit: 4 * n, "seconds": 2.0 + n, "peak_bytes": 2 * 10**8} for n in (1, 2, 4)]
    for unit in ("layers", "tokens")
}
FACTS = {"speed": {"settings": {}, "runs": RUNS}, "plan": PLANS, "scaling": SERIES}


def draw(folder: Path) -> dict[str, str]:
    """All plots, by their names."""
    folder.mkdir()
    arguments = [str(folder / "plots")]
    for name, facts in FACTS.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(facts))
        arguments += [f"--{name}", str(file)]
    plots.main(arguments)
    return {file.stem: file.read_text(encoding="utf-8") for file in (folder / "plots").iterdir()}


def test_each_plot_names_what_it_shows_and_is_the_same_every_time(tmp_path: Path) -> None:
    drawn = draw(tmp_path / "first")
    assert drawn.keys() == FACTS.keys()
    assert drawn == draw(tmp_path / "second")
    for name, words in {
        "speed": ("baseline", "forward", "all else", "peak memory above the imports, GB"),
        "plan": ("fifth", "planned peak, GB", "measured / planned"),
        "scaling": ("layers", "tokens", "peak, MB"),
    }.items():
        for word in words:
            assert f">{word}</text>" in drawn[name]


def test_lengths_are_those_of_the_figures() -> None:
    seconds, memory = plots.plot_speed(FACTS["speed"]).axes
    widths = [patch.get_width() for patch in seconds.patches]
    assert widths == pytest.approx([2, 3, 1, 2, 3, 13])
    assert [patch.get_width() for patch in memory.patches] == pytest.approx([0.3, 0.9])
    peaks, shares = plots.plot_plan(PLANS).axes
    assert list(peaks.lines[0].get_xdata()) == [1, 2]
    assert [list(line.get_ydata()) for line in shares.lines[:5]] == [[pytest.approx(0.9)] * 2] * 5
    assert len({(line.get_color(), line.get_marker()) for line in shares.lines[:5]}) == 5
    layers = plots.plot_scaling(SERIES).axes[0]
    assert list(layers.lines[1].get_ydata()) == pytest.approx([2, 6])  # the line through 3, 4 and 6 seconds


def test_of_what_is_not_given_no_plot_is_made(tmp_path: Path) -> None:
    plots.main([str(tmp_path / "plots")])
    assert list((tmp_path / "plots").iterdir()) == []
