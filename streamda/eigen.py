"""The few largest eigenpairs of a symmetric operator that is never formed.

Block Krylov with full reorthogonalization, Rayleigh-Ritz, a residual test and a thick restart. Where a preconditioner
is given, later steps also add the preconditioned residual (block Davidson), which is what finds eigenvectors that the
operator itself hardly separates.

Nothing iterative is trusted: the residual is computed from the stored products, convergence is judged against the gap
to the first eigenvalue that is *not* wanted (the error of the subspace is residual over gap), and both are returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Operator = Callable[[torch.Tensor], torch.Tensor]
"""Maps a block [n, k] to [n, k]."""

GUARD_VECTORS = 8
"""Vectors carried beside the wanted ones. Fewer converge slower where eigenvalues crowd at the cut; more cost work."""
DEPENDENT = 1e-13
"""Squared length, relative to the longest direction and to one, below which a direction is rounding."""
PLAIN_STEPS = 6
"""Steps before the preconditioner joins in. Where the operator separates its eigenvalues it is done by then, and the
preconditioned half of each block would be wasted."""
MAX_BASIS_BLOCKS = 8
"""Blocks in the basis before a restart: 8 blocks of 16 float64 vectors at n = 28672 are 2 x 29 MB."""


@dataclass(frozen=True, slots=True)
class EigenSolution:
    """The largest eigenpairs found, and how far they can be trusted."""

    values: torch.Tensor
    """[rank] eigenvalues, descending."""
    vectors: torch.Tensor
    """[n, rank] orthonormal; in each column the entry of largest magnitude is positive."""
    next_value: float
    """First eigenvalue that was left out (an estimate from below), or -inf if there is none."""
    residual: float
    """Largest column norm of ``A v - theta v``, relative to the largest eigenvalue magnitude seen."""
    steps: int
    converged: bool


def largest_eigenpairs(
    apply: Operator,
    start: torch.Tensor,
    rank: int,
    *,
    precondition: Operator | None = None,
    gap_tolerance: float = 1e-6,
    max_steps: int = 200,
) -> EigenSolution:
    """Finds the `rank` largest (not largest in magnitude) eigenvalues of a symmetric operator.

    Args:
        apply: the operator; its magnitude should be near 1 (scale it first: solvers judge by absolute numbers).
        start: [n, k] with k >= min(n, rank), the first block; random, or better. float64.
        rank: eigenpairs wanted, at most n.
        precondition: maps residuals [n, k] towards errors [n, k]; any linear map will do, a good one is faster.
        gap_tolerance: residual over gap at which the subspace counts as found.
        max_steps: operator applications at most, each to a block.
    """
    size = start.shape[0]
    eps = torch.finfo(start.dtype).eps
    basis = _orthonormal(start, None)
    width = basis.shape[1]
    images = apply(basis)
    for step in range(1, max_steps + 1):
        ritz = basis.T @ images
        theta, rotation = torch.linalg.eigh((ritz + ritz.T) / 2)  # ascending
        theta, rotation = theta.flip(0), rotation.flip(1)
        magnitude = max(float(theta.abs().max()), torch.finfo(start.dtype).tiny)
        kept = min(width, theta.numel())
        vectors = basis @ rotation[:, :kept]
        residuals = images @ rotation[:, :kept] - vectors * theta[:kept]
        worst = float(residuals[:, :rank].norm(dim=0).max())
        exhausted = basis.shape[1] == size
        gap = float(theta[rank - 1] - theta[rank]) if theta.numel() > rank else float("inf")
        # below the rounding of the products themselves no further step can help
        converged = exhausted or worst <= gap_tolerance * gap or worst <= 64 * eps * magnitude
        block = None if converged else _expansion(residuals, basis, precondition if step > PLAIN_STEPS else None)
        if converged or block is None or step == max_steps:
            return EigenSolution(
                values=theta[:rank],
                vectors=canonical_signs(vectors[:, :rank]),
                next_value=float(theta[rank]) if theta.numel() > rank else float("-inf"),
                residual=worst / magnitude,
                steps=step,
                # a basis that cannot grow is an invariant subspace: what it holds is exact
                converged=converged or block is None,
            )
        if basis.shape[1] + block.shape[1] > max(MAX_BASIS_BLOCKS * width, 2 * width + block.shape[1]):
            kept = min(2 * width, theta.numel())
            basis, images = basis @ rotation[:, :kept], images @ rotation[:, :kept]
            block = _orthonormal(block, basis)
        basis = torch.cat((basis, block), dim=1)
        images = torch.cat((images, apply(block)), dim=1)
    raise AssertionError("unreachable: the last step returns")


def canonical_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Flips columns [n, k] so that the entry of largest magnitude of each is positive."""
    peaks = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(peaks < 0, -1.0, 1.0).to(vectors.dtype)


def _expansion(residuals: torch.Tensor, basis: torch.Tensor, precondition: Operator | None) -> torch.Tensor | None:
    """New orthonormal directions [n, k] from the residuals, or None where they add nothing."""
    scales = residuals.norm(dim=0)
    residuals = residuals[:, scales > 0] / scales[scales > 0]
    if residuals.shape[1] == 0:
        return None
    if precondition is not None:
        extra = precondition(residuals)
        residuals = torch.cat((residuals, extra / extra.norm(dim=0).clamp_min(torch.finfo(extra.dtype).tiny)), dim=1)
    block = _orthonormal(residuals, basis)
    return block if block.shape[1] else None


def _orthonormal(block: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
    """Orthonormal basis [n, <= k] of what a block of unit-size columns adds to `against` [n, m].

    By eigenvectors of the small Gram matrix, so that all large work is matrix products. Twice is enough (Kahan and
    Parlett): the second pass removes what rounding left of the first. Directions that are all rounding are dropped.
    """
    room = block.shape[0] - (against.shape[1] if against is not None else 0)
    for _ in range(2):
        if against is not None:
            block = block - against @ (against.T @ block)
        weights, rotation = torch.linalg.eigh(block.T @ block)  # ascending
        keep = weights > DEPENDENT * weights[-1:].clamp_min(DEPENDENT)
        block = (block @ rotation[:, keep] / weights[keep].sqrt()).flip(1)[:, : max(0, room)]
        if block.shape[1] == 0:
            return block
    return block
