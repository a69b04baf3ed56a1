"""One run's folder: opened or continued with the plan it was begun with, its facts written down, its end tidied."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from streamda import commands, files
from streamda.adapter import require_writable_output
from streamda.adapter_check import check_adapter, check_recorded
from streamda.batches import micro_batch_text
from streamda.config import RunConfig
from streamda.disk_plan import stride_text, thinned_out
from streamda.disk_space import START_RESERVE_BYTES, room_for_run
from streamda.errors import ConfigError, MismatchError, StorageError
from streamda.files import shown
from streamda.layers import BlockSpec
from streamda.limits import limit_errors
from streamda.memory import format_size
from streamda.model_copy import copy_configuration
from streamda.output import NotEmptyError
from streamda.plan import Plan
from streamda.quoting import counted, named
from streamda.report import REPORT_FILE, InitReport, read_report
from streamda.run_parts import canonical_digest, differences
from streamda.rundir import RunDirectory
from streamda.samples import Sample
from streamda.setup import Prepared, versions
from streamda.solutions import skipped_layers, solve_unit
from streamda.store import stats_unit

NOTHING_TO_CONTINUE: Mapping[str, Any] = MappingProxyType({"overwriting": None, "finished": True})
"""What the settings of a run say whose adapter is in place, or of which, by `collect`, all is collected."""


@contextmanager
def open_run(
    work: Path,
    prepared: Prepared,
    parts: dict[str, dict[str, Any]],
    made: Plan,
    *,
    solver_settings: Mapping[str, Any] | None = None,
) -> Iterator[tuple[RunDirectory, Plan]]:
    """Opens or continues a run directory, with the plan that it was, or will be, run with.

    What ``--overwrite`` begins is marked until it is done, so that the same command continues it if it was stopped.

    Args:
        work: the directory.
        prepared: the run.
        parts: what decides its statistics.
        made: the plan for what the directory's file system has free.
        solver_settings: how this run also solves; None if it does not.

    Raises:
        StorageError: the disk cannot hold a run that has not begun.
        StreamdaError: as `RunDirectory.open` does.
    """
    config = prepared.config
    solves = solver_settings is not None
    keeps = config.keep_statistics or not solves
    mark = _restart_mark(config, parts, solver_settings) if config.overwrite else None
    own = {"overwriting": mark, **commands.record("init" if solves else "collect", config.given(), work)}
    there = (work / "run.json").exists()
    if not there:
        _require_space(work, made)

    def begin() -> dict[str, Any]:
        if there:  # and is to be thrown away
            _require_space(work, made)
        return _run_facts(prepared, made) | {"keeps_statistics": keeps} | own

    def starts_over(record: Mapping[str, Any]) -> bool:
        if mark is None or not config.resume or record["settings"].get("overwriting") != mark:
            return config.overwrite
        changed = any(differences(record["parts"]["numerics"], parts["numerics"]))
        return changed and not config.allow_environment_change

    with RunDirectory.open(
        work,
        parts,
        settings={},
        new=begin,
        resume=config.resume,
        restart=starts_over,
        ignore_parts=("numerics",) if config.allow_environment_change else (),
    ) as run:
        # what `init` began is still to become an adapter when `collect` has been there
        is_ours = solves or run.settings.get("stage") != "init"
        if not is_ours and not run.settings["keeps_statistics"]:
            raise MismatchError(
                f"{shown(run.path)} is the work directory of an `init` that keeps no statistics; finish that, or give "
                "another --statistics"
            )
        if run.settings.get("skipped_samples") and not config.skip_bad_samples:
            raise MismatchError(
                f"{shown(run.path)}: this run has left out samples that became NaN or Inf; give --skip-bad-samples "
                "again, or --overwrite to start over"
            )
        # the bits of a run depend on its micro-batches, so a continued one keeps them under any budget; statistics
        # that were once to be kept are never freed behind their owner's back
        chosen, kept = run.settings["micro_batch_tokens"], bool(run.settings["keeps_statistics"])
        if chosen != made.micro_batch_tokens or kept > keeps:
            keeps = keeps or kept
            made = prepared.plan(
                solves=solves, keep_statistics=keeps, micro_batch_tokens=chosen, disk_room=room_for_run(work)
            )
        if keeps and not kept:  # once it is known that the run fits with them
            _drop_made_from_rows(run, prepared.specs(chosen, keep_statistics=False))
        copies = copy_configuration(prepared.source.folder, run.path, config.trust_remote_code)
        run.update_settings({"keeps_statistics": keeps, "model_files": copies, **(own if is_ours else {})})
        with limit_errors(prepared.budget.device_bytes, made.peak_bytes):
            yield run, made
        if is_ours and run.settings["keeps_statistics"]:  # else it is gone
            run.update_settings(NOTHING_TO_CONTINUE)


def _drop_made_from_rows(run: RunDirectory, specs: Sequence[BlockSpec]) -> None:
    """Drops what a run has that kept no statistics so far: those that are kept are sums, and so is what is solved."""
    for spec in specs:
        if any(group.token_rows for group in spec.groups):
            for name in {solve_unit(spec.index), stats_unit(spec.index)} & set(run.units.names()):
                run.units.drop(name)


def run_digest(parts: Mapping[str, Any], solver_settings: Mapping[str, Any]) -> str:
    """Digest of what an adapter was made from and how; a finished one stands whatever the libraries' versions are."""
    return canonical_digest({"parts": _without_numerics(parts), "solve": dict(solver_settings)})


