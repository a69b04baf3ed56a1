"""The statistics of a block as its solution reads them: timed, looked at, and where a run may be stopped."""

from __future__ import annotations

import torch

from streamda import stopping
from streamda.block_statistics import BlockStatistics, MeanMoment
from streamda.errors import DamagedError
from streamda.factors import frobenius_norm, largest_magnitude
from streamda.layers import InputGroup
from streamda.panels import OF_INPUTS
from streamda.products import TRIANGLE_ROWS
from streamda.timeline import Timeline

MAX_ASYMMETRY = 1e-5
"""Of a stored input moment, relative to its largest value; it was mirrored when it was written."""


class CheckedMoment:
    """A `MeanMoment` that is looked at as it is read, and whose reading does not count for what is made of it."""

    def __init__(self, moment: MeanMoment, group: InputGroup, timeline: Timeline, *, from_disk: bool) -> None:
        self._moment, self._name, self._timeline, self._from_disk = moment, group.name, timeline, from_disk
        self._squares: dict[int, float] = {}  # of the entries of each band that was read, with those above the diagonal
        self._trace = 0.0

    def __len__(self) -> int:
        return len(self._moment)

    def diagonal(self) -> torch.Tensor:
        """[d_in] float64."""
        with self._timeline.span("read statistics"):
            return self._moment.diagonal()

    def band(self, index: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Band `index`, [rows, stop]."""
        stopping.check()  # a factorization asks for its bands one by one
        with self._timeline.span("read statistics"):
            band = self._moment.band(index, dtype)
        if index not in self._squares:
            start = band.shape[1] - band.shape[0]
            if self._from_disk:  # else it was mirrored a moment ago
                self._require_symmetric(band[:, start:])
            below = frobenius_norm(band[:, :start]) if start else 0.0
            self._squares[index] = 2 * below**2 + frobenius_norm(band[:, start:]) ** 2
            self._trace += float(band.diagonal(start).sum())
        return band

    @property
    def effective_rank(self) -> float | None:
        """Squared trace over squared Frobenius norm: how many equal eigenvalues would spread as these do.

        None unless all of the moment was read; 0 where it is zero.
        """
        if len(self._squares) < len(self._moment):
            return None
        squares = sum(self._squares.values())
        return self._trace**2 / squares if squares else 0.0

    def _require_symmetric(self, tile: torch.Tensor) -> None:
        """Looks at a diagonal tile [rows, rows]; a factorization reads its lower half only."""
        largest = largest_magnitude(tile)
        for row in range(0, tile.shape[0], TRIANGLE_ROWS):
            rows = slice(row, row + TRIANGLE_ROWS)
            for column in range(0, row + 1, TRIANGLE_ROWS):
                columns = slice(column, column + TRIANGLE_ROWS)
                worst = float((tile[rows, columns] - tile[columns, rows].T).abs().amax())
                if worst > MAX_ASYMMETRY * largest:
                    raise DamagedError(
                        f"{self._name}: its stored input moment is not symmetric (by {worst / largest:.1e} of its "
                        "largest value); collect the statistics of its block again"
                    )


class TokenRows:
    """Rows of a block's statistics as `streamda.token_basis` reads them."""

    def __init__(
        self, statistics: BlockStatistics, module: str, statistic: str, device: torch.device, timeline: Timeline
    ) -> None:
        self._statistics, self._device, self._timeline = statistics, device, timeline
        self._of = (module, statistic)
        linear = statistics.spec.linear(module)
        columns = linear.d_in if statistic in OF_INPUTS else linear.d_out
        self.shape: tuple[int, int] = (statistics.facts(module)["num_tokens"], columns)

    def part(self, tokens: slice, columns: slice) -> torch.Tensor:
        """Columns of the rows of some tokens."""
        stopping.check()
        with self._timeline.span("read statistics"):
            return self._statistics.token_rows(*self._of, tokens, columns).to(self._device)
