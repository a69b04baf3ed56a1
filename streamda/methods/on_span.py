"""The low end of the guidance matrix for few tokens: that of a matrix with no more rows than there are tokens.

The input moment of T tokens is ``W diag(s) W^T`` with T columns in W at most, and where the gradient's rows lie in the
span of W, as they do where the same tokens made it, so do the columns of D:

    D^T = -K W^T,   K = diag(1/y) (gradient W) diag(1 / (s + lambda))                                  [d_out, T]
    Omega = W (c diag(1 / (s + lambda)) - alpha K^T K) W^T + (c / lambda) (I - W W^T)

No eigenvalue on the span is above c / lambda, so that the low end of Omega is that of a T x T matrix; where that has
fewer rows than eigenvectors are wanted, the rest is any orthonormal one outside the span, along which D is zero.
The rounding of the stored sums, which 1 / lambda would magnify outside the span, does not enter.
Where the tokens' rows are known and not only sums of them, span and gradient come from these (`streamda.token_span`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from streamda import eigen
from streamda.config import SolveConfig
from streamda.factors import frobenius_norm, largest_magnitude, mirror_lower_
from streamda.methods.displacement import Displacement, largest_square
from streamda.methods.input_factor import SpannedFactor, TokenFactor
from streamda.methods.low_end import LowEnd, draw, out_of_range, outside_of, require_range
from streamda.products import add_product_, add_triangle_
from streamda.solve_bytes import is_stepwise
from streamda.token_span import TokenGradient

MAX_LEAK = 1e-3
"""Share of the gradient that may lie outside the span of the inputs: gradients of tokens that the input moment does not
count (token mask `labels`) leave far more, and the layer is solved the general way."""
NOISY_LEAK = 1e-5
"""Share from which on it is said that the solution is noisy. Rounding leaves 1e-7 to 1e-6; more means that the inputs
of some tokens hardly stand out of the rounding of the others'. How far B A is off depends on which tokens these are."""
LEAK_PROBES = 8
"""Random vectors by which that share is measured."""
NEARLY_CANCELLED = 1e-5
"""Of the sizes of its two factors, below which the rounding of the square of a product might show."""
ZERO_IN_FLOAT64 = 1e-12
"""Of the sizes of its two factors, below which a product is the rounding of zero in float64."""

MAX_STEPS, HOPED_FOR = 10, 20.0
"""Steps after which all eigenpairs are computed at once instead; sooner, where residuals would have to shrink by more
than the second number in each step that is left. A 135M model's layers took five to nine steps."""
SETTLED = 1e-6
"""Residual over gap at which a few eigenvectors count as found."""


@dataclass(frozen=True, slots=True)
class GradientOnSpan:
    """A gradient along the span of its layer's inputs."""

    product: torch.Tensor
    """``gradient W`` [d_out, k] float64."""
    noisy: bool
    """Whether rounding may be a part of what matters in it."""


@dataclass(frozen=True, slots=True)
class DisplacementOnSpan:
    """The matrix K of the module's docstring, [d_out, k] in units of `scale`, as far as it is needed."""

    scale: float
    gram: torch.Tensor
    """``K^T K`` [k, k] float64, of order one."""
    times: Callable[[torch.Tensor], torch.Tensor]
    """``K block`` [d_out, r] for [k, r]."""
    noisy: bool
    """As of a `GradientOnSpan`."""


