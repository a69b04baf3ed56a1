"""What is in a folder that streamda wrote: statistics, a run under way, or an adapter."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from streamda import files
from streamda.commands import completing, continuing, here, lacks_adapter
from streamda.errors import ConfigError, LockedError
from streamda.files import shown
from streamda.memory import format_size
from streamda.quoting import printable
from streamda.report import REPORT_FILE, read_report, table
from streamda.rundir import WORK_SUFFIX, RunDirectory, find_record, unit_names
from streamda.solutions import solve_unit
from streamda.store import stats_unit
from streamda.units import UnitStore

UNIT_KINDS = {
    "acts": "boundary states",
    "grads": "boundary gradients",
    "stats": "statistics",
    "solve": "solved blocks",
}
"""What the units of a run hold, by the first part of their names."""


def inspect_folder(folder: Path) -> tuple[dict[str, Any], str]:
    """Describes a folder; of a run that is under way, how far it is.

    Returns:
        The same twice: as plain JSON, and as text for people.

    Raises:
        ConfigError: streamda did not write it.
        StorageError: it may not be read.
        LockedError: a run is about to be made or removed there.
        DamagedError: it does not hold what was committed.
    """
    require_readable(folder)
    if (folder / REPORT_FILE).is_file():
        report = read_report(folder)
        return report.to_dict(), report.to_table()
    try:
        with RunDirectory.open_existing(folder, exclusive=False) as run:
            return _describe(run.path, run.settings, run.parts, _checked_sizes(run.units), at_work=False)
    except LockedError:
        path = Path(os.path.realpath(folder))
        record = find_record(path)
        if record is None:
            raise
        # units come and go meanwhile: their names tell how far it is, and none is looked into
        sizes = dict.fromkeys(unit_names(path))
        return _describe(path, record["settings"], record["parts"], sizes, at_work=True)


def require_readable(folder: Path) -> None:
    """Refuses a place that is no folder (`ConfigError`), or one that may not be read (`StorageError`)."""
    with files.storage_errors("look into", folder):
        try:
            files.system_calls.listdir(folder)
            os.stat(os.path.join(folder, "."))  # its names may be readable and what they stand for not
        except (FileNotFoundError, NotADirectoryError) as error:
            work = f"{folder}{WORK_SUFFIX}"
            run = f"; the run that makes it is in {shown(work)}" if os.path.isfile(f"{work}/run.json") else ""
            raise ConfigError(f"{shown(folder)} is not a folder{run}") from error


def collected_blocks(settings: Mapping[str, Any], units: Container[str]) -> list[int]:
    """The adapted blocks of a run whose statistics were finished, by the names of its units."""
    # where statistics stay in memory, or are freed, what is solved is all that is seen of them
    kept = settings.get("keeps_statistics", True)
    wanted = settings.get("adapted_blocks", [])
    return [index for index in wanted if stats_unit(index) in units or (not kept and solve_unit(index) in units)]


def unit_rows(sizes: Mapping[str, int | None]) -> list[list[str]]:
    """Rows of a table from the bytes of each unit: what those of a kind hold, their number, their size if known."""
    rows = []
    for kind, what in UNIT_KINDS.items():
        chosen = [size for name, size in sizes.items() if name.startswith(kind + "-")]
        known = [size for size in chosen if size is not None]
        if chosen:
            rows.append([what, str(len(chosen)), *([format_size(sum(known))] if known else [])])
    return rows


def _checked_sizes(units: UnitStore) -> dict[str, int | None]:
    sizes: dict[str, int | None] = {}
    for name in units.names():
        units.check(name)
        sizes[name] = sum(record.size for record in units.metadata(name).files.values())
    return sizes


def _describe(
    path: Path,
    settings: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int | None],
    *,
    at_work: bool,
) -> tuple[dict[str, Any], str]:
    """Of a run, as `inspect_folder`; sizes of units are None where nothing is known of them but their names."""
    blocks = settings["adapted_blocks"]
    solved = [index for index in blocks if solve_unit(index) in sizes]
    collected = collected_blocks(settings, sizes)
    is_whole = len(collected) == len(blocks) and not lacks_adapter(settings)
    state = "" if is_whole else ", incomplete" if settings.get("finished", True) else ", interrupted"
    next_command = None if is_whole or at_work else completing(settings, path)
    facts: dict[str, Any] = {
        "at_work": at_work,
        "model": settings["model"],
        "data": settings["data"],
        "method": dict(parts["method"]),
        "command": continuing(settings, path),
        "begun_in": settings.get("begun_in"),
        "next": next_command,
        "loss": settings.get("loss"),
        "adapted_blocks": blocks,
        "collected_blocks": collected,
        "solved_blocks": solved,
        "units": dict(sizes),
    }
    data = settings["data"]
    command, begun_in = facts["command"], facts["begun_in"]
    lines = [
        f"streamda run  {path}" + (", at work" if at_work else state),
        *([f"  command      {command}"] if command is not None else []),
        *([f"  to continue  {next_command}"] if next_command is not None else []),
        *([f"  begun in     {printable(begun_in)}"] if begun_in not in (None, here()) else []),
        f"  model        {settings['model']['name']}  ({settings['model']['num_blocks']} blocks)",
        f"  data         {data['source']}  ({data['num_samples']} samples, {data['num_tokens']} tokens)",
        f"  layers       {len(parts['method']['modules'])}",
        f"  collected    {len(collected)} of {len(blocks)} blocks",
        f"  solved       {len(solved)} of {len(blocks)} blocks",
        "",
        *table(["units", "number", *([] if at_work else ["size"])], unit_rows(sizes)),
    ]
    return facts, "\n".join(lines)
