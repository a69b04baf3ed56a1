"""The damped, factorized input moment that the layers of one input group share.

    Z = input_moment + lambda I = scale L L^T

The moment is read by bands, for a Cholesky factor once for each damping that is tried. A damping that is too small for
the rounding of the stored sums is raised, tenfold at a time and never silently; a matrix that needs much of it is no
second moment.

A moment that was summed over few tokens, fewer than it has rows, is kept as its few eigenpairs instead, for which it is
read twice; where the tokens' inputs were kept and not summed, they come from these. Of more tokens whose inputs were
kept it is the moment along a basis of these that is factorized.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from streamda import cholesky
from streamda.errors import NumericalError
from streamda.factors import is_finite
from streamda.low_rank import low_rank_factor
from streamda.solve_bytes import INVERTED_SIZE, few_tokens
from streamda.token_basis import BasisMoment, NonFiniteError, Rows, TokenBasis
from streamda.token_span import TokenSpan, token_span

MIN_RAISED_DAMPING = 1e-9
"""Share of the mean diagonal below which a raised damping need not be tried: float32 sums leave negative eigenvalues of
about 1e-7 of the largest one. Lower costs futile factorizations where activations are large, higher damps too much."""
MAX_RAISED_DAMPING = 1e-2
"""Raised damping never exceeds this share of the mean diagonal: a matrix that needs more is no second moment."""


@dataclass(frozen=True, slots=True)
class InputFactor:
    """The factorized, damped input moment that the layers of one group share."""

    bands: cholesky.Bands
    """Of L, float64, the Cholesky factor of the damped moment over `scale`."""
    scale: float
    """Mean diagonal of the moment, divided out before factorizing."""
    damping: float
    """lambda in use, in the moment's own units."""
    raises: int
    inverse: torch.Tensor | None = None
    """``Z^-1`` [d_in, d_in] itself, of a small moment."""

    def solve(self, block: torch.Tensor) -> torch.Tensor:
        """``Z^-1 block`` for [d_in, k]."""
        if self.inverse is not None:
            # vectors as rows, as there; it is symmetric, and the product is a third faster with its transpose
            return (block.T @ self.inverse.T).T
        return cholesky.solve(self.bands, block) / self.scale

    def multiply(self, block: torch.Tensor) -> torch.Tensor:
        """``Z block / scale`` for [d_in, k]."""
        return cholesky.multiply(self.bands, block)


@dataclass(frozen=True, slots=True)
class SpannedFactor:
    """The damped input moment of few tokens: ``vectors diag(eigenvalues) vectors^T + lambda I``."""

    vectors: torch.Tensor
    """W [d_in, k], orthonormal, float64: the directions that the inputs of the tokens span, k at most their number."""
    eigenvalues: torch.Tensor
    """[k] of the moment, positive, ascending."""
    damping: float
    """lambda."""
    cholesky: Callable[[], InputFactor]
    """Factorizes the moment after all, once, for a layer whose gradient leaves the span; raises as
    `prepare_input_factor` does."""

    def lift(self, block: torch.Tensor) -> torch.Tensor:
        """``W block`` [d_in, r] for [k, r]."""
        # as rows of vectors: the other way round it takes ten times as long
        return (block.T @ self.vectors.T).T


@dataclass(frozen=True, slots=True)
class TokenFactor:
    """The same of tokens whose inputs x are known: no gradient of theirs leaves the span."""

    span: TokenSpan
    damping: float
    """lambda."""

    @property
    def eigenvalues(self) -> torch.Tensor:
        """As of a `SpannedFactor`: of the mean."""
        return self.span.eigenvalues / self.span.images.shape[0]

    def lift(self, block: torch.Tensor) -> torch.Tensor:
        """As of a `SpannedFactor`."""
        return self.span.lift(block)

    @property
    def effective_rank(self) -> float:
        """Squared trace over squared Frobenius norm of the moment."""
        return float(self.eigenvalues.sum().square() / self.eigenvalues.square().sum())


@dataclass(frozen=True, slots=True)
class BasisFactor:
    """The damped input moment of tokens whose inputs are known, along a basis of these."""

    basis: TokenBasis
    along: InputFactor
    effective_rank: float
    """Squared trace over squared Frobenius norm of the moment."""

    @property
    def damping(self) -> float:
        """Lambda in use."""
        return self.along.damping


Factor: TypeAlias = InputFactor | SpannedFactor | TokenFactor | BasisFactor
"""What the layers of one input group share, in the form that its tokens allow."""


