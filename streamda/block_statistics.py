"""The statistics of one block on their way to its solution: in memory, or (see `streamda.store`) on disk.

Sums and counts are held, never means (see `streamda.factors`), or the rows of few tokens in place of sums; what is
asked for here are means, and rows. A solution is the same to the bit wherever they lay: both ways hand out the same
regions of sums, copied into memory of their own, and the same rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, overload

import torch

from streamda.factors import mirror_lower_, round_to_pairs_
from streamda.layers import BlockSpec, InputGroup
from streamda.panels import FLOAT32_BYTES, PANEL_ROWS, Panel, block_panels

TILE = PANEL_ROWS
TILES_AT_A_TIME = 2
"""Tiles that are read at a time where a band is not wanted in the dtype it is stored in."""

PanelMaker = Callable[[Panel, torch.device], torch.Tensor]
"""Makes the sums of a panel, zero, float32 or as wide as the panel says."""

_Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype."""


def sums_dtype(item_bytes: int) -> torch.dtype:
    """Of sums of so many bytes each."""
    return torch.float32 if item_bytes == FLOAT32_BYTES else torch.float64


def zero_panel(panel: Panel, device: torch.device) -> torch.Tensor:
    """The sums of a panel before anything is added, in memory of their own."""
    return torch.zeros(panel.shape, device=device, dtype=sums_dtype(panel.item_bytes))


class StatisticsSink(Protocol):
    """Takes the statistics of one block as they are finished."""

    def new_panel(self, panel: Panel, device: torch.device) -> torch.Tensor:
        """As `zero_panel`."""

    def write_panel(self, panel: Panel, values: torch.Tensor) -> None:
        """Takes one finished panel over; the diagonal tile of an input moment becomes symmetric on the way.

        Args:
            panel: whole tile rows of one statistic.
            values: its sums, [rows, columns] ([rows] for an output moment), of `new_panel`'s dtype.
        """

    def write_facts(self, module: str, facts: Mapping[str, Any]) -> None:
        """Takes a module's counts and weight norm."""


