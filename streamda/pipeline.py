"""The stages, each as one page: plan, collect, solve, and `initialize`, which is all of them.

skeleton, samples, plan          nothing is read yet, and every refusal happens here
prologue, blocks up, epilogue    pass 1a: boundary states are spilled
blocks down                      pass 1b: statistics of a block are committed ...
solve                          pass 2:  ... and solved, and freed unless they are kept
adapter, report
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from streamda import files
from streamda.adapter import AdapterFacts, check_adapter, require_writable_output, write_adapter
from streamda.calibration import describe_sample
from streamda.checkpoint import Checkpoint, build_skeleton, load_config
from streamda.collect_stage import Collection
from streamda.config import RunConfig
from streamda.errors import ConfigError, DamagedError, StorageError
from streamda.memory import PeakMeter, bound_allocator, enforce_device_limit, format_size
from streamda.plan import Plan
from streamda.progress import Progress
from streamda.report import REPORT_FILE, InitReport, read_report
from streamda.rundir import RunDirectory, canonical_digest
from streamda.setup import Prepared, choose_device, fingerprint_parts, measure_flops, prepare, versions
from streamda.solutions import read_factors, read_summaries
from streamda.solve_stage import Solver
from streamda.stopwatch import Stopwatch
from streamda.store import stats_unit

DISK_RESERVE_BYTES = 500_000_000
"""Left free beside what a run needs, so that a full disk stops us before it stops others."""
CONFIG_COPY = "model"
"""Folder inside a run with a copy of the model's config.json, all that `solve` needs of the model."""


def initialize(config: RunConfig, *, quiet: bool = False, verbose: bool = False) -> InitReport:
    """Plans, collects, solves and writes the adapter; continues where an interrupted run of the same settings stopped.

    Args:
        config: the run.
        quiet: no progress and no notices.
        verbose: also shows one sample with its mask.

    Raises:
        StreamdaError: of the kind that fits, see `streamda.errors`.
    """
    output = _output_dir(config)
    work = Path(config.work_dir or f"{output}.work")
    _require_apart(config, output=output, work=work)
    prepared = prepare(config, weights=True)
    made = prepared.plan(solves=True, keep_statistics=config.keep_statistics)
    checkpoint = Checkpoint(prepared.source.folder, prepared.stack.model, prepared.device)
    parts = fingerprint_parts(prepared, checkpoint.fingerprint())
    solver = _solver(config, prepared.population_size, prepared.device)
    digest = canonical_digest({"parts": parts, "solve": solver.settings})
    if not config.overwrite and (done := _finished(output, digest, prepared)) is not None:
        if not config.keep_statistics:
            _remove_run(work, parts)
        return done
    require_writable_output(output, config.overwrite)
    with _meter(prepared) as meter:
        progress = Progress(meter, quiet=quiet)
        _announce(progress, prepared, verbose)
        with _open_run(work, prepared, parts, made, solves=True) as (run, made):
            report = _new_report(prepared, made)
            Collection(prepared, checkpoint, run, made, meter, progress, report).collect(solver)
            report.output_dir = str(output)
            report.statistics_dir = str(work) if config.keep_statistics else None
            report.model["fingerprint"] = digest
            with Stopwatch(report, "write", meter):
                _write_adapter(output, run, report, config, prepared.stack.model)
            if not config.keep_statistics:
                run.remove()
    return report


def collect(config: RunConfig, *, quiet: bool = False, verbose: bool = False) -> InitReport:
    """Pass 1 only: statistics of all blocks into ``config.statistics``, for `solve`. Arguments as for `initialize`."""
    if config.statistics is None:
        raise ConfigError("no folder for the statistics is given; use --statistics DIR")
    work = Path(config.statistics)
    _require_apart(config, output=None, work=work)
    prepared = prepare(config, weights=True, solves=False)
    made = prepared.plan(solves=False, keep_statistics=True)
    checkpoint = Checkpoint(prepared.source.folder, prepared.stack.model, prepared.device)
    parts = fingerprint_parts(prepared, checkpoint.fingerprint())
    with _meter(prepared) as meter:
        progress = Progress(meter, quiet=quiet)
        _announce(progress, prepared, verbose)
        with _open_run(work, prepared, parts, made, solves=False) as (run, made):
            report = _new_report(prepared, made)
            Collection(prepared, checkpoint, run, made, meter, progress, report).collect(None)
            report.statistics_dir = str(work)
    return report


