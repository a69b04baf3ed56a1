"""LoRA-DA (arXiv 2510.24561): the adapter from the low end of the guidance matrix, which is never formed.

With the damped input factor ``Z = L L^T`` and output factor ``y`` (see `streamda.factors` for the statistics):

    D     = -Z^-1 gradient^T diag(1/y)                                  [d_in, d_out]   eq. 21
    Omega = (beta sum_j 1/y_j / N) Z^-1 - alpha D D^T                   [d_in, d_in]    eq. 19
    V     = eigenvectors of Omega's r smallest eigenvalues              [d_in, r]
    A     = V^T a_norm,   B = (V^T D)^T / (gamma a_norm)

Normalizing D by its largest singular value sigma scales Omega as a whole, hence leaves V alone and only divides B.

The operator at work is ``-Omega`` scaled to order one: ``v -> alpha D (D^T v) - c Z^-1 v``. Applying it costs two
triangular solves and four thin products; the Cholesky factorization, shared by the layers that read one input, is
nearly all that is left. Where beta is large, the wanted eigenvectors lie where ``Z^-1`` is small and the operator
hardly tells them apart; there ``Z`` itself, applied to the residuals, is the preconditioner that does. With alpha = 0
they are the top eigenvectors of ``Z``, and ``Z`` is the operator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from streamda import cholesky, eigen
from streamda.config import SolveConfig
from streamda.errors import NumericalError
from streamda.methods.solution import LayerSolution, SolveStats, SolveStatus, layer_generator, standard_start
from streamda.solve_plan import CHUNK_BYTES, MIN_CHUNK_ROWS

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

    def solve(self, block: torch.Tensor) -> torch.Tensor:
        """``Z^-1 block`` for [d_in, k]."""
        return cholesky.solve(self.bands, block) / self.scale

    def multiply(self, block: torch.Tensor) -> torch.Tensor:
        """``Z block / scale`` for [d_in, k]."""
        return cholesky.multiply(self.bands, block)


class Moment(Protocol):
    """A mean input moment [d_in, d_in], read by bands of rows as `streamda.cholesky` cuts them."""

    def __len__(self) -> int:
        """Bands."""

    def diagonal(self) -> torch.Tensor:
        """[d_in] float64."""

    def band(self, index: int) -> torch.Tensor:
        """Band `index`, [rows, stop] float64, which the caller may change."""


def prepare_input_factor(
    moment: Moment, damping: float, names: tuple[str, ...], bands: cholesky.Bands | None = None
) -> InputFactor | None:
    """Damps and factorizes an input moment; raises the damping, tenfold at a time, where it must, and says so.

    Args:
        moment: is read once for each damping that is tried.
        damping: lambda.
        names: modules of the group, for messages.
        bands: takes the factor; in memory where none are given.

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
    del diagonal
    held: cholesky.Bands = {} if bands is None else bands
    used, raises = damping, 0
    while True:

        def damped(index: int, used: float = used) -> torch.Tensor:
            band = moment.band(index).div_(scale)
            band.diagonal(band.shape[1] - band.shape[0]).add_(used / scale)
            return band

        try:
            cholesky.factorize(damped, len(moment), held)
            return InputFactor(held, scale, used, raises)
        except cholesky.NotPositiveDefiniteError:
            held.clear()
        raised = max(10 * used, MIN_RAISED_DAMPING * scale)
        if raised > MAX_RAISED_DAMPING * scale:
            raise NumericalError(
                f"{names[0]}: the input moment is not positive semidefinite (a damping of {used:.1e} did not help); "
                "the statistics hold a non-finite value or are damaged"
            )
        used, raises = raised, raises + 1


