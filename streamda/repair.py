"""Dropping damaged units of a run, and what then makes them again."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamda.commands import completing, only_collects, solving
from streamda.errors import ConfigError
from streamda.files import shown
from streamda.filesystem import tolerated
from streamda.quoting import named
from streamda.rundir import RunDirectory
from streamda.solutions import solve_unit
from streamda.store import stats_unit

_AGAIN = {
    "acts": "the boundary state is computed again from the nearest one below it",
    "grads": "the boundary gradient is computed again, from the loss downward where none above it is left",
    "stats": "the statistics are collected again, from the loss downward where no boundary gradient is left",
    "solve": "the block is solved again, and its statistics are collected again where they are gone",
}


@dataclass(frozen=True, slots=True)
class Repair:
    """What was dropped."""

    folder: str
    dropped: tuple[str, ...]
    """Units that were asked for."""
    dependents: tuple[str, ...]
    """Units that were made from those, and dropped with them."""
    next_steps: tuple[str, ...]
    """What to run for it to be made again, one after another."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """What was done and what follows, for people."""
        lines = [f"dropped {', '.join(self.dropped)}"]
        if self.dependents:
            lines.append(f"dropped with it, because made from it: {', '.join(self.dependents)}")
        kinds = {name.partition("-")[0] for name in (*self.dropped, *self.dependents)}
        lines += [text for kind, text in _AGAIN.items() if kind in kinds]
        return "\n".join([*lines, "to run next, from where it was begun:", *(f"  {step}" for step in self.next_steps)])


def repair_folder(folder: Path, drop: Sequence[str], unsafe_filesystem: bool = False) -> Repair:
    """Drops units of a run, and the solutions made from dropped statistics where the statistics are to be kept.

    Nothing else goes: whatever was computed from a unit was computed while its bytes were those that were committed,
    because each reading checks them. In a run that frees statistics the solution of a block is all that is left of its
    part of the work, and stays.

    Args:
        folder: the run's directory, or collected statistics.
        drop: names of units.
        unsafe_filesystem: whether to go on with a file system that cannot lock or sync.

    Raises:
        ConfigError: no run, or a name that is none of its units; nothing is dropped then.
        LockedError: a run is using it.
        DamagedError: the record of the run is damaged.
    """
    with tolerated(unsafe_filesystem), RunDirectory.open_existing(folder, exclusive=True, check=False) as run:
        units = run.units.names()
        for name in drop:
            if name not in units:
                raise ConfigError(_unknown(run.path, name, units))
        wanted = tuple(dict.fromkeys(drop))
        if not wanted:
            raise ConfigError("no unit is named; use --drop UNIT, with the name that `streamda verify` gives")
        dependents: tuple[str, ...] = ()
        steps = [completing(run.settings, run.path)]
        if run.settings.get("keeps_statistics", True):
            made = {stats_unit(index): solve_unit(index) for index in run.settings.get("adapted_blocks", [])}
            dependents = tuple(made[name] for name in wanted if made.get(name) in units and made[name] not in wanted)
            if only_collects(run.settings):
                solutions = {*made.values()}
                steps = steps if {*wanted} - solutions else []
                if solutions & {*wanted, *dependents}:
                    steps.append(f"{solving(shown(run.path))} ..., where its adapter is wanted again")
        # what was asked for goes last: interrupted before that, the same repair is asked for again
        for name in (*dependents, *wanted):
            run.units.drop(name)
    return Repair(str(run.path), wanted, dependents, tuple(steps))


def _unknown(path: Path, name: str, units: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, units)
    hint = f"did you mean {', '.join(near)}?" if near else f"it has {named(units) or 'none'}"
    return f"{shown(path)} has no unit {shown(name)!r}; {hint}"
