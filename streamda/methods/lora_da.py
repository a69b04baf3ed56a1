"""LoRA-DA (arXiv 2510.24561): the adapter from the low end of the guidance matrix, which is never formed.

With the damped input factor ``Z = L L^T`` and output factor ``y`` (see `streamda.factors` for the statistics):

    D     = -Z^-1 gradient^T diag(1/y)                                  [d_in, d_out]   eq. 21
    Omega = (beta sum_j 1/y_j / N) Z^-1 - alpha D D^T                   [d_in, d_in]    eq. 19
    V     = eigenvectors of Omega's r smallest eigenvalues              [d_in, r]
    A     = V^T a_norm,   B = (V^T D)^T / (gamma a_norm)

Normalizing D by its largest singular value sigma scales Omega as a whole, hence leaves V alone and only divides B.
`streamda.methods.low_end` finds V, for few tokens `streamda.methods.on_span`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from streamda.config import SolveConfig
from streamda.errors import NumericalError
from streamda.factors import largest_magnitude
from streamda.methods.displacement import Displacement
from streamda.methods.input_factor import BasisFactor, Factor, InputFactor, SpannedFactor, TokenFactor
from streamda.methods.low_end import LowEnd, by_krylov, on_basis
from streamda.methods.on_span import displacement_of_tokens, displacement_on_span, gradient_on_span, on_span
from streamda.methods.solution import LayerSolution, SolveStats, SolveStatus, layer_generator, standard_start
from streamda.token_basis import BasisGradient
from streamda.token_span import TokenGradient


def solve_layer(
    name: str,
    factor: Factor | None,
    gradient: Sequence[torch.Tensor] | TokenGradient | BasisGradient,
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
            anew at each use; a `TokenGradient` of the tokens that a `TokenFactor` is made from, or a `BasisGradient`
            along the basis of a `BasisFactor`.
        output_moment: [d_out], mean over tokens.
        config: the method's settings.
        population_size: N, rows of the whole training set.
        seed: of the run.

    Raises:
        NumericalError: a statistic or the result is not finite.
    """
    d_out, d_in, largest = _extent(gradient)
    if not math.isfinite(largest) or not bool(torch.isfinite(output_moment).all()):
        raise NumericalError(f"{name}: the gradient statistics are not finite")
    if isinstance(factor, BasisFactor):
        assert isinstance(gradient, BasisGradient)
        d_in = factor.basis.d_in
        largest = 0.0 if gradient.is_zero else largest
    if factor is None or largest == 0:
        return standard_start(name, d_in, d_out, config.rank, seed)
    mu, y = _damped(name, output_moment, config)
    variance = config.variance_weight * float((1 / y).sum()) / population_size
    solved = _low_end(name, factor, gradient, (d_out, d_in), y, variance, config, seed)
    if solved is None:
        return standard_start(name, d_in, d_out, config.rank, seed)
    found, factor = solved
    lora_a, lora_b = _split(found, config)
    if not (bool(torch.isfinite(lora_a).all()) and bool(torch.isfinite(lora_b).all())):
        raise NumericalError(f"{name}: the solution is not finite in float32; try a larger --damping")
    return LayerSolution(
        name,
        lora_a,
        lora_b,
        _status(found, factor),
        SolveStats(
            eigenvalues=found.eigenvalues,
            next_eigenvalue=found.next_eigenvalue,
            residual=found.residual,
            steps=found.steps,
            damping=factor.damping,
            output_damping=mu,
            displacement_norm=found.sigma,
        ),
    )


def _damped(name: str, output_moment: torch.Tensor, config: SolveConfig) -> tuple[float, torch.Tensor]:
    """What the output factor is damped by, and the damped factor y [d_out] float64."""
    mu = config.damping
    if config.output_damping_ratio is not None:
        mu = config.output_damping_ratio * float(output_moment.double().median())
    y = output_moment.double() + mu
    if not bool((y > 0).all()):
        raise NumericalError(
            f"{name}: the damped output factor is not positive; the median of the output moment is zero, so give "
            "--damping without --output-damping-ratio"
        )
    return mu, y


