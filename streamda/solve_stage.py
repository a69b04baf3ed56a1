"""Pass 2 for one block: factorize each input of its statistics once, solve its layers, commit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from streamda import stopping
from streamda.adapter import relative_change
from streamda.block_statistics import BlockStatistics, HeldStatistics, sums_dtype
from streamda.cholesky import Bands
from streamda.config import SolveConfig
from streamda.errors import MismatchError, NumericalError
from streamda.files import shown
from streamda.layers import InputGroup, require_rank
from streamda.memory import release_unused
from streamda.methods import (
    BasisFactor,
    Factor,
    LayerSolution,
    SolveStatus,
    TokenFactor,
    prepare_basis_factor,
    prepare_input_factor,
    prepare_token_factor,
    solve_layer,
)
from streamda.run_parts import canonical_digest, differences
from streamda.scratch import SpilledBands
from streamda.solutions import is_skipped, read_summaries, solve_unit, write_solutions
from streamda.solve_plan import HELD_TILE_COPIES, TILE_COPIES, GradientForm, needs_basis, solve_layout
from streamda.solve_reading import CheckedMoment, TokenRows
from streamda.store import stats_unit
from streamda.timeline import Timeline
from streamda.token_basis import BasisGradient
from streamda.token_span import TokenGradient
from streamda.units import UnitStore

SOLVER_VERSION = 12
"""Raised with every change that gives a layer another solution from the same statistics and settings: no adapter is to
mix the two."""


@dataclasses.dataclass(frozen=True, slots=True)
class Solver:
    """Settings of the second pass."""

    config: SolveConfig
    population_size: int
    seed: int
    device: torch.device
    capacity_bytes: int | None = None
    """Memory for the solution of one input group; it decides where things lie, never what comes out."""
    skip_bad_layers: bool = False
    """Whether a layer that cannot be solved is left without adapter. No setting: what is solved is the same with it."""
    timeline: Timeline = dataclasses.field(default_factory=Timeline)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a solution, given its statistics."""
        given = {"population_size": self.population_size, "seed": self.seed, "version": SOLVER_VERSION}
        return dataclasses.asdict(self.config) | given

    @property
    def digest(self) -> str:
        """Digest of `settings`."""
        return canonical_digest(self.settings)

    def solve_block(
        self, statistics: BlockStatistics, scratch: Path
    ) -> tuple[list[LayerSolution], dict[str, dict[str, Any]]]:
        """Solves all layers of a block but those that are left out.

        Args:
            statistics: of the block.
            scratch: folder for what does not fit in memory.

        Returns:
            The solutions, and per module what the report says beside their numbers; of a layer that is left without
            adapter, why.

        Raises:
            NumericalError: a layer cannot be solved, by name.
            DamagedError: the statistics contradict each other.
            ConfigError: the rank is above a layer's smaller side.
        """
        require_rank(statistics.spec.linears, self.config.rank)
        solutions: list[LayerSolution] = []
        facts: dict[str, dict[str, Any]] = {}
        for group in statistics.spec.groups:
            stopping.check()
            num_tokens = statistics.facts(group.name)["num_tokens"]  # of all: they read the same input
            wanted: tuple[str, ...] = ()
            for name in group.modules:
                if (reason := statistics.facts(name).get("skipped")) is None:
                    wanted += (name,)
                else:
                    facts[name] = self._left_out(statistics, name, NumericalError(f"{name}: {reason}"))
            if not wanted:
                continue
            widest = max(statistics.spec.linear(name).d_out for name in group.modules)
            is_held = isinstance(statistics, HeldStatistics)
            copies = HELD_TILE_COPIES if is_held else TILE_COPIES  # as planned
            layout = solve_layout(
                group.d_in,
                widest,
                self.config.rank,
                self.capacity_bytes,
                num_tokens,
                copies,
                token_rows=group.token_rows,
                min_tokens=num_tokens,
                moment_bytes=group.moment_bytes,
            )
            with ExitStack() as stack:
                places = layout.bands_in_memory, layout.basis_in_memory, layout.basis_in_memory
                # of the factor, of a basis of the tokens, and of what the tokens are along it
                bands = [stack.enter_context(SpilledBands(scratch, place, self.device)) for place in places]
                moment = statistics.moment(group, self.device)
                checked = CheckedMoment(moment, group, self.timeline, from_disk=not is_held)
                try:
                    factor = self._factorize(statistics, group, wanted, checked, bands)
                except NumericalError as error:
                    facts |= {name: self._left_out(statistics, name, error) for name in wanted}
                    continue
                for name in wanted:
                    stopping.check()
                    try:
                        solutions.append(self._solve_layer(statistics, name, factor, layout.gradient, scratch))
                    except NumericalError as error:
                        facts[name] = self._left_out(statistics, name, error)
                        continue
                    spread = checked.effective_rank
                    if group.token_rows:
                        spread = factor.effective_rank if isinstance(factor, TokenFactor | BasisFactor) else 0.0
                    facts[name] = self._facts(statistics, solutions[-1]) | {
                        "effective_rank": spread,
                        "statistics": "rows" if group.token_rows else "sums",
                    }
            release_unused(self.device)
        return solutions, facts

    def _factorize(
        self,
        statistics: BlockStatistics,
        group: InputGroup,
        wanted: tuple[str, ...],
        moment: CheckedMoment,
        bands: Sequence[SpilledBands],
    ) -> Factor | None:
        damping, (of_factor, of_basis, of_coordinates) = self.config.damping, bands
        if needs_basis(group.d_in, group.token_rows):
            inputs = TokenRows(statistics, group.name, "input_rows", self.device, self.timeline)
            with self.timeline.span("cholesky"):
                return prepare_basis_factor(inputs, damping, wanted, (of_basis, of_coordinates), of_factor)
        if group.token_rows:
            with self.timeline.span("read statistics"):
                rows = statistics.token_rows(group.name, "input_rows").to(self.device)
            with self.timeline.span("eigenvectors"):
                return prepare_token_factor(rows, damping, wanted)
        with self.timeline.span("cholesky"):
            num_tokens = statistics.facts(group.name)["num_tokens"]
            dtype = sums_dtype(group.moment_bytes)
            return prepare_input_factor(moment, damping, wanted, of_factor, num_tokens, dtype)

    def _left_out(self, statistics: BlockStatistics, name: str, error: NumericalError) -> dict[str, Any]:
        """What is kept of a layer without adapter.

        Raises:
            NumericalError: the given one, if no layer may be left out.
        """
        if not self.skip_bad_layers:
            raise NumericalError(f"{error}; --skip-bad-layers leaves such layers without adapter") from error
        stored = statistics.facts(name)
        return {
            "status": SolveStatus.SKIPPED.value,
            "reason": str(error).removeprefix(f"{name}: "),
            "num_tokens": stored["num_tokens"],
            "num_samples": stored["num_samples"],
        }

    def _solve_layer(
        self,
        statistics: BlockStatistics,
        name: str,
        factor: Factor | None,
        form: GradientForm,
        scratch: Path,
    ) -> LayerSolution:
        started = self.timeline.now()
        with ExitStack() as stack:
            gradient: Sequence[torch.Tensor] | TokenGradient | BasisGradient
            if isinstance(factor, BasisFactor):
                held: Bands = {}
                if form == "streamed":
                    held = stack.enter_context(SpilledBands(scratch, 0, self.device))
                gradient = self._along_basis(statistics, name, factor, form, held)
            elif statistics.spec.group_of(name).token_rows:
                wanted = slice(None) if factor is not None else slice(0)  # without inputs no gradient is looked at
                with self.timeline.span("read statistics"):
                    rows = statistics.token_rows(name, "output_rows", wanted).to(self.device)
                d_in = statistics.spec.linear(name).d_in
                gradient = TokenGradient(rows, d_in, statistics.facts(name)["num_samples"])
            elif form == "streamed":
                gradient = statistics.gradient_bands(name, self.device)
            else:
                with self.timeline.span("read statistics"):
                    bands = statistics.gradient_bands(name, self.device)
                    gradient = [band.to(getattr(torch, form)) for band in bands]
            with self.timeline.span("eigenvectors"):
                solution = solve_layer(
                    name,
                    factor,
                    gradient,
                    statistics.output_moment(name, self.device),
                    self.config,
                    population_size=self.population_size,
                    seed=self.seed,
                )
            if solution.stats is None:
                return solution
            stats = dataclasses.replace(solution.stats, seconds=self.timeline.now() - started)
            return dataclasses.replace(solution, stats=stats)

    def _along_basis(
        self, statistics: BlockStatistics, name: str, factor: BasisFactor, form: GradientForm, bands: Bands
    ) -> BasisGradient:
        rows = TokenRows(statistics, name, "output_rows", self.device, self.timeline)
        num_samples = statistics.facts(name)["num_samples"]
        dtype = torch.float64 if form == "float64" else torch.float32
        with self.timeline.span("eigenvectors"):
            return BasisGradient(factor.basis, rows, num_samples, bands, dtype)

    def _facts(self, statistics: BlockStatistics, solution: LayerSolution) -> dict[str, Any]:
        stored = statistics.facts(solution.name)
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
        complete = self.skip_bad_layers or not any(map(is_skipped, read_summaries(units, index).values()))
        if complete and units.metadata(name).fingerprint == self.digest:
            return True
        if stats_unit(index) not in units:
            before = units.metadata(name).get("settings", {})
            if before.get("version") != SOLVER_VERSION:
                raise MismatchError(
                    f"{shown(units.folder.parent)}: block {index} is solved by another version of streamda, whose "
                    "numbers are others, and its statistics are freed; give another --work-dir, or --overwrite to "
                    "start over"
                )
            found = ", ".join(differences(before, self.settings))
            raise MismatchError(
                f"{shown(units.folder.parent)}: block {index} is already solved with other settings of the method "
                f"({found or 'with --skip-bad-layers'}) and its statistics are freed; give the options of the "
                "interrupted run, another --work-dir, or --overwrite to start over"
            )
        units.drop(name)
        return False

    def solve(self, units: UnitStore, statistics: BlockStatistics) -> None:
        """Solves a block and commits the result."""
        solutions, facts = self.solve_block(statistics, units.folder)
        with self.timeline.span("commit"):
            write_solutions(units, statistics.spec.index, self.settings, solutions, facts)
