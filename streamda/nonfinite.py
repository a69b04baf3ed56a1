"""Which samples became NaN or Inf, and in which module.

Every boundary is looked at as it is made, sample by sample, so that none is ever committed with NaN or Inf in it, and
so that it is known which samples are bad. Where in the block they became so is asked only then, by passing them through
it once more, each alone: samples of a micro-batch do not mix in a decoder, so the others are as good as without them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from streamda.batches import Batch
from streamda.block_calls import BlockCall
from streamda.blocks import DecoderStack
from streamda.errors import NumericalError
from streamda.quoting import NUM_NAMED, named


class BadSamplesError(NumericalError):
    """Samples became NaN or Inf, or made a statistic so. Raised before anything bad that they made is committed."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        """Takes what is wrong, by index of the sample in the calibration set."""
        self.reasons = dict(sorted(reasons.items()))
        super().__init__(f"{named_samples(list(self.reasons))}: {next(iter(self.reasons.values()))}")


def named_samples(indices: Sequence[int], rows: Sequence[int] | None = None) -> str:
    """The first few samples, by their index from 0 and the row of the data that they were made of, if known."""
    names = [f"{index} (row {rows[index]})" if rows else str(index) for index in indices]
    return f"sample{'s' if len(indices) > 1 else ''} {named(names)}"


def skip_notice(entry: Mapping[str, Any]) -> str:
    """Says that a sample was left out, and why, from what a run keeps of it: ``sample``, ``row``, ``reason``."""
    return f"{named_samples([entry['sample']])} (row {entry['row']} of the data) was left out: {entry['reason']}"


def bad_samples(states: torch.Tensor) -> list[int]:
    """Which samples of a micro-batch [batch, tokens, hidden] hold NaN or Inf."""
    # extremes at the speed of memory, without the copy that a mask is; NaN comes through
    samples = states.detach().flatten(1)
    if samples.device.type == "cpu":  # where a row at a time is several times as fast; elsewhere kernels are few
        extremes = torch.stack([torch.stack(torch.aminmax(sample)) for sample in samples], dim=1)  # [2, batch]
    else:
        extremes = torch.stack(torch.aminmax(samples, dim=1))
    return [row for row, finite in enumerate(torch.isfinite(extremes).all(dim=0).tolist()) if not finite]


@contextmanager
def noting_bad_samples() -> Iterator[dict[int, str]]:
    """Takes reasons by sample while a boundary is made; if there are any at its end, they are raised.

    Raises:
        BadSamplesError: so that a boundary whose writing this is nested in is not committed.
    """
    reasons: dict[int, str] = {}
    yield reasons
    if reasons:
        raise BadSamplesError(reasons)


class Examiner:
    """Finds out where samples became bad, by passing them once more through the block that is loaded."""

    def __init__(self, stack: DecoderStack) -> None:
        self._stack = stack

    def reasons(
        self, index: int, batch: Batch, rows: Sequence[int], hidden: torch.Tensor, above: torch.Tensor | None = None
    ) -> dict[int, str]:
        """Why samples of a micro-batch are bad behind a block, or below it on the way back.

        Args:
            index: of the block.
            batch: the micro-batch.
            rows: the samples in it that are.
            hidden: [batch, tokens, hidden], what enters the block.
            above: [batch, tokens, hidden], the gradient of what leaves it, on the way back.

        Returns:
            A clause for each, by index of the sample in the calibration set.
        """
        found: dict[int, str] = {}
        vague = f"{self._stack.prefixes[index]} gives NaN or Inf{'' if above is None else ' on the way back'}"
        for row in rows:
            note = self._examine(index, hidden, above, row) if len(found) < NUM_NAMED else None
            found[batch.samples[row]] = note or vague
        return found

    def culprits(
        self, index: int, modules: Collection[str], passes: Iterable[tuple[Batch, torch.Tensor, torch.Tensor]]
    ) -> dict[int, str]:
        """Samples that alone make the statistics of modules of a block NaN or Inf.

        Args:
            index: of the block.
            modules: full names.
            passes: the micro-batches with their states and the gradients above the block.
        """
        found = {}
        for batch, hidden, above in passes:
            call = self._stack.calls(*batch.shape)[index]
            prefix, block = self._stack.prefixes[index], self._stack.blocks[index]
            if examine(block, prefix, call, hidden, above, moments_of=modules) is not None:
                for row, sample in enumerate(batch.samples):
                    if note := self._examine(index, hidden, above, row, modules):
                        found[sample] = note
            del hidden, above
        return found

    def _examine(
        self,
        index: int,
        hidden: torch.Tensor,
        above: torch.Tensor | None,
        row: int,
        modules: Collection[str] | None = None,
    ) -> str | None:
        return examine(
            self._stack.blocks[index],
            self._stack.prefixes[index],
            self._stack.calls(1, hidden.shape[1])[index],
            hidden[row : row + 1],
            None if above is None else above[row : row + 1],
            moments_of=modules,
        )


def examine(
    block: nn.Module,
    prefix: str,
    call: BlockCall,
    hidden: torch.Tensor,
    gradient: torch.Tensor | None = None,
    *,
    moments_of: Collection[str] | None = None,
) -> str | None:
    """Passes samples through a block and says where the first NaN or Inf appears.

    Args:
        block: with its weights loaded.
        prefix: its name.
        call: how the model calls it for this shape.
        hidden: [batch, tokens, hidden], what enters it.
        gradient: [batch, tokens, hidden], of what leaves it, where the way back is to be followed too.
        moments_of: full names of modules; only these are looked at, and also whether squares of what they see overflow.

    Returns:
        One clause that names the module; None if nothing is wrong with these samples.
    """
    notes: list[str] = []
    squares = moments_of is not None

    def look(values: object, text: str) -> None:
        if isinstance(values, torch.Tensor) and values.is_floating_point() and not notes:
            if not _is_finite(values):
                notes.append(f"{text} NaN or Inf")
            elif squares and not bool(torch.isfinite(values.detach().float().square().sum())):
                notes.append(f"{text} values whose squares overflow float32")

    def visit(name: str, args: tuple[Any, ...], output: Any) -> None:
        look(args[0] if args else None, f"{name} receives")
        result = output[0] if isinstance(output, (tuple, list)) and output else output
        if not squares:
            look(result, f"{name} gives")
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.register_hook(  # type: ignore[no-untyped-call]  # torch has no types for it
                lambda g: look(g, f"the gradient of what {name} gives holds")
            )

    names = [f"{prefix}.{name}" if name else prefix for name, _ in block.named_modules()]
    chosen = [name for name in names if moments_of is None or name in moments_of]
    with _visiting(block, prefix, chosen, visit):
        if gradient is None:
            with torch.no_grad():
                call.run(block, hidden)
        else:
            with torch.enable_grad():
                output = call.run(block, hidden.detach().requires_grad_(True))
            torch.autograd.backward(output, gradient)
    return notes[0] if notes else None


@contextmanager
def _visiting(
    block: nn.Module, prefix: str, names: Collection[str], visit: Callable[[str, tuple[Any, ...], Any], None]
) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    modules = dict(block.named_modules())

    def hook_of(name: str) -> Callable[..., None]:
        return lambda _module, args, output: visit(name, args, output)

    for name in names:
        module = modules["" if name == prefix else name.removeprefix(prefix + ".")]
        handles.append(module.register_forward_hook(hook_of(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(values: torch.Tensor) -> bool:
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values.detach()))).all())