def _restart_mark(config: RunConfig, parts: Mapping[str, Any], solver_settings: Mapping[str, Any] | None) -> str:
    """Tells commands with ``--overwrite`` apart: none continues what it could not, so that each can start over."""
    skips = [config.skip_bad_samples, config.skip_bad_layers]
    return canonical_digest({"run": run_digest(parts, solver_settings or {}), "skips": skips})


def resume_notices(prepared: Prepared, run: RunDirectory, parts: Mapping[str, Any]) -> list[str]:
    """Says where a continued run goes on otherwise than it was asked to."""
    notices = []
    changed = list(differences(run.parts["numerics"], parts["numerics"]))
    if changed:
        notices.append(f"the environment has changed since this run was begun: {', '.join(changed)}; bits may differ")
    asked, chosen = prepared.config.collect.micro_batch_tokens, run.settings["micro_batch_tokens"]
    if asked not in ("auto", str(chosen)):
        begun = micro_batch_text(chosen)
        notices.append(f"this run goes on with {begun} per micro-batch, as it was begun, not {asked}")
    return notices


def continuation_notice(where: str, was_killed: bool) -> str:
    """Where an interrupted run goes on, and what may have ended it."""
    if not was_killed:
        return f"continuing at {where}"
    return (
        f"continuing at {where}; the last process here was killed, or the machine stopped: if memory ran out, give "
        "a smaller --max-gpu-mem or --max-host-mem"
    )


def _without_numerics(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if name != "numerics"}


def new_report(prepared: Prepared, made: Plan) -> InitReport:
    """A report with all that is known before the start."""
    calibration = prepared.calibration
    return InitReport(
        config=prepared.config.to_dict(),
        versions=versions(),
        model={
            "name": prepared.source.name,
            "revision": prepared.source.revision,
            "num_blocks": len(prepared.stack.blocks),
            "num_layers": len(prepared.targets.linears),
            "dtype": str(prepared.dtype).removeprefix("torch."),
        },
        data={
            "source": calibration.source,
            "is_shipped": calibration.is_shipped,
            **sample_counts(calibration.samples, prepared.num_rows(made.micro_batch_tokens)),
            "num_truncated": calibration.num_truncated,
            "num_skipped": calibration.num_skipped,
            "num_bad_lines": calibration.num_bad_lines,
            "num_duplicates": calibration.num_duplicates,
            "population_size": prepared.population_size,
        },
        plan=made.to_dict(),
        budget_bytes=prepared.budget.device_bytes,
        notices=[*prepared.notices, *stride_notices(made)],
    )


def sample_counts(samples: Sequence[Sample], num_rows: int) -> dict[str, int]:
    """What the report says of the samples that a run is made of, and of the tokens computed for them."""
    return {
        "num_samples": len(samples),
        "num_tokens": sum(sample.num_tokens for sample in samples),
        "num_rows": num_rows,
        "num_label_tokens": sum(sample.num_label_tokens for sample in samples),
    }


def stride_notices(made: Plan) -> list[str]:
    """Says what a run costs that cannot keep all boundaries."""
    if made.boundary_stride == 1:
        return []
    return [
        f"disk is short: boundaries kept: {stride_text(made.boundary_stride)}, weights are read "
        f"{made.weight_passes:.1f} times"
    ]


def disk_notices(prepared: Prepared, planned: Plan, room: int) -> list[str]:
    """Says what a run would do on a disk that has no room for the plan.

    Args:
        prepared: the run.
        planned: for any disk.
        room: in bytes, of the work directory's file system.
    """
    if planned.disk_bytes <= room:
        return []
    here = prepared.plan(solves=True, keep_statistics=prepared.config.keep_statistics, disk_room=room)
    fits = (
        f"a run would keep {stride_text(here.boundary_stride)} of the boundary states and read weights "
        f"{here.weight_passes:.1f} times"
        if here.disk_bytes <= room
        else f"a run needs {format_size(here.disk_bytes)} at least, and a new one is refused"
    )
    return [f"the disk has room for {format_size(room)} beside a reserve of {format_size(START_RESERVE_BYTES)}: {fits}"]


