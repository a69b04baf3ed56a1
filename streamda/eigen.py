"""The few largest eigenpairs of a symmetric operator that is never formed.

Block Krylov with full reorthogonalization, Rayleigh-Ritz, a residual test and a thick restart. Where a preconditioner
is given, later steps also add the preconditioned residual (block Davidson), which is what finds eigenvectors that the
operator itself hardly separates.

Nothing iterative is trusted: the residual is computed from the stored products, convergence is judged against the gap
to the first eigenvalue that is *not* wanted (the error of the subspace is residual over gap), and both are returned.

Inside, vectors are rows [k, n]: products of a large matrix with few vectors are two to four times as fast that way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Operator = Callable[[torch.Tensor], torch.Tensor]
"""Maps a block [n, k] to [n, k]."""

GUARD_VECTORS = 8
"""Vectors carried beside the wanted ones. Fewer converge slower where eigenvalues crowd at the cut; more cost work."""
WIDE_GUARD_VECTORS, WIDE_SIZE = 24, 4096
"""From this size on, a step is bound by reading the operator's matrices and not by its products: more vectors cost
little there, and save steps."""
DEPENDENT = 1e-13
"""Squared length, relative to the longest direction and to one, below which a direction is rounding."""
PLAIN_STEPS = 24
"""Steps before the preconditioner joins in. Where the operator separates its eigenvalues at all it is done by then, and
the preconditioned half of each block would be wasted."""
ROTATED_COLUMNS = 2048
"""Columns of the basis rotated at a time: or there would be a second basis for a moment."""
MAX_BASIS_VECTORS = 30 * 16
"""In the basis before a restart, or 20 blocks of wide ones. A flat spectrum costs twice the steps with a quarter of
it, and may never settle; 704 float64 vectors at n = 28672 are 161 MB, and their images as much."""


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


def guard_vectors(size: int) -> int:
    """Vectors to carry beside the wanted ones for an operator of this size."""
    return WIDE_GUARD_VECTORS if size >= WIDE_SIZE else GUARD_VECTORS


def largest_eigenpairs(
    apply: Operator,
    start: torch.Tensor,
    rank: int,
    *,
    precondition: Operator | None = None,
    gap_tolerance: float = 1e-5,
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
    precision = torch.finfo(start.dtype)
    first = _orthonormal(start.T.contiguous(), None)
    width = first.shape[0]
    limit = basis_limit(size, width)
    basis, images = _Rows(first, limit), _Rows(apply(first.T).T, limit)
    ritz = basis.all @ images.all.T
    for step in range(1, max_steps + 1):
        theta, rotation = torch.linalg.eigh((ritz + ritz.T) / 2)  # ascending
        theta, rotation = theta.flip(0), rotation.flip(1).T
        magnitude = max(float(theta.abs().max()), precision.tiny)
        kept = min(width, theta.numel())
        vectors = rotation[:kept] @ basis.all
        residuals = rotation[:kept] @ images.all - vectors * theta[:kept, None]
        worst = float(residuals[:rank].norm(dim=1).max())
        exhausted = basis.count == size
        gap = float(theta[rank - 1] - theta[rank]) if theta.numel() > rank else float("inf")
        # below the rounding of the products themselves no further step can help
        converged = exhausted or worst <= gap_tolerance * gap or worst <= 64 * precision.eps * magnitude
        extra = precondition if step > PLAIN_STEPS else None
        block = None if converged else _expansion(residuals, basis.all, extra)
        if converged or block is None or step == max_steps:
            return EigenSolution(
                values=theta[:rank],
                vectors=canonical_signs(vectors[:rank].T),
                next_value=float(theta[rank]) if theta.numel() > rank else float("-inf"),
                residual=worst / magnitude,
                steps=step,
                # a basis that cannot grow is an invariant subspace: what it holds is exact
                converged=converged or block is None,
            )
        if basis.count + block.shape[0] > limit:
            kept = limit // 2  # a thin restart forgets what took many steps to find
            basis.rotate(rotation[:kept])
            images.rotate(rotation[:kept])
            block = _orthonormal(block, basis.all)
            ritz = basis.all @ images.all.T
        basis.append(block)
        images.append(apply(block.T).T)
        ritz = _bordered(ritz, basis.all @ images.all[-block.shape[0] :].T)
    raise AssertionError("unreachable: the last step returns")


def basis_limit(size: int, width: int) -> int:
    """Room for vectors in the basis, for blocks of `width`."""
    # two blocks more: one that overflows is seen before it is added
    return min(size, max(MAX_BASIS_VECTORS, 20 * width)) + 2 * width


def _bordered(symmetric: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix [m, m] with more columns [m + k, k], and what these are as rows."""
    beside, corner = columns[: symmetric.shape[0]], columns[symmetric.shape[0] :]
    return torch.cat((torch.cat((symmetric, beside.T)), torch.cat((beside, corner))), dim=1)


class _Rows:
    """A growing matrix [count, n] of vectors in one piece of memory: none is ever moved."""

    def __init__(self, first: torch.Tensor, limit: int) -> None:
        self._rows = first.new_empty(limit, first.shape[1])
        self.count = 0
        self.append(first)

    @property
    def all(self) -> torch.Tensor:
        """All vectors, as a view."""
        return self._rows[: self.count]

    def append(self, block: torch.Tensor) -> None:
        """Adds vectors [k, n]."""
        self._rows[self.count : self.count + block.shape[0]] = block
        self.count += block.shape[0]

    def rotate(self, rotation: torch.Tensor) -> None:
        """Replaces the vectors by combinations of them."""
        count, self.count = self.count, rotation.shape[0]
        for start in range(0, self._rows.shape[1], ROTATED_COLUMNS):
            columns = slice(start, start + ROTATED_COLUMNS)
            self._rows[: self.count, columns] = rotation @ self._rows[:count, columns]


def canonical_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Flips columns [n, k] so that the entry of largest magnitude of each is positive."""
    peaks = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(peaks < 0, -1.0, 1.0).to(vectors.dtype)


def _expansion(residuals: torch.Tensor, basis: torch.Tensor, precondition: Operator | None) -> torch.Tensor | None:
    """New orthonormal directions [k, n] from the residuals, or None where they add nothing."""
    scales = residuals.norm(dim=1, keepdim=True)
    residuals = residuals[scales[:, 0] > 0] / scales[scales[:, 0] > 0]
    if residuals.shape[0] == 0:
        return None
    if precondition is not None:
        extra = precondition(residuals.T).T
        scales = extra.norm(dim=1, keepdim=True).clamp_min(torch.finfo(extra.dtype).tiny)
        residuals = torch.cat((residuals, extra / scales))
    block = _orthonormal(residuals, basis)
    return block if block.shape[0] else None


def _orthonormal(block: torch.Tensor, against: torch.Tensor | None) -> torch.Tensor:
    """Orthonormal basis [<= k, n] of what a block of unit-size vectors adds to `against` [m, n].

    By eigenvectors of the small Gram matrix, so that all large work is matrix products. Twice is enough (Kahan and
    Parlett): the second pass removes what rounding left of the first. Directions that are all rounding are dropped.
    """
    room = block.shape[1] - (against.shape[0] if against is not None else 0)
    for _ in range(2):
        if against is not None:
            block = block - (block @ against.T) @ against
        weights, rotation = torch.linalg.eigh(block @ block.T)  # ascending
        keep = weights > DEPENDENT * weights[-1:].clamp_min(DEPENDENT)
        block = ((rotation[:, keep] / weights[keep].sqrt()).T @ block).flip(0)[: max(0, room)]
        if block.shape[0] == 0:
            return block
    return block
