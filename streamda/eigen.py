"""The few largest eigenpairs of a symmetric operator that is never formed.

Block Krylov with full reorthogonalization, Rayleigh-Ritz, a residual test and a thick restart. Where a preconditioner
is given, later steps also add the preconditioned residual (block Davidson), which is what finds eigenvectors that the
operator itself hardly separates.

Nothing iterative is trusted: the residual is computed from the stored products, convergence is judged against the gap
to the first eigenvalue that is *not* wanted (the error of the subspace is residual over gap), and both are returned.

Inside, vectors are rows [k, n]: products of a large matrix with few vectors are two to four times as fast that way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from streamda.factors import is_finite

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
FASTEST_STEP, MOST_UNSEEN = 100, 4
"""By what a step is taken to shrink residuals, and steps from one look at them to the next at most. For a small
operator the eigenproblem of the basis takes as long as a step itself. Of layers of a 135M model the largest factor was
60, but for a first step; where it is larger, up to three steps are made that nothing needs."""
ROTATED_COLUMNS = 2048
"""Columns of the basis rotated at a time: or there would be a second basis for a moment."""
BASIS_VECTORS = 30 * 16
"""In the basis before a restart; of wide blocks 20 blocks, if these are more. A flat spectrum costs twice the steps
with a quarter of it, and may never settle."""


class NotFiniteError(ArithmeticError):
    """The operator made a number that is not finite."""


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
    hoped_for: float = math.inf,
) -> EigenSolution:
    """Finds the `rank` largest (not largest in magnitude) eigenvalues of a symmetric operator.

    Args:
        apply: the operator; its magnitude should be near 1 (scale it first: solvers judge by absolute numbers).
        start: [n, k] with k >= min(n, rank + 1), the first block; random, or better. float64.
        rank: eigenpairs wanted, at most n.
        precondition: maps residuals [n, k] towards errors [n, k]; any linear map will do, a good one is faster.
        gap_tolerance: residual over gap at which the subspace counts as found.
        max_steps: operator applications at most, each to a block.
        hoped_for: gives up where residuals would have to shrink by more than this in each step that is left.

    Raises:
        NotFiniteError: the operator makes NaN or Inf.
        ValueError: too few columns of the start are independent.
    """
    size = start.shape[0]
    first = _orthonormal(start.T.contiguous(), None)
    width = first.shape[0]
    if width < min(size, rank + 1):  # there would be no gap to judge by
        raise ValueError(f"of {start.shape[1]} vectors to start from only {width} are independent")
    limit = basis_limit(size, width)
    basis, images = _Rows(first, limit), _Rows(_finite(apply(first.T).T), limit)
    ritz = basis.all @ images.all.T
    look_at = 1
    for step in range(1, max_steps + 1):
        # what the last images add to the basis is what residuals span; these cost a look at the whole basis
        block = _expansion(images.last, basis.all, None) if step < look_at else None
        if block is None:
            look = _look(basis, images, ritz, width, rank)
            # below the rounding of the products themselves no further step can help
            enough = max(gap_tolerance * look.gap, 64 * torch.finfo(start.dtype).eps * look.magnitude)
            converged = basis.count == size or look.worst <= enough
            extra = precondition if step > PLAIN_STEPS else None
            block = None if converged else _expansion(look.residuals, basis.all, extra)
            shrinking = math.log(look.worst / enough) if look.worst > enough else 0.0
            hopeless = shrinking > (max_steps - step) * math.log(hoped_for)
            if converged or block is None or step == max_steps or hopeless:
                return EigenSolution(
                    values=look.values[:rank],
                    vectors=canonical_signs(look.vectors[:rank].T),
                    next_value=float(look.values[rank]) if look.values.numel() > rank else float("-inf"),
                    residual=look.worst / look.magnitude,
                    steps=step,
                    # a basis that cannot grow is an invariant subspace: what it holds is exact
                    converged=converged or block is None,
                )
            if basis.count + block.shape[0] > limit:
                kept = limit // 2  # a thin restart forgets what took many steps to find
                basis.rotate(look.rotation[:kept])
                images.rotate(look.rotation[:kept])
                block = _orthonormal(block, basis.all)
                ritz = basis.all @ images.all.T
            # the preconditioner takes residuals, and a restart the vectors that were seen
            most = min(MOST_UNSEEN, PLAIN_STEPS + 1 - step, (limit - basis.count) // width, max_steps - step)
            look_at = step + 1
            while look_at < step + most and look.worst > enough * FASTEST_STEP ** (look_at - step):
                look_at += 1
        basis.append(block)
        images.append(_finite(apply(block.T).T))
        ritz = _bordered(ritz, basis.all @ images.last.T)
    raise AssertionError("unreachable: the last step returns")


def _finite(images: torch.Tensor) -> torch.Tensor:
    if not is_finite(images):
        raise NotFiniteError("the operator over- or underflows")
    return images


def basis_limit(size: int, width: int) -> int:
    """Room for vectors [size] in the basis, for blocks of `width` of them."""
    # two blocks more: one that overflows is seen before it is added
    return min(size, max(BASIS_VECTORS, 20 * width)) + 2 * width


@dataclass(frozen=True, slots=True)
class _Look:
    """Ritz pairs of a basis, largest first."""

    values: torch.Tensor
    """All of them, [count]."""
    rotation: torch.Tensor
    """[count, count], as rows along the basis."""
    vectors: torch.Tensor
    """[width, n], those of the largest values."""
    residuals: torch.Tensor
    """[width, n] of these."""
    worst: float
    """Largest norm of a wanted one."""
    gap: float
    """Between the last wanted value and the next; infinite where there is none."""
    magnitude: float
    """Largest magnitude of a value, never zero."""


def _look(basis: _Rows, images: _Rows, ritz: torch.Tensor, width: int, rank: int) -> _Look:
    """Rayleigh-Ritz.

    Args:
        basis: orthonormal.
        images: of the basis.
        ritz: products of one with the other.
        width: vectors of a block.
        rank: of them that are wanted.
    """
    theta, rotation = small_eigh((ritz + ritz.T) / 2)  # ascending
    theta, rotation = theta.flip(0), rotation.flip(1).T
    vectors = rotation[:width] @ basis.all
    residuals = rotation[:width] @ images.all - vectors * theta[:width, None]
    return _Look(
        values=theta,
        rotation=rotation,
        vectors=vectors,
        residuals=residuals,
        worst=float(residuals[:rank].norm(dim=1).max()),
        gap=float(theta[rank - 1] - theta[rank]) if theta.numel() > rank else math.inf,
        magnitude=max(float(theta.abs().max()), torch.finfo(theta.dtype).tiny),
    )


def _bordered(symmetric: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix [m, m] with more columns [m + k, k], and what these are as rows."""
    beside, corner = columns[: symmetric.shape[0]], columns[symmetric.shape[0] :]
    return torch.cat((torch.cat((symmetric, beside.T)), torch.cat((beside, corner))), dim=1)


