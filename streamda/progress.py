"""Progress for people: one bar per pass over the blocks, silent where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Never

from tqdm import tqdm

from streamda.memory import format_size
from streamda.quoting import printable_lines
from streamda.stopwatch import RunMeter


class PassBar:
    """The bar of one pass: step by step, with token rate and the highest memory peak so far."""

    def __init__(self, bar: tqdm[Never], meter: RunMeter, tokens: int) -> None:
        self._bar = bar
        self._meter = meter
        self._tokens = tokens
        self._started = time.monotonic()
        self._done = 0

    def working_on(self, what: str) -> None:
        """Shows what is being worked on now."""
        if self._bar.disable:
            return
        shown = what
        if self._done:
            rate = self._tokens * self._done / max(1e-9, time.monotonic() - self._started)
            # neither a pass over statistics nor one that counts its micro-batches has tokens per step
            shown += f", {rate:,.0f} tokens/s" if self._tokens else ""
            shown += f", peak {format_size(self._meter.highest_peak())}"
        self._bar.set_postfix_str(shown, refresh=True)

    def advance(self) -> None:
        """One step is done in this run; those of an earlier run are not counted, so that the ETA stays honest."""
        self._done += 1
        self._bar.update(1)


class Progress:
    """Opens bars; prints lines above them."""

    def __init__(self, meter: RunMeter, *, quiet: bool) -> None:
        self._meter = meter
        self._quiet = quiet or sys.stderr is None  # as under pythonw, and where it was closed
        self._silent = self._quiet or not sys.stderr.isatty()

    @contextmanager
    def pass_over(self, name: str, num_steps: int, tokens: int, unit: str = "block") -> Iterator[PassBar]:
        """A bar for one pass.

        Args:
            name: of the pass.
            num_steps: still to be done in this run.
            tokens: that each step computes; 0 shows no rate.
            unit: what a step is.
        """
        with tqdm(total=num_steps, desc=name, unit=unit, disable=self._silent, leave=True) as bar:
            yield PassBar(bar, self._meter, tokens)

    def say(self, line: str) -> None:
        """One line on stderr, unless quiet."""
        if not self._quiet:
            with suppress(OSError):  # nobody reads it any more, which is no reason to stop
                tqdm.write(printable_lines(line), file=sys.stderr)
