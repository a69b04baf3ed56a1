"""Pass 1 of a run, with pass 2 of each block behind it where one is wanted; continues what is already committed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing

from streamda.batches import collate, make_micro_batches
from streamda.boundary import BoundaryStore
from streamda.checkpoint import Checkpoint
from streamda.disk_plan import needed_boundaries, solution_bytes
from streamda.disk_space import require_room
from streamda.layers import BlockSpec
from streamda.panels import stored_bytes
from streamda.plan import Plan
from streamda.progress import Progress
from streamda.report import InitReport
from streamda.rundir import RunDirectory
from streamda.session import stride_notices
from streamda.setup import Prepared
from streamda.solutions import solve_unit
from streamda.solve_stage import Solver
from streamda.stopwatch import RunMeter, Stopwatch
from streamda.store import BlockStatisticsWriter, stats_unit
from streamda.sweep import Sweep, acts, grads


class Collection:
    """The passes of one run."""

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
        samples = prepared.calibration.samples
        micro_batches = make_micro_batches(prepared.lengths, plan.micro_batch_tokens)
        self._batches = [
            collate(
                [samples[index].input_ids for index in batch.samples],
                [samples[index].labels for index in batch.samples],
                prepared.config.collect.token_mask,
                prepared.device,
            )
            for batch in micro_batches
        ]
        shapes = [(*batch.input_ids.shape, prepared.stack.hidden_size) for batch in self._batches]
        self._boundaries = BoundaryStore(run.units, shapes, prepared.dtype, plan.boundaries_in_memory)
        self._sweep = Sweep(
            prepared.stack,
            checkpoint,
            self._batches,
            self._boundaries,
            meter.timeline,
            keep_stored=plan.keep_stored,
            prefetch=plan.prefetch,
        )
        self._specs = [cost.spec for cost in prepared.work.at(plan.micro_batch_tokens).blocks]
        self._lowest = prepared.lowest_block
        self._keeps = bool(run.settings["keeps_statistics"])
        self._statistics_written = 0

    def collect(self, solver: Solver | None) -> None:
        """Runs both passes from wherever an earlier run stopped.

        Args:
            solver: solves each block once its statistics are committed; None collects only.
        """
        # one thread commits a block's statistics; it is waited for however this ends
        with closing(self._sweep), ThreadPoolExecutor(1, "streamda-commit") as self._committer:
            self._collect(solver)

    def _collect(self, solver: Solver | None) -> None:
        units, report = self._run.units, self._report
        report.resumed = bool(units.names())
        for notice in stride_notices(self._plan):
            self._progress.say(f"note: {notice}")
        top = len(self._specs)
        following = top - 1  # the block that comes next on the way down
        while following >= self._lowest and self._is_collected(following, solver):
            following -= 1
        if following >= self._lowest:
            self._checkpoint.load(self._prepared.stack.small_names)
            self._go_up(following)
        unsolved: int | None = None  # what is committed while it waits is solved while the next one is committed
        with self._progress.pass_over("backward", following - self._lowest + 1, self._num_tokens) as bar:
            for index in range(top - 1, self._lowest - 1, -1):
                bar.working_on(f"block {index}")
                committed: Future[None] | None = None
                if index <= following:
                    self._refill(index)
                    with Stopwatch(report, "backward", self._meter):
                        committed = self._collect_block(self._specs[index])
                if unsolved is not None:
                    self._solve_block(unsolved, solver)
                if committed is not None:
                    with self._meter.timeline.span("wait for the commit"):
                        committed.result()
                    self._note_written(stats_unit(index))
                unsolved = index
                self._forget(index)
                if index <= following:
                    bar.advance()
            if unsolved is not None:
                self._solve_block(unsolved, solver)
        self._boundaries.drop(grads(self._lowest))
        report.bytes = {
            "weights_read": self._checkpoint.bytes_read,
            "checkpoint": self._checkpoint.total_bytes,
            "boundaries_written": self._boundaries.bytes_written,
            "boundaries_read": self._boundaries.bytes_read,
            "statistics_written": self._statistics_written,
        }
        report.loss = self._run.settings.get("loss")

    @property
    def _num_tokens(self) -> int:
        return sum(self._prepared.lengths)

    def _go_up(self, following: int) -> None:
        """Makes every boundary that the rest of the way down needs."""
        report, top = self._report, len(self._specs)
        begins = grads(top) not in self._boundaries and grads(following + 1) not in self._boundaries
        wanted = (*self._needed(following), top) if begins else self._needed(following)
        if 0 in self._sweep.missing_boundaries(wanted):
            with Stopwatch(report, "prologue", self._meter):
                self._sweep.prologue()
        missing = self._sweep.missing_boundaries(wanted)
        with (
            Stopwatch(report, "forward", self._meter),
            self._progress.pass_over("forward", len(missing), self._num_tokens) as bar,
        ):
            self._sweep.forward(wanted, bar)
        if begins or grads(top) in self._boundaries:  # in the second case only its loss is read
            with (
                Stopwatch(report, "epilogue", self._meter),
                self._progress.pass_over("epilogue", len(self._batches), 0, unit="batch") as bar,
            ):
                loss = self._sweep.epilogue(self._plan.logit_rows, bar)
            self._run.update_settings({"loss": loss})
        self._boundaries.drop(acts(top))

    def _needed(self, following: int) -> tuple[int, ...]:
        return needed_boundaries(following, self._lowest, len(self._specs), self._plan.boundary_stride)

    def _refill(self, index: int) -> None:
        """Where not all boundaries are kept: makes those of a segment again before the way down enters it."""
        if acts(index) not in self._boundaries:
            with Stopwatch(self._report, "forward", self._meter):
                self._sweep.forward(self._needed(index))

    def _is_collected(self, index: int, solver: Solver | None) -> bool:
        """Whether nothing of a block's first pass is missing."""
        units = self._run.units
        below = index == self._lowest or grads(index) in self._boundaries or self._is_past(index - 1)
        if not self._specs[index].linears:
            return below
        solved = solver is not None and not self._keeps and solver.is_solved(units, index)
        return below and (solved or stats_unit(index) in units)

    def _is_past(self, index: int) -> bool:
        """Whether the way down has passed a block, so that what led to it may be gone."""
        if index < self._lowest:
            return True
        units = self._run.units
        solved = not self._keeps and solve_unit(index) in units
        here = solved or stats_unit(index) in units or not self._specs[index].linears
        return here and (index == self._lowest or grads(index) in self._boundaries or self._is_past(index - 1))

    def _collect_block(self, spec: BlockSpec) -> Future[None] | None:
        """Commits the gradient below a block, and writes its statistics.

        Only once they, too, are committed may go what led to them.

        Returns:
            The commit of the statistics, under way; None for a block without any.
        """
        units, push = self._run.units, spec.index > self._lowest
        replays = self._plan.replays[spec.index]
        if not spec.linears:
            self._sweep.backward_block(spec, (), lambda _panel, _values: None, push=push)
            return None
        name = stats_unit(spec.index)
        if name in units:  # committed, but the gradient below it is not: both are made anew
            units.drop(name)
        require_room(units.folder, stored_bytes(spec), f"the statistics of block {spec.index}")
        with ExitStack() as stack:
            draft = stack.enter_context(self._meter.timeline.at_exit("commit", units.create(name), lane="commit"))
            writer = BlockStatisticsWriter(draft.path, spec, self._prepared.config.collect.statistics_codec)
            facts = self._sweep.backward_block(spec, replays, writer.write_panel, push=push)
            for module, values in facts.items():
                writer.write_facts(module, values)
            draft.metadata |= {"prefix": spec.prefix, "modules": [linear.name for linear in spec.linears]}
            return self._committer.submit(stack.pop_all().close)

    def _note_written(self, name: str) -> None:
        self._statistics_written += sum(record.size for record in self._run.units.metadata(name).files.values())

    def _solve_block(self, index: int, solver: Solver | None) -> None:
        units = self._run.units
        if solver is None or not self._specs[index].linears:
            return
        if not solver.is_solved(units, index):
            need = solution_bytes(self._specs[index], solver.config.rank) + self._plan.scratch_bytes
            require_room(units.folder, need, f"the solution of block {index}")
            with Stopwatch(self._report, "solve", self._meter):
                solver.solve(units, index)
        if not self._keeps and stats_unit(index) in units:
            units.drop(stats_unit(index))

    def _forget(self, index: int) -> None:
        """Drops the boundaries that only a finished block needed."""
        self._boundaries.drop(acts(index))
        self._boundaries.drop(grads(index + 1))