def solve(config: RunConfig, *, quiet: bool = False) -> InitReport:
    """Pass 2 only: an adapter from collected statistics. Of the model nothing but its configuration is used.

    Args:
        config: ``statistics`` and ``output_dir`` must be given; of the rest the method's settings count.
        quiet: no progress.
    """
    if config.statistics is None:
        raise ConfigError("no statistics are given; use --statistics with what `collect` wrote")
    if config.output_dir is None:
        raise ConfigError("no folder for the adapter is given; use --output-dir DIR")
    output = Path(config.output_dir)
    _require_apart(config, output=output, work=Path(config.statistics))
    require_writable_output(output, config.overwrite)
    device = choose_device(config.device)
    with RunDirectory.open_existing(Path(config.statistics), exclusive=True) as run, PeakMeter(device) as meter:
        facts = run.settings
        missing = [index for index in facts["adapted_blocks"] if stats_unit(index) not in run.units]
        if missing:
            raise ConfigError(
                f"{config.statistics} lacks the statistics of {len(missing)} blocks; finish `collect` with the same "
                "options first"
            )
        solver = _solver(config, config.solve.population_size or facts["population_size"], device)
        report = InitReport(config=config.to_dict(), versions=versions(), model=dict(facts["model"]))
        report.data = dict(facts["data"])
        report.notices = list(facts["notices"])
        report.loss = facts.get("loss")
        with (
            Stopwatch(report, "solve", meter),
            Progress(meter, quiet=quiet).pass_over("solve", len(facts["adapted_blocks"]), 0) as bar,
        ):
            for index in facts["adapted_blocks"]:
                bar.working_on(f"block {index}")
                if not solver.is_solved(run.units, index):
                    solver.solve(run.units, index)
                bar.advance()
        report.output_dir, report.statistics_dir = str(output), config.statistics
        report.model["fingerprint"] = canonical_digest({"parts": dict(run.parts), "solve": solver.settings})
        model_config = load_config(run.path / CONFIG_COPY, config.trust_remote_code)
        _write_adapter(output, run, report, config, build_skeleton(model_config, torch.float32))
    return report


def plan(config: RunConfig) -> tuple[Plan, dict[str, Any]]:
    """What `initialize` would do and need, from the configuration and the samples alone.

    Returns:
        The plan, and the facts beside it that `streamda.report.plan_table` shows.
    """
    prepared = prepare(config, weights=False)
    made = prepared.plan(solves=True, keep_statistics=config.keep_statistics)
    rate = measure_flops(prepared.device, prepared.dtype)
    return made, {
        "model": prepared.source.name,
        "num_blocks": len(prepared.stack.blocks),
        "num_layers": len(prepared.targets.linears),
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "budget_bytes": prepared.budget.device_bytes,
        "smallest_budget_bytes": prepared.smallest_budget(solves=True),
        "num_samples": len(prepared.calibration.samples),
        "num_tokens": sum(prepared.lengths),
        "num_rows": prepared.num_rows(made.micro_batch_tokens),
        "flops_per_second": rate,
        "seconds": sum(made.flops.values()) / rate,
        "notices": list(prepared.notices),
    }


def _output_dir(config: RunConfig) -> Path:
    if config.output_dir is not None:
        return Path(config.output_dir)
    if config.model is None:
        raise ConfigError("no model is given; use --model with a hub id or a local folder")
    return Path(f"{Path(config.model.rstrip('/')).name}-lora-da")


def _require_apart(config: RunConfig, output: Path | None, work: Path) -> None:
    """The model, the adapter and the run's state each have a folder of their own."""
    places = {"--work-dir or --statistics": work} | ({} if output is None else {"--output-dir": output})
    resolved = {name: path.resolve() for name, path in places.items()}
    if len(set(resolved.values())) < len(resolved):
        raise ConfigError(f"--output-dir and the run's folder are both {work}; give them different folders")
    model = Path(config.model).resolve() if config.model is not None and Path(config.model).is_dir() else None
    for name, path in resolved.items():
        if model is not None and (path == model or model in path.parents):
            raise ConfigError(f"{name} {path} lies in the model's folder; choose a place outside it")


def _solver(config: RunConfig, population_size: int, device: torch.device) -> Solver:
    return Solver(config.solve, population_size, config.data.seed, device)


def _meter(prepared: Prepared) -> PeakMeter:
    """Starts measuring. Imports, tokenizer and samples are behind us; the checkpoint has not given a weight yet."""
    enforce_device_limit(prepared.device, prepared.budget.device_bytes)
    bound_allocator(prepared.device)
    return PeakMeter(prepared.device)


