"""Progress for people: one bar per pass over the blocks, silent where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Never

from tqdm import tqdm

from streamda.memory import PeakMeter, format_size


class PassBar:
    """The bar of one pass: block by block, with token rate and memory in use."""

    def __init__(self, bar: tqdm[Never], meter: PeakMeter, tokens: int) -> None:
        self._bar = bar
        self._meter = meter
        self._tokens = tokens
        self._started = time.monotonic()
        self._done = 0

    def working_on(self, what: str) -> None:
        """Shows what is being worked on now."""
        rate = self._tokens * self._done / max(1e-9, time.monotonic() - self._started)
        shown = f"{what}, {rate:,.0f} tokens/s, {format_size(self._meter.current())}" if self._done else what
        self._bar.set_postfix_str(shown, refresh=True)

    def advance(self) -> None:
        """One block is done in this run; blocks of an earlier run are not counted, so that the ETA stays honest."""
        self._done += 1
        self._bar.update(1)


class Progress:
    """Opens bars; prints lines above them."""

    def __init__(self, meter: PeakMeter, *, quiet: bool) -> None:
        self._meter = meter
        self._silent = quiet or not sys.stderr.isatty()
        self._quiet = quiet

    @contextmanager
    def pass_over(self, name: str, num_blocks: int, tokens: int) -> Iterator[PassBar]:
        """A bar for one pass.

        Args:
            name: of the pass.
            num_blocks: still to be done in this run.
            tokens: that pass through each block.
        """
        with tqdm(total=num_blocks, desc=name, unit="block", disable=self._silent, leave=True) as bar:
            yield PassBar(bar, self._meter, tokens)

    def say(self, line: str) -> None:
        """One line on stderr, unless quiet."""
        if not self._quiet:
            tqdm.write(line, file=sys.stderr)
