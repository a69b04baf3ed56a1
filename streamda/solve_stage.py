"""Pass 2 for one block: read its statistics back, factorize each input once, solve its layers, commit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from streamda.adapter import relative_change
from streamda.config import SolveConfig
from streamda.errors import MismatchError
from streamda.layers import require_rank
from streamda.memory import release_unused
from streamda.methods import LayerSolution, prepare_input_factor, solve_layer
from streamda.rundir import canonical_digest
from streamda.solutions import solve_unit, write_solutions
from streamda.store import BlockStatisticsReader, stats_unit
from streamda.units import UnitStore


@dataclasses.dataclass(frozen=True, slots=True)
class Solver:
    """Settings of the second pass."""

    config: SolveConfig
    population_size: int
    seed: int
    device: torch.device

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a solution, given its statistics."""
        return dataclasses.asdict(self.config) | {"population_size": self.population_size, "seed": self.seed}

    @property
    def digest(self) -> str:
        """Digest of `settings`."""
        return canonical_digest(self.settings)

    def solve_block(self, reader: BlockStatisticsReader) -> tuple[list[LayerSolution], dict[str, dict[str, Any]]]:
        """Solves all layers of a block.

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

            def read(group: Any = group) -> torch.Tensor:
                return reader.input_moment(group, torch.float64, self.device)

            factor = prepare_input_factor(read, self.config.damping, group.modules)
            for name in group.modules:
                solution = solve_layer(
                    name,
                    factor,
                    reader.gradient(name, torch.float64, self.device),
                    reader.output_moment(name, self.device),
                    self.config,
                    population_size=self.population_size,
                    seed=self.seed,
                )
                solutions.append(solution)
                stored = reader.facts(name)
                change = relative_change(solution.lora_a, solution.lora_b, self.config.scaling, stored["weight_norm"])
                facts[name] = {
                    # a zero weight has no relative change, and JSON no infinity
                    "step_zero_change": change if math.isfinite(change) else None,
                    "num_tokens": stored["num_tokens"],
                    "num_samples": stored["num_samples"],
                }
            del factor
            release_unused(self.device)
        return solutions, facts

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
        solutions, facts = self.solve_block(BlockStatisticsReader(units, index))
        write_solutions(units, index, self.digest, solutions, facts)
