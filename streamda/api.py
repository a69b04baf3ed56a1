"""The Python interface: the command line's options as keyword arguments."""

from __future__ import annotations

from typing import Any

from streamda import pipeline
from streamda.config import RunConfig
from streamda.report import InitReport


def initialize(*, quiet: bool = True, verbose: bool = False, **options: Any) -> InitReport:
    """Computes a data-aware starting point for a LoRA adapter (LoRA-DA, arXiv 2510.24561) and writes it for PEFT.

    Args:
        quiet: no progress bars and no notices on stderr; notices are in the report.
        verbose: also prints one sample with its mask.
        **options: those of ``streamda init``, with underscores: ``model``, ``dataset``, ``output_dir``,
            ``max_gpu_mem``, ``rank`` ...; see `streamda.config` for all of them and their defaults.

    Returns:
        What was done: where the adapter is, memory planned and measured, time, and a line per layer.

    Raises:
        StreamdaError: of the kind that fits, see `streamda.errors`.
    """
    return pipeline.initialize(RunConfig.from_options(options), quiet=quiet, verbose=verbose)


def collect(*, quiet: bool = True, verbose: bool = False, **options: Any) -> InitReport:
    """Collects the statistics of all layers into the folder ``statistics`` and keeps them, for `solve`.

    Arguments as for `initialize`; ``statistics`` is required.
    """
    return pipeline.collect(RunConfig.from_options(options), quiet=quiet, verbose=verbose)


def solve(*, quiet: bool = True, **options: Any) -> InitReport:
    """Solves an adapter from collected statistics, as often as wanted; the model's weights are not needed.

    Arguments as for `initialize`; ``statistics`` and ``output_dir`` are required, and of the other options those of
    the method count (``rank``, ``variance_weight`` ...).
    """
    return pipeline.solve(RunConfig.from_options(options), quiet=quiet)