def _low_end(
    name: str,
    factor: Factor,
    gradient: Sequence[torch.Tensor] | TokenGradient | BasisGradient,
    shape: tuple[int, int],
    y: torch.Tensor,
    variance: float,
    config: SolveConfig,
    seed: int,
) -> tuple[LowEnd, Factor] | None:
    """Finds the low end in the way that fits what the layer's factor is.

    Returns:
        It, and the factor that it was found with; None where the gradient turns out to be zero.
    """
    d_out, d_in = shape

    def displacement(inverse: InputFactor | None, bands: Sequence[torch.Tensor], columns: int = d_in) -> Displacement:
        return Displacement(inverse, bands, (d_out, columns), y if config.use_fisher else None, y.device)

    generator = layer_generator(name, seed)
    if isinstance(factor, TokenFactor):
        assert isinstance(gradient, TokenGradient)
        of_tokens = displacement_of_tokens(factor, gradient, displacement(None, ()), config)
        return None if of_tokens is None else (on_span(name, factor, of_tokens, variance, generator, config), factor)
    if isinstance(factor, BasisFactor):
        assert isinstance(gradient, BasisGradient)
        along_basis = displacement(factor.along if config.use_fisher else None, gradient, factor.basis.size)
        return on_basis(name, factor, along_basis, variance, generator, config), factor
    assert not isinstance(gradient, TokenGradient)
    if isinstance(factor, SpannedFactor):
        plain = displacement(None, gradient)
        along = gradient_on_span(factor, plain, generator)
        if along is not None:
            spanned = displacement_on_span(factor, along, plain, config)
            return on_span(name, factor, spanned, variance, generator, config), factor
        factor = factor.cholesky()
        generator = layer_generator(name, seed)  # from its beginning, wherever the span was looked at before
    whole = displacement(factor if config.use_fisher else None, gradient)
    return by_krylov(name, factor, whole, variance, generator, config), factor


def _status(found: LowEnd, factor: Factor) -> SolveStatus:
    """How a layer ended; of what is wrong with it, what matters most."""
    if not found.converged:
        return SolveStatus.UNCONVERGED
    factorized = factor.along if isinstance(factor, BasisFactor) else factor
    if isinstance(factorized, InputFactor) and factorized.raises:
        return SolveStatus.DAMPED
    return SolveStatus.NOISY if found.noisy else SolveStatus.OK


def _extent(gradient: Sequence[torch.Tensor] | TokenGradient) -> tuple[int, int, float]:
    """d_out, d_in, and the largest magnitude (NaN where a value is not finite), of a gradient or its rows."""
    if isinstance(gradient, TokenGradient):
        # of a layer that no token came to there are none
        largest = largest_magnitude(gradient.rows) if gradient.rows.numel() else 0.0
        return gradient.rows.shape[1], gradient.d_in, largest
    d_out, d_in, largest = 0, 0, 0.0
    for index in range(len(gradient)):
        band = gradient[index]
        magnitude = largest_magnitude(band)
        d_out, d_in = d_out + band.shape[0], band.shape[1]
        del band  # before the next one is read
        if not math.isfinite(magnitude):
            return d_out, d_in, math.nan
        largest = max(largest, magnitude)
    return d_out, d_in, largest


def _split(found: LowEnd, config: SolveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, d_in] and B [d_out, r] in float32."""
    lora_a = found.vectors.T
    lora_b = found.projected / found.sigma if config.normalize else found.projected
    if config.balance:
        left, singular, right = torch.linalg.svd(lora_b, full_matrices=False)
        root = singular.sqrt()
        lora_a, lora_b = root[:, None] * (right @ lora_a), left * root
    a_norm = config.a_norm if config.a_norm is not None else 1 / math.sqrt(config.gamma)
    return (lora_a * a_norm).float().contiguous(), (lora_b / (config.gamma * a_norm)).float().contiguous()
