"""The Python interface: the command line's options as keyword arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamda import pipeline
from streamda.config import RunConfig
from streamda.repair import Repair, repair_folder
from streamda.report import InitReport
from streamda.requirements import require_platform
from streamda.verification import Verification, verify_folder


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
    require_platform()
    return pipeline.initialize(RunConfig.from_options(options), quiet=quiet, verbose=verbose)


def collect(*, quiet: bool = True, verbose: bool = False, **options: Any) -> InitReport:
    """Collects the statistics of all layers into the folder ``statistics`` and keeps them, for `solve`.

    Arguments as for `initialize`; ``statistics`` is required.
    """
    require_platform()
    return pipeline.collect(RunConfig.from_options(options), quiet=quiet, verbose=verbose)


def solve(*, quiet: bool = True, **options: Any) -> InitReport:
    """Solves an adapter from collected statistics, as often as wanted; the model's weights are not needed.

    Arguments as for `initialize`; ``statistics`` and ``output_dir`` are required, and of the other options those of
    the method count (``rank``, ``variance_weight`` ...).
    """
    require_platform()
    return pipeline.solve(RunConfig.from_options(options), quiet=quiet)


def verify(folder: str | Path, *, strict: bool = True) -> Verification:
    """Checks every byte of statistics, of a run's work directory, or of an adapter. Changes nothing.

    Args:
        folder: what `collect` or `initialize` wrote.
        strict: False returns a result with damages instead of raising.

    Returns:
        What was found sound, the damages with their repairs, and notes.

    Raises:
        DamagedError: naming the first damaged file and its repair, and how many more there are.
        StreamdaError: of the kind that fits, where there is nothing to check, or a run is writing it.
    """
    found = verify_folder(Path(folder))
    if strict:
        found.require_sound()
    return found


def repair(folder: str | Path, *, drop: Sequence[str], unsafe_filesystem: bool = False) -> Repair:
    """Drops units of a run, damaged or not, so that they are made again, with the same bits.

    Args:
        folder: statistics, or a run's work directory.
        drop: names of units, as `verify` gives them.
        unsafe_filesystem: goes on with a file system that cannot lock or sync.

    Returns:
        What was dropped, and in ``next_steps`` what to run to have it made again.

    Raises:
        ConfigError: a name that is no unit; nothing is dropped then.
        StreamdaError: of the kind that fits, see `streamda.errors`.
    """
    return repair_folder(Path(folder), [drop] if isinstance(drop, str) else drop, unsafe_filesystem)
