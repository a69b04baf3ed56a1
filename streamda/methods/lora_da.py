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

import torch

from streamda import eigen
from streamda.config import SolveConfig
from streamda.errors import NumericalError
from streamda.methods.input_factor import InputFactor
from streamda.methods.solution import LayerSolution, SolveStats, SolveStatus, layer_generator, standard_start
from streamda.solve_plan import CHUNK_BYTES, MIN_CHUNK_ROWS


def solve_layer(
    name: str,
    factor: InputFactor | None,
    gradient: Sequence[torch.Tensor],
    output_moment: torch.Tensor,
    config: SolveConfig,
    *,
    population_size: int,
    seed: int,
    num_tokens: int | None = None,
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
        num_tokens: that the gradient was summed over, which bounds its rank; None where unknown. It only decides where
            the eigensolver starts.

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
    generator = layer_generator(name, seed)
    start = torch.randn(
        d_in, min(d_in, config.rank + eigen.guard_vectors(d_in)), generator=generator, dtype=torch.float64
    ).to(output_moment.device)
    start = start / start.norm(dim=0)
    scale = displacement.magnitude(start)
    if not math.isfinite(scale) or scale == 0:
        raise NumericalError(f"{name}: the displacement over- or underflows in float64")
    variance = config.variance_weight * float((1 / y).sum()) / population_size
    span = None
    if config.bias_weight and num_tokens is not None and num_tokens <= min(eigen.START_VECTORS, d_in // 2):
        span = torch.randn(d_out, min(num_tokens, d_out), generator=generator, dtype=torch.float64).to(start.device)
    found = _eigenvectors(factor, displacement, scale, variance, start, span, config)
    del span
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
        return -self.precondition(self.unsolved(block))

    def unsolved(self, block: torch.Tensor) -> torch.Tensor:
        """``gradient^T diag(1/y) block``, which is ``-Z D block``: [d_out, k] -> [d_in, k]."""
        vectors = self._weigh(block).T.contiguous()  # [k, d_out]
        product = vectors.new_zeros(vectors.shape[0], self._d_in)
        for start, rows in self._rows():
            product.addmm_(vectors[:, start : start + rows.shape[0]], rows)
            del rows
        return product.T

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
        few = start[:, : eigen.GUARD_VECTORS]
        return math.sqrt(float(self.times(self.transposed(few)).norm(dim=0).max()))

    def largest_singular_value(self, near: torch.Tensor, start: torch.Tensor, scale: float) -> float:
        """The spectral norm, to eight digits.

        Args:
            near: [d_in, k], directions that probably hold the largest one: the eigenvectors found before.
            start: [d_in, k], random directions for the case that they do not.
            scale: what `magnitude` gave.
        """
        found = eigen.largest_eigenpairs(
            lambda block: self.times(self.transposed(block / scale)) / scale,
            torch.cat((near, start[:, : eigen.GUARD_VECTORS]), dim=1),
            1,
            gap_tolerance=1e-4,  # an eigenvalue's error is the square of its vector's
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
    span: torch.Tensor | None,
    config: SolveConfig,
) -> eigen.EigenSolution:
    """Largest eigenpairs of ``-Omega / (alpha scale^2)`` (of Z over its own scale, where alpha is 0).

    Omega is taken before normalization, its variance term being ``variance Z^-1``.

    With `span` [d_out, tokens] the start also holds the range of ``gradient^T``. What few tokens determine lies in it
    but for rounding, so that one wide product finds what would take dozens of thin ones; what is left of the error
    lies where Z is all damping, and that is where the preconditioner helps from the first step on.
    """
    if config.bias_weight == 0:
        return eigen.largest_eigenpairs(factor.multiply, start, config.rank)
    variance /= config.bias_weight * scale**2

    def apply(block: torch.Tensor) -> torch.Tensor:
        solved = displacement.precondition(block)  # both terms begin with it
        result = displacement.times(displacement.transposed(block, solved / scale) / scale)
        return result.sub_(solved, alpha=variance) if variance else result

    precondition = factor.multiply if variance else None
    if span is None:
        return eigen.largest_eigenpairs(apply, start, config.rank, precondition=precondition)
    directions = displacement.unsolved(span)
    directions /= directions.norm(dim=0).clamp_min(torch.finfo(directions.dtype).tiny)
    return eigen.largest_eigenpairs(
        apply,
        torch.cat((directions, start), dim=1),
        config.rank,
        width=start.shape[1],
        precondition=precondition,
        plain_steps=0,
    )


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
