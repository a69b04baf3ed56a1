"""A thin factor ``M = F F^T`` of a semidefinite matrix whose rank is below its size, and that is read by bands.

The rank is a few hundred where a second moment was summed over a few hundred tokens. Then two products with a few
hundred vectors (randomized range finder, arXiv 0909.4061, then the Nystrom approximation on the range found) replace
the n^3/3 operations of a Cholesky factorization, and the matrix is read twice whatever its rank. The first product only
has to find the range, to which the second applies the matrix: the dtype that the matrix was summed in does for it, and
loses no digit of the result.

The matrix is first scaled to a unit diagonal: a sum of products in float32 is off by its rounding relative to
``sqrt(M_ii M_jj)``, so that after scaling one tolerance serves channels of all sizes.

The result is checked against the matrix itself: a factor that does not reproduce it is no factor, and None is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from streamda.products import add_product_

OVERSAMPLING = 32
"""Random vectors beyond the rank: with none, the smallest direction would be as badly seen as a square random matrix
is conditioned."""
MAX_SURPLUS = 1e-3
"""Of the unit diagonal: magnitude of an eigenvalue beyond `max_rank`, also below zero, that may be rounding."""
PROBES = 8
"""Random vectors that the factor is checked with."""
PROBE_TOLERANCE = 1e-4
"""Of products with them. Rounding of float32 sums leaves a few millionths; a matrix that is not semidefinite, or whose
rank is higher, leaves far more."""


def low_rank_factor(
    read: Callable[[int, torch.dtype], torch.Tensor],
    diagonal: torch.Tensor,
    num_bands: int,
    max_rank: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor | None:
    """Factorizes a symmetric positive semidefinite matrix of rank at most `max_rank`, up to its rounding.

    Args:
        read: gives band i of the lower triangle, [rows, stop] in the dtype asked for, as `streamda.cholesky` cuts
            them; it is changed in place, and what lies above the diagonal is not used.
        diagonal: [n] float64, none negative.
        num_bands: bands of the matrix.
        max_rank: the rank is known to be no higher.
        dtype: that the matrix was summed in. Sums in float64 are known to what a pair of float32 numbers holds.

    Returns:
        F [n, k] float64 with k the directions that stand out of the rounding, at most `max_rank`; None where the rank
        is above `max_rank`, the matrix is not semidefinite, or a value is not finite.
    """
    size = diagonal.numel()
    # a channel that was always zero has a row of zeros; one that has not is no second moment, and must show
    scale = diagonal.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    inverse = (1 / scale)[:, None]

    def times(block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return _product(lambda index: read(index, dtype), num_bands, (inverse * block).to(dtype)).mul_(inverse)

    generator = torch.Generator().manual_seed(size)  # the draw decides rounding only

    def draw(count: int) -> torch.Tensor:
        return torch.randn(size, count, generator=generator).double().to(diagonal.device)

    width = max_rank + extra_vectors(size, max_rank) - PROBES
    found = times(draw(width), dtype)
    if not bool(torch.isfinite(found).all()):
        return None
    basis = torch.linalg.qr(found).Q.double()
    del found
    probes = draw(PROBES)
    images = times(torch.cat((basis, probes), dim=1), torch.float64)
    images, probed = images[:, :width], images[:, width:].clone()
    if not bool(torch.isfinite(images).all()):
        return None
    inner = basis.T @ images
    del basis
    values, rotation = torch.linalg.eigh((inner + inner.T) / 2)
    if bool((values[: width - max_rank].abs() > MAX_SURPLUS).any()):
        return None
    # rounding makes a symmetric matrix of entries of about eps, whose norm is twice eps times the root of the size
    eps = torch.finfo(torch.float32).eps
    noise = 2 * (eps if dtype == torch.float32 else eps**2) * math.sqrt(size)
    kept = values > noise
    kept[: width - max_rank] = False
    factor: torch.Tensor = images @ (rotation[:, kept] / values[kept].sqrt())
    del images
    error = probed - factor @ (factor.T @ probes)
    if not bool(kept.any()) or not float(error.norm()) <= PROBE_TOLERANCE * float(probed.norm()):
        return None
    factor *= scale[:, None]
    return factor


def extra_vectors(size: int, max_rank: int) -> int:
    """Vectors that the matrix is multiplied with beyond `max_rank`."""
    return min(size - max_rank, OVERSAMPLING) + PROBES


def _product(read: Callable[[int], torch.Tensor], num_bands: int, block: torch.Tensor) -> torch.Tensor:
    """``M block`` for [n, k], from one reading of the lower triangle."""
    product = torch.zeros_like(block)
    for index in range(num_bands):
        band = read(index)
        rows, stop = band.shape
        start = stop - rows
        square = band[:, start:].tril_()
        add_product_(product[start:stop], band.T, block[:stop])
        square.diagonal().zero_()
        add_product_(product[:stop], band, block[start:stop])
        del band, square  # before the next one is read
    return product
