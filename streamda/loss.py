"""Behind the last block: each sample's loss, and what goes back into the blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from streamda.batches import Batch
from streamda.blocks import DecoderStack


def loss_gradient(
    stack: DecoderStack, batch: Batch, hidden: torch.Tensor, logit_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of a micro-batch, and the gradient of their sum.

    Args:
        stack: the model; its head must be loaded.
        batch: the micro-batch.
        hidden: [batch, tokens, hidden], what leaves the last block.
        logit_rows: label positions per chunk: a vocabulary of logits for all of them would be the run's peak.

    Returns:
        Each sample's mean loss over its label tokens, [batch, 1] float64 on the host; the gradient, as `hidden`.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])  # [rows, hidden]
    gradient = torch.zeros_like(flat)
    sums = torch.zeros(hidden.shape[0], 1, dtype=torch.float64)
    parts = []
    targets = batch.targets()
    step = min(logit_rows, stack.max_positions or logit_rows)  # they pass as one sequence
    for start in range(0, targets.rows.numel(), step):
        chunk = slice(start, start + step)
        rows = targets.rows[chunk]
        states = flat[rows].requires_grad_(True)
        with torch.enable_grad():
            logits = stack.logits(states)
            losses = F.cross_entropy(logits.float(), targets.ids[chunk], reduction="none")
            weighted = losses * targets.weights[chunk]
        torch.autograd.backward(weighted.sum())
        assert states.grad is not None
        gradient[rows] = states.grad
        parts.append(weighted.detach())
    if parts:  # on the host, where sums have one order; brought there at once, since the device is waited for
        samples = (targets.rows // hidden.shape[1]).cpu()
        sums.index_add_(0, samples, torch.cat(parts).cpu().double()[:, None])
    return sums, gradient.reshape(hidden.shape)
