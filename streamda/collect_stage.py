"""Pass 1 of a run, with pass 2 of each block behind it where one is wanted; continues what is already committed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import torch

from streamda.batches import MicroBatch, collate
from streamda.block_statistics import BlockStatistics, HeldStatistics, StatisticsSink
from streamda.boundary import BoundaryStore
from streamda.checkpoint import Checkpoint
from streamda.disk_plan import needed_boundaries, solution_bytes
from streamda.disk_space import require_room
from streamda.errors import NumericalError
from streamda.files import reached
from streamda.heap import bound_allocator, reuse_heap
from streamda.kept_memory import REUSING_PHASES
from streamda.layers import BlockSpec
from streamda.memory import release_unused
from streamda.nonfinite import BadSamplesError, named_samples, skip_notice
from streamda.panels import stored_bytes
from streamda.plan import Plan
from streamda.progress import Progress
from streamda.report import InitReport
from streamda.rundir import RunDirectory
from streamda.session import continuation_notice, sample_counts, stride_notices
from streamda.setup import Prepared
from streamda.solve_stage import Solver
from streamda.stopwatch import RunMeter, Stopwatch
from streamda.store import BlockStatisticsReader, BlockStatisticsWriter, stats_unit
from streamda.sweep import Sweep, acts, grads


class Collection:
    """The passes of one run: `collect` makes micro-batches and a sweep for them, as often as samples have to go."""

    def __init__(
        self,
        prepared: Prepared,
        checkpoint: Checkpoint,
        run: RunDirectory,
        plan: Plan,
        meter: RunMeter,
        progress: Progress,
        report: InitReport,
    ) -> None:
        self._prepared, self._checkpoint, self._run, self._plan = prepared, checkpoint, run, plan
        self._meter, self._progress, self._report = meter, progress, report
        self._lowest = prepared.lowest_block
        self._keeps = bool(run.settings["keeps_statistics"])
        self._specs = prepared.specs(plan.micro_batch_tokens, keep_statistics=self._keeps)
        self._statistics_written = 0

    def collect(self, solver: Solver | None) -> None:
        """Runs both passes from wherever an earlier run stopped.

        Args:
            solver: solves each block once it has its statistics; None collects only.
        """
        self._report.resumed = bool(self._run.units.names())
        bound_allocator(self._prepared.device)
        while True:
            self._begin()
            try:
                # one thread commits a block's statistics; it is waited for however this ends
                with closing(self._sweep), ThreadPoolExecutor(1, "streamda-commit") as self._committer:
                    self._collect(solver)
            except BadSamplesError as error:
                reasons = error.reasons
            else:
                break
            # out here nothing of the failed pass is alive any more that its traceback had held
            self._leave_out(reasons)
        bound_allocator(self._prepared.device)
        self._report.skipped_samples = [dict(entry) for entry in self._run.settings.get("skipped_samples", ())]
        self._report.notices += map(skip_notice, self._report.skipped_samples)
        self._report.data |= self._run.settings["data"]

    def _begin(self) -> None:
        """Puts all samples but those left out into micro-batches."""
        prepared = self._prepared
        samples = prepared.calibration.samples
        skipped = {entry["sample"] for entry in self._run.settings.get("skipped_samples", ())}
        self._chosen = [index for index in range(len(samples)) if index not in skipped]
        self._batches = []
        for batch in self._micro_batches(self._chosen):
            indices = [self._chosen[place] for place in batch.samples]
            ids, labels = zip(*((samples[index].input_ids, samples[index].labels) for index in indices), strict=True)
            self._batches.append(collate(ids, labels, prepared.config.collect.token_mask, prepared.device, indices))
        shapes = [(*batch.shape, prepared.stack.hidden_size) for batch in self._batches]
        held, threads = self._plan.boundaries_in_memory, self._plan.boundary_threads
        self._boundaries = BoundaryStore(
            self._run.units, shapes, prepared.dtype, held, timeline=self._meter.timeline, beside_device=threads
        )
        self._sweep = Sweep(
            prepared.stack,
            self._checkpoint,
            self._batches,
            self._boundaries,
            self._meter.timeline,
            keep_stored=self._plan.keep_stored,
            prefetch=self._plan.prefetch,
            skip_bad_samples=prepared.config.skip_bad_samples,
            skip_bad_layers=prepared.config.skip_bad_layers,
        )
        if prepared.config.skip_bad_layers:  # the block is run with zeros where such a weight is not finite
            self._checkpoint.tolerate(f"{linear.name}.weight" for spec in self._specs for linear in spec.linears)

    def _micro_batches(self, chosen: Sequence[int]) -> tuple[MicroBatch, ...]:
        """Of some of the samples; no batch is larger than the plan's largest."""
        cut, limit, lengths = self._prepared.micro_batches, self._plan.micro_batch_tokens, self._prepared.lengths
        if len(chosen) < len(lengths):
            limit = min(limit, max(batch.num_rows for batch in cut(lengths, limit)))
        return cut([lengths[index] for index in chosen], limit)

    def _leave_out(self, reasons: Mapping[int, str]) -> None:
        """Records samples as left out, once nothing is there any more that was made with them.

        The statistics are sums over all samples, and what one adds to them cannot be taken out again. A run that is
        killed in between comes upon the same samples again.

        Raises:
            NumericalError: they may not be left out, or none would be left.
        """
        calibration, units = self._prepared.calibration, self._run.units
        rows = calibration.row_numbers
        first = next(iter(reasons.values()))
        narrow = "" if self._prepared.dtype == torch.float32 else ", or try --dtype float32"
        if len(reasons) == len(self._chosen):
            raise NumericalError(
                f"all {len(reasons)} samples become NaN or Inf: {first}; nothing can be saved: look for a damaged "
                f"weight{narrow}"
            )
        if not self._prepared.config.skip_bad_samples:
            raise NumericalError(
                f"{named_samples(list(reasons), rows)}: {first}; remove what is wrong with the data, or use "
                f"--skip-bad-samples to leave out such samples{narrow}"
            )
        for name in units.names():
            units.drop(name)
        reached("bad-samples-dropped")
        stack = self._prepared.stack
        self._checkpoint.release([*stack.prefixes, *stack.embeddings, stack.head_name])
        release_unused(self._prepared.device)
        entries = [{"sample": index, "row": rows[index], "reason": reason} for index, reason in reasons.items()]
        for entry in entries:
            self._progress.say(f"note: {skip_notice(entry)}; the passes begin again without it")
        chosen = [index for index in self._chosen if index not in reasons]
        left = [calibration.samples[index] for index in chosen]
        before = self._run.settings
        skipped = sorted([*before.get("skipped_samples", ()), *entries], key=lambda entry: int(entry["sample"]))
        counts = sample_counts(left, sum(batch.num_rows for batch in self._micro_batches(chosen)))
        self._run.update_settings({"skipped_samples": skipped, "data": before["data"] | counts})

    def _collect(self, solver: Solver | None) -> None:
        self._progress.tell(stride_notices(self._plan))
        self._steps = self._missing_steps(solver)
        following = max(self._steps, default=self._lowest - 1)  # the block that comes next on the way down
        self._report.already_done = solver is None and not self._steps
        if self._run.units.names() and not self._report.already_done:
            self._progress.say(f"note: {continuation_notice(self._where(following), self._run.was_killed)}")
        if self._steps:
            self._checkpoint.load(self._prepared.stack.small_names)
            self._go_up(following)
        solved: HeldStatistics | None = None  # statistics whose memory the next block's take
        unsolved: int | None = None  # what is committed while it waits is solved while the next one is committed
        with self._progress.pass_over("backward", len(self._steps), self._num_tokens) as bar:
            for index in range(len(self._specs) - 1, self._lowest - 1, -1):
                bar.working_on(f"block {index}")
                committed: Future[None] | None = None
                held: HeldStatistics | None = None
                if index in self._steps:
                    if acts(index) not in self._boundaries:
                        solved = None  # there is no room for it beside the passes that make them
                        self._refill(index)
                    with self._phase("backward"):
                        if solver is None or self._plan.spill_statistics or self._is_collected(index, solver):
                            solved = None  # such a block may be larger than those whose statistics are held
                            committed = self._collect_block(self._specs[index], solver)
                        else:
                            self._require_solution_room(self._specs[index], solver)
                            held = HeldStatistics(self._specs[index], solved)
                            self._pass_down(self._specs[index], held)
                if unsolved is not None:
                    self._solve_block(unsolved, solver)
                    unsolved = None
                if committed is not None:
                    with self._meter.timeline.span("wait for the commit"):
                        committed.result()
                    self._note_written(stats_unit(index))
                if held is not None and solver is not None:
                    self._solve(solver, held)
                    solved = held
                else:
                    unsolved = index
                self._forget(index)
                if index in self._steps:
                    bar.advance()
            if unsolved is not None:
                self._solve_block(unsolved, solver)
        self._boundaries.drop(grads(self._lowest))
        self._report.bytes = {
            "weights_read": self._checkpoint.bytes_read,
            "checkpoint": self._checkpoint.total_bytes,
            "boundaries_written": self._boundaries.bytes_written,
            "boundaries_read": self._boundaries.bytes_read,
            "statistics_written": self._statistics_written,
        }
        self._report.loss = self._run.settings.get("loss")

    def _where(self, following: int) -> str:
        """Where an interrupted run goes on."""
        if following < self._lowest:
            return "the last solutions"
        if {grads(len(self._specs)), grads(following + 1)} & set(self._run.units.names()):
            return f"block {following} of the backward pass"
        missing = self._sweep.missing_boundaries((len(self._specs),))
        return f"block {max(0, missing[0] - 1)} of the forward pass" if missing else "the loss"

    @property
    def _num_tokens(self) -> int:
        return sum(self._prepared.lengths[index] for index in self._chosen)

    def _go_up(self, following: int) -> None:
        """Makes every boundary that the rest of the way down needs."""
        top = len(self._specs)
        begins = grads(top) not in self._boundaries and grads(following + 1) not in self._boundaries
        wanted = (*self._needed(following), top) if begins else self._needed(following)
        if 0 in self._sweep.missing_boundaries(wanted):
            with self._phase("prologue"):
                self._sweep.prologue()
        missing = self._sweep.missing_boundaries(wanted)
        passing = self._progress.pass_over("forward", len(missing), self._num_tokens)
        with self._phase("forward"), passing as bar:
            self._sweep.forward(wanted, bar)
        if begins or grads(top) in self._boundaries:  # in the second case only its loss is read
            with (
                self._phase("epilogue"),
                self._progress.pass_over("epilogue", len(self._batches), 0, "batch", measures_rates=False) as bar,
            ):
                loss = self._sweep.epilogue(self._plan.logit_rows, bar)
            self._run.update_settings({"loss": loss})
        self._boundaries.drop(acts(top))

    def _phase(self, name: str) -> Stopwatch:
        """Begins a phase, with what it may keep of the memory that it frees."""
        budget, device = self._prepared.budget.device_bytes, self._prepared.device
        if name in REUSING_PHASES:
            # what was only to be collected has no solution planned
            slack = budget - self._plan.peaks.get(name, budget)
            reuse_heap(device, self._plan.reused.get(name, 0), slack, large=name == "solve")
        else:
            bound_allocator(device)
        return Stopwatch(self._report, name, self._meter)

    def _needed(self, following: int) -> tuple[int, ...]:
        return needed_boundaries(following, min(self._steps), len(self._specs), self._plan.boundary_stride)

    def _refill(self, index: int) -> None:
        """Where not all boundaries are kept: makes those of a segment again before the way down enters it."""
        with self._phase("forward"):
            self._sweep.forward(self._needed(index))

    def _missing_steps(self, solver: Solver | None) -> set[int]:
        """The blocks to pass on the way down: whose statistics are missing, and whose gradient another of them needs.

        What is committed is never made again, though what led to it is gone; nothing is passed on that none needs.
        """
        steps: set[int] = set()
        for index in range(self._lowest, len(self._specs)):
            leads_on = index - 1 in steps and grads(index) not in self._boundaries
            if not self._is_collected(index, solver) or leads_on:
                steps.add(index)
        return steps

    def _is_collected(self, index: int, solver: Solver | None) -> bool:
        """Whether a block's statistics are not missing."""
        units = self._run.units
        if not self._specs[index].linears:
            return True
        solved = solver is not None and not self._keeps and solver.is_solved(units, index)
        return solved or stats_unit(index) in units

    def _collect_block(self, spec: BlockSpec, solver: Solver | None) -> Future[None] | None:
        """Passes a block, and writes the statistics that it lacks to disk.

        Only once they, too, are committed may go what led to them.

        Returns:
            The commit of the statistics, under way; None for a block without any, or that has them.
        """
        units = self._run.units
        if self._is_collected(spec.index, solver):
            self._sweep.backward_block(spec, (), None, push=spec.index - 1 in self._steps)
            return None
        name = stats_unit(spec.index)
        require_room(units.folder, stored_bytes(spec), f"the statistics of block {spec.index}")
        with ExitStack() as stack:
            draft = stack.enter_context(self._meter.timeline.at_exit("commit", units.create(name), lane="writer"))
            writer = BlockStatisticsWriter(draft.path, spec, self._prepared.config.collect.statistics_codec)
            facts = self._pass_down(spec, writer)
            skipped = {module: values["skipped"] for module, values in facts.items() if "skipped" in values}
            draft.metadata |= {"prefix": spec.prefix, "modules": [linear.name for linear in spec.linears]}
            draft.metadata |= {"skipped": skipped} if skipped else {}
            return self._committer.submit(stack.pop_all().close)

    def _pass_down(self, spec: BlockSpec, sink: StatisticsSink) -> dict[str, dict[str, Any]]:
        """Commits the gradient below a block, if one is to be passed there, and makes the block's statistics."""
        push = spec.index - 1 in self._steps
        facts = self._sweep.backward_block(spec, self._plan.replays[spec.index], sink, push=push)
        for module, values in facts.items():
            sink.write_facts(module, values)
        return facts

    def _note_written(self, name: str) -> None:
        self._statistics_written += sum(record.size for record in self._run.units.metadata(name).files.values())

    def _solve_block(self, index: int, solver: Solver | None) -> None:
        units = self._run.units
        if solver is None or not self._specs[index].linears:
            return
        if not solver.is_solved(units, index):
            self._solve(solver, BlockStatisticsReader(units, index))
        if not self._keeps and stats_unit(index) in units:
            units.drop(stats_unit(index))

    def _solve(self, solver: Solver, statistics: BlockStatistics) -> None:
        self._require_solution_room(statistics.spec, solver)
        if not self._plan.spare_bytes:
            self._checkpoint.free_spare()
            release_unused(self._prepared.device)
        with self._phase("solve"):
            solver.solve(self._run.units, statistics)

    def _require_solution_room(self, spec: BlockSpec, solver: Solver) -> None:
        need = solution_bytes(spec, solver.config.rank) + self._plan.scratch_bytes
        require_room(self._run.units.folder, need, f"the solution of block {spec.index}")

    def _forget(self, index: int) -> None:
        """Drops the boundaries that only a finished block needed."""
        self._boundaries.drop(acts(index))
        self._boundaries.drop(grads(index + 1))
