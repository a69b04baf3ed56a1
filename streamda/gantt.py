"""A timeline as a drawing: lanes are rows, work is coloured bars over a seconds axis. SVG that needs nothing beside it.

Each lane is drawn by columns of a pixel's width, and a column has the colour of what took most of it, so a run of any
length gives a drawing of the same size, and blocks of milliseconds merge into the work that prevails. Every span by
itself is in the trace (`streamda.trace`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from streamda.timeline import PHASES, Span, innermost

COLUMNS = 1200
_LEFT, _RIGHT, _TOP, _ROW, _BAR = 110, 30, 46, 40, 28
_LEGEND_ROW, _LEGEND_COLUMNS = 20, 4
_COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44bb99", "#bbcc33", "#aaaa00",
    "#99ddff", "#ffaabb", "#222255", "#999933", "#882255", "#225555", "#bbbbbb", "#663333",
)  # fmt: skip
"""Told apart with any colour vision as far as so many can be: Paul Tol's bright, light and dark schemes, in this order,
which is that of the time taken."""


def draw_timeline(spans: Sequence[Span], title: str) -> str:
    """An SVG document.

    Args:
        spans: in the order of `Timeline.spans`.
        title: of the drawing.
    """
    pieces = innermost(spans)
    end = max((piece.stop for piece in pieces), default=0.0) or 1.0
    lanes = sorted(dict.fromkeys(piece.lane for piece in pieces), key=lambda lane: lane != PHASES)
    totals = _totals(pieces)
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(totals)}
    body = [f'<text x="{_LEFT}" y="24" font-size="16">{escape(title)}</text>']
    for number, lane in enumerate(lanes):
        body += _lane(lane, [piece for piece in pieces if piece.lane == lane], colours, end, _TOP + number * _ROW)
    bottom = _TOP + len(lanes) * _ROW
    body += _axis(end, bottom)
    body += _legend(totals, colours, bottom + 50)
    width = _LEFT + COLUMNS + _RIGHT
    height = bottom + 50 + _LEGEND_ROW * math.ceil(len(totals) / _LEGEND_COLUMNS) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _totals(pieces: Sequence[Span]) -> dict[str, float]:
    """Seconds of work by name, longest first; of a phase that has no work of its name, what it took."""
    sums: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for piece in pieces:
        kind = sums[piece.lane == PHASES]
        kind[piece.name] = kind.get(piece.name, 0.0) + piece.stop - piece.start
    return dict(sorted((sums[True] | sums[False]).items(), key=lambda entry: -entry[1]))


def _lane(lane: str, pieces: Sequence[Span], colours: dict[str, str], end: float, top: int) -> list[str]:
    parts = [
        f'<text x="{_LEFT - 8}" y="{top + _BAR * 0.65:.0f}" text-anchor="end">{escape(lane)}</text>',
        f'<rect x="{_LEFT}" y="{top}" width="{COLUMNS}" height="{_BAR}" fill="#eeeeee"/>',
    ]
    for name, first, last in _runs(_prevailing(pieces, end / COLUMNS)):
        spent = f"{first * end / COLUMNS:.4g} to {last * end / COLUMNS:.4g} s"
        parts.append(
            f'<rect x="{_LEFT + first}" y="{top}" width="{last - first}" height="{_BAR}" fill="{colours[name]}">'
            f"<title>{escape(name)}, {spent}</title></rect>"
        )
    return parts


def _prevailing(pieces: Sequence[Span], seconds: float) -> list[str | None]:
    """For each column of a lane the name of what took most of it, None where idleness did."""
    columns: list[dict[str | None, float]] = [{} for _ in range(COLUMNS)]
    for piece in pieces:
        first = min(COLUMNS - 1, int(piece.start / seconds))
        last = min(COLUMNS - 1, int(piece.stop / seconds))
        for column in range(first, last + 1):
            covered = min(piece.stop, (column + 1) * seconds) - max(piece.start, column * seconds)
            columns[column][piece.name] = columns[column].get(piece.name, 0.0) + max(0.0, covered)
    for seen in columns:
        seen[None] = seconds - sum(seen.values())
    return [max(seen, key=lambda name: seen[name]) for seen in columns]


def _runs(names: Sequence[str | None]) -> list[tuple[str, int, int]]:
    """Neighbouring columns of one name as (name, first, behind the last); the idle ones are left out."""
    runs: list[tuple[str, int, int]] = []
    for column, name in enumerate(names):
        if runs and runs[-1][0] == name and runs[-1][2] == column:
            runs[-1] = (runs[-1][0], runs[-1][1], column + 1)
        elif name is not None:
            runs.append((name, column, column + 1))
    return runs


def _axis(end: float, top: int) -> list[str]:
    """Ticks at 1, 2 or 5 times a power of ten seconds, about ten of them."""
    power = 10.0 ** math.floor(math.log10(end / 10))
    step = next(factor * power for factor in (1, 2, 5, 10) if end / (factor * power) <= 12)
    parts = [f'<text x="{_LEFT + COLUMNS / 2:.0f}" y="{top + 32}" text-anchor="middle">seconds</text>']
    for number in range(int(end / step) + 1):
        x = _LEFT + COLUMNS * number * step / end
        parts.append(f'<path d="M {x:.1f} {_TOP - 4} V {top}" stroke="black" stroke-opacity="0.2"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + 14}" text-anchor="middle">{number * step:.6g}</text>')
    return parts


def _legend(totals: dict[str, float], colours: dict[str, str], top: int) -> list[str]:
    parts = []
    for number, (name, total) in enumerate(totals.items()):
        row, column = divmod(number, _LEGEND_COLUMNS)
        x, y = _LEFT + column * COLUMNS // _LEGEND_COLUMNS, top + row * _LEGEND_ROW
        parts.append(f'<rect x="{x}" y="{y - 11}" width="14" height="14" fill="{colours[name]}"/>')
        seconds = f"{total:.0f}" if total >= 100 else f"{total:.3g}"
        parts.append(f'<text x="{x + 20}" y="{y}">{escape(name)}, {seconds} s</text>')
    return parts
