"""Stopping on request: a signal asks for it, and the run leaves at its next safe point.

Only the command line installs the handlers; whoever uses the Python interface keeps ``KeyboardInterrupt``. While a run
writes (`deferred`), a signal only leaves a note, which `check` turns into a `StoppedError` between two micro-batches,
panels or layers; before and after, it is raised at once. A second signal ends the process on the spot, which the
commit protocol makes as safe as any kill. `guard_start` is for the seconds before all that, in which the libraries are
imported: this module is imported before them, and imports none.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from types import FrameType

from streamda.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_SECONDS = 0.3
"""Signals this soon after the first are its echo: `timeout` and batch systems signal a process and then its group."""

_requested: signal.Signals | None = None
_raised = False
_ending = False
_deferrals = 0


def check() -> None:
    """Raises a `StoppedError` if a signal has asked for it. Called where everything unfinished can be thrown away."""
    if _requested is not None:
        raise StoppedError(f"stopped by {_requested.name}; the same command continues from here")


@contextmanager
def deferred() -> Iterator[None]:
    """Within the block signals wait for the next `check`."""
    global _deferrals
    check()  # a library may have swallowed what the handler raised
    _deferrals += 1
    try:
        yield
    finally:
        _deferrals -= 1


def cause_of(error: Exception) -> Exception:
    """The `StoppedError` that a signal raised in the middle of a library, if ``error`` is what that made of it."""
    if not _raised or isinstance(error, StoppedError):
        return error
    try:
        check()
    except StoppedError as stopped:
        stopped.__cause__ = error
        return stopped
    return error


def hold() -> None:
    """From now on a first signal raises nothing: the outcome is known, and this process is about to end."""
    global _ending
    _ending = True


def guard_start() -> None:
    """Has signals end this process in one line until `install`, if it is the command line that is being imported."""
    if not _is_command():
        return
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _leave_start)


def install() -> None:
    """Takes over the signals in `SIGNALS`, but none that is ignored: ``nohup`` and background jobs mean it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # the interpreter runs handlers only between two operations, and one factorization may take minutes: a thread of
    # its own hears of each signal at once
    threading.Thread(target=_watch, args=(reading,), name="streamda-signals", daemon=True).start()
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # first, or the thread would miss what a handler hears
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def _handle(number: int, _frame: FrameType | None) -> None:
    global _requested, _raised
    first = _requested is None
    if first:
        _requested = signal.Signals(number)
    if first and not _deferrals and not _ending:
        _raised = True
        check()


def _is_command() -> bool:
    """Whether this process is ``streamda ...`` or ``python -m streamda ...``, as far as it is known at its start."""
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    if started == "-m":  # what it is while the module is looked for, whose name is here
        return "streamda" in (after for flag, after in pairwise(sys.orig_argv) if flag == "-m")
    return os.path.basename(started) == "streamda"


def _leave_start(number: int, _frame: FrameType | None) -> None:
    """Nothing is begun, so nothing is to be tidied; an exception would be a traceback out of some library."""
    with suppress(OSError):
        os.write(2, f"streamda: error: stopped by {signal.Signals(number).name} before it did anything\n".encode())
    os._exit(StoppedError.exit_code)


def _watch(reading: int) -> None:
    """Leaves at the second signal, whatever the main thread is doing."""
    first: float | None = None
    while received := os.read(reading, 1):
        number = received[0]
        if number not in SIGNALS:
            continue
        if first is None:
            first = time.monotonic()
            if _deferrals and os.isatty(2):
                with suppress(OSError):
                    os.write(2, b"\nstreamda: stopping at the next safe point; the same signal again leaves at once\n")
        elif time.monotonic() - first > ECHO_SECONDS:
            os._exit(128 + number)
