"""What a solve returns: the factors, a status with a sentence of advice, and how good they are."""

from __future__ import annotations

import enum
import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch


class SolveStatus(enum.Enum):
    """How a layer ended. Every value but OK is shown to the user with its advice."""

    OK = "ok"
    DAMPED = "damped"
    NOISY = "noisy"
    ZERO = "zero"
    UNCONVERGED = "unconverged"
    SKIPPED = "skipped"

    @property
    def advice(self) -> str:
        """One sentence: what it means and what to do."""
        return {
            SolveStatus.OK: "Solved as configured.",
            SolveStatus.DAMPED: (
                "The input moment was not positive definite at the given damping, which was raised; more samples or "
                "a larger --damping avoid it."
            ),
            SolveStatus.NOISY: (
                "There are few tokens, and the inputs of some hardly stand out of the rounding that those of others "
                "leave in the statistics; more samples or a larger --damping avoid it."
            ),
            SolveStatus.ZERO: (
                "The gradient is exactly zero, so the layer got LoRA's standard start (B = 0); it sees no signal from "
                "these samples."
            ),
            SolveStatus.UNCONVERGED: (
                "The eigenvectors did not settle: eigenvalues on both sides of the cut are nearly equal; another "
                "--rank moves the cut."
            ),
            SolveStatus.SKIPPED: (
                "The layer has no adapter: its weight or statistics hold NaN or Inf, or it could not be solved, and "
                "--skip-bad-layers was given; the reasons are in the notes."
            ),
        }[self]


@dataclass(frozen=True, slots=True)
class SolveStats:
    """Numbers about one solved layer, all plain JSON."""

    eigenvalues: tuple[float, ...]
    """Of minus the guidance matrix, descending: the kept ones."""
    next_eigenvalue: float | None
    """The first one left out; None where the layer has no more."""
    residual: float
    """Largest eigenpair residual, relative."""
    steps: int
    damping: float
    """lambda in use, after any raise."""
    output_damping: float
    displacement_norm: float
    """Largest singular value of the displacement before normalization."""
    seconds: float = 0.0
    """From its statistics to its factors, without what its input group's factor took; set by whoever times it."""


@dataclass(frozen=True, slots=True)
class LayerSolution:
    """The starting point of one layer's adapter."""

    name: str
    lora_a: torch.Tensor
    """[rank, d_in] float32."""
    lora_b: torch.Tensor
    """[d_out, rank] float32."""
    status: SolveStatus
    stats: SolveStats | None
    """None where nothing was solved."""

    def summary(self) -> dict[str, Any]:
        """Status and numbers as plain JSON."""
        return {"status": self.status.value} | (asdict(self.stats) if self.stats is not None else {})


def layer_generator(name: str, seed: int) -> torch.Generator:
    """A CPU generator whose stream depends on the layer's name and the seed only, never on the order of layers."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)


def standard_start(name: str, d_in: int, d_out: int, rank: int, seed: int) -> LayerSolution:
    """LoRA's own start (arXiv 2106.09685, as PEFT does it): A uniform in +-1/sqrt(d_in), B zero."""
    bound = 1 / math.sqrt(d_in)
    lora_a = (torch.rand(rank, d_in, generator=layer_generator(name, seed)) * 2 - 1) * bound
    return LayerSolution(name, lora_a, torch.zeros(d_out, rank), SolveStatus.ZERO, None)
