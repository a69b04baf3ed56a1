"""Pass 2 for one block: read its statistics back, factorize each input once, solve its layers, commit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from streamda.adapter import relative_change
from streamda.config import SolveConfig
from streamda.errors import MismatchError
from streamda.layers import require_rank
from streamda.memory import release_unused
from streamda.methods import InputFactor, LayerSolution, prepare_input_factor, solve_layer
from streamda.rundir import canonical_digest
from streamda.scratch import SpilledBands
from streamda.solutions import solve_unit, write_solutions
from streamda.solve_plan import GradientForm, solve_layout
from streamda.store import BlockStatisticsReader, StoredMoment, stats_unit
from streamda.timeline import Timeline
from streamda.units import UnitStore


class _TimedMoment:
    """A `StoredMoment` whose reading does not count for what is made of it."""

    def __init__(self, moment: StoredMoment, timeline: Timeline) -> None:
        self._moment, self._timeline = moment, timeline

    def __len__(self) -> int:
        return len(self._moment)

    def diagonal(self) -> torch.Tensor:
        with self._timeline.span("read statistics"):
            return self._moment.diagonal()

    def band(self, index: int) -> torch.Tensor:
        with self._timeline.span("read statistics"):
            return self._moment.band(index)


@dataclasses.dataclass(frozen=True, slots=True)
class Solver:
    """Settings of the second pass."""

    config: SolveConfig
    population_size: int
    seed: int
    device: torch.device
    capacity_bytes: int | None = None
    """Memory for the solution of one input group; it decides where things lie, never what comes out."""
    timeline: Timeline = dataclasses.field(default_factory=Timeline)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a solution, given its statistics."""
        return dataclasses.asdict(self.config) | {"population_size": self.population_size, "seed": self.seed}

    @property
    def digest(self) -> str:
        """Digest of `settings`."""
        return canonical_digest(self.settings)

    def solve_block(
        self, reader: BlockStatisticsReader, scratch: Path
    ) -> tuple[list[LayerSolution], dict[str, dict[str, Any]]]:
        """Solves all layers of a block.

        Args:
            reader: the block's statistics.
            scratch: folder for what does not fit in memory.

        Returns:
            The solutions, and per module what the report says beside their numbers.

        Raises:
            NumericalError: a layer cannot be solved, by name.
            ConfigError: the rank is above a layer's smaller side.
        """
        require_rank(reader.spec.linears, self.config.rank)
        solutions: list[LayerSolution] = []
        facts: dict[str, dict[str, Any]] = {}
        for group in reader.spec.groups:
            widest = max(reader.spec.linear(name).d_out for name in group.modules)
            layout = solve_layout(group.d_in, widest, self.config.rank, self.capacity_bytes)
            with SpilledBands(scratch, layout.bands_in_memory, self.device) as bands:
                moment = _TimedMoment(reader.moment(group, self.device), self.timeline)
                with self.timeline.span("cholesky"):
                    factor = prepare_input_factor(moment, self.config.damping, group.modules, bands)
                for name in group.modules:
                    solutions.append(self._solve_layer(reader, name, factor, layout.gradient))
                    facts[name] = self._facts(reader, solutions[-1])
            release_unused(self.device)
        return solutions, facts

    def _solve_layer(
        self, reader: BlockStatisticsReader, name: str, factor: InputFactor | None, form: GradientForm
    ) -> LayerSolution:
        gradient: Sequence[torch.Tensor] = reader.gradient_bands(name, self.device)
        if form != "streamed":
            with self.timeline.span("read statistics"):
                gradient = [band.to(getattr(torch, form)) for band in gradient]
        with self.timeline.span("eigenvectors"):
            return solve_layer(
                name,
                factor,
                gradient,
                reader.output_moment(name, self.device),
                self.config,
                population_size=self.population_size,
                seed=self.seed,
                num_tokens=reader.facts(name)["num_tokens"],
            )

    def _facts(self, reader: BlockStatisticsReader, solution: LayerSolution) -> dict[str, Any]:
        stored = reader.facts(solution.name)
        change = relative_change(solution.lora_a, solution.lora_b, self.config.scaling, stored["weight_norm"])
        return {
            # a zero weight has no relative change, and JSON no infinity
            "step_zero_change": change if math.isfinite(change) else None,
            "num_tokens": stored["num_tokens"],
            "num_samples": stored["num_samples"],
        }

    def is_solved(self, units: UnitStore, index: int) -> bool:
        """Whether a block is solved with these very settings.

        Raises:
            MismatchError: it is solved with others, and its statistics are gone.
        """
        name = solve_unit(index)
        if name not in units:
            return False
        if units.metadata(name).fingerprint == self.digest:
            return True
        if stats_unit(index) not in units:
            raise MismatchError(
                f"{units.folder.parent}: block {index} is already solved with other settings of the method and its "
                "statistics are freed; give the options of the interrupted run, another --work-dir, or --overwrite to "
                "start over"
            )
        units.drop(name)
        return False

    def solve(self, units: UnitStore, index: int) -> None:
        """Solves a block from its committed statistics and commits the result."""
        solutions, facts = self.solve_block(BlockStatisticsReader(units, index), units.folder)
        with self.timeline.span("commit"):
            write_solutions(units, index, self.digest, solutions, facts)