class BlockStatistics(ABC):
    """The finished statistics of one block."""

    spec: BlockSpec

    @abstractmethod
    def facts(self, module: str) -> dict[str, Any]:
        """Counts and weight norm of a module."""

    @abstractmethod
    def sums(self, module: str, statistic: str, *where: slice) -> torch.Tensor:
        """A copy of a region of the sums of a statistic, of an input moment only of its lower tiles.

        Float32, but for an input moment that was summed in float64.

        Raises:
            DamagedError: on disk, it is not what was committed, or not finite.
        """

    def token_rows(
        self, module: str, statistic: str, tokens: slice = slice(None), columns: slice = slice(None)
    ) -> torch.Tensor:
        """Rows that stand for sums, one for each token that was seen, [tokens, columns] float32; not to be changed.

        Args:
            module: of a group with `token_rows`; for inputs its first one.
            statistic: ``input_rows`` or ``output_rows``.
            tokens: those that are wanted.
            columns: those that are wanted.
        """
        start, stop, _ = tokens.indices(self.facts(module)["num_tokens"])
        return self.sums(module, statistic, slice(start, stop), columns)

    def moment(self, group: InputGroup, device: torch.device) -> MeanMoment:
        """The mean input moment of a group, to be read band by band."""
        return MeanMoment(self, group, device)

    def input_moment(self, group: InputGroup, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The mean input moment [d_in, d_in] of a group; only its lower triangle (and diagonal tiles) are filled."""
        bands = self.moment(group, device)
        moment = torch.zeros(group.d_in, group.d_in, dtype=dtype, device=device)
        for index in range(len(bands)):
            band = bands.band(index, dtype)
            moment[index * TILE : index * TILE + band.shape[0], : band.shape[1]] = band
        return moment

    def moment_tiles(self, group: InputGroup, row: int, columns: slice) -> torch.Tensor:
        """Tiles side by side in the lower triangle of a mean input moment, where the sums lie, and as wide as they."""
        rows = slice(row, row + TILE)
        if group.token_rows:
            left, right = (self.token_rows(group.name, "input_rows", columns=each) for each in (rows, columns))
            block = left.T @ right
        else:
            block = self.sums(group.name, "input_moment", rows, columns)
        return _mean_(block, self.facts(group.name)["num_tokens"])

    def gradient(self, module: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The mean gradient [d_out, d_in]."""
        linear = self.spec.linear(module)
        gradient = torch.empty(linear.d_out, linear.d_in, dtype=dtype, device=device)
        for index, band in enumerate(self.gradient_bands(module, device)):
            gradient[index * TILE : index * TILE + band.shape[0]] = band
        return gradient

    def gradient_bands(self, module: str, device: torch.device) -> MeanGradient:
        """The mean gradient as bands of rows, each read when it is asked for."""
        return MeanGradient(self, module, device)

    def gradient_band(self, module: str, row: int, device: torch.device) -> torch.Tensor:
        """Rows from `row` on of a mean gradient, [up to a tile's rows, d_in] float32."""
        rows, group = slice(row, row + TILE), self.spec.group_of(module)
        if group.token_rows:
            g = self.token_rows(module, "output_rows", columns=rows)
            band = g.T @ self.token_rows(group.name, "input_rows")
        else:
            band = self.sums(module, "gradient", rows, slice(None))
        return _mean_(band, self.facts(module)["num_samples"]).to(device)

    def output_moment(self, module: str, device: torch.device) -> torch.Tensor:
        """The mean output moment [d_out] float32."""
        sums = self.sums(module, "output_moment", slice(None))
        return _mean_(sums, self.facts(module)["num_tokens"]).to(device)


def _mean_(sums: torch.Tensor, count: int) -> torch.Tensor:
    """Divides in place; on every device alike, for by a number of Python's CUDA multiplies with its reciprocal."""
    return sums.div_(torch.tensor(max(1, count), dtype=sums.dtype, device=sums.device))


class HeldStatistics(BlockStatistics):
    """Statistics that stay in memory, on the device that made them, until their block is solved."""

    def __init__(self, spec: BlockSpec, solved: HeldStatistics | None = None) -> None:
        """Makes what takes the statistics of a block.

        Args:
            spec: of the block.
            solved: statistics that are needed no more. Memory of theirs that fits is used again, which spares the
                system making gigabytes of fresh pages for each block; the rest is freed now.
        """
        self.spec = spec
        self._facts: dict[str, dict[str, Any]] = {}
        self._panels: dict[tuple[str, str, int], torch.Tensor] = {}
        self._spare: defaultdict[_Kind, list[torch.Tensor]] = defaultdict(list)
        if solved is not None:
            left: defaultdict[_Kind, list[torch.Tensor]] = defaultdict(list)
            for values in solved._panels.values():
                left[tuple(values.shape), values.dtype].append(values)
            solved._panels.clear()
            for panel in block_panels(spec):
                kind = panel.shape, sums_dtype(panel.item_bytes)
                if left[kind]:
                    self._spare[kind].append(left[kind].pop())

    def new_panel(self, panel: Panel, device: torch.device) -> torch.Tensor:
        """As `StatisticsSink` says."""
        spare = self._spare[panel.shape, sums_dtype(panel.item_bytes)]
        return spare.pop().zero_() if spare else zero_panel(panel, device)

    def write_panel(self, panel: Panel, values: torch.Tensor) -> None:
        """As `StatisticsSink` says."""
        if panel.statistic == "input_moment":
            mirror_lower_(values[:, panel.start : panel.stop])
        if values.dtype == torch.float64:
            round_to_pairs_(values)
        self._panels[panel.module, panel.statistic, panel.start] = values

    def write_facts(self, module: str, facts: Mapping[str, Any]) -> None:
        """As `StatisticsSink` says."""
        self._facts[module] = dict(facts)

    def facts(self, module: str) -> dict[str, Any]:
        """As `BlockStatistics` says."""
        return self._facts[module]

    def token_rows(
        self, module: str, statistic: str, tokens: slice = slice(None), columns: slice = slice(None)
    ) -> torch.Tensor:
        """As `BlockStatistics` says; a copy only where the rows lie in several panels."""
        first, last, _ = tokens.indices(self.facts(module)["num_tokens"])
        starts = sorted(start for name, kind, start in self._panels if (name, kind) == (module, statistic))
        parts: list[torch.Tensor] = []
        for start in starts:
            panel = self._panels[module, statistic, start]
            if max(first, start) < min(last, start + panel.shape[0]):
                parts.append(panel[max(first - start, 0) : last - start, columns])
        if not parts:
            return self._panels[module, statistic, 0][:0, columns]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sums(self, module: str, statistic: str, *where: slice) -> torch.Tensor:
        """As `BlockStatistics` says; rows are all those of one panel."""
        rows, *columns = where
        panel = self._panels[module, statistic, rows.start or 0]
        assert rows.stop is None or rows.stop >= (rows.start or 0) + panel.shape[0]
        return panel[(slice(None), *columns)].clone(memory_format=torch.contiguous_format)


class MeanMoment:
    """A mean input moment, by bands of rows; see `streamda.cholesky`."""

    def __init__(self, statistics: BlockStatistics, group: InputGroup, device: torch.device) -> None:
        self._statistics, self._group, self._device = statistics, group, device
        self._only_tile: torch.Tensor | None = None  # read for its diagonal, and then wanted whole

    def __len__(self) -> int:
        return -(-self._group.d_in // TILE)

    def diagonal(self) -> torch.Tensor:
        """[d_in] float64."""
        parts: list[torch.Tensor] = []
        for start in range(0, self._group.d_in, TILE):
            tile = self._statistics.moment_tiles(self._group, start, slice(start, start + TILE))
            parts.append(tile.diagonal().to(torch.float64, copy=True))  # a view would hold all tiles
        self._only_tile = tile if len(parts) == 1 else None
        return torch.cat(parts).to(self._device)

    def band(self, index: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Band `index`, [rows, stop]; a new tensor each time."""
        start = index * TILE
        stop = min(start + TILE, self._group.d_in)
        tile, self._only_tile = self._only_tile, None
        if tile is not None:
            return tile.to(self._device, dtype)
        if dtype == torch.float32 and self._group.moment_bytes == FLOAT32_BYTES:
            return self._statistics.moment_tiles(self._group, start, slice(stop)).to(self._device)
        band = torch.empty(stop - start, stop, dtype=dtype, device=self._device)
        for column in range(0, stop, TILE * TILES_AT_A_TIME):
            columns = slice(column, min(column + TILE * TILES_AT_A_TIME, stop))
            band[:, columns] = self._statistics.moment_tiles(self._group, start, columns).to(self._device)
        return band


class GradientBands(Sequence[torch.Tensor]):
    """A mean gradient by bands of rows, each read when it is asked for."""

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        if not 0 <= index < len(self):
            raise IndexError(index)  # what ends an iteration
        return self._band(index)

    @abstractmethod
    def _band(self, index: int) -> torch.Tensor:
        """Band `index`."""


class MeanGradient(GradientBands):
    """A mean gradient, by bands of rows, [up to a tile's rows, d_in] float32 each."""

    def __init__(self, statistics: BlockStatistics, module: str, device: torch.device) -> None:
        self._statistics, self._module, self._device = statistics, module, device

    def __len__(self) -> int:
        return -(-self._statistics.spec.linear(self._module).d_out // TILE)

    def _band(self, index: int) -> torch.Tensor:
        return self._statistics.gradient_band(self._module, index * TILE, self._device)
