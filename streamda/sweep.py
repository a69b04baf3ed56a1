"""The two passes over the blocks, one block resident at a time.

All samples pass through a block before the next one is loaded, so every weight is read once on the way up and once on
the way down, however many samples there are. What connects the passes is kept by name, on disk or where the budget
allows in memory (`streamda.boundary`): ``acts-0007`` enters block 7, ``grads-0007`` is its gradient. Each method can be
called again after a kill and skips what is already committed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from streamda import stopping
from streamda.batches import Batch
from streamda.block_statistics import StatisticsSink, zero_panel
from streamda.blocks import DecoderStack
from streamda.boundary import BoundaryStore
from streamda.checkpoint import Checkpoint
from streamda.factors import fits_float32, frobenius_norm
from streamda.hooks import PanelCollector
from streamda.layers import BlockSpec
from streamda.loss import loss_gradient
from streamda.memory import release_unused
from streamda.nonfinite import BadSamplesError, Examiner, bad_samples, noting_bad_samples
from streamda.panels import Replay
from streamda.passes import Passes
from streamda.prefetch import Prefetcher
from streamda.progress import PassBar
from streamda.timeline import Timeline
from streamda.unread import Replayed


def acts(index: int) -> str:
    """Name of the hidden states that enter block `index`."""
    return f"acts-{index:04d}"


def grads(index: int) -> str:
    """Name of the gradient of `acts(index)`."""
    return f"grads-{index:04d}"


class Sweep:
    """Moves boundary states through the blocks of a model."""

    def __init__(
        self,
        stack: DecoderStack,
        checkpoint: Checkpoint,
        batches: Sequence[Batch],
        boundaries: BoundaryStore,
        timeline: Timeline,
        *,
        keep_stored: bool = False,
        prefetch: bool = False,
        skip_bad_samples: bool = False,
        skip_bad_layers: bool = False,
    ) -> None:
        """Moves nothing yet; a thread that reads ahead begins.

        Args:
            stack: the model.
            checkpoint: its weights.
            batches: the samples, as collated micro-batches.
            boundaries: what connects the passes.
            timeline: takes what was done when.
            keep_stored: weights stay in the dtype of their files and are cast for each product.
            prefetch: the next block is read into memory while one is in use; else the system is asked to cache it.
                Close the sweep to end the thread that does either.
            skip_bad_samples: whoever catches a `BadSamplesError` goes on without them.
            skip_bad_layers: a layer whose weight or statistics hold NaN or Inf is left out and not an error.
        """
        self._stack = stack
        stack.forget_calls()  # of shapes that were only planned with
        self._checkpoint = checkpoint
        self._batches = batches
        self._boundaries = boundaries
        self._passes = Passes(batches, boundaries, timeline, stack.device)
        self._timeline = timeline
        self._device = stack.device
        self._keep_stored = keep_stored
        self._skip_bad_samples = skip_bad_samples
        self._skip_bad_layers = skip_bad_layers
        self._num_samples = sum(len(batch.samples) for batch in batches)
        self._examiner = Examiner(stack)
        self._blocks_ahead = Prefetcher(checkpoint, timeline, in_memory=prefetch)

    def close(self) -> None:
        """Ends what reads ahead, and frees what was kept for it."""
        self._blocks_ahead.close()
        self._checkpoint.close()

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return len(self._stack.blocks)

    def missing_boundaries(self, wanted: Sequence[int]) -> list[int]:
        """Boundaries that a forward pass has to make so that all of ``wanted`` (ascending) exist, ascending.

        What leads to a missing one from the highest existing one below it is among them, whether wanted or not.
        """
        missing: list[int] = []
        for target in wanted:
            steps = []
            while target >= 0 and acts(target) not in self._boundaries and target not in missing[-1:]:
                steps.append(target)
                target -= 1
            missing += reversed(steps)
        return missing

    def prologue(self) -> None:
        """Makes the first boundary from the token ids."""
        names = list(self._stack.embeddings)
        self._load(names)
        with self._passes.writing(acts(0)) as writer:
            for batch in self._batches:
                stopping.check()
                writer.append(self._stack.embed(batch.input_ids()))
        self._checkpoint.release(names)
        release_unused(self._device)

    def forward(self, wanted: Sequence[int], bar: PassBar | None = None) -> None:
        """Makes the boundaries ``wanted`` (ascending); one that is not wanted is dropped as soon as it is used.

        Where the first one is missing, `prologue` makes it before.
        """
        missing = self.missing_boundaries(wanted)
        assert 0 not in missing
        blocks = [boundary - 1 for boundary in missing]  # each makes the one above it
        for index in range(self.num_blocks + 1):  # of a run that was killed, or kept more
            if index not in wanted and index not in blocks:
                self._boundaries.drop(acts(index))
        for index, after in itertools.zip_longest(blocks, blocks[1:]):
            if bar is not None:
                bar.working_on(f"block {index}")
            self._forward_block(index, after)
            if index not in wanted:
                self._boundaries.drop(acts(index))
            release_unused(self._device)
            if bar is not None:
                bar.advance()

    def epilogue(self, logit_rows: int, bar: PassBar) -> float:
        """Final norm, head and loss at the label positions; makes the gradient of the last boundary.

        Args:
            logit_rows: label positions per chunk.
            bar: counts micro-batches.

        Returns:
            The mean over samples of their losses.

        Raises:
            NumericalError: a loss, or the gradient of one, is not finite.
        """
        name = grads(self.num_blocks)
        if name not in self._boundaries:
            self._load([self._stack.head_name])
            facts: dict[str, Any] = {}
            total = torch.zeros((), dtype=torch.float64)
            with self._passes.writing(name, durable=True, facts=facts) as writer, noting_bad_samples() as faults:
                for batch, hidden in self._passes.over(acts(self.num_blocks)):
                    bar.working_on("head and loss")
                    losses, gradient = loss_gradient(self._stack, batch, hidden, logit_rows)
                    for what, rows in (("loss", bad_samples(losses)), ("gradient of the loss", bad_samples(gradient))):
                        faults |= {batch.samples[row]: f"the {what} is NaN or Inf" for row in rows}
                    total += losses.sum().cpu()
                    writer.append(gradient)
                    bar.advance()
                    del hidden, gradient
                facts["loss"] = float(total) / self._num_samples
            self._checkpoint.release([self._stack.head_name])
            release_unused(self._device)
        return float(self._boundaries.facts(name)["loss"])

    def backward_block(
        self, spec: BlockSpec, replays: Sequence[Replay], sink: StatisticsSink | None, *, push: bool
    ) -> dict[str, dict[str, Any]]:
        """Replays a block with gradients, accumulates its statistics, and pushes the boundary gradient below it.

        Args:
            spec: the block's adapted layers.
            replays: passes over all samples and what each accumulates; with none, only the gradient is pushed.
            sink: makes each panel, and takes it when it is finished; may be None where there are no replays.
            push: whether blocks below need the gradient (``grads(index)``).

        Returns:
            Per module its counts and the Frobenius norm of its weight; of a layer that is left out, also why.

        Raises:
            BadSamplesError: some samples became NaN or Inf on the way.
            NumericalError: statistics did, and no layer may be left out for it.
            ModelError: a weight holds NaN or Inf, and no layer may be left out for it.
        """
        index = spec.index
        block = self._stack.blocks[index]
        leads_on = push and acts(index - 1) in self._boundaries  # else blocks below run forward first
        self._load_block(index, index - 1 if leads_on else None)
        facts = {linear.name: self._first_facts(linear.name) for linear in spec.linears}
        wants_push = push and grads(index) not in self._boundaries
        assert sink is not None or not replays
        new_panel = zero_panel if sink is None else sink.new_panel
        for number, replay in enumerate(replays or (Replay(()),)):
            collector = PanelCollector(block, spec, replay.panels, self._device, new_panel)
            with Replayed(block, spec.prefix, spec.unread) as replayed, collector:
                if replay.needs_backward or (wants_push and number == 0):
                    self._replay_backward(index, replayed, collector, push=wants_push and number == 0)
                else:
                    self._replay_forward(index, replayed, collector)
            if number == 0:
                for name, count in collector.num_tokens.items():
                    facts[name]["num_tokens"] = count
            bad = self._left_out(spec, collector)
            for name, reason in bad.items():
                facts[name]["skipped"] = reason
            release_unused(self._device)
            while collector.totals:
                stopping.check()
                panel, values = collector.totals.popitem()
                if sink is not None and (not bad or fits_float32(values)):
                    with self._timeline.span("write statistics"):
                        sink.write_panel(panel, values)
                del values
        # only now, when the next block's weights are usually read: beside that reading a norm takes five times as long
        for name, known in facts.items():
            known["weight_norm"] = frobenius_norm(self._stack.model.get_parameter(f"{name}.weight"))
        self._checkpoint.release([spec.prefix], spare=push)
        release_unused(self._device)
        return facts

    def _first_facts(self, name: str) -> dict[str, Any]:
        """What is known of a layer before its statistics are."""
        facts: dict[str, Any] = {"num_samples": self._num_samples, "num_tokens": 0}
        if count := self._checkpoint.not_finite.get(f"{name}.weight", 0):
            facts["skipped"] = f"its weight holds NaN or Inf ({count} of its values; zeros stood in for them)"
        return facts

    def _left_out(self, spec: BlockSpec, collector: PanelCollector) -> dict[str, str]:
        """Why layers are to be left without an adapter, by name: their statistics are NaN or Inf.

        Raises:
            BadSamplesError: because of some samples, without which they would not be.
            NumericalError: for whatever reason, if no layer may be left out.
        """
        bad = collector.bad_layers()
        if not bad:
            return {}
        if self._skip_bad_samples or not self._skip_bad_layers:
            passes = self._passes.over(acts(spec.index), grads(spec.index + 1))
            reasons = self._examiner.culprits(spec.index, bad, passes)
            if reasons and (len(reasons) < self._num_samples or not self._skip_bad_layers):
                raise BadSamplesError(reasons)
        if not self._skip_bad_layers:
            collector.require_finite()
        return bad

    def _load(self, names: list[str]) -> None:
        """Loads weights, and hands back what reading them in another dtype left behind."""
        with self._timeline.span("read weights"):
            self._checkpoint.load(names, keep_stored=self._keep_stored)
        release_unused(self._device)

    def _load_block(self, index: int, after: int | None) -> None:
        """Loads a block, and says which one is asked for next, if any is; on the way down its boundary is there."""
        with self._timeline.span("read weights"):
            self._blocks_ahead.take([self._stack.prefixes[index]], keep_stored=self._keep_stored)
        if after is None:
            self._checkpoint.free_spare()
        release_unused(self._device)
        if after is not None:
            names, keep_stored = [self._stack.prefixes[after]], self._keep_stored
            # behind a block of weights the disk would let its first micro-batch wait
            first = functools.partial(self._boundaries.announce, acts(after))
            self._blocks_ahead.start(names, keep_stored=keep_stored, before=first)

    def _forward_block(self, index: int, after: int | None) -> None:
        """Makes the boundary above a block; `after` is the block that is next, if there is one."""
        block, prefix = self._stack.blocks[index], self._stack.prefixes[index]
        self._load_block(index, after)
        with self._passes.writing(acts(index + 1)) as writer, noting_bad_samples() as faults, torch.no_grad():
            for batch, hidden in self._passes.over(acts(index)):
                output = self._stack.calls(*batch.shape)[index].run(block, hidden)
                faults |= self._examiner.reasons(index, batch, bad_samples(output), hidden)
                writer.append(output)
                del hidden, output
        self._checkpoint.release([prefix], spare=after is not None)

    def _replay_forward(self, index: int, block: Replayed, collector: PanelCollector) -> None:
        with torch.no_grad():
            for batch, hidden in self._passes.over(acts(index)):
                collector.begin(batch)
                block.run(self._stack.calls(*batch.shape)[index], hidden)
                collector.end()
                del hidden

    def _replay_backward(self, index: int, block: Replayed, collector: PanelCollector, *, push: bool) -> None:
        """Runs all micro-batches forward and backward through a block; with `push`, makes the boundary below it."""
        pushing = self._passes.writing(grads(index), durable=True) if push else nullcontext()
        with pushing as writer, noting_bad_samples() as faults:
            for batch, hidden, above in self._passes.over(acts(index), grads(index + 1)):
                collector.begin(batch)
                # weights require no gradient, so the graph hangs on the hidden states alone; detached, because a
                # boundary in memory is the same tensor in every replay and would gather their gradients
                hidden = hidden.detach().requires_grad_(True)
                with torch.enable_grad():
                    output = block.run(self._stack.calls(*batch.shape)[index], hidden)
                torch.autograd.backward(output, above)
                collector.end()
                if writer is not None:
                    assert hidden.grad is not None
                    faults |= self._examiner.reasons(index, batch, bad_samples(hidden.grad), hidden, above)
                    writer.append(hidden.grad)
                del hidden, above, output