class _Rows:
    """A growing matrix [count, n] of vectors in one piece of memory: none is ever moved."""

    def __init__(self, first: torch.Tensor, limit: int) -> None:
        self._rows = first.new_empty(limit, first.shape[1])
        self.count, self._last = 0, 0
        self.append(first)

    @property
    def all(self) -> torch.Tensor:
        """All vectors, as a view."""
        return self._rows[: self.count]

    @property
    def last(self) -> torch.Tensor:
        """The vectors that were added last, as a view."""
        return self._rows[self.count - self._last : self.count]

    def append(self, block: torch.Tensor) -> None:
        """Adds vectors [k, n]."""
        self._last = block.shape[0]
        self._rows[self.count : self.count + block.shape[0]] = block
        self.count += block.shape[0]

    def rotate(self, rotation: torch.Tensor) -> None:
        """Replaces the vectors by combinations of them."""
        count, self.count = self.count, rotation.shape[0]
        for start in range(0, self._rows.shape[1], ROTATED_COLUMNS):
            columns = slice(start, start + ROTATED_COLUMNS)
            self._rows[: self.count, columns] = rotation @ self._rows[:count, columns]


def small_eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `torch.linalg.eigh`, on the host: of matrices of up to some hundred rows a GPU takes milliseconds each."""
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)


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
        weights, rotation = small_eigh(block @ block.T)  # ascending
        keep = weights > DEPENDENT * weights[-1:].clamp_min(DEPENDENT)
        block = ((rotation[:, keep] / weights[keep].sqrt()).T @ block).flip(0)[: max(0, room)]
        if block.shape[0] == 0:
            return block
    return block
