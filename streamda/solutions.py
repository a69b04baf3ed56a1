"""Solved blocks as committed units: lora_A and lora_B of each layer, and how the solve went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from streamda.methods import LayerSolution
from streamda.units import UnitStore

FACTORS_FILE = "factors.safetensors"


def solve_unit(index: int) -> str:
    """Name of the unit with a block's solution."""
    return f"solve-{index:04d}"


def write_solutions(
    units: UnitStore,
    index: int,
    digest: str,
    solutions: Sequence[LayerSolution],
    facts: Mapping[str, Mapping[str, Any]],
) -> None:
    """Commits the solutions of a block.

    Args:
        units: of the run.
        index: of the block.
        digest: of the settings that they were solved with.
        solutions: of the block's layers.
        facts: per module, plain JSON to keep beside its status.
    """
    with units.create(solve_unit(index), fingerprint=digest) as draft:
        tensors = {}
        for solution in solutions:
            tensors[f"{solution.name}.lora_A"] = solution.lora_a.cpu()
            tensors[f"{solution.name}.lora_B"] = solution.lora_b.cpu()
        save_file(tensors, draft.path / FACTORS_FILE)
        draft.metadata["modules"] = {
            solution.name: solution.summary() | dict(facts.get(solution.name, {})) for solution in solutions
        }


def read_factors(units: UnitStore, index: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """lora_A and lora_B by module name, after a full check of the unit.

    Raises:
        DamagedError: the unit does not hold what was committed.
    """
    units.verify(solve_unit(index))
    tensors = load_file(units.path(solve_unit(index)) / FACTORS_FILE)
    names = [key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")]
    return {name: (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in names}


class SolvedFactors(Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
    """lora_A and lora_B of all solved blocks by module name, one block in memory at a time."""

    def __init__(self, units: UnitStore, indices: Sequence[int]) -> None:
        self._units = units
        self._blocks = {name: index for index in indices for name in read_summaries(units, index)}
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
