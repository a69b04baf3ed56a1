"""The low end of LoRA-DA's guidance matrix: its eigenvectors, the displacement along them, and sigma.

    Omega = c Z^-1 - alpha D D^T          [d_in, d_in], before normalization; eq. 19 of arXiv 2510.24561

`by_krylov` is the general way: ``v -> alpha D (D^T v) - c Z^-1 v``, scaled to order one. Applying it costs two
triangular solves and four thin products; the Cholesky factorization, shared by the layers that read one input, is
nearly all that is left. Where beta is large, the wanted eigenvectors lie where ``Z^-1`` is small and the operator
hardly tells them apart; there ``Z`` itself, applied to the residuals, is the preconditioner that does. With alpha = 0
they are the top eigenvectors of ``Z``, and ``Z`` is the operator.

`on_span` is for few tokens. The input moment of T tokens is ``W diag(s) W^T`` with T columns in W at most, and where
the gradient's rows lie in the span of W, as they do where the same tokens made it, so do the columns of D:

    D^T = -K W^T,   K = diag(1/y) (gradient W) diag(1 / (s + lambda))                                  [d_out, T]
    Omega = W (c diag(1 / (s + lambda)) - alpha K^T K) W^T + (c / lambda) (I - W W^T)

No eigenvalue on the span is above c / lambda, so that the low end of Omega is that of a T x T matrix; where that has
fewer rows than eigenvectors are wanted, the rest is any orthonormal one outside the span, along which D is zero.
Nothing iterates, and the rounding of the stored sums, which 1 / lambda would magnify outside the span, does not enter.
Where the tokens' rows are known and not only sums of them, span and gradient come from these (`streamda.token_span`).

`on_basis` is for more tokens than that, whose rows are known: `by_krylov` along a basis of
these (`streamda.token_basis`), for the same reason.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from streamda import eigen
from streamda.config import SolveConfig
from streamda.errors import NumericalError
from streamda.factors import frobenius_norm, largest_magnitude, mirror_lower_
from streamda.methods.displacement import Displacement
from streamda.methods.input_factor import BasisFactor, InputFactor, SpannedFactor, TokenFactor
from streamda.products import add_product_, add_triangle_
from streamda.token_span import TokenGradient

MAX_LEAK = 1e-3
"""Share of the gradient that may lie outside the span of the inputs: gradients of tokens that the input moment does not
count (token mask `labels`) leave far more, and the layer is solved the general way."""
NOISY_LEAK = 1e-5
"""Share from which on it is said that the solution is noisy. Rounding leaves 1e-7 to 1e-6; more means that the inputs
of some tokens hardly stand out of the rounding of the others'. How far B A is off depends on which tokens these are."""
LEAK_PROBES = 8
"""Random vectors by which that share is measured."""
NO_GRADIENT = 1e-12
"""Of the sizes of its two factors, below which a product is the rounding of zero in float64."""


@dataclass(frozen=True, slots=True)
class GradientOnSpan:
    """A gradient along the span of its layer's inputs."""

    product: torch.Tensor
    """``gradient W`` [d_out, k] float64."""
    noisy: bool
    """Whether rounding may be a part of what matters in it."""


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
    """Largest norm of ``A v - theta v``, relative to the largest eigenvalue magnitude."""
    steps: int
    """Applications of the operator to a block."""
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
    start = _drawn(d_in, min(d_in, config.rank + eigen.guard_vectors(d_in)), generator, displacement.device)
    start /= start.norm(dim=0)
    scale = displacement.magnitude(start)
    _require_range(name, scale)
    scaled = variance / (config.bias_weight * scale**2) if config.bias_weight else 0.0

    def apply(block: torch.Tensor) -> torch.Tensor:
        solved = displacement.precondition(block)  # both terms begin with it
        result = displacement.times(displacement.transposed(block, solved / scale) / scale)
        return result.sub_(solved, alpha=scaled) if scaled else result

    if config.bias_weight == 0:
        found = eigen.largest_eigenpairs(factor.multiply, start, config.rank)
    else:
        found = eigen.largest_eigenpairs(apply, start, config.rank, precondition=factor.multiply if scaled else None)
    sigma = displacement.largest_singular_value(found.vectors, start, scale)

    def in_units(theta: float) -> float:
        unit = sigma**2 if config.normalize else 1.0
        if config.bias_weight == 0:
            return -variance / unit / max(theta * factor.scale, factor.damping)
        return theta * config.bias_weight * scale**2 / unit

    return LowEnd(
        eigenvalues=tuple(in_units(float(value)) for value in found.values),
        next_eigenvalue=in_units(found.next_value) if math.isfinite(found.next_value) else None,
        vectors=found.vectors,
        projected=displacement.transposed(found.vectors),
        sigma=sigma,
        residual=found.residual,
        steps=found.steps,
        converged=found.converged,
    )


