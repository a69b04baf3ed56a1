"""The stages, each as one page: plan, collect, solve, and `initialize`, which is all of them.

skeleton, samples, plan          nothing is read yet, and every refusal happens here
prologue, blocks up, epilogue    pass 1a: boundary states are spilled
blocks down                      pass 1b: statistics of a block stay in memory, or are committed to disk ...
solve                          pass 2:  ... and it is solved, and they are freed unless they are kept
adapter, report
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from streamda import stopping
from streamda.adapter import AdapterFacts, write_adapter
from streamda.bounds import Bounds, Rates, parse_rates
from streamda.calibration import describe_sample
from streamda.collect_stage import Collection
from streamda.config import RunConfig
from streamda.disk_space import require_output_room, room_for_run
from streamda.errors import BudgetError, ConfigError, DamagedError, StorageError
from streamda.filesystem import tolerated
from streamda.heap import bound_allocator
from streamda.layers import require_rank
from streamda.limits import limit_errors
from streamda.memory import blas_workspace_bytes, device_limit, parse_budget
from streamda.model_copy import check_configuration
from streamda.nonfinite import skip_notice
from streamda.places import output_dir, require_places, work_dir
from streamda.plan import Plan
from streamda.precision import full_precision
from streamda.progress import Progress
from streamda.rates import ProductRates, measure_rates
from streamda.report import InitReport, large_change_notices
from streamda.rundir import MODEL_FOLDER, RunDirectory, require_run
from streamda.session import (
    disk_notices,
    finished_report,
    new_report,
    open_run,
    remove_leftover,
    require_complete,
    require_free_output,
    resume_notices,
    run_digest,
)
from streamda.setup import Prepared, choose_device, fingerprint_parts, prepare, versions
from streamda.skeleton import build_skeleton, load_config
from streamda.solutions import SolvedFactors, read_summaries, skipped_layers
from streamda.solve_plan import solve_capacity
from streamda.solve_stage import Solver
from streamda.stopwatch import RunMeter, Stopwatch
from streamda.store import BlockStatisticsReader
from streamda.timeline import Timeline
from streamda.trace import write_profile
from streamda.workers import settle_threads

MEASURED_RUN_SECONDS = 60.0
"""A run that was shorter is not held against the machine's rates unless asked for: measuring them takes a second."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _on_this_machine(
    stage: Callable[Concatenate[RunConfig, _Arguments], _Result],
) -> Callable[Concatenate[RunConfig, _Arguments], _Result]:
    """Around a stage: settled threads, full precision, limits of the system by name, and any file system if allowed."""

    @functools.wraps(stage)
    def run(config: RunConfig, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        settle_threads()
        with tolerated(config.unsafe_filesystem), full_precision(), limit_errors():
            return stage(config, *args, **kwargs)

    return run


@_on_this_machine
def initialize(config: RunConfig, *, quiet: bool = False, verbose: bool = False) -> InitReport:
    """Plans, collects, solves and writes the adapter; continues where an interrupted run of the same settings stopped.

    Args:
        config: the run.
        quiet: no progress and no notices.
        verbose: also shows one sample with its mask.

    Raises:
        StreamdaError: of the kind that fits, see `streamda.errors`.
    """
    timeline = Timeline()
    rates = parse_rates(config.rates)
    output, work = output_dir(config), work_dir(config)
    require_places(config, work, output)
    with timeline.span("prepare"):
        prepared = prepare(config, weights=True)
        made = prepared.plan(solves=True, keep_statistics=config.keep_statistics, disk_room=room_for_run(work))
        checkpoint = prepared.checkpoint
        assert checkpoint is not None  # it was asked for with its weights
        parts = fingerprint_parts(prepared, checkpoint.fingerprint())
    solver = _solver(config, prepared.population_size, prepared.device, timeline)
    digest = run_digest(parts, solver.settings)
    if not config.overwrite and (done := finished_report(output, digest, prepared)) is not None:
        remove_leftover(work, parts)
        return done
    require_free_output(output, config)
    with _meter(prepared, timeline) as meter:
        progress = Progress(meter, quiet=quiet)
        _announce(progress, prepared, verbose)
        with (
            stopping.deferred(),
            open_run(work, prepared, parts, made, solver_settings=solver.settings) as (run, made),
        ):
            require_output_room(output, run.path, made.bytes_written["solutions"])
            report = new_report(prepared, made)
            report.notices += progress.tell(resume_notices(prepared, run, parts))
            solver = dataclasses.replace(solver, capacity_bytes=made.solve_capacity)
            Collection(prepared, checkpoint, run, made, meter, progress, report).collect(solver)
            report.output_dir = str(output)
            keeps = bool(run.settings["keeps_statistics"])
            report.statistics_dir = str(work) if keeps else None
            report.model["fingerprint"] = digest
            report.note_time(timeline)
            if config.profile or config.rates is not None or report.wall_seconds >= MEASURED_RUN_SECONDS:
                try:
                    with timeline.span("measure rates"), limit_errors():
                        _record_bounds(report, prepared, made, rates.or_else(meter.product_rates), work)
                except (BudgetError, StorageError):  # no reason to lose what is done
                    report.notices.append("the machine's rates could not be measured: no room for it")
            with Stopwatch(report, "write", meter), timeline.span("write adapter"):
                _write_adapter(output, run, report, config, prepared.stack.model)
            if not keeps:
                run.remove()
    if config.profile:
        write_profile(output, timeline.spans(), f"streamda init, {prepared.source.name}")
    return report


@_on_this_machine
def collect(config: RunConfig, *, quiet: bool = False, verbose: bool = False) -> InitReport:
    """Pass 1 only: statistics of all blocks into ``config.statistics``, for `solve`. Arguments as for `initialize`."""
    if config.statistics is None:
        raise ConfigError("no folder for the statistics is given; use --statistics DIR")
    timeline = Timeline()
    work = Path(config.statistics)
    require_places(config, work, None)
    with timeline.span("prepare"):
        prepared = prepare(config, weights=True, solves=False)
        made = prepared.plan(solves=False, keep_statistics=True, disk_room=room_for_run(work))
        checkpoint = prepared.checkpoint
        assert checkpoint is not None  # it was asked for with its weights
        parts = fingerprint_parts(prepared, checkpoint.fingerprint())
    with _meter(prepared, timeline) as meter:
        progress = Progress(meter, quiet=quiet)
        _announce(progress, prepared, verbose)
        with stopping.deferred(), open_run(work, prepared, parts, made) as (run, made):
            report = new_report(prepared, made)
            report.notices += progress.tell(resume_notices(prepared, run, parts))
            Collection(prepared, checkpoint, run, made, meter, progress, report).collect(None)
            report.statistics_dir = str(work)
            report.note_time(timeline)
    return report


@_on_this_machine
def solve(config: RunConfig, *, quiet: bool = False) -> InitReport:
    """Pass 2 only: an adapter from collected statistics. Of the model nothing but its configuration is used.

    Args:
        config: ``statistics`` and ``output_dir`` must be given; of the rest the method's settings count.
        quiet: no progress.

    Raises:
        BudgetError: ``max_gpu_mem`` is given and too small.
    """
    if config.statistics is None:
        raise ConfigError("no statistics are given; use --statistics with what `collect` wrote")
    if config.output_dir is None:
        raise ConfigError("no folder for the adapter is given; use --output-dir DIR")
    timeline = Timeline()
    output = Path(config.output_dir)
    require_run(config.statistics)
    require_places(config, Path(config.statistics), output)
    require_free_output(output, config)
    device = choose_device(config.device)
    with (
        stopping.deferred(),
        RunDirectory.open_existing(Path(config.statistics), exclusive=True) as run,
        RunMeter(device, timeline) as meter,
        ExitStack() as stack,
    ):
        facts = run.settings
        check_configuration(run.path, facts.get("model_files", {}))
        require_complete(run)
        specs = [BlockStatisticsReader(run.units, index).spec for index in facts["adapted_blocks"]]
        linears = [linear for spec in specs for linear in spec.linears]
        require_rank(linears, config.solve.rank, may_leave_out=False)
        bound_allocator(device)
        solver = _solver(config, config.solve.population_size or facts["population_size"], device, timeline)
        if config.max_gpu_mem is not None:
            budget = parse_budget(config.max_gpu_mem, "--max-gpu-mem")
            stack.enter_context(device_limit(device, budget))
            capacity = solve_capacity(budget, specs, config.solve.rank, library_bytes=blas_workspace_bytes(device))
            solver = dataclasses.replace(solver, capacity_bytes=capacity)
        report = InitReport(config=config.to_dict(), versions=versions(), model=dict(facts["model"]))
        report.data = dict(facts["data"])
        report.skipped_samples = [dict(entry) for entry in facts.get("skipped_samples", ())]
        report.notices = [*facts["notices"], *map(skip_notice, report.skipped_samples)]
        report.loss = facts.get("loss")
        with (
            Stopwatch(report, "solve", meter),
            Progress(meter, quiet=quiet).pass_over("solve", len(facts["adapted_blocks"]), 0) as bar,
        ):
            for index in facts["adapted_blocks"]:
                stopping.check()
                bar.working_on(f"block {index}")
                if solver.is_solved(run.units, index):
                    report.resumed = True
                else:
                    solver.solve(run.units, BlockStatisticsReader(run.units, index))
                bar.advance()
        report.output_dir, report.statistics_dir = str(output), config.statistics
        report.model["fingerprint"] = run_digest(run.parts, solver.settings)
        report.note_time(timeline)
        model_config = load_config(run.path / MODEL_FOLDER, config.trust_remote_code)
        with timeline.span("write adapter"):
            _write_adapter(
                output, run, report, config, build_skeleton(model_config, torch.float32, config.trust_remote_code)
            )
    if config.profile:
        write_profile(output, timeline.spans(), f"streamda solve, {report.model['name']}")
    return report


@_on_this_machine
def plan(config: RunConfig) -> tuple[Plan, dict[str, Any]]:
    """What `initialize` would do and need, from the configuration and the samples alone.

    Returns:
        The plan, and the facts beside it that `streamda.plan_table.plan_table` shows.
    """
    rates = parse_rates(config.rates)
    prepared = prepare(config, weights=False)
    made = prepared.plan(solves=True, keep_statistics=config.keep_statistics)
    notices = list(prepared.notices)
    if config.rates is None:  # else it is about another machine, whose disk is not this one
        notices += disk_notices(prepared, made, room_for_run(work_dir(config)))
    rates, reason = measure_rates(prepared.device, prepared.dtype, work_dir(config), rates)
    specs = prepared.specs(made.micro_batch_tokens, keep_statistics=config.keep_statistics)
    bounds = Bounds(
        rates,
        made.flops,
        bytes_read=made.weight_bytes_read + sum(made.bytes_read.values()),
        bytes_written=sum(made.bytes_written.values()),
    )
    return made, {
        "model": prepared.source.name,
        "num_blocks": len(prepared.stack.blocks),
        "num_layers": len(prepared.targets.linears),
        "num_layers_from_rows": sum(len(group.modules) for spec in specs for group in spec.groups if group.token_rows),
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "budget_bytes": prepared.budget.device_bytes,
        "smallest_budget_bytes": prepared.smallest_budget(solves=True, keep_statistics=config.keep_statistics),
        "num_samples": len(prepared.calibration.samples),
        "num_tokens": sum(prepared.lengths),
        "num_rows": prepared.num_rows(made.micro_batch_tokens),
        "bounds": bounds.to_dict(),
        "notices": [*notices, *([reason] if reason is not None else [])],
    }


def _record_bounds(report: InitReport, prepared: Prepared, made: Plan, rates: Rates, work: Path) -> None:
    """Holds the run against what this machine could do, unless parts of it were done before."""
    if report.resumed:
        return
    rates, reason = measure_rates(prepared.device, prepared.dtype, work, rates)
    if reason is not None:
        report.notices.append(reason)
    moved = report.bytes
    report.bounds = Bounds(
        rates,
        made.flops,
        bytes_read=moved["weights_read"] + moved["boundaries_read"] + made.bytes_read["statistics"],
        bytes_written=moved["boundaries_written"] + moved["statistics_written"] + made.bytes_written["solutions"],
    ).to_dict(report.wall_seconds)


def _solver(config: RunConfig, population_size: int, device: torch.device, timeline: Timeline) -> Solver:
    skip = config.skip_bad_layers
    return Solver(config.solve, population_size, config.data.seed, device, timeline=timeline, skip_bad_layers=skip)


@contextmanager
def _meter(prepared: Prepared, timeline: Timeline) -> Iterator[RunMeter]:
    """Measures. Imports, tokenizer and samples are behind us; the checkpoint has not given a weight yet."""
    device = prepared.device
    with (
        device_limit(device, prepared.budget.device_bytes),
        RunMeter(device, timeline, ProductRates(device, prepared.dtype)) as meter,
    ):
        yield meter


def _announce(progress: Progress, prepared: Prepared, verbose: bool) -> None:
    progress.tell(prepared.notices)
    if verbose:
        progress.say(describe_sample(prepared.calibration.samples[0], prepared.tokenizer))


def _write_adapter(output: Path, run: RunDirectory, report: InitReport, config: RunConfig, skeleton: Any) -> None:
    """Gathers the solved blocks into a PEFT adapter with the report beside it."""
    stopping.check()  # from here on it is done before a stop would be
    for index in run.settings["adapted_blocks"]:
        report.modules |= read_summaries(run.units, index)
    report.notices += large_change_notices(report.modules, normalized=config.solve.normalize)
    factors = SolvedFactors(run.units, run.settings["adapted_blocks"])
    skipped = skipped_layers(report.modules)
    report.notices += (f"{name} is left without adapter: {reason}" for name, reason in skipped.items())
    expected = set(run.parts["method"]["modules"]) - set(skipped)
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
        step_zero_change={name: report.modules[name]["step_zero_change"] or 0.0 for name in factors},
    )
    write_adapter(
        output,
        factors,
        facts,
        skeleton,
        overwrite=config.overwrite,
        report=report.seal,
    )
