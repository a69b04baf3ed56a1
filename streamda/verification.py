"""A full check of what streamda wrote: every byte of a run's units, or of an adapter, and what the bytes mean.

Statistics are read tile by tile and boundary states piece by piece, so that a check needs no more memory than a few
tiles. Nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from streamda import files
from streamda.adapter import OWN_FILES, has_mark
from streamda.adapter_check import WEIGHTS_FILE, verify_adapter
from streamda.block_statistics import TILE
from streamda.boundary import require_finite_states
from streamda.commands import completing, lacks_adapter
from streamda.errors import ConfigError, DamagedError
from streamda.files import shown
from streamda.inspection import UNIT_KINDS, collected_blocks, require_readable, unit_rows
from streamda.memory import format_size
from streamda.model_copy import check_configuration
from streamda.report import REPORT_FILE, read_report, table
from streamda.rundir import OWN_NAMES, RunDirectory
from streamda.solutions import is_skipped, read_factors, read_summaries
from streamda.store import BlockStatisticsReader
from streamda.trace import PROFILE_FILES
from streamda.units import LEFTOVER_SUFFIXES

_MOST_DAMAGES = 20  # lines for people: beyond that it is the disk, and no list of files
_UNIT = re.compile(rf"(?P<kind>{'|'.join(UNIT_KINDS)})-(?P<index>\d{{4,}})")


@dataclass(frozen=True, slots=True)
class Verification:
    """What a check found."""

    folder: str
    kind: Literal["run", "adapter"]
    units: dict[str, int]
    """Bytes of each unit, or of each file of an adapter, that is sound."""
    damages: tuple[str, ...]
    """A line each: the file, what is wrong with it, and the repair."""
    notes: tuple[str, ...]
    """What is no damage and still worth knowing."""

    @property
    def is_sound(self) -> bool:
        """Whether everything is what was written."""
        return not self.damages

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {"sound": self.is_sound}

    def to_table(self) -> str:
        """The result for people."""
        rows = unit_rows(self.units)
        if self.kind == "adapter":
            rows = [[name, "1", format_size(size)] for name, size in self.units.items()]
        more = len(self.damages) - _MOST_DAMAGES
        return "\n".join(
            [
                f"streamda {self.kind}  {shown(self.folder)}",
                *(table(["sound", "number", "size"], rows) if rows else []),
                *(f"  damaged: {damage}" for damage in self.damages[:_MOST_DAMAGES]),
                *([f"  damaged: {more} more"] if more > 0 else []),
                *(f"  note: {note}" for note in self.notes),
                *(["  every file is what was written"] if self.is_sound else []),
            ]
        )

    def require_sound(self) -> None:
        """Raises a `DamagedError` that names the first damaged file, its repair, and how many damages there are."""
        if self.damages:
            more = f" (and {len(self.damages) - 1} more)" if len(self.damages) > 1 else ""
            raise DamagedError(self.damages[0] + more)


def verify_folder(folder: Path) -> Verification:
    """Checks a run's directory, collected statistics, or an adapter in full.

    Raises:
        ConfigError: streamda did not write it.
        StorageError: it may not be read.
        LockedError: a run is writing it.
        DamagedError: the record of a run is damaged, without which nothing else can be judged.
    """
    require_readable(folder)
    if any((folder / name).is_file() for name in (REPORT_FILE, WEIGHTS_FILE)):
        return _verify_adapter(folder)
    with RunDirectory.open_existing(folder, exclusive=False) as run:
        return _verify_run(run)


def _is_foreign(weights: Path) -> bool:
    with files.storage_errors("look at", weights):
        return has_mark(weights) is False


def _verify_adapter(folder: Path) -> Verification:
    damages: list[str] = []
    notes: list[str] = []
    sizes: dict[str, int] = {}
    try:
        if not (folder / REPORT_FILE).is_file():
            if _is_foreign(folder / WEIGHTS_FILE):
                raise ConfigError(
                    f"{shown(folder)} holds an adapter that streamda did not write, such as training saves; there is "
                    "nothing to check it against"
                )
            raise DamagedError(
                f"{shown(folder / REPORT_FILE)} is missing, which says what was written; move {shown(folder)} away and "
                "make the adapter again"
            )
        report = read_report(folder)
        if not report.files:
            notes.append("an older streamda wrote this without checksums: a changed number in it would not be noticed")
        adapted = [name for name, facts in report.modules.items() if not is_skipped(facts)]
        verify_adapter(folder, report.written, adapted)
        sizes = {name: record.size for name, record in report.written.items()}
    except DamagedError as error:
        damages.append(str(error))
    notes += _strangers(folder, (*OWN_FILES, *PROFILE_FILES))
    return Verification(str(folder), "adapter", sizes, tuple(damages), tuple(notes))


def _verify_run(run: RunDirectory) -> Verification:
    sizes, damages = {}, []
    names = run.units.names()
    for name in names:
        try:
            _verify_unit(run, name)
            sizes[name] = sum(record.size for record in run.units.metadata(name).files.values())
        except DamagedError as error:
            damages.append(str(error))
    try:
        check_configuration(run.path, run.settings.get("model_files", {}))
    except DamagedError as error:
        damages.append(str(error))
    notes = [
        *_strangers(run.path, OWN_NAMES),
        *_strangers(run.units.folder, names),
    ]
    wanted = run.settings.get("adapted_blocks", [])
    collected = len(collected_blocks(run.settings, names))
    if collected < len(wanted) or lacks_adapter(run.settings):
        command = completing(run.settings, run.path)
        notes.append(f"not finished: {collected} of {len(wanted)} blocks are collected; to continue: {command}")
    return Verification(str(run.path), "run", sizes, tuple(damages), tuple(notes))


def _verify_unit(run: RunDirectory, name: str) -> None:
    """Every file of the unit, and then what its kind promises; a `DamagedError` with the repair."""
    run.units.verify(name)
    found = _UNIT.fullmatch(name)
    if found is None:
        return
    index = int(found["index"])
    if found["kind"] == "stats":
        reader = BlockStatisticsReader(run.units, index)
        _require(run, name, _lists(run, name, reader), "lists other modules than it holds")
        _verify_statistics(run, name, reader)
    elif found["kind"] == "solve":
        _verify_factors(run, name, index)
    else:
        require_finite_states(run.units, name)


def _lists(run: RunDirectory, name: str, reader: BlockStatisticsReader) -> bool:
    """Whether a unit's manifest, its arrays and the run agree on its modules."""
    held = {linear.name for linear in reader.spec.linears}
    return held == set(run.units.metadata(name)["modules"]) and held <= set(run.parts["method"]["modules"])