class Moment(Protocol):
    """A mean input moment [d_in, d_in], read by bands of rows as `streamda.cholesky` cuts them."""

    def __len__(self) -> int:
        """Bands."""

    def diagonal(self) -> torch.Tensor:
        """[d_in] float64."""

    def band(self, index: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Band `index`, [rows, stop], which the caller may change."""


def prepare_input_factor(
    moment: Moment,
    damping: float,
    names: tuple[str, ...],
    bands: cholesky.Bands | None = None,
    num_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> InputFactor | SpannedFactor | None:
    """Damps and factorizes an input moment; raises the damping, tenfold at a time, where it must, and says so.

    Args:
        moment: is read at least once, whole.
        damping: lambda.
        names: modules of the group, for messages.
        bands: takes the factor; in memory where none are given.
        num_tokens: that were summed, which bounds the rank; None where unknown.
        dtype: that they were summed in.

    Returns:
        None for a moment that is exactly zero: its layers never saw an input.

    Raises:
        NumericalError: non-finite values, or not a second moment even with all the damping that is allowed.
    """
    diagonal = moment.diagonal()
    scale = float(diagonal.mean())
    if not math.isfinite(scale) or not bool(torch.isfinite(diagonal).all()):
        raise NumericalError(f"{names[0]}: the input moment is not finite")
    if scale == 0 and not any(bool(moment.band(index).any()) for index in range(len(moment))):
        return None
    if scale <= 0 or bool((diagonal < 0).any()):
        raise NumericalError(f"{names[0]}: the input moment has a negative diagonal; the statistics are damaged")
    factorize = functools.cache(lambda: _factorize(moment, scale, damping, names, {} if bands is None else bands))
    if num_tokens is not None and 0 < num_tokens <= few_tokens(diagonal.numel()):
        thin = low_rank_factor(moment.band, diagonal, len(moment), num_tokens, dtype)
        if thin is not None:
            return _spanned(thin, damping, factorize)
    return factorize()


def prepare_token_factor(rows: torch.Tensor, damping: float, names: tuple[str, ...]) -> TokenFactor | None:
    """As `prepare_input_factor`, from the inputs of few tokens themselves.

    Args:
        rows: [tokens, d_in].
        damping: lambda.
        names: modules of the group, for messages.

    Raises:
        NumericalError: non-finite values.
    """
    if not is_finite(rows):
        raise NumericalError(f"{names[0]}: its input is not finite")
    span = token_span(rows)
    return None if span is None else TokenFactor(span, damping)


def prepare_basis_factor(
    rows: Rows,
    damping: float,
    names: tuple[str, ...],
    basis_bands: tuple[cholesky.Bands, cholesky.Bands],
    bands: cholesky.Bands,
) -> BasisFactor | None:
    """As `prepare_token_factor`, for more tokens than a dense eigenproblem may have.

    Args:
        rows: [tokens, d_in].
        damping: lambda.
        names: modules of the group, for messages.
        basis_bands: take the basis and the tokens' coordinates along it.
        bands: takes the factor of the moment along the basis.

    Raises:
        NumericalError: non-finite values.
    """
    if not rows.shape[0]:
        return None
    try:
        basis = TokenBasis(rows, *basis_bands)
    except NonFiniteError:
        raise NumericalError(f"{names[0]}: its input is not finite") from None
    if not basis.size:
        return None
    moment = BasisMoment(basis)
    along = prepare_input_factor(moment, damping, names, bands)
    assert isinstance(along, InputFactor)  # it is not zero, and how few tokens there are was not told
    return BasisFactor(basis, along, moment.effective_rank)


def _factorize(
    moment: Moment, scale: float, damping: float, names: tuple[str, ...], bands: cholesky.Bands
) -> InputFactor:
    used, raises = damping, 0
    while True:

        def damped(index: int, used: float = used) -> torch.Tensor:
            band = moment.band(index).div_(scale)
            band.diagonal(band.shape[1] - band.shape[0]).add_(used / scale)
            return band

        try:
            cholesky.factorize(damped, len(moment), bands)
        except cholesky.NotPositiveDefiniteError:
            bands.clear()
        else:
            is_small = len(bands) == 1 and bands[0].shape[1] <= INVERTED_SIZE
            inverse = cholesky.inverse(bands[0]).div_(scale) if is_small else None
            return InputFactor(bands, scale, used, raises, inverse)
        raised = max(10 * used, MIN_RAISED_DAMPING * scale)
        if raised > MAX_RAISED_DAMPING * scale:
            raise NumericalError(
                f"{names[0]}: the input moment is not positive semidefinite (a damping of {used:.1e} did not help); "
                "the statistics hold a non-finite value or are damaged"
            )
        used, raises = raised, raises + 1


def _spanned(thin: torch.Tensor, damping: float, factorize: Callable[[], InputFactor]) -> SpannedFactor:
    """From a factor [d_in, k] of the moment."""
    basis, triangle = torch.linalg.qr(thin)
    left, singular, _ = torch.linalg.svd(triangle)
    return SpannedFactor((basis @ left).flip(1).contiguous(), singular.flip(0).square(), damping, factorize)