def solve_layer(
    name: str,
    factor: InputFactor | None,
    gradient: Sequence[torch.Tensor],
    output_moment: torch.Tensor,
    config: SolveConfig,
    *,
    population_size: int,
    seed: int,
) -> LayerSolution:
    """Solves one layer.

    Args:
        name: module name; with `seed` it fixes the eigensolver's start.
        factor: of the layer's input group; None for an input that was always zero.
        gradient: [d_out, d_in], mean over samples, as bands of rows [rows, d_in] in float32 or float64; may be read
            anew at each use.
        output_moment: [d_out], mean over tokens.
        config: the method's settings.
        population_size: N, rows of the whole training set.
        seed: of the run.

    Raises:
        NumericalError: a statistic or the result is not finite.
    """
    started = time.monotonic()
    d_out, d_in, largest = _extent(gradient)
    if not math.isfinite(largest) or not bool(torch.isfinite(output_moment).all()):
        raise NumericalError(f"{name}: the gradient statistics are not finite")
    if factor is None or largest == 0:
        return standard_start(name, d_in, d_out, config.rank, seed)
    mu = config.damping
    if config.output_damping_ratio is not None:
        mu = config.output_damping_ratio * float(output_moment.double().median())
    y = output_moment.double() + mu
    if not bool((y > 0).all()):
        raise NumericalError(
            f"{name}: the damped output factor is not positive; the median of the output moment is zero, so give "
            "--damping without --output-damping-ratio"
        )
    displacement = _Displacement(
        factor if config.use_fisher else None, gradient, (d_out, d_in), y if config.use_fisher else None
    )
    start = torch.randn(
        d_in,
        min(d_in, config.rank + eigen.guard_vectors(d_in)),
        generator=layer_generator(name, seed),
        dtype=torch.float64,
    ).to(output_moment.device)
    start = start / start.norm(dim=0)
    scale = displacement.magnitude(start)
    if not math.isfinite(scale) or scale == 0:
        raise NumericalError(f"{name}: the displacement over- or underflows in float64")
    variance = config.variance_weight * float((1 / y).sum()) / population_size
    found = _eigenvectors(factor, displacement, scale, variance, start, config)
    sigma = displacement.largest_singular_value(found.vectors, start, scale)

    def in_units(theta: float) -> float:
        """An eigenvalue of minus the guidance matrix, from one of the operator that stood for it."""
        unit = sigma**2 if config.normalize else 1.0
        if config.bias_weight == 0:
            return -variance / unit / max(theta * factor.scale, factor.damping)
        return theta * config.bias_weight * scale**2 / unit

    lora_a, lora_b = _split(found.vectors, displacement.transposed(found.vectors), sigma, config)
    if not (bool(torch.isfinite(lora_a).all()) and bool(torch.isfinite(lora_b).all())):
        raise NumericalError(f"{name}: the solution is not finite in float32; try a larger --damping")
    status = SolveStatus.OK if found.converged else SolveStatus.UNCONVERGED
    if factor.raises and found.converged:
        status = SolveStatus.DAMPED
    return LayerSolution(
        name,
        lora_a,
        lora_b,
        status,
        SolveStats(
            eigenvalues=tuple(in_units(float(value)) for value in found.values),
            next_eigenvalue=in_units(found.next_value) if math.isfinite(found.next_value) else None,
            residual=found.residual,
            steps=found.steps,
            damping=factor.damping,
            output_damping=mu,
            displacement_norm=sigma,
            seconds=time.monotonic() - started,
        ),
    )


def _extent(gradient: Sequence[torch.Tensor]) -> tuple[int, int, float]:
    """d_out, d_in, and the largest magnitude (NaN where a value is not finite) of a gradient in bands."""
    d_out, d_in, largest = 0, 0, 0.0
    for index in range(len(gradient)):
        band = gradient[index]
        low, high = (float(bound) for bound in torch.aminmax(band))  # without a second matrix; NaN comes through
        largest = max(largest, -low, high) if math.isfinite(low + high) else math.nan
        d_out, d_in = d_out + band.shape[0], band.shape[1]
        del band  # before the next one is read
        if math.isnan(largest):
            break
    return d_out, d_in, largest


