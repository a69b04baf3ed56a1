"""How fast a run could be: its work over the rates of the machine. Plain arithmetic; nothing is measured here.

The compute bound is the sum over phases of FLOPs over the rate of a matrix product in that phase's precision. The disk
bound is bytes read over the reading rate plus bytes written over the writing rate, as if one disk did both and held the
checkpoint too. A run that overlaps the two perfectly takes the larger; one that does not overlap them, the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from streamda.errors import ConfigError

PHASE_PRECISION = {"statistics_float64": "float64", "solve": "float64", "solve_float32": "float32"}
"""Of the phases of a plan's FLOPs that are not computed in the compute dtype."""
_UNITS = {"flops": "FLOP/s", "flops64": "FLOP/s", "read": "bytes/s", "write": "bytes/s"}


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second; None is not known."""

    flops: float | None = None
    """Of a matrix product in the compute dtype."""
    flops64: float | None = None
    """Of a matrix product in float64."""
    read: float | None = None
    """Bytes read from the work directory's file system, past the page cache."""
    write: float | None = None
    """Bytes written to it, durably."""

    def or_else(self, other: Rates) -> Rates:
        """These, and the other's where these are not known."""
        mine = {name: value for name, value in asdict(self).items() if value is not None}
        return Rates(**(asdict(other) | mine))


def parse_rates(text: str | None) -> Rates:
    """Rates as users write them: ``flops=150e9,flops64=90e9,read=1e9,write=4e8``, in any order, any of them left out.

    Raises:
        ConfigError: an unknown name, one that is given twice, or a value that is no number above zero.
    """
    found: dict[str, float] = {}
    for part in (text or "").split(",") if text is not None else ():
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if name not in _UNITS or name in found or not 0 < value < float("inf"):
            allowed = ", ".join(f"{known} ({unit})" for known, unit in _UNITS.items())
            raise ConfigError(
                f"--rates has {part.strip()!r}; expected name=number above zero, each once, names being {allowed}"
            )
        found[name] = value
    return Rates(**found)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the work of a run takes at given rates, in seconds; None where a rate is not known."""

    rates: Rates
    flops: dict[str, int]
    """By phase."""
    bytes_read: int
    bytes_written: int

    @property
    def precision(self) -> dict[str, str]:
        """Of each phase: ``compute`` (the compute dtype), ``float32`` or ``float64``."""
        return {phase: PHASE_PRECISION.get(phase, "compute") for phase in self.flops}

    @property
    def phase_seconds(self) -> dict[str, float | None]:
        """Compute time by phase."""
        # float32 is measured only where it is the compute dtype; a narrower one is emulated on some devices
        single = max((rate for rate in (self.rates.flops, self.rates.flops64) if rate is not None), default=None)
        rates = {"float64": self.rates.flops64, "compute": self.rates.flops, "float32": single}
        return {phase: _ratio(count, rates[self.precision[phase]]) for phase, count in self.flops.items()}

    @property
    def compute_seconds(self) -> float | None:
        """The compute bound."""
        return _sum(*self.phase_seconds.values())

    @property
    def read_seconds(self) -> float | None:
        """Reading, weights included."""
        return _ratio(self.bytes_read, self.rates.read)

    @property
    def write_seconds(self) -> float | None:
        """Writing, durably."""
        return _ratio(self.bytes_written, self.rates.write)

    @property
    def disk_seconds(self) -> float | None:
        """The disk bound."""
        return _sum(self.read_seconds, self.write_seconds)

    @property
    def at_least_seconds(self) -> float | None:
        """Everything overlapped: the larger bound."""
        compute, disk = self.compute_seconds, self.disk_seconds
        return None if compute is None or disk is None else max(compute, disk)

    @property
    def in_turn_seconds(self) -> float | None:
        """Nothing overlapped: the sum of both bounds, at full rates."""
        return _sum(self.compute_seconds, self.disk_seconds)

    def to_dict(self, wall_seconds: float | None = None) -> dict[str, Any]:
        """Plain JSON.

        Args:
            wall_seconds: what the run took, to be compared with its larger bound.
        """
        flops: Mapping[str, int] = self.flops
        by_precision = {
            kind: sum(count for phase, count in flops.items() if self.precision[phase] == kind)
            for kind in ("compute", "float32", "float64")
        }
        values: dict[str, Any] = {
            "rates": asdict(self.rates),
            "flops": dict(flops),
            "precision": self.precision,
            "flops_by_precision": by_precision,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "phase_seconds": self.phase_seconds,
            "compute_seconds": self.compute_seconds,
            "read_seconds": self.read_seconds,
            "write_seconds": self.write_seconds,
            "disk_seconds": self.disk_seconds,
            "at_least_seconds": self.at_least_seconds,
            "in_turn_seconds": self.in_turn_seconds,
        }
        if wall_seconds is not None:
            # without a disk rate the compute bound is still a bound
            larger = max((value for value in (self.compute_seconds, self.disk_seconds) if value), default=None)
            values |= {
                "wall_seconds": wall_seconds,
                "larger": None if larger is None else "compute" if larger == self.compute_seconds else "disk",
                "times_the_bound": None if larger is None else wall_seconds / larger,
            }
        return values


def _ratio(amount: float, rate: float | None) -> float | None:
    return None if rate is None else amount / rate


def _sum(*seconds: float | None) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None
