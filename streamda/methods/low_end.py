"""The low end of LoRA-DA's guidance matrix: its eigenvectors, the displacement along them, and sigma.

    Omega = c Z^-1 - alpha D D^T          [d_in, d_in], before normalization; eq. 19 of arXiv 2510.24561

`by_krylov` is the general way: ``v -> alpha D (D^T v) - c Z^-1 v``, scaled to order one. Applying it costs two
triangular solves and four thin products; the Cholesky factorization, shared by the layers that read one input, is
nearly all that is left. Where beta is large, the wanted eigenvectors lie where ``Z^-1`` is small and the operator
hardly tells them apart; there ``Z`` itself, applied to the residuals, is the preconditioner that does. With alpha = 0
they are the top eigenvectors of ``Z``, and ``Z`` is the operator.

`on_basis` is for tokens whose rows are known: `by_krylov` along a basis of these (`streamda.token_basis`), since the
rounding of sums would be magnified outside their span. For few of them see `streamda.methods.on_span`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from streamda import eigen
from streamda.config import SolveConfig
from streamda.errors import NumericalError
from streamda.methods.displacement import Displacement
from streamda.methods.input_factor import BasisFactor, InputFactor


@dataclass(frozen=True, slots=True)
class LowEnd:
    """Eigenpairs of minus the guidance matrix, largest first, and what the adapter is made of."""

    eigenvalues: tuple[float, ...]
    """The kept ones, of the matrix as it is with sigma divided out where the configuration says so."""
    next_eigenvalue: float | None
    """The first one left out; None where there is none."""
    vectors: torch.Tensor
    """V [d_in, rank]; in each column the entry of largest magnitude is positive."""
    projected: torch.Tensor
    """``D^T V`` [d_out, rank], sigma not divided out."""
    sigma: float
    """Largest singular value of D."""
    residual: float
    """Largest norm of ``A v - theta v``, relative to the largest eigenvalue magnitude that was computed."""
    steps: int
    """Applications of the operator to a block; a small matrix whose eigenpairs are all computed counts as one."""
    converged: bool
    """Whether the eigenvectors have settled."""
    noisy: bool = False
    """Whether the rounding of the statistics shows in the solution."""


def by_krylov(
    name: str,
    factor: InputFactor,
    displacement: Displacement,
    variance: float,
    generator: torch.Generator,
    config: SolveConfig,
) -> LowEnd:
    """Finds the low end by block Krylov steps.

    Args:
        name: of the layer, for messages.
        factor: of the layer's input.
        displacement: of the layer.
        variance: c.
        generator: makes the start.
        config: the method's settings.

    Raises:
        NumericalError: D over- or underflows.
    """
    d_in = displacement.d_in
    start = draw(d_in, min(d_in, config.rank + eigen.guard_vectors(d_in)), generator, displacement.device)
    start /= start.norm(dim=0)
    scale = 0.0

    def apply(block: torch.Tensor) -> torch.Tensor:
        nonlocal scale
        solved = displacement.precondition(block)  # both terms begin with it
        images = displacement.transposed(block, solved)
        unit = scale or float(images.norm(dim=0).max())
        require_range(name, unit)
        result = displacement.times(images / unit)
        if not scale:  # the first block tells it, which spares an application; from then on all is of order one
            scale = math.sqrt(unit) * math.sqrt(float(result.norm(dim=0).max()))
            require_range(name, scale)
        result *= unit / scale / scale
        if config.bias_weight:
            result.sub_(solved, alpha=variance / config.bias_weight / scale / scale)
        return result

    try:
        if config.bias_weight == 0:
            apply(start)  # for the scale alone
            found = eigen.largest_eigenpairs(factor.multiply, start, config.rank)
            outside = penalty = math.inf
        else:
            precondition = factor.multiply if variance else None
            found = eigen.largest_eigenpairs(apply, start, config.rank, precondition=precondition)
            outside, penalty = found.next_value, variance / config.bias_weight / scale / scale / factor.damping
        projected = displacement.transposed(found.vectors)
        sigma = displacement.largest_singular_value(found.vectors, projected, outside, penalty, start, scale)
    except eigen.NotFiniteError as error:
        raise out_of_range(name) from error

    def in_units(theta: float) -> float:
        unit = sigma**2 if config.normalize else 1.0
        if config.bias_weight == 0:
            return -variance / unit / max(theta * factor.scale, factor.damping)
        return theta * config.bias_weight * scale**2 / unit

    return LowEnd(
        eigenvalues=tuple(in_units(float(value)) for value in found.values),
        next_eigenvalue=in_units(found.next_value) if math.isfinite(found.next_value) else None,
        vectors=found.vectors,
        projected=projected,
        sigma=sigma,
        residual=found.residual,
        steps=found.steps,
        converged=found.converged,
    )


def on_basis(
    name: str,
    factor: BasisFactor,
    displacement: Displacement,
    variance: float,
    generator: torch.Generator,
    config: SolveConfig,
) -> LowEnd:
    """Finds the low end along a basis of the tokens, and lifts it from there.

    Takes what `by_krylov` takes, the displacement along the basis.

    Raises:
        NumericalError: D over- or underflows.
    """
    found = by_krylov(name, factor.along, displacement, variance, generator, config)
    lifted = factor.basis.lift(found.vectors)
    # with more eigenvectors wanted than tokens have directions, the rest lies outside, and nothing of D with it
    missing = min(config.rank, factor.basis.d_in) - lifted.shape[1]
    if missing:
        lifted = torch.cat((lifted, outside_of(lifted, missing, generator)), dim=1)
    vectors = eigen.canonical_signs(lifted)
    projected = torch.nn.functional.pad(found.projected, (0, missing)) * (lifted * vectors).sum(0).sign()
    outside = -variance / factor.damping / (found.sigma**2 if config.normalize else 1.0)
    has_more = factor.basis.d_in > config.rank
    return dataclasses.replace(
        found,
        eigenvalues=found.eigenvalues + missing * (outside,),
        next_eigenvalue=outside if found.next_eigenvalue is None and has_more else found.next_eigenvalue,
        vectors=vectors,
        projected=projected,
        noisy=factor.basis.is_faint,
    )


def outside_of(vectors: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal columns [d_in, count] at right angles to `vectors` [d_in, k]."""
    found = draw(vectors.shape[0], count, generator, vectors.device)
    for _ in range(2):  # the second time removes what rounding left of the first
        found -= vectors @ (vectors.T @ found)
        found = torch.linalg.qr(found).Q
    return found


def draw(size: int, count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Random vectors [size, count] float64; the same on every device."""
    return torch.randn(size, count, generator=generator, dtype=torch.float64).to(device)


def require_range(name: str, scale: float) -> None:
    """Refuses what cannot be brought to order one.

    Raises:
        NumericalError: the size of D is zero or not finite.
    """
    if not math.isfinite(scale) or scale == 0:
        raise out_of_range(name)


def out_of_range(name: str) -> NumericalError:
    """What is said of a layer whose numbers leave the range of float64."""
    return NumericalError(
        f"{name}: the displacement, or what the variance takes off it, over- or underflows in float64"
    )