def on_span(
    name: str,
    factor: SpannedFactor | TokenFactor,
    gradient: GradientOnSpan,
    displacement: Displacement,
    variance: float,
    generator: torch.Generator,
    config: SolveConfig,
) -> LowEnd:
    """Finds the low end as that of a matrix of as many rows as the inputs have independent directions.

    Takes what `by_krylov` takes, and the gradient on the span, which is overwritten.

    Raises:
        NumericalError: D over- or underflows.
    """
    weighted = displacement.weigh(gradient.product)
    damped = factor.eigenvalues + factor.damping
    if config.use_fisher:
        weighted /= damped
    scale = largest_magnitude(weighted)
    _require_range(name, scale)
    weighted /= scale
    gram = weighted.new_zeros(weighted.shape[1], weighted.shape[1])
    add_triangle_(gram, weighted, 0)
    mirror_lower_(gram)
    sigma = math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0)) * scale
    # minus the guidance matrix on the span, in units of alpha scale^2 once alpha is there; else its order, that of Z
    small = gram * config.bias_weight if config.bias_weight else torch.diag(damped)
    constant = 0.0
    if variance and config.bias_weight:
        # c / (s + lambda) is c / (s_max + lambda) and the rest: the constant moves no vector, and would drown what does
        top = float(damped[-1])
        constant = variance / scale**2 / top
        small.diagonal().sub_(constant * ((factor.eigenvalues[-1] - factor.eigenvalues) / damped))
    theta, rotation = torch.linalg.eigh(small)
    theta, rotation = theta.flip(0), rotation.flip(1)[:, : config.rank]
    kept = rotation.shape[1]
    residual = (small @ rotation - rotation * theta[:kept]).norm(dim=0).max() / theta.abs().max()
    # as rows of vectors: the other way round these products take ten times as long
    unsigned = (rotation.T @ factor.vectors.T).T
    if kept < config.rank:
        unsigned = torch.cat((unsigned, _outside(factor.vectors, config.rank - kept, generator)), dim=1)
    vectors = eigen.canonical_signs(unsigned)
    signs = (unsigned * vectors).sum(0).sign()[:kept]
    projected = weighted.new_zeros(weighted.shape[0], config.rank)
    projected[:, :kept] = ((rotation * (-scale * signs)).T @ weighted.T).T

    unit = sigma**2 if config.normalize else 1.0
    values = [
        (float(value) - constant) * scale**2 / unit if config.bias_weight else -variance / unit / float(value)
        for value in theta[: config.rank + 1]
    ]
    outside = min(config.rank + 1, displacement.d_in) - len(values)
    values += [-variance / unit / factor.damping] * outside
    return LowEnd(
        eigenvalues=tuple(values[: config.rank]),
        next_eigenvalue=values[config.rank] if len(values) > config.rank else None,
        vectors=vectors,
        projected=projected,
        sigma=sigma,
        residual=float(residual),
        steps=1,
        converged=True,
        noisy=gradient.noisy,
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
        lifted = torch.cat((lifted, _outside(lifted, missing, generator)), dim=1)
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


def token_gradient_on_span(factor: TokenFactor, gradient: TokenGradient) -> GradientOnSpan | None:
    """A gradient of few tokens along the span of their inputs; None where it is zero."""
    images, rest = factor.span.images, factor.span.rest
    # both at once: the rows are cast for each product
    whole = gradient.along(torch.cat((images, rest), dim=1))
    product, outside = whole[:, : images.shape[1]], whole[:, images.shape[1] :]
    size = frobenius_norm(gradient.rows) * float(images.norm())
    inside = float(product.norm())
    if inside * gradient.num_samples <= NO_GRADIENT * size:
        return None
    return GradientOnSpan(product, factor.span.is_faint or float(outside.norm()) > NOISY_LEAK * inside)


def gradient_on_span(
    factor: SpannedFactor, displacement: Displacement, generator: torch.Generator
) -> GradientOnSpan | None:
    """A gradient along the span of its inputs; None where more of it lies outside than rounding.

    The gradient is a float32 sum, whose rounding is as large as that of a product in float32; so the operands are.
    """
    vectors = factor.vectors
    probes = _drawn(vectors.shape[0], LEAK_PROBES, generator, vectors.device)
    probes -= vectors @ (vectors.T @ probes)
    right = torch.cat((vectors.float(), probes.float()), dim=1)
    along = vectors.new_empty(displacement.d_out, vectors.shape[1])
    leaked = 0.0
    for start, rows in displacement.rows(torch.float32):
        product = along.new_zeros(rows.shape[0], right.shape[1])
        add_product_(product, rows.T, right)
        along[start : start + rows.shape[0]] = product[:, :-LEAK_PROBES]
        leaked += float(product[:, -LEAK_PROBES:].square().sum())
        del rows
    inside = float(along.norm())
    leak = math.sqrt(leaked / LEAK_PROBES) / inside if inside else math.inf
    return GradientOnSpan(along, leak > NOISY_LEAK) if leak <= MAX_LEAK else None


def _outside(vectors: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal columns [d_in, count] at right angles to `vectors` [d_in, k]."""
    drawn = _drawn(vectors.shape[0], count, generator, vectors.device)
    for _ in range(2):  # the second time removes what rounding left of the first
        drawn -= vectors @ (vectors.T @ drawn)
        drawn = torch.linalg.qr(drawn).Q
    return drawn


def _drawn(size: int, count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    return torch.randn(size, count, generator=generator, dtype=torch.float64).to(device)


def _require_range(name: str, scale: float) -> None:
    if not math.isfinite(scale) or scale == 0:
        raise NumericalError(f"{name}: the displacement over- or underflows in float64")