def finished_report(output: Path, digest: str, prepared: Prepared) -> InitReport | None:
    """The report of a finished run with these very settings, its adapter checked again; None if there is none.

    Raises:
        ConfigError: statistics are to be kept, and of that run there are none.
        DamagedError: the adapter is not what was written.
    """
    if not os.path.isfile(output / REPORT_FILE):
        return None
    report = read_report(output)
    if report.model.get("fingerprint") != digest:
        return None
    config = prepared.config
    if config.keep_statistics and not _has_statistics(report):
        where = f"are no longer in {shown(report.statistics_dir)}" if report.statistics_dir else "were not kept"
        raise ConfigError(
            f"{shown(output)} holds the finished adapter of these settings, but its statistics {where}; "
            "`streamda collect` makes them, and --overwrite makes both anew"
        )
    refused = report.skipped_samples and not config.skip_bad_samples
    if refused or (skipped_layers(report.modules) and not config.skip_bad_layers):
        return None
    check_recorded(output, report.written)
    check_adapter(output, prepared.stack.model)
    report.already_done = True
    return report


def require_complete(run: RunDirectory) -> None:
    """Refuses statistics of which some are missing, with what collects them."""
    if not run.settings.get("keeps_statistics", True):
        raise ConfigError(
            f"{shown(run.path)} is the work directory of an `init` that keeps no statistics; `streamda collect` makes "
            "them, in another folder"
        )
    missing = [index for index in run.settings["adapted_blocks"] if stats_unit(index) not in run.units]
    if missing:
        command = commands.collecting(run.settings, run.path) or "`streamda collect` with the same options"
        raise ConfigError(
            f"{shown(run.path)} lacks the statistics of {counted(len(missing), 'block')}; first run, from where it was "
            f"begun: {command}"
        )


def require_free_output(output: Path, config: RunConfig) -> None:
    """Refuses an output folder as `require_writable_output` does; of another run's adapter it says what differs."""
    try:
        require_writable_output(output, config.overwrite)
    except NotEmptyError as error:
        if not os.path.isfile(output / REPORT_FILE):
            raise
        report = read_report(output)
        statistics = shown(report.statistics_dir or "")
        hint = f"; `{commands.solving(statistics)}` makes others" if _has_statistics(report) else ""
        raise ConfigError(f"{error}: it has {_other_adapter(report.config, config.to_dict())}{hint}") from error


def _other_adapter(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What an adapter is, by the options it was made with and those that are asked for now."""
    solved = [options.get("model") is None for options in (old, new)]  # `solve` knows neither model nor data
    if any(solved):
        names = ["statistics", "solve"] if all(solved) else ["solve"]
    else:
        names = ["model", "revision", "skip_bad_samples", "skip_bad_layers", "data", "collect", "solve"]
    found = list(differences({name: old.get(name) for name in names}, {name: new[name] for name in names}))
    if found:
        return f"the adapter of another run, where {named(found)}"
    return "an adapter with the same settings" + ("" if any(solved) else ", of another model or other samples")


def _has_statistics(report: InitReport) -> bool:
    """Whether a finished run's own record says where its statistics are, and a run lies there."""
    return report.statistics_dir is not None and os.path.isfile(os.path.join(report.statistics_dir, "run.json"))


def remove_leftover(work: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Removes what a run left that was killed between putting its adapter in place and cleaning up."""
    if (work / "run.json").is_file():
        with RunDirectory.open_existing(work, exclusive=True, check=False) as run:  # it goes, damaged or not
            ours = canonical_digest(_without_numerics(run.parts)) == canonical_digest(_without_numerics(parts))
            if ours and not run.settings["keeps_statistics"]:
                run.remove()
            elif ours:
                run.update_settings(NOTHING_TO_CONTINUE)
    else:
        RunDirectory.finish_removal(work)


def _run_facts(prepared: Prepared, made: Plan) -> dict[str, Any]:
    """What a run remembers of itself, so that `solve` needs nothing else."""
    report = new_report(prepared, made)
    return {
        "micro_batch_tokens": made.micro_batch_tokens,
        "population_size": prepared.population_size,
        "adapted_blocks": [index for index, replays in enumerate(made.replays) if replays],
        "model": report.model,
        "data": report.data,
        "notices": list(prepared.notices),
    }


def _require_space(work: Path, made: Plan) -> None:
    """Refuses to begin what the disk cannot hold."""
    room = room_for_run(work)
    if room < made.disk_bytes:
        raise StorageError(
            f"the run needs {format_size(made.disk_bytes)} of disk{thinned_out(made.boundary_stride)}, and a reserve "
            f"of {format_size(START_RESERVE_BYTES)}; {work} has "
            f"{format_size(files.free_bytes(work))} free: give --work-dir on a larger disk, more --max-host-mem, or "
            "fewer or shorter samples"
        )
