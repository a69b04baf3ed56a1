"""Solved blocks as committed units: lora_A and lora_B of each layer, and how the solve went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from streamda import files
from streamda.errors import DamagedError, NumericalError
from streamda.methods import LayerSolution, SolveStatus
from streamda.run_parts import canonical_digest
from streamda.units import UnitStore

FACTORS_FILE = "factors.safetensors"


def solve_unit(index: int) -> str:
    """Name of the unit with a block's solution."""
    return f"solve-{index:04d}"


def write_solutions(
    units: UnitStore,
    index: int,
    settings: Mapping[str, Any],
    solutions: Sequence[LayerSolution],
    facts: Mapping[str, Mapping[str, Any]],
) -> None:
    """Commits the solutions of a block.

    Args:
        units: of the run.
        index: of the block.
        settings: that they were solved with.
        solutions: of the block's layers.
        facts: per module, plain JSON to keep beside its status; a module without a solution brings its status along.
    """
    with units.create(solve_unit(index), fingerprint=canonical_digest(settings)) as draft:
        tensors = {}
        for solution in solutions:
            tensors[f"{solution.name}.lora_A"] = solution.lora_a.cpu()
            tensors[f"{solution.name}.lora_B"] = solution.lora_b.cpu()
        with files.FileWriter(draft.path / FACTORS_FILE) as file:  # safetensors' own would be for the owner's eyes only
            file.write(save(tensors))
        draft.record(FACTORS_FILE, file.size, file.crc32c)
        summaries = {solution.name: solution.summary() for solution in solutions}
        draft.metadata["settings"] = dict(settings)
        draft.metadata["modules"] = {
            name: summaries.get(name, {}) | dict(facts.get(name, {})) for name in dict.fromkeys([*facts, *summaries])
        }


def read_factors(units: UnitStore, index: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """lora_A and lora_B by module name, after a full check of the unit.

    Raises:
        DamagedError: the unit does not hold what was committed.
    """
    units.verify(solve_unit(index))
    path = units.path(solve_unit(index)) / FACTORS_FILE
    with files.damage_errors(path):
        try:
            tensors = load_file(path)
        except SafetensorError as error:  # between its check and now
            raise DamagedError(f"{files.shown(path)} cannot be read: {error}") from error
    names = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    return {name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in names}


class SolvedFactors(Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
    """lora_A and lora_B of all solved blocks by module name, one block in memory at a time."""

    def __init__(self, units: UnitStore, indices: Sequence[int]) -> None:
        self._units = units
        self._blocks = {
            name: index
            for index in indices
            for name, facts in read_summaries(units, index).items()
            if not is_skipped(facts)
        }
        self._loaded: tuple[int, dict[str, tuple[torch.Tensor, torch.Tensor]]] | None = None

    def __getitem__(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        index = self._blocks[name]
        if self._loaded is None or self._loaded[0] != index:
            self._loaded = (index, read_factors(self._units, index))
        return self._loaded[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


def read_summaries(units: UnitStore, index: int) -> dict[str, dict[str, Any]]:
    """Per module what `write_solutions` kept beside the factors."""
    return dict(units.metadata(solve_unit(index))["modules"])


def is_skipped(summary: Mapping[str, Any]) -> bool:
    """Whether a layer was left without adapter, by what was kept of it."""
    return bool(summary["status"] == SolveStatus.SKIPPED.value)


def skipped_layers(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The layers that were left without adapter, and why.

    Raises:
        NumericalError: there is no other.
    """
    skipped = {name: str(summary["reason"]) for name, summary in summaries.items() if is_skipped(summary)}
    if skipped and len(skipped) == len(summaries):
        name, reason = next(iter(skipped.items()))
        raise NumericalError(f"no layer could be solved, so there is no adapter to write; {name}: {reason}")
    return skipped
