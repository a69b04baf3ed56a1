"""Second moments and gradients of one linear layer: sums, counts, and what they become.

Conventions, stated here once (PyTorch orientation; arXiv 2510.24561, section 4):

* A linear layer has weight ``W [d_out, d_in]``, input rows ``x [tokens, d_in]`` and output-gradient rows
  ``g [tokens, d_out]``. ``g`` is the gradient of the *sum over samples of per-sample losses*, where a sample's loss is
  the mean cross-entropy over its own label tokens. So nothing depends on how samples are put into micro-batches.
* What is accumulated and stored is a **sum** with its **count**; sums of several runs add up. Division happens when
  a statistic is read, damping when it is solved:

  ============== ============================================ ==========================
  statistic      sum                                          divided by
  ============== ============================================ ==========================
  gradient       ``g^T x`` over all tokens  [d_out, d_in]     number of samples
  input moment   ``x^T x`` over chosen tokens  [d_in, d_in]   number of chosen tokens
  output moment  ``g * g`` over chosen tokens  [d_out]        number of chosen tokens
  ============== ============================================ ==========================

* Sums are float32, or wider, whatever the dtype of the operands. On CUDA, bfloat16 operands are multiplied with float32
  accumulation and float32 output, which loses nothing: the product of two bfloat16 numbers is exact in float32.
* Where a CPU computes in float32, products of inputs are summed in float64. The damping is a millionth and less of a
  moment's larger eigenvalues, and the rounding of float32 sums as large as its smaller ones, which the inverse makes
  large: that alone put layers of small models, and one in two hundred of a real one, a percent off.
* Only the lower triangle of an input moment is accumulated, by panels of rows ``[start, stop)`` and columns
  ``[0, stop)``. Above the diagonal a panel holds whatever the last partial block left there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from streamda.products import add_product_, add_triangle_, triangle_rows

NORM_ROWS = 1024
"""Rows of a weight whose norm is taken at a time: a float64 copy of the whole would be larger than the block."""
SMALLEST_NORM = 1e-12
"""A float32 norm below it may have lost squares to underflow."""
WIDE_BYTES = 32 << 20
"""Of inputs that are cast to float64 at a time."""
DEVICE_TRIANGLE_ROWS = 1024
"""As `TRIANGLE_ROWS` of a GPU, which larger products fill better. Unmeasured."""
MIRRORED_ROWS = 256
"""Of a matrix that are mirrored at a time. Of 64 to 1024 the fastest: they and their mirror image stay in a cache (1.4
to 2.8 times as fast as 1024 at 576 to 2048 rows of float64)."""
SQUARE_COLUMNS = 2048
"""Output features squared at a time, so that no copy of all gradients is made."""


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """The statistics of one linear layer, divided by their counts."""

    name: str
    gradient: torch.Tensor
    """[d_out, d_in] float32: mean over samples of dloss/dW."""
    input_moment: torch.Tensor
    """[d_in, d_in], symmetric: mean over tokens of x x^T; float64 where it was summed so, else float32."""
    output_moment: torch.Tensor
    """[d_out] float32: mean over tokens of g * g."""
    num_tokens: int
    num_samples: int
    weight_norm: float
    """Frobenius norm of the base weight."""

    def __repr__(self) -> str:
        """Shapes in place of numbers."""
        d_out, d_in = self.gradient.shape
        return f"LayerStatistics({self.name!r}, {d_out} x {d_in}, {self.num_tokens} tokens, {self.num_samples} samples)"


def _is_mixed(total: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the device multiplies narrow operands into wide sums; on others they are cast first."""
    return x.device.type == "cuda" and x.dtype != total.dtype