def on_span(
    name: str,
    factor: SpannedFactor | TokenFactor,
    displacement: DisplacementOnSpan,
    variance: float,
    generator: torch.Generator,
    config: SolveConfig,
) -> LowEnd:
    """Finds the low end as that of a matrix of as many rows as the inputs have independent directions.

    Takes what `by_krylov` takes, the displacement on the span.

    Raises:
        NumericalError: D over- or underflows.
    """
    scale, gram = displacement.scale, displacement.gram
    require_range(name, scale)
    damped = factor.eigenvalues + factor.damping
    constant = 0.0
    if config.bias_weight:
        # minus the guidance matrix on the span, in units of alpha scale^2
        small = gram.clone()
        # c / (s + lambda) is c / (s_max + lambda) and the rest: the constant moves no vector, and would drown what does
        constant = variance / config.bias_weight / scale**2 / float(damped[-1])
        rest = constant * ((factor.eigenvalues[-1] - factor.eigenvalues) / damped)
        small.diagonal().sub_(rest)
        require_range(name, largest_magnitude(small))
        try:
            theta, rotation, residual, steps = _largest_eigenpairs(small, config.rank, generator)
        except eigen.NotFiniteError as error:
            raise out_of_range(name) from error
        outside = float(theta[-1]) if theta.numel() > rotation.shape[1] else -math.inf
        penalty = largest_magnitude(rest)
    else:  # its order is that of Z, a diagonal in ascending order
        theta, steps, residual = damped.flip(0)[: config.rank + 1], 1, 0.0
        rotation = torch.eye(damped.numel(), dtype=damped.dtype, device=damped.device).flip(1)[:, : config.rank]
        outside = penalty = math.inf
    sigma = math.sqrt(max(_largest_eigenvalue(gram, rotation, outside, penalty), 0.0)) * scale
    kept = rotation.shape[1]
    unsigned = factor.lift(rotation)
    d_in = unsigned.shape[0]
    if kept < config.rank:  # and so few directions that all of them are no large matrix
        whole = factor.lift(torch.eye(kept, dtype=rotation.dtype, device=rotation.device))
        unsigned = torch.cat((unsigned, outside_of(whole, config.rank - kept, generator)), dim=1)
    vectors = eigen.canonical_signs(unsigned)
    signs = (unsigned * vectors).sum(0).sign()[:kept]
    projected = torch.nn.functional.pad(displacement.times(rotation * (-scale * signs)), (0, config.rank - kept))

    unit = sigma**2 if config.normalize else 1.0
    values = [
        (float(value) - constant) * config.bias_weight * scale**2 / unit
        if config.bias_weight
        else -variance / unit / float(value)
        for value in theta
    ]
    values += [-variance / unit / factor.damping] * (min(config.rank + 1, d_in) - len(values))
    return LowEnd(
        eigenvalues=tuple(values[: config.rank]),
        next_eigenvalue=values[config.rank] if len(values) > config.rank else None,
        vectors=vectors,
        projected=projected,
        sigma=sigma,
        residual=residual,
        steps=steps,
        converged=True,
        noisy=displacement.noisy,
    )


