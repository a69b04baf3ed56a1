"""The span of few tokens: eigenpairs of a second moment, and a gradient along them, from the tokens' rows themselves.

With ``x`` [tokens, d_in] the inputs of a layer and ``g`` [tokens, d_out] the gradients of its outputs,

    moment   = x^T x / tokens   = W diag(s) W^T      W [d_in, k] orthonormal
    gradient = g^T x / samples  = (g^T (x W) / samples) W^T

so with fewer tokens than inputs neither matrix need be summed up, kept, or read: what is solved is as small as the
number of tokens, and the only rounding in it is that of the rows. Nor is W made, which is ``x^T C`` for a small C, or
``gradient W``: what is asked of them are a few of their combinations, and the products ``g diag(w) g^T`` of the rows
with themselves, half as much work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from streamda.factors import mirror_lower_
from streamda.products import add_triangle_

CHUNK_COLUMNS = 4096
"""Of rows that are in float64 at a time."""
DISTINCT = 1e-5
"""A direction counts where some row has more than this share of its length along it. Prompts of one template give all
samples tokens whose inputs differ by nothing, or by float32's rounding, 1e-7 to 1e-6, of which the inverse of the
damping would make the largest part of the solution; tokens of a real model differ by 1e-4 and more."""
ROUNDING, CLEAR = 1e-6, 3e-5
"""What lies between these shares may be either, and is said."""
GRAM_RANGE = 1e-6
"""Eigenvalues of ``x x^T``, with rows of unit length, below which its eigenvectors have too few digits; singular values
have all of them, and take longer."""
SQUARED_RANGE = 1e-8
"""The same of eigenvalues relative to the largest, where rows have their lengths."""


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """The eigenpairs of ``x^T x`` above rounding."""

    eigenvalues: torch.Tensor
    """[k] of the sum, not the mean; positive, ascending."""
    images: torch.Tensor
    """``x W`` [tokens, k] float64."""
    rest: torch.Tensor
    """``x R`` [tokens, m] float64 for orthonormal R that is all of ``x`` outside the span."""
    is_faint: bool
    """Whether a direction may as well be the rounding of the rows."""
    left: torch.Tensor
    """[n, d_in], the rows or a basis of theirs."""
    right: torch.Tensor
    """[n, k] float64: ``left^T right`` is W [d_in, k], orthonormal."""

    def lift(self, block: torch.Tensor) -> torch.Tensor:
        """``W block`` [d_in, r] for [k, r]."""
        return _times_rows((self.right @ block).T, self.left).T


@dataclass(frozen=True, slots=True)
class TokenGradient:
    """A mean gradient as the product that it is."""

    rows: torch.Tensor
    """g [tokens, d_out]."""
    d_in: int
    num_samples: int

    def along(self, images: torch.Tensor) -> torch.Tensor:
        """``gradient W`` [d_out, k] float64, for ``x W`` [tokens, k]."""
        return _times_rows(images.T, self.rows).div_(self.num_samples).T

    def moment(self, weights: torch.Tensor | None) -> torch.Tensor:
        """``g diag(weights)^2 g^T`` [tokens, tokens] float64, for [d_out] or ones."""
        return mirror_lower_(_gram(self.rows, weights))


def token_span(rows: torch.Tensor) -> TokenSpan | None:
    """Finds the span of rows.

    Directions are counted among rows of unit length, where those of a small token are as good as those of a large one.

    Args:
        rows: x [tokens, d_in], finite, no more tokens than inputs.

    Returns:
        None where there are none, or nothing but zeros.
    """
    gram = _gram(rows)
    lengths = gram.diagonal().sqrt()
    if not bool(lengths.any()):
        return None
    lengths[lengths == 0] = 1
    # eigh looks at the lower triangle only
    values, turned = torch.linalg.eigh(gram.div_(lengths[:, None]).div_(lengths))
    left: torch.Tensor | None = None
    if float(values[_shares(values, turned) > DISTINCT][0]) < GRAM_RANGE:
        basis, values, turned = _decomposed(rows.double() / lengths[:, None])
        left = basis.T
    shares = _shares(values, turned)
    kept = shares > DISTINCT
    # unit rows are `turned diag(roots)` times orthonormal ones; with their lengths, the columns are to be turned again
    roots = values.clamp_min(0).sqrt()
    along = lengths[:, None] * turned * roots
    eigenvalues, mixed = torch.linalg.eigh(along[:, kept].T @ along[:, kept])
    if float(eigenvalues[0]) < SQUARED_RANGE * float(eigenvalues[-1]):
        _, singular, turning = torch.linalg.svd(along[:, kept], full_matrices=False)
        eigenvalues, mixed = singular.square().flip(0), turning.flip(0).T
    if left is None:
        left, right = rows, (turned[:, kept] / roots[kept] / lengths[:, None]) @ mixed
    else:
        left, right = left[kept], mixed
    # the product of many equal rows has so much rounding of its own
    rounding = max(ROUNDING, 4 * math.sqrt(torch.finfo(torch.float64).eps * float(values[-1])))
    faint = bool(((shares > rounding) & (shares < CLEAR)).any())
    return TokenSpan(eigenvalues, along[:, kept] @ mixed, along[:, ~kept], faint, left, right)


def _shares(values: torch.Tensor, turned: torch.Tensor) -> torch.Tensor:
    """The most that a row of unit length has along each direction; many rows that share one do not make it larger."""
    return turned.abs().amax(dim=0) * values.clamp_min(0).sqrt()


def _decomposed(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``rows = U diag(sqrt(s)) V^T`` as V [columns, tokens], s [tokens] ascending, and U [tokens, tokens]."""
    basis, triangle = torch.linalg.qr(rows.T)
    left, singular, right = torch.linalg.svd(triangle)  # of the transpose: so that V = basis left and U = right^T
    return basis @ left.flip(1), singular.square().flip(0), right.flip(0).T


def _gram(rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The lower triangle of ``rows diag(weights)^2 rows^T`` in float64, for [columns] or ones."""
    gram = rows.new_zeros(rows.shape[0], rows.shape[0], dtype=torch.float64)
    for columns in _chunks(rows):
        chunk = rows[:, columns].double()
        if weights is not None:
            chunk = chunk * weights[columns]  # rows in float64 are not copied
        add_triangle_(gram, chunk.T, 0)
        del chunk  # before the next one is made
    return gram


def _times_rows(block: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``block rows`` [k, columns] float64 for [k, tokens]; that way round it takes half of the time."""
    product = block.new_empty(block.shape[0], rows.shape[1])
    for columns in _chunks(rows):
        torch.mm(block, rows[:, columns].double(), out=product[:, columns])
    return product


def _chunks(rows: torch.Tensor) -> list[slice]:
    return [slice(start, start + CHUNK_COLUMNS) for start in range(0, rows.shape[1], CHUNK_COLUMNS)]