def _verify_statistics(run: RunDirectory, name: str, reader: BlockStatisticsReader) -> None:
    """All sums, a tile at a time, and rows: reading checks that they are finite; second moments are not below zero.

    Of layers that were left out, because their sums were not finite, these sums are not there.
    """
    kept = {linear.name for linear in reader.spec.linears if "skipped" not in reader.facts(linear.name)}
    for linear in reader.spec.linears:
        if linear.name not in kept:
            continue
        if reader.spec.group_of(linear.name).token_rows:
            _read_rows(reader, linear.name, "output_rows")
        else:
            for row in range(0, linear.d_out, TILE):
                for column in range(0, linear.d_in, TILE):
                    reader.sums(linear.name, "gradient", slice(row, row + TILE), slice(column, column + TILE))
        moment = reader.sums(linear.name, "output_moment", slice(None))
        _require(run, name, not bool((moment < 0).any()), f"has an output moment below zero in {linear.name}")
    for group in reader.spec.groups:
        if not kept & set(group.modules):
            continue
        if group.token_rows:
            _read_rows(reader, group.name, "input_rows")
            continue
        for row in range(0, group.d_in, TILE):
            for column in range(0, row + 1, TILE):
                tile = reader.sums(group.name, "input_moment", slice(row, row + TILE), slice(column, column + TILE))
                sound = row != column or not bool((tile.diagonal() < 0).any())
                _require(run, name, sound, f"has an input moment with a diagonal below zero in {group.name}")


def _read_rows(reader: BlockStatisticsReader, module: str, statistic: str) -> None:
    for row in range(0, reader.facts(module)["num_tokens"], TILE):
        reader.token_rows(module, statistic, slice(row, row + TILE))


def _verify_factors(run: RunDirectory, name: str, index: int) -> None:
    factors = read_factors(run.units, index)
    solved = {module for module, facts in read_summaries(run.units, index).items() if not is_skipped(facts)}
    _require(run, name, set(factors) == solved, "lists other modules than it holds")
    for module, (lora_a, lora_b) in factors.items():
        fits = lora_a.dim() == lora_b.dim() == 2 and lora_a.shape[0] == lora_b.shape[1]
        _require(run, name, fits, f"has factors of {module} that do not fit each other")
        finite = bool(lora_a.isfinite().all()) and bool(lora_b.isfinite().all())
        _require(run, name, finite, f"has factors of {module} that are not finite")


def _require(run: RunDirectory, name: str, sound: bool, what: str) -> None:
    if not sound:
        raise DamagedError(f"unit {name} is damaged: {shown(run.units.folder / name)} {what}; {run.units.repair(name)}")


def _strangers(folder: Path, names: Sequence[str]) -> list[str]:
    """Notes on what is not ours at the top of a folder; it is left alone, other than what the next run sweeps away."""
    with files.damage_errors(folder):
        found = sorted(set(files.system_calls.listdir(folder)) - set(names))
    foreign = [name for name in found if not name.endswith(LEFTOVER_SUFFIXES)]
    return [f"{shown(folder / name)} is not part of it, and left alone" for name in foreign]
