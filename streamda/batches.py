"""Samples put together into micro-batches, and what each needs beside its token ids.

Samples are ordered by length, longest first, and a micro-batch takes neighbours. Few micro-batches keep the products
large and waste rows on padding; the best cut between the two is found exactly. Samples are padded on the right; see
`streamda.blocks` for why no mask is needed then. Of a model whose tokens also see what lies to their right only samples
of one length share a micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamda.config import TokenMask

MAX_PADDING = 0.05
"""Share of all rows that may be padding."""
BATCH_COST_ROWS = 64
"""Rows of padding that one micro-batch less is worth: what its small products and its elementwise work lose."""
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


def make_micro_batches(lengths: Sequence[int], max_tokens: int, *, padded: bool = True) -> tuple[MicroBatch, ...]:
    """Groups samples of similar length; a function of its arguments only, so a resumed run gets the same batches.

    Args:
        lengths: tokens of each sample.
        max_tokens: rows per micro-batch; a sample longer than that is a micro-batch of its own.
        padded: whether samples of several lengths may share one.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    ordered, real = [lengths[index] for index in order], sum(lengths)
    cost = BATCH_COST_ROWS if padded else 0
    while True:
        cuts = _best_cuts(ordered, max_tokens, cost)
        batches = tuple(
            MicroBatch(tuple(order[start:stop]), ordered[start]) for start, stop in itertools.pairwise([0, *cuts])
        )
        rows = sum(batch.num_rows for batch in batches)
        # at a cost of nothing only samples of one length share a micro-batch
        if cost == 0 or rows - real <= MAX_PADDING * rows:
            return batches
        cost //= 2


def micro_batch_text(tokens: int) -> str:
    """What a micro-batch of at most so many tokens is, in words; it never is less than a sample."""
    return "one sample" if tokens == 1 else f"{tokens} tokens"


def _best_cuts(lengths: Sequence[int], max_tokens: int, batch_cost: int) -> list[int]:
    """Where to end each micro-batch so that rows plus costs are least; by dynamic programming.

    Args:
        lengths: in descending order.
        max_tokens: rows per micro-batch.
        batch_cost: of each micro-batch, in rows.
    """
    # of the first samples: rows with costs, and micro-batches, which decide between equals
    least, begins = [(0, 0)], [0]
    for stop in range(1, len(lengths) + 1):
        choices: list[tuple[int, int, int]] = []  # rows with costs, micro-batches, minus the first sample
        for start in range(stop - 1, -1, -1):
            rows = lengths[start] * (stop - start)
            if rows > max_tokens and choices:
                break  # only a sample of its own may be longer
            choices.append((least[start][0] + rows + batch_cost, least[start][1] + 1, -start))
        cost, count, begin = min(choices)
        least.append((cost, count))
        begins.append(-begin)
    cuts, stop = [], len(lengths)
    while stop:
        cuts.append(stop)
        stop = begins[stop]
    return cuts[::-1]


@dataclass(frozen=True, slots=True)
class Labels:
    """What a micro-batch is to predict."""

    rows: torch.Tensor
    """[labels] rows whose next token is a label."""
    ids: torch.Tensor
    """[labels] that next token."""
    weights: torch.Tensor
    """[labels] float32: one over the number of labels of the row's sample, so that losses are per-sample means."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. Rows are positions of the flattened [batch, tokens] grid.

    What only one end of the model needs (token ids, targets) is made there and then from the samples' own tensors, so
    that hardly anything is kept per token for the whole run.
    """

    samples: tuple[int, ...]
    """Indices into the calibration set."""
    shape: tuple[int, int]
    """[batch, tokens], padding included."""
    moment_rows: torch.Tensor | None
    """Rows that enter the second moments; None for all of them."""
    leaves_out_padding: bool
    """Whether the other rows are all padding: no loss hangs on that, and its output gradients are zero."""
    ids: tuple[torch.Tensor, ...]
    """Per sample, [tokens] int64, on the host."""
    labels: tuple[torch.Tensor, ...]
    """Per sample, [tokens] int64, not shifted, on the host."""
    device: torch.device
    """Where tensors of the batch are to be."""

    @property
    def num_rows(self) -> int:
        """Tokens computed, padding included."""
        return self.shape[0] * self.shape[1]

    def input_ids(self) -> torch.Tensor:
        """[batch, tokens] int64, padded with 0."""
        padded = torch.zeros(self.shape, dtype=torch.long)
        for row, sample in enumerate(self.ids):
            padded[row, : sample.numel()] = sample
        return padded.to(self.device)

    def targets(self) -> Labels:
        """The labels, each at the row that predicts it."""
        following = _following(self.labels, self.shape)
        predicts = following != IGNORED_LABEL
        counts = predicts.sum(dim=1, keepdim=True).clamp_min(1)
        weights = (1.0 / counts).expand(self.shape)
        return Labels(
            rows=predicts.flatten().nonzero()[:, 0].to(self.device),
            ids=following[predicts].to(self.device),
            weights=weights[predicts].float().to(self.device),
        )


def collate(
    ids: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    token_mask: TokenMask,
    device: torch.device,
    samples: Sequence[int] | None = None,
) -> Batch:
    """Puts samples into one micro-batch, padded on the right.

    Args:
        ids: per sample, [tokens] int64.
        labels: per sample, [tokens] int64, not shifted; -100 where there is no loss.
        token_mask: which tokens enter the second moments.
        device: where its tensors are to be.
        samples: their indices in the calibration set; from 0 on where none are given.
    """
    shape = (len(ids), max(sample.numel() for sample in ids))
    if token_mask == "attention":
        chosen = torch.arange(shape[1]) < torch.tensor([sample.numel() for sample in ids])[:, None]
    else:
        chosen = _following(labels, shape) != IGNORED_LABEL
    return Batch(
        samples=tuple(range(len(ids)) if samples is None else samples),
        shape=shape,
        leaves_out_padding=token_mask == "attention",
        moment_rows=None if bool(chosen.all()) else chosen.flatten().nonzero()[:, 0].to(device),
        ids=tuple(ids),
        labels=tuple(labels),
        device=device,
    )


def _following(labels: Sequence[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """The label that each position predicts, [batch, tokens]."""
    following = torch.full(shape, IGNORED_LABEL)
    for row, sample in enumerate(labels):
        following[row, : sample.numel() - 1] = sample[1:]
    return following