@contextmanager
def _open_run(
    work: Path, prepared: Prepared, parts: dict[str, dict[str, Any]], made: Plan, *, solves: bool
) -> Iterator[tuple[RunDirectory, Plan]]:
    """Opens or continues a run directory, with the plan that it was, or will be, run with."""
    config = prepared.config
    if not (work / "run.json").exists():
        _require_space(work, made)
    with RunDirectory.open(work, parts, settings={}, resume=config.resume, restart=config.overwrite) as run:
        chosen = run.settings.get("micro_batch_tokens")
        if chosen is not None and chosen != made.micro_batch_tokens:
            # the bits of a run depend on its micro-batches, so a continued one keeps them under any budget
            keeps = config.keep_statistics or not solves
            made = prepared.plan(solves=solves, keep_statistics=keeps, micro_batch_tokens=chosen)
        run.update_settings(_run_facts(prepared, made))
        files.make_folders(run.path / CONFIG_COPY)
        files.write_json_atomic(
            run.path / CONFIG_COPY / "config.json", files.read_json(prepared.source.folder / "config.json")
        )
        yield run, made


def _require_space(work: Path, made: Plan) -> None:
    """Refuses to begin what the disk cannot hold."""
    free = files.free_bytes(work)
    if free < made.disk_bytes + DISK_RESERVE_BYTES:
        raise StorageError(
            f"{work} has {format_size(free)} free and the run needs {format_size(made.disk_bytes)} and a reserve of "
            f"{format_size(DISK_RESERVE_BYTES)}; give --work-dir on a larger disk, or use fewer or shorter samples"
        )


def _run_facts(prepared: Prepared, made: Plan) -> dict[str, Any]:
    """What a run remembers of itself, so that `solve` needs nothing else."""
    report = _new_report(prepared, made)
    return {
        "micro_batch_tokens": made.micro_batch_tokens,
        "population_size": prepared.population_size,
        "adapted_blocks": [index for index, replays in enumerate(made.replays) if replays],
        "model": report.model,
        "data": report.data,
        "notices": report.notices,
    }


def _new_report(prepared: Prepared, made: Plan) -> InitReport:
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
            "num_samples": len(calibration.samples),
            "num_tokens": sum(prepared.lengths),
            "num_rows": prepared.num_rows(made.micro_batch_tokens),
            "num_label_tokens": sum(sample.num_label_tokens for sample in calibration.samples),
            "num_truncated": calibration.num_truncated,
            "num_skipped": calibration.num_skipped,
            "population_size": prepared.population_size,
        },
        plan=made.to_dict(),
        budget_bytes=prepared.budget.device_bytes,
        notices=list(prepared.notices),
    )


def _announce(progress: Progress, prepared: Prepared, verbose: bool) -> None:
    for notice in prepared.notices:
        progress.say(f"note: {notice}")
    if verbose:
        progress.say(describe_sample(prepared.calibration.samples[0], prepared.tokenizer))


def _write_adapter(output: Path, run: RunDirectory, report: InitReport, config: RunConfig, skeleton: Any) -> None:
    """Gathers the solved blocks into a PEFT adapter with the report beside it."""
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for index in run.settings["adapted_blocks"]:
        factors |= read_factors(run.units, index)
        report.modules |= read_summaries(run.units, index)
    expected = set(run.parts["method"]["modules"])
    if set(factors) != expected:
        raise DamagedError(f"{run.path} holds solutions of {len(factors)} layers, not of {len(expected)}")
    facts = AdapterFacts(
        base_model=report.model["name"],
        revision=report.model["revision"],
        dataset=report.data["source"],
        num_samples=report.data["num_samples"],
        is_shipped_data=report.data["is_shipped"],
        solve=config.solve,
        version=report.versions["streamda"],
        step_zero_change={name: facts["step_zero_change"] or 0.0 for name, facts in report.modules.items()},
    )
    write_adapter(
        output,
        factors,
        facts,
        skeleton,
        overwrite=config.overwrite,
        extra_files={REPORT_FILE: (report.to_json() + "\n").encode()},
    )


def _remove_run(work: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Removes what a run left that was killed between putting its adapter in place and cleaning up."""
    if (work / "run.json").is_file():
        with RunDirectory.open_existing(work, exclusive=True) as run:
            if canonical_digest(dict(run.parts)) == canonical_digest(parts):
                run.remove()


def _finished(output: Path, digest: str, prepared: Prepared) -> InitReport | None:
    """The report of a finished run with these very settings, its adapter checked again; None if there is none."""
    if not (output / REPORT_FILE).is_file():
        return None
    try:
        report = read_report(output)
    except (ValueError, TypeError):
        return None  # not ours to judge; the refusal to overwrite names the folder
    if report.model.get("fingerprint") != digest:
        return None
    check_adapter(output, prepared.stack.model)
    report.already_done = True
    return report
