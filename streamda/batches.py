"""Samples put together into micro-batches, and what each needs beside its token ids.

Samples are ordered by length, longest first, and a micro-batch takes neighbours only while padding stays small. Samples
are padded on the right; see `streamda.blocks` for why no mask is needed then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamda.config import TokenMask

MAX_PADDING = 0.05
"""Padding allowed in a micro-batch. More would pack better; less would leave the matrix products thin."""
IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Which samples pass through a block together."""

    samples: tuple[int, ...]
    """Indices into the calibration set."""
    length: int
    """Tokens of the longest of them."""

    @property
    def num_rows(self) -> int:
        """Tokens computed, padding included."""
        return len(self.samples) * self.length


def make_micro_batches(lengths: Sequence[int], max_tokens: int) -> tuple[MicroBatch, ...]:
    """Groups samples of similar length; a function of its arguments only, so a resumed run gets the same batches.

    Args:
        lengths: tokens of each sample.
        max_tokens: rows per micro-batch; a sample longer than that is a micro-batch of its own.
    """
    batches: list[MicroBatch] = []
    current: list[int] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        longest = lengths[current[0]] if current else lengths[index]
        rows = longest * (len(current) + 1)
        if current and (rows > max_tokens or (rows - real - lengths[index]) > MAX_PADDING * rows):
            batches.append(MicroBatch(tuple(current), longest))
            current, real = [], 0
        current.append(index)
        real += lengths[index]
    if current:
        batches.append(MicroBatch(tuple(current), lengths[current[0]]))
    return tuple(batches)


@dataclass(frozen=True, slots=True)
class Batch:
    """The tensors of one micro-batch. Rows are positions of the flattened [batch, tokens] grid."""

    input_ids: torch.Tensor
    """[batch, tokens] int64, padded with 0."""
    moment_rows: torch.Tensor | None
    """Rows that enter the second moments; None for all of them."""
    is_padded: bool
    label_rows: torch.Tensor
    """[labels] rows whose next token is a label."""
    label_ids: torch.Tensor
    """[labels] that next token."""
    label_weights: torch.Tensor
    """[labels] float32: one over the number of labels of the row's sample, so that losses are per-sample means."""


def collate(
    ids: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], token_mask: TokenMask, device: torch.device
) -> Batch:
    """Pads samples on the right and finds their rows.

    Args:
        ids: per sample, [tokens] int64.
        labels: per sample, [tokens] int64, not shifted; -100 where there is no loss.
        token_mask: which tokens enter the second moments.
        device: where the result goes.
    """
    length = max(sample.numel() for sample in ids)
    input_ids = torch.zeros(len(ids), length, dtype=torch.long)
    real = torch.zeros(len(ids), length, dtype=torch.bool)
    following = torch.full((len(ids), length), IGNORED_LABEL)  # the label that each position predicts
    for row, (sample, sample_labels) in enumerate(zip(ids, labels, strict=True)):
        input_ids[row, : sample.numel()] = sample
        real[row, : sample.numel()] = True
        following[row, : sample.numel() - 1] = sample_labels[1:]
    predicts = following != IGNORED_LABEL
    counts = predicts.sum(dim=1, keepdim=True).clamp_min(1)
    weights = (1.0 / counts).expand(-1, length)
    chosen = real if token_mask == "attention" else predicts
    return Batch(
        input_ids=input_ids.to(device),
        moment_rows=None if bool(chosen.all()) else chosen.flatten().nonzero()[:, 0].to(device),
        is_padded=not bool(real.all()),
        label_rows=predicts.flatten().nonzero()[:, 0].to(device),
        label_ids=following[predicts].to(device),
        label_weights=weights[predicts].float().to(device),
    )
