"""Runs in a process of their own that kill themselves at a named point, and what they leave."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import streamda

# a server that has streamda imported forks a process per kill, which spares each its six seconds of imports
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["streamda"])


def run_until(point: str, options: dict[str, Any]) -> int | None:
    """Runs `initialize` in a process of its own that kills itself at a point; its exit code."""
    process = PROCESSES.Process(target=_run_until, args=(point, options))
    process.start()
    process.join()
    return process.exitcode


def _run_until(point: str, options: dict[str, Any]) -> None:
    os.environ["STREAMDA_KILL_AT"] = point
    streamda.initialize(**options)


def weights(folder: Path) -> bytes:
    """The file of the adapter that a run made below a folder."""
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()
