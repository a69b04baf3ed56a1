"""Float32 matrix products on CPUs that PyTorch's BLAS was not made for.

PyTorch multiplies float32 matrices with MKL, and MKL takes AVX-512 kernels on Intel's processors only: elsewhere it
reaches half the rate or less of what the processor does. oneDNN, which PyTorch carries too, asks what the processor can
do and not who made it. Where that differs, what is called here goes to oneDNN, through the operator that
`torch.compile` uses for linear layers. Elsewhere MKL is as fast, but on processors that it was not made for it cuts
products with large weights badly: where the processor has AVX-512 in halves only these go to oneDNN, and where it has
none MKL gets them by columns. All else (GPUs, other dtypes, processors of Intel's) is a plain product.

oneDNN makes a kernel of half a megabyte or more for every shape that it meets, and keeps it. Micro-batches come in many
lengths, so products are cut into pieces of a few sizes, at which it is as fast as on the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from streamda.processor import family, vendor

ONEDNN, ONEDNN_LARGE, MKL_BY_COLUMNS, PLAIN = "oneDNN", "oneDNN for large weights", "MKL by columns", "default"
"""What multiplies, and how."""
MKL_VENDOR = "GenuineIntel"
"""Whose processors MKL is made for."""
HALVED = ("AuthenticAMD", 25)
"""Maker and family of processors that compute AVX-512 in two halves (Zen 4), in which MKL leaves nothing unused: with
copies into pieces and out of them a 135M model took 8 % longer when all went to oneDNN."""
PIECES = (256, 128, 64)
"""Rows of a product at a time. Fewer sizes are fewer kernels to keep; larger ones are no faster, smaller ones lose a
third of the rate. What is left over is part of a last piece that overlaps the one before it; products with fewer rows
take the plain way."""
TERMS = (1024, 512, 256, 128, 64)
"""Of sums at a time, too: for each piece of it the result is read and written once more."""
MAX_STEP = 2 * TERMS[0]
"""The longest sum that is not cut where its terms lie far apart, as in a transposed weight: oneDNN slows down with
their number, at 5120 by a fifth. Longer ones are cut like other sums."""
COLUMN_STEP = 64
"""Columns of a sum's result are filled up to a multiple of it: how many directions a span has depends on the data."""
WIDE_TERMS = (256, 64)
"""Where pieces are added up in a wider dtype: within one, the rounding grows with its length."""
PIECE_BYTES = 32 << 20
"""Of an operand that is copied for a piece of the sums, or of a piece of the result, unless the smallest piece is more.
Half of it would cut a 13B model's widest layer into smaller pieces, and read and write its sums more often."""
LARGE_WEIGHT = 4 << 20
"""Numbers of a weight from which on MKL cuts products with it badly: on Zen 4 oneDNN takes 5 to 45 % less time,
the least of it where rows are few."""
MKL_COLUMNS, MKL_MOST_ROWS, MKL_LEAST_TERMS = 1024, 1024, 2048
"""Columns of a product with a large weight at a time, where its rows are no more than the second number and its sums no
shorter than the third: on Zen 3 a block of a 13B model takes a quarter less time forward at 512 rows. With more rows
MKL's own cut is as good; what short sums give takes too long to copy."""
TRIANGLE_ROWS = 192
"""Rows per product inside a triangle. Smaller skips more of what is above the diagonal (of 576 columns 256 skips a
third), larger keeps the matrix products big enough to run at full rate."""
TILE_ROWS, TILE_COLUMNS = 256, 2048
"""Of a result at a time: 2 MB stay in a cache until they are added. Where it has no more columns than that, twice as
many rows are faster."""


