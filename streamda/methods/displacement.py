"""The displacement D of LoRA-DA as products with thin blocks: ``D = -Z^-1 gradient^T diag(1/y)`` is never formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from streamda import eigen
from streamda.factors import is_finite
from streamda.methods.input_factor import InputFactor
from streamda.solve_bytes import most_chunk_rows

SETTLED_NORM = 1e-4
"""Residual over gap at which the largest singular value counts as found: its error is the square of that."""


class Displacement:
    """The matrix D [d_in, d_out] as products with thin blocks; without Fisher factors it is minus the gradient."""

    def __init__(
        self,
        factor: InputFactor | None,
        gradient: Sequence[torch.Tensor],
        shape: tuple[int, int],
        y: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        """Computes nothing.

        Args:
            factor: of the input; None for the identity.
            gradient: bands of rows [rows, d_in], which may be read anew at each use.
            shape: d_out and d_in.
            y: [d_out], the damped output factor; None for ones.
            device: of the gradient.
        """
        self._factor = factor
        self._gradient = gradient
        self.d_out, self.d_in = shape
        self.device = device
        self.weights = None if y is None else 1 / y
        """``1/y`` [d_out]; None for ones."""
        self._minus_weights: torch.Tensor | float = -1.0 if self.weights is None else -self.weights

    def precondition(self, block: torch.Tensor) -> torch.Tensor:
        """``Z^-1 block`` for [d_in, k]."""
        return block if self._factor is None else self._factor.solve(block)

    def transposed(self, block: torch.Tensor, solved: torch.Tensor | None = None) -> torch.Tensor:
        """``D^T block``: [d_in, k] -> [d_out, k]; `solved` is ``Z^-1 block`` where it is known already."""
        right = self.precondition(block) if solved is None else solved
        # as rows of vectors, because products with few of them are two to four times as fast that way
        vectors = right.T.contiguous()
        product = vectors.new_empty(vectors.shape[0], self.d_out)
        for start, rows in self.rows():
            torch.mm(vectors, rows.T, out=product[:, start : start + rows.shape[0]])
            del rows  # or it would be there while the next one is made
        return product.mul_(self._minus_weights).T

    def times(self, block: torch.Tensor) -> torch.Tensor:
        """``D block``: [d_out, k] -> [d_in, k]."""
        vectors = block.T * self._minus_weights  # [k, d_out]
        product = vectors.new_zeros(vectors.shape[0], self.d_in)
        for start, rows in self.rows():
            product.addmm_(vectors[:, start : start + rows.shape[0]], rows)
            del rows
        return self.precondition(product.T)

    def rows(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and rows [count, d_in] of each chunk of the gradient, which may be a view of it.

        Chunks depend on the shape only: the bits must not depend on the budget.
        """
        chunk_rows = most_chunk_rows(self.d_in)
        start = 0
        for index in range(len(self._gradient)):
            band = self._gradient[index]  # a band may be read for this; a loop over them would hold two
            for row in range(0, band.shape[0], chunk_rows):
                yield start + row, band[row : row + chunk_rows].to(dtype)
            start += band.shape[0]
            del band

    def largest_singular_value(
        self,
        vectors: torch.Tensor,
        images: torch.Tensor,
        outside: float,
        penalty: float,
        start: torch.Tensor,
        scale: float,
    ) -> float:
        """The spectral norm, to eight digits where the largest singular values are apart.

        Args:
            vectors: [d_in, k], the eigenvectors found before. D's largest singular vector is along them unless the
                variance term decides what they are.
            images: ``D^T vectors`` [d_out, k].
            outside: see `largest_square`, as a share of `scale` squared.
            penalty: likewise.
            start: [d_in, m], random directions to begin with where it has to be looked for.
            scale: about the size of D.

        Raises:
            NotFiniteError: D over- or underflows.
        """
        along = images / scale
        if not is_finite(along):
            raise eigen.NotFiniteError("the displacement over- or underflows")
        square = largest_square(
            vectors, along.T @ along, lambda block: self.times(along @ block) / scale, outside, penalty
        )
        if square is not None:
            return math.sqrt(square) * scale
        # not from the vectors: where they hold another one exactly, that would pass for the largest
        found = eigen.largest_eigenpairs(
            lambda block: self.times(self.transposed(block / scale)) / scale,
            start,
            1,
            gap_tolerance=SETTLED_NORM,
        )
        return math.sqrt(max(float(found.values[0]), 0.0)) * scale

    def weigh(self, block: torch.Tensor) -> torch.Tensor:
        """``diag(1/y) block`` for [d_out, k], in place."""
        return block if self.weights is None else block.mul_(self.weights[:, None])


def largest_square(
    vectors: torch.Tensor,
    gram: torch.Tensor,
    apply: Callable[[torch.Tensor], torch.Tensor],
    outside: float,
    penalty: float,
) -> float | None:
    """The largest eigenvalue of ``D D^T`` along the eigenvectors found; None unless no other one can be larger.

    These span an invariant subspace of ``D D^T - P`` with ``0 <= P <= penalty``, and along what is left of the space
    that is `outside` at most. So there ``D D^T`` is at most both together; and what it has between the two parts is
    what P has there, half of the penalty at most.

    Args:
        vectors: V [n, r], orthonormal.
        gram: ``V^T D D^T V`` [r, r].
        apply: ``D D^T V block`` [n, k] for [r, k].
        outside: the largest eigenvalue that was left out.
        penalty: the largest eigenvalue that P may have.
    """
    squares, rotation = eigen.small_eigh(gram)  # ascending
    if squares.numel() < 2:
        return None
    second, largest = float(squares[-2]), float(squares[-1])
    if max(second, outside + penalty) + penalty / 2 > largest:
        return None
    residual = apply(rotation[:, -1:]) - (vectors @ rotation[:, -1:]) * squares[-1]
    return largest if float(residual.norm()) < SETTLED_NORM * (largest - second) else None