def add_gradient_(total: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> None:
    """Adds ``g^T x`` to a panel of gradient rows.

    Args:
        total: [rows, d_in] float32, changed in place.
        x: [tokens, d_in].
        g: [tokens, rows], the output gradients of just the panel's rows.
    """
    if _is_mixed(total, x):
        total.add_(torch.mm(g.T, x, out_dtype=total.dtype))
    else:
        add_product_(total, g.to(total.dtype), x.to(total.dtype))


def add_input_moment_(total: torch.Tensor, x: torch.Tensor, start: int) -> None:
    """Adds the lower triangle of ``x^T x`` to a panel of rows ``[start, stop)`` and columns ``[0, stop)``.

    Args:
        total: [stop - start, stop] float32 or, on a CPU, float64; changed in place.
        x: [tokens, d_in].
        start: first row of the panel.
    """
    stop = start + total.shape[0]
    if total.dtype == torch.float64:
        step = wide_tokens(stop)
        for token in range(0, x.shape[0], step):
            add_triangle_(total, x[token : token + step, :stop].double(), start)
        return
    if not _is_mixed(total, x):
        add_triangle_(total, x.to(total.dtype), start)
        return
    for row, end in triangle_rows(start, stop, DEVICE_TRIANGLE_ROWS):
        block = total[row - start : end - start, :end]
        block.add_(torch.mm(x[:, row:end].T, x[:, :end], out_dtype=total.dtype))


def wide_tokens(columns: int) -> int:
    """Tokens that are cast to float64 at a time."""
    return max(1, WIDE_BYTES // (8 * columns))


def round_to_pairs_(sums: torch.Tensor) -> torch.Tensor:
    """Rounds float64 sums [rows, columns] to what two float32 numbers hold, as they are stored; in place, returned."""
    step = max(1, wide_tokens(sums.shape[1]) // 4)
    for row in range(0, sums.shape[0], step):
        rows = sums[row : row + step]
        high = rows.float()
        rows.copy_(rows.sub_(high).float()).add_(high)
    return sums


def fits_float32(sums: torch.Tensor) -> bool:
    """Whether all sums are finite, and are so as float32 numbers."""
    if sums.dtype == torch.float32:
        return is_finite(sums)
    return largest_magnitude(sums) <= torch.finfo(torch.float32).max


def add_output_moment_(total: torch.Tensor, g: torch.Tensor) -> None:
    """Adds the column sums of ``g * g``.

    Args:
        total: [d_out] float32, changed in place.
        g: [tokens, d_out].
    """
    for start in range(0, total.numel(), SQUARE_COLUMNS):
        columns = slice(start, start + SQUARE_COLUMNS)
        total[columns].add_(g[:, columns].to(total.dtype).square().sum(dim=0))


def mirror_lower_(matrix: torch.Tensor) -> torch.Tensor:
    """Copies the lower triangle of a square matrix [n, n] onto its upper one, in place; returns the matrix."""
    size = matrix.shape[0]
    for start in range(0, size, MIRRORED_ROWS):
        stop = min(start + MIRRORED_ROWS, size)
        diagonal = matrix[start:stop, start:stop]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
    return matrix


def largest_magnitude(values: torch.Tensor) -> float:
    """Of a tensor that is not empty, without a second one; not finite where a value is not."""
    # aminmax would copy a transposed matrix first
    flat = values.T if values.ndim == 2 and values.T.is_contiguous() else values
    low, high = (float(bound) for bound in torch.aminmax(flat))
    return max(-low, high)


def is_finite(values: torch.Tensor) -> bool:
    """Whether there is neither NaN nor Inf."""
    # the sum first, at the speed of memory; it may overflow where no value is more than large
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def frobenius_norm(weight: torch.Tensor) -> float:
    """Of a matrix [rows, columns], to six digits."""
    # row by row in float32, at the speed of memory and float64 at a twentieth of it; squares may under- or overflow
    for dtype in (torch.promote_types(weight.dtype, torch.float32), torch.float64):
        bands = [
            torch.linalg.vector_norm(weight[row : row + NORM_ROWS], dim=1, dtype=dtype).double()
            for row in range(0, weight.shape[0], NORM_ROWS)
        ]
        norm = float(torch.linalg.vector_norm(torch.cat(bands)))
        if math.isfinite(norm) and norm > SMALLEST_NORM:
            break
    return norm
