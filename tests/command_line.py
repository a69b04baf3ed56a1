"""The command line in this process, as tests call it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from streamda import cli, stopping


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs `streamda ...` in this process, without its signal handlers; the exit code."""
    monkeypatch.setattr("sys.argv", ["streamda", *arguments])
    monkeypatch.setattr(stopping, "install", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options of the Python interface as the command line takes them."""
    given = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    return [part for flag, value in given.items() for part in ((flag,) if value is True else (flag, str(value)))]


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails what hangs, or waits for an answer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
