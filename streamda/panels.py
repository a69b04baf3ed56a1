"""Panels and replays: how the statistics of a block are cut when they do not all fit beside it. Plain integers.

A *panel* is a band of rows of one statistic, the unit of accumulation and of storage. Panels are packed into *replays*:
each runs the block over all samples again and accumulates its own panels. Panels of input moments need the forward half
of a replay only, so they are packed last, and what overflows costs a forward pass and no more.

Of few tokens the rows themselves may stand for the sums of their products: they then are the statistics, of inputs and
of output gradients, and a panel holds those of some tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from streamda.layers import BlockSpec, InputGroup

PANEL_ROWS = 2048
"""Rows of a panel, and side of a stored tile: 2048 x 28672 float32 are 235 MB."""
FLOAT32_BYTES = 4

Statistic = Literal["gradient", "output_moment", "input_moment", "input_rows", "output_rows"]
OF_INPUTS = ("input_moment", "input_rows")
"""Statistics that an input group's layers share, and that need no gradient."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Rows ``[start, stop)`` of one statistic of one module (of inputs: of the group's first module)."""

    statistic: Statistic
    module: str
    start: int
    stop: int
    columns: int
    """1 for an output moment; `stop` for an input moment, whose upper triangle is not kept."""
    item_bytes: int = FLOAT32_BYTES
    """Of each sum."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its sums."""
        rows = self.stop - self.start
        return (rows,) if self.statistic == "output_moment" else (rows, self.columns)

    @property
    def num_bytes(self) -> int:
        """Bytes of its sums."""
        return (self.stop - self.start) * self.columns * self.item_bytes


@dataclass(frozen=True, slots=True)
class Replay:
    """One more pass of all samples through a block, and the panels that it accumulates."""

    panels: tuple[Panel, ...]

    @property
    def needs_backward(self) -> bool:
        """Whether output gradients are needed; what is known of inputs comes from the forward half."""
        return not self.panels or any(panel.statistic not in OF_INPUTS for panel in self.panels)


def block_panels(spec: BlockSpec) -> tuple[Panel, ...]:
    """All panels of a block: those that need gradients first, in the order of its layers."""
    panels: list[Panel] = []
    for linear in spec.linears:
        panels.append(Panel("output_moment", linear.name, 0, linear.d_out, 1))
        group = spec.group_of(linear.name)
        if group.token_rows:
            panels += _row_panels(spec, group, "output_rows", linear.name, linear.d_out)
            continue
        for start in range(0, linear.d_out, PANEL_ROWS):
            stop = min(start + PANEL_ROWS, linear.d_out)
            panels.append(Panel("gradient", linear.name, start, stop, linear.d_in))
    for group in spec.groups:
        if group.token_rows:
            panels += _row_panels(spec, group, "input_rows", group.name, group.d_in)
            continue
        for start in range(0, group.d_in, PANEL_ROWS):
            stop = min(start + PANEL_ROWS, group.d_in)
            panels.append(Panel("input_moment", group.name, start, stop, stop, group.moment_bytes))
    return tuple(panels)


def _row_panels(spec: BlockSpec, group: InputGroup, statistic: Statistic, module: str, columns: int) -> Iterator[Panel]:
    step = panel_tokens(group.d_in, [spec.linear(name).d_out for name in group.modules])
    for start in range(0, group.token_rows, step):
        yield Panel(statistic, module, start, min(start + step, group.token_rows), columns)


def panel_tokens(d_in: int, widths: Sequence[int]) -> int:
    """Tokens in a panel of rows: as many as make none larger than the largest panel of sums.

    Args:
        d_in: of an input group.
        widths: outputs of its layers.
    """
    last = d_in - d_in % PANEL_ROWS  # the last whole panel of a moment ends there; one that is cut short may be larger
    largest = max(min(PANEL_ROWS, max(widths)) * d_in, PANEL_ROWS * last, (d_in - last) * d_in)
    return max(1, min(PANEL_ROWS, largest // max(d_in, *widths)))


def statistics_bytes(spec: BlockSpec) -> int:
    """Bytes of a block's statistics."""
    return sum(panel.num_bytes for panel in block_panels(spec))


def stored_bytes(spec: BlockSpec) -> int:
    """Bytes of a block's statistics on disk: tiles at the edge of a statistic are stored whole."""

    def padded(side: int) -> int:
        tile = min(PANEL_ROWS, side)
        return -(-side // tile) * tile

    heights: dict[tuple[str, str], int] = {}  # of the tiles of each statistic: those of its first panel
    total = 0
    for panel in block_panels(spec):
        height = heights.setdefault((panel.module, panel.statistic), padded(panel.stop - panel.start))
        total += height * padded(panel.columns) * panel.item_bytes
    return total


def pack_replays(panels: Sequence[Panel], capacity_bytes: int) -> tuple[Replay, ...] | None:
    """Packs panels into replays, first fit in the order given; None if one alone does not fit.

    Not always the fewest replays that there could be, but never twice as many.
    """
    replays: list[list[Panel]] = []
    used: list[int] = []
    for panel in panels:
        if panel.num_bytes > capacity_bytes:
            return None
        # first fit: a small input moment may still fit beside the gradients of an earlier replay
        for index, filled in enumerate(used):
            if filled + panel.num_bytes <= capacity_bytes:
                replays[index].append(panel)
                used[index] += panel.num_bytes
                break
        else:
            replays.append([panel])
            used.append(panel.num_bytes)
    return tuple(Replay(tuple(replay)) for replay in replays)
