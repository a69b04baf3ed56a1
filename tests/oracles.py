"""LoRA-DA written down as the paper states it: dense, float64, with nothing saved. The package never imports this.

Every matrix that the package avoids is formed here: the inverse of the damped input moment, the displacement, the
guidance matrix and all of its eigenvectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DenseSolution:
    """The dense answer, and what a test needs to know about how well posed it is."""

    lora_a: torch.Tensor
    """[rank, d_in]"""
    lora_b: torch.Tensor
    """[d_out, rank]"""
    omega: torch.Tensor
    """[d_in, d_in] the guidance matrix."""
    eigenvalues: torch.Tensor
    """[d_in] of the guidance matrix, ascending."""
    displacement: torch.Tensor
    """[d_in, d_out], divided by sigma where normalized."""
    sigma: float
    """Largest singular value of the displacement before that division."""

    @property
    def product(self) -> torch.Tensor:
        """B A [d_out, d_in]."""
        return self.lora_b @ self.lora_a

    def relative_gap(self, rank: int) -> float:
        """Distance between the last eigenvalue kept and the first left out, over the largest magnitude."""
        if rank >= self.eigenvalues.numel():
            return math.inf
        return float((self.eigenvalues[rank] - self.eigenvalues[rank - 1]) / self.eigenvalues.abs().max())


def dense_lora_da(
    gradient: torch.Tensor,
    input_moment: torch.Tensor,
    output_moment: torch.Tensor,
    *,
    rank: int,
    population_size: int,
    variance_weight: float = 0.03,
    bias_weight: float = 1.0,
    gamma: float = 1024.0,
    a_norm: float | None = None,
    damping: float = 1e-6,
    output_damping_ratio: float | None = None,
    normalize: bool = True,
    balance: bool = False,
    use_fisher: bool = True,
) -> DenseSolution:
    """Equations 19 and 21 and Theorem 4.2 of arXiv 2510.24561, dense and in float64.

    Args:
        gradient: [d_out, d_in].
        input_moment: [d_in, d_in], both triangles.
        output_moment: [d_out].
        rank: of the adapter.
        population_size: rows of the whole training set.
        variance_weight: beta.
        bias_weight: alpha.
        gamma: B A is divided by it.
        a_norm: norm of the rows of A; None for 1 / sqrt(gamma).
        damping: lambda.
        output_damping_ratio: mu over the median of the output moment; None for mu = lambda.
        normalize: whether the displacement is divided by its largest singular value.
        balance: whether A and B share the singular values of B A.
        use_fisher: whether the displacement is preconditioned at all.
    """
    gradient, output_moment = gradient.double(), output_moment.double()
    moment = (input_moment.double() + input_moment.double().T) / 2
    identity = torch.eye(moment.shape[0], dtype=torch.float64)
    mu = damping if output_damping_ratio is None else output_damping_ratio * float(output_moment.median())
    y = output_moment + mu
    z_inverse = torch.linalg.inv(moment + damping * identity)
    z_inverse = (z_inverse + z_inverse.T) / 2

    displacement = -(z_inverse @ gradient.T @ torch.diag(1 / y)) if use_fisher else -gradient.T.clone()
    sigma = float(torch.linalg.svdvals(displacement)[0])
    if normalize:
        displacement = displacement / sigma
    variance = variance_weight * float((1 / y).sum()) / population_size / (sigma**2 if normalize else 1.0)
    omega = variance * z_inverse - bias_weight * displacement @ displacement.T
    omega = (omega + omega.T) / 2
    eigenvalues, eigenvectors = torch.linalg.eigh(omega)
    v = eigenvectors[:, :rank]
    for column in range(rank):
        if v[v[:, column].abs().argmax(), column] < 0:
            v[:, column] = -v[:, column]

    lora_a, lora_b = v.T, (v.T @ displacement).T
    if balance:
        left, singular, right = torch.linalg.svd(lora_b, full_matrices=False)
        lora_a, lora_b = torch.diag(singular.sqrt()) @ right @ lora_a, left @ torch.diag(singular.sqrt())
    a_norm = 1 / math.sqrt(gamma) if a_norm is None else a_norm
    return DenseSolution(lora_a * a_norm, lora_b / (gamma * a_norm), omega, eigenvalues, displacement, sigma)