class _Displacement:
    """The matrix D [d_in, d_out] as products with thin blocks; without Fisher factors it is minus the gradient."""

    def __init__(
        self,
        factor: InputFactor | None,
        gradient: Sequence[torch.Tensor],
        shape: tuple[int, int],
        y: torch.Tensor | None,
    ) -> None:
        self._factor = factor
        self._gradient = gradient
        self._d_out, self._d_in = shape
        self._inverse_y = None if y is None else 1 / y[:, None]

    def precondition(self, block: torch.Tensor) -> torch.Tensor:
        """``Z^-1 block`` for [d_in, k]."""
        return block if self._factor is None else self._factor.solve(block)

    def transposed(self, block: torch.Tensor, solved: torch.Tensor | None = None) -> torch.Tensor:
        """``D^T block``: [d_in, k] -> [d_out, k]; `solved` is ``Z^-1 block`` where it is known already."""
        right = self.precondition(block) if solved is None else solved
        # as rows of vectors, because products with few of them are two to four times as fast that way
        vectors = right.T.contiguous()
        product = vectors.new_empty(vectors.shape[0], self._d_out)
        for start, rows in self._rows():
            torch.mm(vectors, rows.T, out=product[:, start : start + rows.shape[0]])
            del rows  # or it would be there while the next one is made
        return -self._weigh(product.T)

    def times(self, block: torch.Tensor) -> torch.Tensor:
        """``D block``: [d_out, k] -> [d_in, k]."""
        vectors = self._weigh(block).T.contiguous()  # [k, d_out]
        product = vectors.new_zeros(vectors.shape[0], self._d_in)
        for start, rows in self._rows():
            product.addmm_(vectors[:, start : start + rows.shape[0]], rows)
            del rows
        return -self.precondition(product.T)

    def _rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The gradient in float64, by chunks that depend on its shape only: the bits must not depend on the budget."""
        chunk_rows = max(MIN_CHUNK_ROWS, CHUNK_BYTES // (8 * self._d_in))
        start = 0
        for index in range(len(self._gradient)):
            band = self._gradient[index]  # a band may be read for this; a loop over them would hold two
            for row in range(0, band.shape[0], chunk_rows):
                yield start + row, band[row : row + chunk_rows].double()
            start += band.shape[0]
            del band

    def magnitude(self, start: torch.Tensor) -> float:
        """A rough size of D, to bring everything to order one: at most its spectral norm."""
        return math.sqrt(float(self.times(self.transposed(start)).norm(dim=0).max()))

    def largest_singular_value(self, near: torch.Tensor, start: torch.Tensor, scale: float) -> float:
        """The spectral norm, to about ten digits.

        Args:
            near: [d_in, k], directions that probably hold the largest one: the eigenvectors found before.
            start: [d_in, k], random directions for the case that they do not.
            scale: what `magnitude` gave.
        """
        found = eigen.largest_eigenpairs(
            lambda block: self.times(self.transposed(block / scale)) / scale,
            torch.cat((near, start[:, : eigen.GUARD_VECTORS]), dim=1),
            1,
            gap_tolerance=1e-5,
        )
        return math.sqrt(max(float(found.values[0]), 0.0)) * scale

    def _weigh(self, block: torch.Tensor) -> torch.Tensor:
        return block if self._inverse_y is None else block * self._inverse_y


def _eigenvectors(
    factor: InputFactor,
    displacement: _Displacement,
    scale: float,
    variance: float,
    start: torch.Tensor,
    config: SolveConfig,
) -> eigen.EigenSolution:
    """Largest eigenpairs of ``-Omega / (alpha scale^2)`` (of Z over its own scale, where alpha is 0).

    Omega is taken before normalization, its variance term being ``variance Z^-1``.
    """
    if config.bias_weight == 0:
        return eigen.largest_eigenpairs(factor.multiply, start, config.rank)
    variance /= config.bias_weight * scale**2

    def apply(block: torch.Tensor) -> torch.Tensor:
        solved = displacement.precondition(block)  # both terms begin with it
        result = displacement.times(displacement.transposed(block, solved / scale) / scale)
        return result.sub_(solved, alpha=variance) if variance else result

    return eigen.largest_eigenpairs(apply, start, config.rank, precondition=factor.multiply if variance else None)


def _split(
    vectors: torch.Tensor, projected: torch.Tensor, sigma: float, config: SolveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, d_in] and B [d_out, r] in float32 from V [d_in, r] and ``D^T V`` [d_out, r]."""
    lora_b = projected / sigma if config.normalize else projected
    lora_a = vectors.T
    if config.balance:
        left, singular, right = torch.linalg.svd(lora_b, full_matrices=False)
        root = singular.sqrt()
        lora_a, lora_b = root[:, None] * (right @ lora_a), left * root
    a_norm = config.a_norm if config.a_norm is not None else 1 / math.sqrt(config.gamma)
    return (lora_a * a_norm).float().contiguous(), (lora_b / (config.gamma * a_norm)).float().contiguous()