@functools.cache
def cpu_products() -> str:
    """How this machine's CPU multiplies float32 matrices; it depends on nothing but the machine."""
    made_by = vendor()
    if made_by in (None, MKL_VENDOR):
        return PLAIN
    if (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch has no types for it
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return ONEDNN_LARGE if (made_by, family()) == HALVED else ONEDNN
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # torch has no types for it
    return MKL_BY_COLUMNS if has_mkl else PLAIN


def product_library(device: torch.device) -> str:
    """What multiplies float32 matrices on a device, as a run's record names it; it decides last bits."""
    return cpu_products() if device.type == "cpu" else PLAIN


def linear(
    input: torch.Tensor,  # as PyTorch calls it, for those who give it by name
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `torch.nn.functional.linear`; the fast path is for weights and biases that need no gradient.

    Args:
        input: [..., d_in].
        weight: [d_out, d_in].
        bias: [d_out] or None.
    """
    if not _is_fast_linear(input, weight, bias):
        return F.linear(input, weight, bias)
    result: torch.Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]  # torch has no types for it
    return result


def work_bytes(device: torch.device, terms: int, width: int) -> int:
    """Bytes that the products below take beside operands and result, at most.

    Args:
        device: that multiplies.
        terms: of the longest sum.
        width: of the widest operand or result.
    """
    if product_library(device) != ONEDNN:  # sums are plain, and linear layers cut into pieces of few megabytes
        return 0
    # narrower operands are cut into longer pieces, so the widest is not always the largest; copies have no odd columns
    filled = width + -width % COLUMN_STEP
    copies = [size * min(filled, PIECE_BYTES // (4 * size) + COLUMN_STEP) for size in TERMS if size <= terms]
    copies.append(TERMS[-1] * filled)
    factor = 2 * 2 * TILE_ROWS * min(terms, TERMS[0])  # without the terms that were seen, and row-major
    return 4 * (max(copies) + factor + TILE_ROWS * max(width, 2 * TILE_COLUMNS))


def in_model(device: torch.device) -> AbstractContextManager[object]:
    """A context in which modules' linear layers take `linear`."""
    return nullcontext() if product_library(device) == PLAIN else _LinearMode()


def add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left^T right``.

    Args:
        total: [m, n], of the dtype of the operands or a wider one, changed in place. Long sums of float32 products lose
            less where what each piece of them adds up to is added in float64.
        left: [terms, m].
        right: [terms, n], best row-major.
    """
    if not _is_fast(left.shape[0], left, right):
        if total.dtype == left.dtype:
            total.addmm_(left.T, right)
        else:
            total.add_(left.T @ right)
        return
    columns = right.shape[1]
    tile_rows = TILE_ROWS if columns > TILE_COLUMNS else 2 * TILE_ROWS
    sizes = _narrowed(TERMS if total.dtype == left.dtype else WIDE_TERMS, columns)
    for terms, seen in _cut(left.shape[0], sizes):
        factor, operand = left[terms], _padded(right[terms]).T
        for start in range(0, total.shape[0], tile_rows):
            rows = slice(start, start + tile_rows)
            total[rows].add_(_onednn(_without(seen, factor[:, rows]).T, operand)[:, :columns])
        del operand  # before the next one is made


def add_triangle_(total: torch.Tensor, x: torch.Tensor, start: int) -> None:
    """Adds what is on and below the diagonal of rows ``[start, stop)`` of ``x^T x``, by blocks of `TRIANGLE_ROWS` rows.

    Args:
        total: [stop - start, stop], changed in place; above the diagonal of a block it holds nothing meaningful.
        x: [terms, at least stop], of the dtype of `total`.
        start: first row.
    """
    stop = start + total.shape[0]
    if not _is_fast(x.shape[0], x):
        for row, end in triangle_rows(start, stop):
            total[row - start : end - start, :end].addmm_(x[:, row:end].T, x[:, :end])
        return
    for terms, seen in _cut(x.shape[0], _narrowed(TERMS, stop)):
        operand = x[terms, :stop].T.contiguous()  # both factors are bands of it
        for row, end in triangle_rows(start, stop):
            factor = _without(seen, operand[row:end].T).T
            for left in range(0, end, TILE_COLUMNS):
                columns = slice(left, min(left + TILE_COLUMNS, end))
                total[row - start : end - start, columns].add_(_onednn(factor, operand[columns]))
            del factor
        del operand  # before the next one is made


def triangle_rows(start: int, stop: int, step: int = 0) -> Iterator[tuple[int, int]]:
    """Cuts rows ``[start, stop)`` of a triangle into those of one product each, by their first and last bound."""
    step = step or TRIANGLE_ROWS
    for row in range(start, stop, step):
        yield row, min(row + step, stop)


class _Linear(torch.autograd.Function):
    """A linear layer of which only the input's gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _times(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return linear(gradients[0], weight.T), None, None


class _LinearMode(TorchFunctionMode):
    """Sends `torch.nn.functional.linear` to `linear`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (linear if func is F.linear else func)(*args, **(kwargs or {}))


def _is_fast_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a linear layer is one that `_times` multiplies well; what is wrong with one is PyTorch's to say."""
    parameters = (weight,) if bias is None else (weight, bias)
    count = x.shape[:-1].numel()
    return (
        weight.ndim == 2
        # oneDNN has no kernels for weights with gaps
        and (weight.is_contiguous() or weight.T.is_contiguous())
        and x.ndim > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and (_is_fast(count, x, *parameters) or _is_large(count, x, *parameters))
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in parameters))
    )