def _largest_eigenpairs(
    matrix: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """Of a symmetric matrix [k, k] float64.

    Returns:
        Eigenvalues [rank + 1, or k if that is less], descending; eigenvectors [k, rank or less] of all but the one
        beyond the rank; the largest norm of ``matrix v - theta v``, relative to the largest magnitude of an eigenvalue
        that was computed; and steps, of which computing all at once is one.

    Raises:
        NotFiniteError: products of the matrix over- or underflow.
    """
    size, steps = matrix.shape[0], 0
    if is_stepwise(size, rank):
        start = draw(size, rank + eigen.GUARD_VECTORS, generator, matrix.device)
        found = eigen.largest_eigenpairs(
            lambda block: (block.T @ matrix).T,
            start / start.norm(dim=0),
            rank,
            gap_tolerance=SETTLED,
            max_steps=MAX_STEPS,
            hoped_for=HOPED_FOR,
        )
        residual = float((matrix @ found.vectors - found.vectors * found.values).norm(dim=0).max())
        if residual <= 2 * SETTLED * float(found.values[-1] - found.next_value):
            theta = torch.cat((found.values, found.values.new_tensor([found.next_value])))
            return theta, found.vectors, found.residual, found.steps
        steps = found.steps
    theta, rotation = torch.linalg.eigh(matrix)
    theta, rotation = theta.flip(0), rotation.flip(1)[:, :rank]
    residual = float((matrix @ rotation - rotation * theta[: rotation.shape[1]]).norm(dim=0).max())
    residual /= max(largest_magnitude(theta), torch.finfo(theta.dtype).tiny)
    return theta[: rank + 1], rotation, residual, steps + 1


def _largest_eigenvalue(gram: torch.Tensor, vectors: torch.Tensor, outside: float, penalty: float) -> float:
    """Of ``K^T K`` [k, k], given the eigenvectors [k, r], which hold its own unless the variance decides.

    Args:
        gram: positive semidefinite.
        vectors: orthonormal.
        outside: see `largest_square`.
        penalty: likewise.
    """
    images = gram @ vectors
    square = largest_square(vectors, vectors.T @ images, lambda block: images @ block, outside, penalty)
    return float(torch.linalg.eigvalsh(gram)[-1]) if square is None else square


def displacement_of_tokens(
    factor: TokenFactor, gradient: TokenGradient, displacement: Displacement, config: SolveConfig
) -> DisplacementOnSpan | None:
    """K of few tokens; None where the gradient is zero.

    With M = ``(x W) diag(1 / (s + lambda)) / samples`` it is ``diag(1/y) g^T M``, and ``K^T K = M^T H M`` with
    ``H = g diag(1/y)^2 g^T`` [tokens, tokens], half of the work that K is. Squares of float32 rows have all their
    digits in float64, and those of differences of rows that are as small as these rows' rounding still have two.

    Args:
        factor: of the layer's input.
        gradient: of the layer, by its tokens.
        displacement: knows y.
        config: the method's settings.
    """
    weights, unit = displacement.weights, 1.0
    if weights is not None:  # their squares must not leave the range
        unit = float(weights.max())
        weights = weights / unit
    products = gradient.moment(weights)
    images, rest = factor.span.images, factor.span.rest
    damped = factor.eigenvalues + factor.damping if config.use_fisher else torch.ones_like(factor.eigenvalues)
    right = images / damped
    size = largest_magnitude(right)
    right /= size
    gram = right.T @ (products @ right)
    inside = float(gram.diagonal() @ (damped * size).square())  # of the images, which are those multiples
    if not inside > NEARLY_CANCELLED**2 * float(products.trace()) * float(images.square().sum()):
        along = token_gradient_on_span(factor, gradient, weights)
        return None if along is None else displacement_on_span(factor, along, displacement, config)
    outside = float(((products @ rest) * rest).sum())
    peak = math.sqrt(float(gram.diagonal().max()))
    right *= gradient.num_samples / (peak * unit)
    return DisplacementOnSpan(
        scale=unit * size * peak / gradient.num_samples,
        gram=(gram + gram.T) / (2 * peak**2),
        times=lambda block: displacement.weigh(gradient.along(right @ block)),
        noisy=factor.span.is_faint or math.sqrt(max(outside, 0.0) / inside) > NOISY_LEAK,
    )


def displacement_on_span(
    factor: SpannedFactor | TokenFactor, gradient: GradientOnSpan, displacement: Displacement, config: SolveConfig
) -> DisplacementOnSpan:
    """K from the gradient on the span, which is overwritten."""
    weighted = displacement.weigh(gradient.product)
    if config.use_fisher:
        weighted /= factor.eigenvalues + factor.damping
    scale = largest_magnitude(weighted)
    weighted /= scale
    gram = weighted.new_zeros(weighted.shape[1], weighted.shape[1])
    add_triangle_(gram, weighted, 0)
    return DisplacementOnSpan(scale, mirror_lower_(gram), lambda block: (block.T @ weighted.T).T, gradient.noisy)


def token_gradient_on_span(
    factor: TokenFactor, gradient: TokenGradient, weights: torch.Tensor | None
) -> GradientOnSpan | None:
    """A gradient of few tokens along the span of their inputs; None where it is zero.

    Args:
        factor: of the layer's input.
        gradient: of the layer, by its tokens.
        weights: [d_out] of the outputs where the part outside the span is measured; None for ones.
    """
    images, rest = factor.span.images, factor.span.rest
    # both at once: the rows are cast for each product
    whole = gradient.along(torch.cat((images, rest), dim=1))
    product, outside = whole[:, : images.shape[1]], whole[:, images.shape[1] :]
    size = frobenius_norm(gradient.rows) * float(images.norm())
    inside, beside = product.norm(dim=1), outside.norm(dim=1)  # of each output
    if float(inside.norm()) * gradient.num_samples <= ZERO_IN_FLOAT64 * size:
        return None
    if weights is not None:
        inside, beside = inside * weights, beside * weights
    return GradientOnSpan(product, factor.span.is_faint or float(beside.norm()) > NOISY_LEAK * float(inside.norm()))


def gradient_on_span(
    factor: SpannedFactor, displacement: Displacement, generator: torch.Generator
) -> GradientOnSpan | None:
    """A gradient along the span of its inputs; None where more of it lies outside than rounding.

    The gradient is a float32 sum, whose rounding is as large as that of a product in float32; so the operands are.
    """
    vectors = factor.vectors
    probes = draw(vectors.shape[0], LEAK_PROBES, generator, vectors.device)
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
