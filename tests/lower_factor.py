"""The factor of a moment as one matrix, out of the form that the package keeps it in."""

from __future__ import annotations

import torch

from streamda import cholesky


def lower_factor(bands: cholesky.Bands) -> torch.Tensor:
    """L [n, n] as one matrix, from bands whose diagonal blocks are inverted (see `streamda.cholesky`)."""
    size = bands[len(bands) - 1].shape[1]
    factor = torch.zeros(size, size, dtype=bands[0].dtype)
    for index in range(len(bands)):
        band = bands[index]
        first = band.shape[1] - band.shape[0]
        factor[first : band.shape[1], : band.shape[1]] = band
        for _, block in cholesky.diagonal_blocks(band):
            factor[block, block.stop :] = 0
            factor[block, block] = torch.linalg.inv(factor[block, block])
    return factor.tril()
