"""Progress for people: one bar per pass over the blocks; in a log file, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Never

from tqdm import tqdm

from streamda.memory import format_size
from streamda.quoting import printable_lines
from streamda.stopwatch import RunMeter

LOG_SECONDS = 60.0
"""Between two lines where there is no terminal to draw a bar on."""


class PassLog:
    """What a pass writes where there is no terminal: a line now and then."""

    def __init__(self, name: str, num_steps: int, say: Callable[[str], None]) -> None:
        self._name, self._num_steps, self._say = name, num_steps, say
        self._started = self._said = time.monotonic()

    def advance(self, done: int, facts: Callable[[], str]) -> None:
        """Says how far the pass is, if it has not for `LOG_SECONDS`, and unless it is done."""
        now = time.monotonic()
        if now - self._said < LOG_SECONDS or done == self._num_steps:
            return
        self._said = now
        minutes = (now - self._started) / 60
        left = max(1, round(minutes / done * (self._num_steps - done)))
        self._say(f"{self._name}: {done} of {self._num_steps} in {minutes:.0f} min, about {left} min to go{facts()}")


class PassBar:
    """The bar of one pass: step by step, with token rate and the highest memory peak so far."""

    def __init__(
        self, bar: tqdm[Never], meter: RunMeter, tokens: int, log: PassLog | None = None, *, measures_rates: bool = True
    ) -> None:
        """Shows nothing yet.

        Args:
            bar: what is drawn; disabled where there is no terminal.
            meter: of the run.
            tokens: that each step computes.
            log: what is written there.
            measures_rates: whether those of the machine may be measured between two steps.
        """
        self._bar = bar
        self._measures_rates = measures_rates
        self._log = log
        self._meter = meter
        self._tokens = tokens
        self._started = time.monotonic()
        self._done = 0

    def working_on(self, what: str) -> None:
        """Shows what is being worked on now."""
        if self._bar.disable:
            return
        self._bar.set_postfix_str(what + (self._facts() if self._done else ""), refresh=True)

    def advance(self) -> None:
        """One step is done in this run; those of an earlier run are not counted, so that the ETA stays honest."""
        self._done += 1
        self._bar.update(1)
        if self._measures_rates:
            self._meter.between_blocks()
        if self._log is not None:
            self._log.advance(self._done, self._facts)

    def _facts(self) -> str:
        # neither a pass over statistics nor one that counts its micro-batches has tokens per step
        rate = self._tokens * self._done / max(1e-9, time.monotonic() - self._started)
        tokens = f", {rate:,.0f} tokens/s" if self._tokens else ""
        return f"{tokens}, peak {format_size(self._meter.highest_peak())}"


class Progress:
    """Opens bars; prints lines above them."""

    def __init__(self, meter: RunMeter, *, quiet: bool) -> None:
        self._meter = meter
        self._quiet = quiet or sys.stderr is None  # as under pythonw, and where it was closed
        self._silent = self._quiet or not sys.stderr.isatty()

    @contextmanager
    def pass_over(
        self, name: str, num_steps: int, tokens: int, unit: str = "block", *, measures_rates: bool = True
    ) -> Iterator[PassBar]:
        """A bar for one pass.

        Args:
            name: of the pass.
            num_steps: still to be done in this run.
            tokens: that each step computes; 0 shows no rate.
            unit: what a step is.
            measures_rates: see `PassBar`; not where activations are held from one step to the next.
        """
        log = PassLog(name, num_steps, self.say) if self._silent and not self._quiet else None
        with tqdm(total=num_steps, desc=name, unit=unit, disable=self._silent, leave=True) as bar:
            yield PassBar(bar, self._meter, tokens, log, measures_rates=measures_rates)

    def tell(self, notices: Iterable[str]) -> list[str]:
        """Says each, and gives them back."""
        told = list(notices)
        for notice in told:
            self.say(f"note: {notice}")
        return told

    def say(self, line: str) -> None:
        """One line on stderr, unless quiet."""
        if not self._quiet:
            with suppress(OSError):  # nobody reads it any more, which is no reason to stop
                tqdm.write(printable_lines(line), file=sys.stderr)