def _is_fast(count: int, *operands: torch.Tensor) -> bool:
    """Whether any product with so many rows, or terms to a sum, is cut into pieces for oneDNN."""
    return cpu_products() == ONEDNN and count >= PIECES[-1] and all(map(_is_host_float32, operands))


def _is_large(count: int, x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> bool:
    """Whether a product with so many rows is cut since its weight is large."""
    way = cpu_products()
    return (
        way in (ONEDNN_LARGE, MKL_BY_COLUMNS)
        and weight.numel() >= LARGE_WEIGHT
        and count >= PIECES[-1]
        and (way == ONEDNN_LARGE or (count <= MKL_MOST_ROWS and weight.shape[1] >= MKL_LEAST_TERMS))
        and all(map(_is_host_float32, (x, weight, *bias)))
    )


def _is_host_float32(operand: torch.Tensor) -> bool:
    """Whether a tensor is float32 numbers in a CPU's memory, and nothing else."""
    return (
        type(operand) in (torch.Tensor, torch.nn.Parameter)
        and operand.dtype == torch.float32
        and operand.device.type == "cpu"
        and operand.numel() > 0
    )


def _times(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x weight^T + bias`` by pieces of rows, or of columns."""
    result = x.new_empty(*x.shape[:-1], weight.shape[0])  # no view: a model may change it in place
    multiply = _by_columns if cpu_products() == MKL_BY_COLUMNS else by_onednn
    multiply(result.view(-1, weight.shape[0]), x.reshape(-1, x.shape[-1]), weight, bias)
    return result


def by_onednn(
    result: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``rows weight^T + bias`` into `result` by pieces of rows, whether oneDNN is the faster one or not.

    Args:
        result: [count, d_out], as all that follow float32 in a CPU's memory.
        rows: [count, d_in], of `PIECES`' last rows or more.
        weight: [d_out, d_in], without gaps, or transposed so.
        bias: [d_out] or None.

    Returns:
        The result, as what takes an `out` of PyTorch's does.
    """
    step = weight.shape[1] if weight.is_contiguous() or weight.shape[1] <= MAX_STEP else TERMS[0]
    for piece, _ in _cut(rows.shape[0], _narrowed(PIECES, weight.shape[0])):
        result[piece] = _onednn(rows[piece, :step], weight[:, :step], bias)
        for start in range(step, weight.shape[1], step):
            terms = slice(start, start + step)
            result[piece].add_(_onednn(rows[piece, terms], weight[:, terms]))
    return result


def _by_columns(result: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """``rows weight^T + bias`` into `result`, as the transpose of ``weight rows^T``, which MKL does faster."""
    for start in range(0, weight.shape[0], MKL_COLUMNS):
        columns = slice(start, start + MKL_COLUMNS)
        product = weight[columns] @ rows.T
        result[:, columns] = product.T if bias is None else product.add_(bias[columns, None]).T
        del product  # before the next one is made


def _onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``rows weight^T + bias``, [m, n]."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
    return result


def _narrowed(sizes: tuple[int, ...], width: int) -> tuple[int, ...]:
    """Which pieces of rows of `width` float32 numbers are small enough to lie beside all else."""
    return tuple(size for size in sizes if size * width * 4 <= PIECE_BYTES) or sizes[-1:]


def _cut(count: int, sizes: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Cuts a range, no shorter than the last size, into pieces of the sizes given, descending.

    Yields:
        Each piece, and how many of its first numbers were in an earlier one: the last piece ends with the range, and is
        as long as it can be at no more work than smaller ones would be.
    """
    start = 0
    for size in sizes:
        for _ in range((count - start) // size):
            yield slice(start, start + size), 0
            start += size
        if 0 < count - start <= size <= min(count, -(-(count - start) // sizes[-1]) * sizes[-1]):
            yield slice(count - size, count), start - (count - size)
            return


def _padded(operand: torch.Tensor) -> torch.Tensor:
    """An operand [terms, n] without gaps; with zeros behind its columns where their number is one of many."""
    missing = -operand.shape[1] % COLUMN_STEP
    return F.pad(operand, (0, missing)) if missing else operand.contiguous()


def _without(seen: int, factor: torch.Tensor) -> torch.Tensor:
    """One of two factors [terms, ...] of a sum, with zeros for its first terms where they were summed already."""
    if seen:
        factor = factor.clone()
        factor[:seen] = 0
    return factor
