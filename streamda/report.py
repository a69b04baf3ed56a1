"""What a run did, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamda.config import SolveConfig
from streamda.errors import DamagedError
from streamda.files import shown
from streamda.memory import format_size
from streamda.methods import SolveStatus
from streamda.quoting import counted, printable
from streamda.sealed_json import seal_of
from streamda.timeline import Timeline
from streamda.units import FileRecord

REPORT_FILE = "streamda_report.json"
_SHOWN_MODULES = 5
_BAR = 24
LARGE_CHANGE = 0.5
"""Of a weight's norm. Starts by the published settings come to a thousandth."""
_SHOWN_SHARE = 0.005
"""Of the wall clock: less would be shown as 0 %."""


@dataclass(slots=True)
class InitReport:
    """Everything worth knowing about a run; filled while it goes."""

    output_dir: str | None = None
    statistics_dir: str | None = None
    already_done: bool = False
    resumed: bool = False
    """True if an earlier run had begun the work: seconds, bytes and peaks are then of this process only."""
    config: dict[str, Any] = field(default_factory=dict)
    """`RunConfig.to_dict`: options by name, those of the stages under ``data``, ``collect`` and ``solve``."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of this package and the libraries that decide its numbers, by name."""
    model: dict[str, Any] = field(default_factory=dict)
    """``name``, ``revision``, ``num_blocks``, ``num_layers`` (adapted ones), ``dtype`` (of the computation), and
    ``fingerprint`` (of all that decided the adapter)."""
    data: dict[str, Any] = field(default_factory=dict)
    """``source``, ``is_shipped`` (whether it is streamda's own), ``population_size``, and counts: ``num_samples``,
    ``num_tokens``, ``num_rows`` (with padding), ``num_label_tokens``, ``num_truncated``, ``num_skipped``,
    ``num_bad_lines``, ``num_duplicates``."""
    plan: dict[str, Any] = field(default_factory=dict)
    """`streamda.plan.Plan.to_dict`; sizes in bytes. Empty after `solve` alone."""
    budget_bytes: int = 0
    """Of the device; 0 after `solve` alone."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Measured peak in bytes by phase, to be held against plan["peaks"]."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase: prologue, forward, epilogue, backward, solve; write is not in the file, which it writes."""
    wall_seconds: float = 0.0
    """From the start until the adapter is written (its writing excluded): preparation and all phases."""
    busy: dict[str, float] = field(default_factory=dict)
    """Seconds by kind of work, whatever the phase; work beside the main thread has its thread behind it in brackets."""
    bounds: dict[str, Any] = field(default_factory=dict)
    """How near the machine's limits the run was, see `streamda.bounds`; empty for a short or a resumed run."""
    bytes: dict[str, int] = field(default_factory=dict)
    """``checkpoint`` is the size of the model's tensors; the others are traffic: ``weights_read``,
    ``boundaries_written``, ``boundaries_read``, ``statistics_written``."""
    loss: float | None = None
    """Mean per-sample loss of the base model on the calibration samples."""
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By module name: ``status`` (a `SolveStatus`), ``num_tokens``, ``num_samples``, ``step_zero_change`` (norm of the
    scaled product B A over that of the weight; None where that is zero), ``effective_rank`` of the input moment,
    ``statistics`` (``rows`` or ``sums``), and unless the gradient was zero the fields of `SolveStats`. A layer without
    adapter has ``status``, ``reason`` and the two counts."""
    skipped_samples: list[dict[str, Any]] = field(default_factory=list)
    """Left out because they became NaN or Inf: index of the sample, row of the data, reason."""
    notices: list[str] = field(default_factory=list)
    """Sentences for people, in the order they came up in."""
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    """Size and crc32c of the adapter's configuration and weights, by name."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InitReport:
        """The report that `to_dict` gave."""
        return cls(**{entry.name: values[entry.name] for entry in dataclasses.fields(cls) if entry.name in values})

    def to_json(self) -> str:
        """One JSON document; NaN and Inf cannot occur in it."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @property
    def written(self) -> dict[str, FileRecord]:
        """`files` as records."""
        return {name: FileRecord(values["size"], values["crc32c"]) for name, values in self.files.items()}

    def note_time(self, timeline: Timeline) -> None:
        """Takes note of what is known of the time before the report is written with the adapter."""
        self.wall_seconds, self.busy = timeline.now(), timeline.busy()

    def seal(self, written: Mapping[str, FileRecord]) -> str:
        """Takes note of what the adapter's files came to; the report's file, with a checksum of its own in it."""
        self.files = {name: {"size": record.size, "crc32c": record.crc32c} for name, record in written.items()}
        values = self.to_dict()
        return json.dumps({**values, "self_crc": seal_of(values)}, indent=2, allow_nan=False) + "\n"

    def to_table(self) -> str:
        """The report for people."""
        return "\n".join(
            [*self._overview(), *self._memory(), *self._time(), *self._layers(), *note_lines(self.notices)]
        )

    def _overview(self) -> list[str]:
        lines = ["streamda: LoRA-DA initialization"]
        if self.model:
            lines.append(
                f"  model        {printable(self.model['name'])}  ({self.model['num_blocks']} blocks, "
                f"{self.model['dtype']})"
            )
        if self.data:
            lines.append(
                f"  data         {printable(self.data['source'])}  ({self.data['num_samples']} samples, "
                f"{self.data['num_tokens']} tokens; {self.data['num_truncated']} cut, "
                f"{self.data['num_skipped']} skipped)"
            )
        method = {name: self.config.get("solve", {}).get(name) for name in ("rank", "lora_alpha", "rslora")}
        if self.modules and None not in method.values():
            solve = SolveConfig(**method)
            solved = [facts for facts in self.modules.values() if facts["status"] != SolveStatus.SKIPPED.value]
            kind = "rank-stabilized, " if solve.rslora else ""
            lines.append(
                f"  method       rank {solve.rank}, alpha {solve.lora_alpha:g} ({kind}scaling {solve.scaling:.3g}), "
                f"{len(solved)} layers"
            )
        if self.loss is not None:
            lines.append(f"  loss         {self.loss:.4f}  (base model, mean over samples)")
        if self.output_dir:
            lines.append(f"  adapter      {printable(self.output_dir)}")
        if self.statistics_dir:
            lines.append(f"  statistics   {printable(self.statistics_dir)}")
        if self.resumed:
            lines.append("  (an earlier process did a part of it: memory, times and bytes are of the last one)")
        return lines

    def _memory(self) -> list[str]:
        if not self.peaks:
            return []
        planned = self.plan.get("peaks", {})
        rows = [
            [phase, format_size(planned[phase]) if phase in planned else "", format_size(peak)]
            for phase, peak in self.peaks.items()
        ]
        budget = f"  (budget {format_size(self.budget_bytes)})" if self.budget_bytes else ""
        return ["", f"memory{budget}", *table(["phase", "planned peak", "measured peak"], rows)]

    def _time(self) -> list[str]:
        if not self.seconds:
            return []
        longest = max(max(self.seconds.values()), 1e-9)
        rows = [[phase, f"{value:.1f} s", "#" * round(_BAR * value / longest)] for phase, value in self.seconds.items()]
        read = self.bytes.get("weights_read", 0)
        stored = self.bytes.get("checkpoint", 0)
        lines = ["", "time", *table(["phase", "seconds", ""], rows)]
        if stored:
            lines.append(f"  weights read {format_size(read)}, {read / stored:.2f} times the checkpoint")
        return [*lines, *self._busy(), *bound_lines(self.bounds)]

    def _busy(self) -> list[str]:
        if not self.busy or self.wall_seconds <= 0:
            return []
        shown = {name: value for name, value in self.busy.items() if value >= _SHOWN_SHARE * self.wall_seconds}
        main = sum(value for name, value in self.busy.items() if not _is_beside(name))  # of one thread, so never more
        shown["everything else"] = self.wall_seconds - main
        rows = [[name, f"{value:.1f} s", f"{100 * value / self.wall_seconds:.0f} %"] for name, value in shown.items()]
        beside = ["  (in brackets: the thread that did it beside the rest)"] if any(map(_is_beside, shown)) else []
        return ["", f"work  (of {self.wall_seconds:.1f} s)", *table(["what", "seconds", "share"], rows), *beside]

    def _layers(self) -> list[str]:
        if not self.modules:
            return []
        counts: dict[str, int] = {}
        for facts in self.modules.values():
            counts[facts["status"]] = counts.get(facts["status"], 0) + 1
        lines = ["", f"layers  ({', '.join(f'{count} {status}' for status, count in sorted(counts.items()))})"]
        for status in counts:
            if status != SolveStatus.OK.value:
                lines.append(f"  {status}: {SolveStatus(status).advice}")
        ranked = sorted(self.modules, key=lambda name: -(self.modules[name].get("step_zero_change") or 0.0))
        unusual = [name for name in self.modules if self.modules[name]["status"] != SolveStatus.OK.value]
        shown = list(dict.fromkeys([*unusual[:_SHOWN_MODULES], *ranked[:_SHOWN_MODULES], *ranked[-1:]]))
        rows = [_module_row(name, self.modules[name]) for name in shown]
        header = ["module", "status", "change at step 0", "eigenvalue r / r+1", "residual", "damping"]
        lines += table(header, rows)
        if len(shown) < len(self.modules):
            lines.append(f"  ... {len(self.modules) - len(shown)} more in {REPORT_FILE}")
        return lines


def _is_beside(work: str) -> bool:
    """Whether it is of another thread than the main one, see `InitReport.busy`."""
    return work.endswith(")")


def _module_row(name: str, facts: Mapping[str, Any]) -> list[str]:
    change = facts.get("step_zero_change")
    kept, following = facts.get("eigenvalues"), facts.get("next_eigenvalue")
    return [
        name,
        facts["status"],
        "" if change is None else f"{change:.2e}",
        "" if not kept else f"{kept[-1]:.2e} / " + ("none" if following is None else f"{following:.2e}"),
        f"{facts['residual']:.0e}" if "residual" in facts else "",
        f"{facts['damping']:.0e}" if "damping" in facts else "",
    ]


def large_change_notices(modules: Mapping[str, Mapping[str, Any]], *, normalized: bool) -> list[str]:
    """Says where an adapter adds so much to the weights that little of the model would be left.

    Args:
        modules: `InitReport.modules`.
        normalized: whether the displacement was divided by its largest singular value.
    """
    changes = {name: facts.get("step_zero_change") or 0.0 for name, facts in modules.items()}
    large = [name for name, change in changes.items() if change > LARGE_CHANGE]
    if not large:
        return []
    worst = max(large, key=changes.__getitem__)
    remedy = "a larger --gamma" if normalized else "--normalize"
    return [
        f"of {counted(len(large), 'layer')} the weight is changed by more than {LARGE_CHANGE:.0%} before the first "
        f"step ({worst}: {changes[worst]:.1e} times its norm), which undoes the model: use {remedy}"
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain text table, columns padded to their widest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    return [line(header), line(["-" * width for width in widths]), *map(line, rows)]


def note_lines(notices: Sequence[str]) -> list[str]:
    """The end of a table: notices, one to a line."""
    return ["", *(f"note: {notice}" for notice in notices)] if notices else []


def bound_lines(bounds: Mapping[str, Any]) -> list[str]:
    """How near the limit a run was, for people: one line; none where that is not known.

    Args:
        bounds: `InitReport.bounds`.
    """
    if bounds.get("times_the_bound") is None:
        return []
    larger = bounds["larger"]
    other = "disk" if larger == "compute" else "compute"
    return [
        f"  wall {format_seconds(bounds['wall_seconds'])} = {bounds['times_the_bound']:.1f} x the {larger} bound "
        f"({format_seconds(bounds[f'{larger}_seconds'])}); {other} bound "
        f"{format_seconds(bounds[f'{other}_seconds'])}"
    ]


def format_seconds(seconds: float | None) -> str:
    """A time for people: ``0.35 s``, ``71 s``, ``34.2 min``, ``5.1 h``; ``unknown`` for None."""
    if seconds is None:
        return "unknown"
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def read_report(folder: Path) -> InitReport:
    """The report inside an adapter folder.

    Raises:
        DamagedError: it is no report, or not the one that was written.
    """
    path, advice = shown(folder / REPORT_FILE), f"move {shown(folder)} away and make the adapter again"
    try:
        values = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        seal = values.pop("self_crc", None)
        report = InitReport.from_dict(values)
        whole = seal == seal_of(values) if seal is not None else not report.files  # older reports have neither
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is no report of a run; {advice}") from error
    if not whole:
        raise DamagedError(f"{path} does not match its own checksum; {advice}")
    return report
