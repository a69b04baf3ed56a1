"""What is in a folder that streamda wrote: statistics, a run under way, or an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamda import files
from streamda.errors import ConfigError
from streamda.files import shown
from streamda.memory import format_size
from streamda.report import REPORT_FILE, read_report, table
from streamda.rundir import RunDirectory
from streamda.solutions import solve_unit
from streamda.store import stats_unit

UNIT_KINDS = {
    "acts": "boundary states",
    "grads": "boundary gradients",
    "stats": "statistics",
    "solve": "solved blocks",
}
"""What the units of a run hold, by the first part of their names."""


def inspect_folder(folder: Path) -> tuple[dict[str, Any], str]:
    """Describes a folder.

    Returns:
        The same twice: as plain JSON, and as text for people.

    Raises:
        ConfigError: streamda did not write it.
        StorageError: it may not be read.
        LockedError: a run is writing it.
        DamagedError: it does not hold what was committed.
    """
    require_readable(folder)
    if (folder / REPORT_FILE).is_file():
        report = read_report(folder)
        return report.to_dict(), report.to_table()
    with RunDirectory.open_existing(folder, exclusive=False) as run:
        return _inspect_run(run)


def require_readable(folder: Path) -> None:
    """Refuses a place that is no folder (`ConfigError`), or one that may not be read (`StorageError`)."""
    with files.storage_errors("look into", folder):
        try:
            files.system_calls.listdir(folder)
            os.stat(os.path.join(folder, "."))  # its names may be readable and what they stand for not
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"{shown(folder)} is not a folder") from error


def unit_rows(sizes: Mapping[str, int]) -> list[list[str]]:
    """Rows of a table from the bytes of each unit: what those of a kind hold, their number, their size together."""
    rows = []
    for kind, what in UNIT_KINDS.items():
        chosen = [size for name, size in sizes.items() if name.startswith(kind + "-")]
        if chosen:
            rows.append([what, str(len(chosen)), format_size(sum(chosen))])
    return rows


def _inspect_run(run: RunDirectory) -> tuple[dict[str, Any], str]:
    sizes = {}
    for name in run.units.names():
        run.units.check(name)
        sizes[name] = sum(record.size for record in run.units.metadata(name).files.values())
    settings = run.settings
    collected = [index for index in settings["adapted_blocks"] if stats_unit(index) in sizes]
    # where statistics stay in memory, what is solved is all that is seen of them
    solved = [index for index in settings["adapted_blocks"] if solve_unit(index) in sizes]
    facts: dict[str, Any] = {
        "model": settings["model"],
        "data": settings["data"],
        "method": dict(run.parts["method"]),
        "loss": settings.get("loss"),
        "adapted_blocks": settings["adapted_blocks"],
        "collected_blocks": collected,
        "solved_blocks": solved,
        "units": sizes,
    }
    data = settings["data"]
    lines = [
        f"streamda run  {run.path}",
        f"  model        {settings['model']['name']}  ({settings['model']['num_blocks']} blocks)",
        f"  data         {data['source']}  ({data['num_samples']} samples, {data['num_tokens']} tokens)",
        f"  layers       {len(run.parts['method']['modules'])}",
        f"  collected    {len(collected)} of {len(settings['adapted_blocks'])} blocks",
        f"  solved       {len(solved)} of {len(settings['adapted_blocks'])} blocks",
        "",
        *table(["units", "number", "size"], unit_rows(sizes)),
    ]
    return facts, "\n".join(lines)
