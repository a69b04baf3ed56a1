"""The planner, in plain integers: everything is accumulated once, nothing overflows, and a refusal tells the truth."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda import panels as panels_module
from streamda.costs import BlockCost, Workload
from streamda.disk_plan import solution_bytes
from streamda.errors import BudgetError, StorageError
from streamda.flops import EIGEN_STEPS
from streamda.heap import HEAP_ROOM_BYTES, HEAP_STRETCH_BYTES
from streamda.layers import BlockSpec, InputGroup, LinearSpec
from streamda.low_rank import extra_vectors
from streamda.memory import RING_BYTES, MemoryBudget, parse_size, staged_bytes
from streamda.panels import PANEL_ROWS, Panel, block_panels, pack_replays, statistics_bytes, stored_bytes
from streamda.plan import Plan, make_plan, minimum_bytes

GB = 10**9
CANDIDATES = (8192, 4096, 2048, 1024, 1)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a real model."""

    hidden: int
    inner: int
    kv: int
    blocks: int
    vocab: int
    block_gb: float = 0.0
    moments_gb: float = 0.0
    """Lower halves, of one block."""
    gradients_gb: float = 0.0
    all_gb: float = 0.0


MODELS = {
    # with the working sets that the design names
    "Llama-2-7B": Shape(4096, 11008, 4096, 32, 32000, 0.40, 0.34, 0.81, 37),
    "Llama-2-13B": Shape(5120, 13824, 5120, 40, 32000, 0.63, 0.54, 1.27, 72),
    "Qwen-32B": Shape(5120, 25600, 640, 64, 151936, 0.90, 1.47, 1.81, 210),
    "Llama-2-70B": Shape(8192, 28672, 1024, 80, 32000, 1.71, 2.05, 3.42, 440),
}


def llama_block(shape: Shape, index: int = 0) -> BlockSpec:
    sides = {
        "q": (shape.hidden, shape.hidden),
        "k": (shape.hidden, shape.kv),
        "v": (shape.hidden, shape.kv),
        "o": (shape.hidden, shape.hidden),
        "gate": (shape.hidden, shape.inner),
        "up": (shape.hidden, shape.inner),
        "down": (shape.inner, shape.hidden),
    }
    linears = tuple(LinearSpec(f"b{index}.{name}", d_in, d_out) for name, (d_in, d_out) in sides.items())
    shared = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    groups = tuple(InputGroup(tuple(f"b{index}.{name}" for name in names), sides[names[0]][0]) for names in shared)
    return BlockSpec(index, f"b{index}", linears, groups)


def num_weights(spec: BlockSpec) -> int:
    return sum(linear.d_in * linear.d_out for linear in spec.linears)


@cache
def llama_workload(shape: Shape, tokens: int, *, samples: int = 256, length: int = 1024, itemsize: int = 2) -> Workload:
    """Costs of a model in bfloat16, of equally long samples."""
    rows = max(tokens // length, 1) * length

    def block(index: int) -> BlockCost:
        spec = llama_block(shape, index)
        saved = rows * (12 * shape.hidden + 4 * shape.inner) * itemsize
        return BlockCost(
            spec,
            weight_bytes=num_weights(spec) * itemsize,
            weight_count=num_weights(spec),
            saved_bytes=saved,
            largest_bytes=rows * shape.inner * itemsize,
            stored_weight_bytes=num_weights(spec) * 2,
            largest_module_bytes=shape.inner * shape.hidden * itemsize,
        )

    blocks = tuple(block(index) for index in range(shape.blocks))
    embedding = shape.vocab * shape.hidden * itemsize
    return Workload(
        micro_batch_tokens=tokens,
        largest_rows=rows,
        num_rows=samples * length,
        num_labels=samples * length // 2,
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        dtype_bytes=itemsize,
        small_bytes=shape.hidden * itemsize,
        embedding_bytes=embedding,
        head_bytes=embedding,
        blocks=blocks,
        checkpoint_bytes=2 * embedding + sum(cost.weight_bytes for cost in blocks),
        outer_count=2 * shape.vocab * shape.hidden,
    )


def plan_for(
    model: str, device_bytes: int, *, host_bytes: int = 0, disk: int | None = None, rank: int = 8, **flags: bool
) -> Plan:
    return make_plan(
        MemoryBudget(device_bytes, host_bytes, disk),
        CANDIDATES,
        lambda tokens: llama_workload(MODELS[model], tokens),
        rank=rank,
        keep_statistics=flags.get("keep_statistics", False),
        host_is_device=flags.get("host_is_device", False),
        spill_statistics=flags.get("spill_statistics", False),
    )


def drawn_block(sides: list[tuple[int, int]]) -> BlockSpec:
    """Layers of any shapes; neighbours of equal input width share their input."""
    linears = tuple(LinearSpec(f"b.{index}", d_in, d_out) for index, (d_in, d_out) in enumerate(sides))
    groups: list[InputGroup] = []
    for linear in linears:
        if groups and groups[-1].d_in == linear.d_in:
            groups[-1] = InputGroup((*groups[-1].modules, linear.name), linear.d_in)
        else:
            groups.append(InputGroup((linear.name,), linear.d_in))
    return BlockSpec(0, "b", linears, tuple(groups))


SIDES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=7)


class TestPanels:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(SIDES)
    def test_every_entry_of_every_statistic_is_in_exactly_one_panel(self, sides: list[tuple[int, int]]) -> None:
        spec = drawn_block(sides)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(panels_module, "PANEL_ROWS", 7)
            panels = block_panels(spec)
        wanted = {
            ("gradient", linear.name, row, column)
            for linear in spec.linears
            for row in range(linear.d_out)
            for column in range(linear.d_in)
        }
        wanted |= {("output_moment", linear.name, row, 0) for linear in spec.linears for row in range(linear.d_out)}
        wanted |= {
            ("input_moment", group.name, row, column)
            for group in spec.groups
            for row in range(group.d_in)
            for column in range(row + 1)
        }
        seen: list[tuple[str, str, int, int]] = []
        for panel in panels:
            for row in range(panel.start, panel.stop):
                columns = row + 1 if panel.statistic == "input_moment" else panel.columns
                assert columns <= panel.columns
                seen += ((panel.statistic, panel.module, row, column) for column in range(columns))
        assert len(seen) == len(wanted)
        assert set(seen) == wanted

    @pytest.mark.parametrize("model", MODELS)
    def test_panels_of_real_models_are_whole_rows_of_tiles(self, model: str) -> None:
        """The store writes tiles whole; a panel that began inside one would overwrite its neighbour."""
        for panel in block_panels(llama_block(MODELS[model])):
            assert panel.statistic == "output_moment" or panel.start % PANEL_ROWS == 0
            assert panel.stop > panel.start
            assert panel.stop - panel.start <= PANEL_ROWS or panel.statistic == "output_moment"
            assert panel.columns == (
                1
                if panel.statistic == "output_moment"
                else panel.stop
                if panel.statistic == "input_moment"
                else panel.columns
            )
            assert panel.num_bytes == (panel.stop - panel.start) * panel.columns * 4

    @pytest.mark.parametrize("model", MODELS)
    def test_the_working_sets_are_those_that_the_design_names(self, model: str) -> None:
        shape = MODELS[model]
        spec = llama_block(shape)
        gradients = sum(panel.num_bytes for panel in block_panels(spec) if panel.statistic == "gradient")
        moments = sum(panel.num_bytes for panel in block_panels(spec) if panel.statistic == "input_moment")
        assert num_weights(spec) * 2 == pytest.approx(shape.block_gb * GB, rel=0.015, abs=0.006 * GB)
        assert gradients == 4 * num_weights(spec) == pytest.approx(shape.gradients_gb * GB, rel=0.015, abs=0.006 * GB)
        # the lower half, and the other halves of the tiles on the diagonal
        half = sum(2 * group.d_in * (group.d_in + 1) for group in spec.groups)
        assert half == pytest.approx(shape.moments_gb * GB, rel=0.015, abs=0.006 * GB)
        assert half < moments <= half + sum(2 * group.d_in * PANEL_ROWS for group in spec.groups)
        assert statistics_bytes(spec) == moments + gradients + 4 * sum(linear.d_out for linear in spec.linears)
        assert shape.blocks * (half + gradients) == pytest.approx(shape.all_gb * GB, rel=0.03)

    def test_what_needs_gradients_comes_first(self) -> None:
        kinds = [panel.statistic == "input_moment" for panel in block_panels(llama_block(MODELS["Llama-2-7B"]))]
        assert kinds == sorted(kinds)
        assert 0 < sum(kinds) < len(kinds)

    def test_a_block_without_adapted_layers_has_no_panels(self) -> None:
        assert block_panels(BlockSpec(0, "b", (), ())) == ()
        assert statistics_bytes(BlockSpec(0, "b", (), ())) == 0
        assert pack_replays((), 0) == ()


PANELS = st.lists(st.integers(1, 100), max_size=30).map(
    lambda sizes: tuple(Panel("gradient", f"m{index}", 0, size, 1) for index, size in enumerate(sizes))
)


class TestReplays:
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(PANELS, st.integers(1, 3000))
    def test_each_panel_is_in_one_replay_and_no_replay_is_over_its_capacity(
        self, panels: tuple[Panel, ...], capacity: int
    ) -> None:
        replays = pack_replays(panels, capacity)
        if any(panel.num_bytes > capacity for panel in panels):
            assert replays is None
            return
        assert replays is not None
        packed = [panel for replay in replays for panel in replay.panels]
        assert sorted(packed, key=panels.index) == list(panels)
        filled = [sum(panel.num_bytes for panel in replay.panels) for replay in replays]
        assert all(0 < size <= capacity for size in filled)
        # no two replays could have been one: first fit leaves at most one of them half empty
        assert all(one + other > capacity for one, other in itertools.pairwise(filled))
        assert len(replays) <= 1 or sum(filled) > capacity

    @pytest.mark.parametrize("model", MODELS)
    def test_more_room_never_takes_more_replays(self, model: str) -> None:
        panels = block_panels(llama_block(MODELS[model]))
        largest, total = max(panel.num_bytes for panel in panels), sum(panel.num_bytes for panel in panels)
        step = max(1, (total - largest) // 400)
        counts = [len(pack_replays(panels, capacity) or ()) for capacity in range(largest, total + step, step)]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1] == 1
        assert pack_replays(panels, largest - 1) is None

    def test_input_moments_alone_need_no_backward_pass(self) -> None:
        spec = drawn_block([(40, 10)])
        whole = sum(panel.num_bytes for panel in block_panels(spec))
        assert [replay.needs_backward for replay in pack_replays(block_panels(spec), whole) or ()] == [True]
        # the moment (6400 bytes) does not fit beside the gradient (1600)
        assert [replay.needs_backward for replay in pack_replays(block_panels(spec), 6400) or ()] == [True, False]


@cache
def budgets(model: str) -> tuple[tuple[int, Plan], ...]:
    """Plans of a model from the smallest budget to one that holds everything."""
    smallest = minimum_bytes(llama_workload(MODELS[model], CANDIDATES[-1]), 8, 0)
    sizes = [int(smallest * share) for share in (1.0, 1.02, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0)]
    return tuple((size, plan_for(model, size)) for size in sizes)


class TestPlansOfRealModels:
    @pytest.mark.parametrize("model", MODELS)
    def test_no_phase_is_above_the_budget(self, model: str) -> None:
        for size, made in budgets(model):
            assert set(made.peaks) == {"prologue", "forward", "epilogue", "backward", "solve"}
            assert made.peak_bytes == max(made.peaks.values()) <= size
            assert min(made.peaks.values()) > 0

    @pytest.mark.parametrize("model", MODELS)
    def test_more_budget_never_takes_more_replays(self, model: str) -> None:
        counts = [made.num_replays for _, made in budgets(model)]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] == MODELS[model].blocks

    @pytest.mark.parametrize("model", MODELS)
    def test_every_block_accumulates_all_of_its_panels(self, model: str) -> None:
        for _, made in budgets(model):
            for index in (0, MODELS[model].blocks - 1):
                packed = {panel for replay in made.replays[index] for panel in replay.panels}
                assert packed == set(block_panels(llama_block(MODELS[model], index)))

    def test_the_command_of_the_readme_fits_the_card_it_names(self) -> None:
        """A 13B model on 24 GB, in one replay per block; a 70B one too, if in more."""
        assert plan_for("Llama-2-13B", 24 * GB).num_replays == 40
        assert plan_for("Llama-2-70B", 24 * GB).peak_bytes <= 24 * GB

    def test_weights_are_read_twice_however_the_blocks_are_cut(self) -> None:
        """Embeddings and head once: the way down does not need them."""
        workload = llama_workload(MODELS["Llama-2-7B"], 1)
        read = 2 * workload.checkpoint_bytes - workload.embedding_bytes - workload.head_bytes
        assert {made.weight_bytes_read for _, made in budgets("Llama-2-7B")} == {read}
        assert {made.boundary_stride for _, made in budgets("Llama-2-7B")} == {1}

    def test_blocks_below_the_lowest_adapted_layer_are_read_once(self) -> None:
        workload = llama_workload(MODELS["Llama-2-7B"], 1)
        bare = [dataclasses.replace(cost, spec=BlockSpec(i, f"b{i}", (), ())) for i, cost in enumerate(workload.blocks)]
        workload = dataclasses.replace(workload, blocks=(*bare[:20], *workload.blocks[20:]))
        made = make_plan(
            MemoryBudget(24 * GB, 0, None),
            (1,),
            lambda _: workload,
            rank=8,
            keep_statistics=False,
            host_is_device=False,
        )
        assert made.weight_bytes_read == workload.checkpoint_bytes + 12 * workload.blocks[0].weight_bytes

    def test_among_equally_few_replays_the_largest_micro_batch_is_taken(self) -> None:
        for size, made in budgets("Llama-2-13B"):
            alone = {}
            for tokens in CANDIDATES:
                try:
                    alone[tokens] = make_plan(
                        MemoryBudget(size, 0, None),
                        (tokens,),
                        lambda tokens: llama_workload(MODELS["Llama-2-13B"], tokens),
                        rank=8,
                        keep_statistics=False,
                        host_is_device=False,
                    ).num_replays
                except BudgetError:
                    continue
            fewest = min(alone.values())
            assert made.num_replays == fewest
            assert made.micro_batch_tokens == max(tokens for tokens, count in alone.items() if count == fewest)

    def test_smaller_micro_batches_are_not_looked_at_where_the_largest_needs_one_replay(self) -> None:
        asked: list[int] = []

        def workload_at(tokens: int) -> Workload:
            asked.append(tokens)
            return llama_workload(MODELS["Llama-2-13B"], tokens)

        made = make_plan(
            MemoryBudget(24 * GB, 0, None), CANDIDATES, workload_at, rank=8, keep_statistics=False, host_is_device=False
        )
        assert made.num_replays == 40
        assert set(asked) == {CANDIDATES[0]}

    def test_collecting_alone_solves_nothing(self) -> None:
        made = plan_for("Llama-2-7B", 24 * GB, rank=0)
        assert "solve" not in made.peaks
        assert made.flops["solve"] == 0

    @pytest.mark.parametrize("model", MODELS)
    def test_statistics_stay_in_memory_where_that_costs_nothing_else(self, model: str) -> None:
        ways = set()
        for budget, made in budgets(model):
            through_disk = plan_for(model, budget, spill_statistics=True)
            assert through_disk.spill_statistics
            assert through_disk.bytes_written["statistics"] > 0
            assert made.num_replays == through_disk.num_replays
            assert made.scratch_bytes <= through_disk.scratch_bytes
            assert max(made.peaks.values()) <= budget
            assert made.prefetch == through_disk.prefetch or not made.spill_statistics  # that alone may go for it
            if not made.spill_statistics:
                assert made.num_replays == len(made.replays)
                assert made.bytes_written["statistics"] == made.bytes_read["statistics"] == 0
                assert made.disk_bytes < through_disk.disk_bytes
                assert made.peaks["solve"] > statistics_bytes(llama_block(MODELS[model]))
            ways.add(made.spill_statistics)
        assert ways == {False, True}

    def test_statistics_go_to_disk_where_they_are_kept_or_not_solved(self) -> None:
        assert not plan_for("Llama-2-13B", 24 * GB).spill_statistics
        assert plan_for("Llama-2-13B", 24 * GB, keep_statistics=True).spill_statistics
        assert plan_for("Llama-2-13B", 24 * GB, rank=0).spill_statistics

    def test_a_plan_is_plain_json_with_replays_as_their_number(self) -> None:
        made = plan_for("Llama-2-7B", 24 * GB)
        plain = json.loads(json.dumps(made.to_dict(), allow_nan=False))
        assert plain["replays"] == [len(block) for block in made.replays] == [1] * 32
        assert plain["peak_bytes"] == made.peak_bytes
        assert plain["peaks"] == made.peaks


class TestWeightsInTheirStoredDtype:
    """Float32 compute from bfloat16 files."""

    SMALL = dataclasses.replace(MODELS["Llama-2-70B"], blocks=3)

    def plan(self, size: int, **costs: int) -> Plan:
        return make_plan(
            MemoryBudget(size, 0, None),
            (256, 64),
            lambda tokens: self.workload(tokens, **costs),
            rank=8,
            keep_statistics=False,
            host_is_device=True,
        )

    def workload(self, tokens: int, **costs: int) -> Workload:
        made = llama_workload(self.SMALL, tokens, samples=8, length=64, itemsize=4)
        return dataclasses.replace(made, blocks=tuple(dataclasses.replace(cost, **costs) for cost in made.blocks))

    def smallest(self, **costs: int) -> int:
        return minimum_bytes(self.workload(64, **costs), 8, 0)

    def test_the_floor_is_a_stored_block_one_cast_matrix_and_a_panel(self) -> None:
        cast = self.workload(64).blocks[0].weight_bytes
        without = self.smallest(stored_weight_bytes=cast)
        # 1.71 GB of the block come off, and the 0.94 GB of one matrix come on
        assert 0.7 * GB < without - self.smallest() < 0.8 * GB
        assert self.plan(self.smallest()).keep_stored

    def test_they_are_cast_for_each_product_only_where_that_is_needed(self) -> None:
        assert not self.plan(40 * GB).keep_stored
        plans = [self.plan(int(self.smallest() * share)) for share in (1, 1.1, 1.3, 1.6, 2, 3, 4)]
        assert {made.keep_stored for made in plans} == {True, False}
        cast = self.workload(64).blocks[0].weight_bytes
        for made, share in zip(plans, (1, 1.1, 1.3, 1.6, 2, 3, 4), strict=True):
            try:
                other = self.plan(int(self.smallest() * share), stored_weight_bytes=cast)
            except BudgetError:
                assert made.keep_stored
                continue
            assert made.keep_stored == (made.num_replays < other.num_replays)
            assert made.num_replays <= other.num_replays

    def test_the_next_block_is_read_ahead_where_that_costs_no_replay(self) -> None:
        roomy, tight = self.plan(40 * GB), self.plan(self.smallest())
        assert (roomy.prefetch, tight.prefetch) == (True, False)
        assert roomy.peaks["forward"] > 2 * self.workload(64).blocks[0].weight_bytes
        for share in (1, 1.1, 1.3, 1.6, 2, 3, 4):
            size = int(self.smallest() * share)
            made = self.plan(size)
            assert made.peak_bytes <= size
            # blocks of no weight are always read ahead, and what is beside them is the same
            if made.prefetch and not made.keep_stored:
                held = self.workload(made.micro_batch_tokens).blocks[0].weight_bytes
                alone = self.plan(size - held - 2**25)
                assert alone.num_replays == made.num_replays

    def test_temporaries_of_narrow_products_are_counted(self) -> None:
        assert self.smallest(product_bytes=123_456_789) - self.smallest() == 123_456_789


class TestRefusals:
    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
    def test_too_small_a_budget_is_refused_with_have_need_and_one_that_works(self, model: str, share: float) -> None:
        smallest = minimum_bytes(llama_workload(MODELS[model], CANDIDATES[-1]), 8, 0)
        with pytest.raises(BudgetError) as caught:
            plan_for(model, int(share * smallest))
        have, need, advised = re.findall(r"(\d[\d.]* ?(?:GB|MB))", str(caught.value))
        assert parse_size(have) == pytest.approx(share * smallest, rel=6e-3)
        assert parse_size(need) == pytest.approx(smallest, rel=6e-3)
        assert 0 <= parse_size(advised) - smallest < 10**6
        assert plan_for(model, parse_size(advised)).peak_bytes <= parse_size(advised)

    @pytest.mark.parametrize("model", MODELS)
    def test_one_byte_less_than_the_smallest_budget_is_too_little(self, model: str) -> None:
        smallest = minimum_bytes(llama_workload(MODELS[model], CANDIDATES[-1]), 8, 0)
        assert plan_for(model, smallest).peak_bytes <= smallest
        with pytest.raises(BudgetError):
            plan_for(model, smallest - 1)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(SIDES, st.integers(0, 10**5), st.integers(0, 10**5), st.integers(1, 4), st.integers(0, 30))
    def test_the_smallest_budget_of_any_model_works_and_one_byte_less_does_not(
        self, sides: list[tuple[int, int]], saved: int, head: int, blocks: int, rank: int
    ) -> None:
        spec = drawn_block([(100 * d_in, 100 * d_out) for d_in, d_out in sides])
        count, largest = num_weights(spec), max(linear.d_in * linear.d_out for linear in spec.linears)
        cost = BlockCost(spec, 4 * count, count, saved, saved // 3, 2 * count, largest * 4)
        workload = Workload(1, 7, 70, 50, 64, 1000, 2, 128, head, head, (cost,) * blocks, 10**6)

        def attempt(size: int) -> Plan:
            return make_plan(
                MemoryBudget(size, 0, None),
                (1,),
                lambda _: workload,
                rank=rank,
                keep_statistics=False,
                host_is_device=False,
            )

        smallest = minimum_bytes(workload, rank, 0)
        assert attempt(smallest).peak_bytes <= smallest
        with pytest.raises(BudgetError):
            attempt(smallest - 1)

    def test_too_little_disk_is_refused_with_need_and_have_and_enough_is_not(self) -> None:
        need = plan_for("Llama-2-7B", 24 * GB).disk_bytes
        assert plan_for("Llama-2-7B", 24 * GB, disk=need).disk_bytes == need
        with pytest.raises(StorageError, match=r"needs .* GB of disk.*, and --max-disk allows 1\.00 GB"):
            plan_for("Llama-2-7B", 24 * GB, disk=GB)


class TestBoundaries:
    BOUNDARY = 256 * 1024 * 4096 * 2  # all samples of the 7B model once

    def test_host_memory_holds_as_many_boundaries_as_fit_and_the_disk_the_others(self) -> None:
        none = plan_for("Llama-2-7B", 24 * GB)
        # what they and the weights pass through is host memory, too
        staged = staged_bytes(none.micro_batch_tokens * 4096 * 2) + RING_BYTES
        some, fewer = (plan_for("Llama-2-7B", 24 * GB, host_bytes=5 * self.BOUNDARY + staged - less) for less in (0, 1))
        every = plan_for("Llama-2-7B", 24 * GB, host_bytes=1000 * self.BOUNDARY)
        assert [made.boundaries_in_memory for made in (none, fewer, some, every)] == [0, 4, 5, 33]
        assert staged == 16 * none.micro_batch_tokens * 4096 * 2 + 2 * 2**25
        short, enough = (plan_for("Llama-2-7B", 24 * GB, host_bytes=staged - less) for less in (1, 0))
        assert [made.boundary_threads for made in (none, short, enough, some)] == [False, False, True, True]
        assert none.disk_bytes - some.disk_bytes == 5 * self.BOUNDARY
        # of the 33, one or two have given way to their gradients when the statistics of two blocks are there
        assert 31 * self.BOUNDARY <= none.disk_bytes - every.disk_bytes <= 32 * self.BOUNDARY
        assert none.peaks == some.peaks == every.peaks  # the host's memory is not the device's

    def test_without_an_accelerator_they_come_out_of_its_budget(self) -> None:
        apart = plan_for("Llama-2-7B", 64 * GB, host_bytes=5 * self.BOUNDARY)
        shared = plan_for("Llama-2-7B", 64 * GB, host_bytes=3 * self.BOUNDARY, host_is_device=True)
        assert shared.boundaries_in_memory == 3
        assert not shared.boundary_threads  # they would take cores from what computes
        for phase in ("prologue", "forward", "solve"):
            kept = shared.reused.get(phase, 0) + (shared.spare_bytes if phase == "solve" else 0)
            assert shared.peaks[phase] - apart.peaks[phase] == 3 * self.BOUNDARY + kept
        smallest = minimum_bytes(llama_workload(MODELS["Llama-2-7B"], 1), 8, 3 * self.BOUNDARY)
        assert (
            plan_for("Llama-2-7B", smallest, host_bytes=3 * self.BOUNDARY, host_is_device=True).peak_bytes <= smallest
        )

    def test_freed_memory_that_is_kept_raises_no_peak_but_that_of_a_stretched_heap(self) -> None:
        kept, spare, weights = set(), set(), num_weights(llama_block(MODELS["Llama-2-7B"])) * 2
        stretched = set()
        for budget in (1 * GB, 2 * GB, 4 * GB, 8 * GB):
            made = plan_for("Llama-2-7B", budget, host_is_device=True)
            without = plan_for("Llama-2-7B", budget)
            assert (without.reused, without.spare_bytes) == ({}, 0)
            grown = {phase: made.peaks[phase] - peak for phase, peak in without.peaks.items()}
            assert grown["solve"] == made.reused["solve"] + made.spare_bytes
            assert grown["forward"] == made.reused["forward"]
            assert {grown[phase] for phase in ("prologue", "epilogue")} == {0}
            is_stretched = made.peak_bytes > without.peak_bytes
            if is_stretched:
                assert made.peaks["backward"] == made.peak_bytes <= budget
                assert HEAP_STRETCH_BYTES in (grown["backward"], made.peak_bytes - without.peaks["backward"])
                assert HEAP_STRETCH_BYTES < made.reused["backward"] <= 2 * HEAP_STRETCH_BYTES
            else:
                assert grown["backward"] == made.reused["backward"] <= HEAP_ROOM_BYTES
            stretched.add(is_stretched)
            kept |= set(made.reused.values())
            spare.add(made.spare_bytes)
        assert 0 in kept
        assert stretched == {False, True}
        assert spare == {0, weights}

    @pytest.mark.parametrize("copies", [1, 2])
    def test_experts_that_are_fused_while_they_are_loaded_are_there_more_than_once(self, copies: int) -> None:
        plain = llama_workload(MODELS["Llama-2-7B"], 1)
        weights = plain.blocks[0].weight_bytes
        experts = 3 * plain.blocks[0].weight_count // 4
        blocks = tuple(dataclasses.replace(cost, fused_count=copies * experts) for cost in plain.blocks)
        fused = dataclasses.replace(plain, blocks=blocks)
        loading = weights + copies * weights * 3 // 4
        assert [cost.loading_bytes(False) for cost in (plain.blocks[0], blocks[0])] == [weights, loading]
        smallest = minimum_bytes(fused, 8, 0)
        assert smallest >= loading > weights
        for budget in (smallest, 3 * smallest, 30 * smallest):
            made, without = (
                make_plan(
                    MemoryBudget(budget, 0, None),
                    (1,),
                    lambda _, workload=workload: workload,
                    rank=8,
                    keep_statistics=False,
                    host_is_device=False,
                )
                for workload in (fused, plain)
            )
            for phase in ("forward", "backward"):
                assert loading < made.peaks[phase] <= budget
                # the next block is not read yet while one is fused: no peak has both
                if made.prefetch and without.prefetch:
                    assert made.peaks[phase] < max(without.peaks[phase] + 1, loading + weights)

    def test_the_smallest_budget_holds_no_more_boundaries_than_there_are(self) -> None:
        """Blocks and one, however much host memory is offered beside them."""
        workload = llama_workload(MODELS["Llama-2-7B"], 1)
        every = minimum_bytes(workload, 8, 33 * self.BOUNDARY)
        assert minimum_bytes(workload, 8, 1000 * self.BOUNDARY) == every

    def test_keeping_all_statistics_takes_the_disk_that_they_have(self) -> None:
        """With boundaries in memory. On disk they are larger than the statistics that take their place."""
        block = llama_block(MODELS["Llama-2-7B"])
        memory = 33 * self.BOUNDARY
        freed = plan_for("Llama-2-7B", 24 * GB, host_bytes=memory, spill_statistics=True)
        kept = plan_for("Llama-2-7B", 24 * GB, host_bytes=memory, keep_statistics=True)
        # beside two gradients: of two blocks, or of all but the first, which needs no gradient below it
        assert 0 <= kept.disk_bytes - freed.disk_bytes - 29 * stored_bytes(block) <= 32 * solution_bytes(block, 8)
        assert (
            plan_for("Llama-2-7B", 24 * GB, spill_statistics=True).disk_bytes
            == plan_for("Llama-2-7B", 24 * GB, keep_statistics=True).disk_bytes
        )

    def test_where_the_disk_is_short_as_few_boundaries_are_thinned_out_as_will_do(self) -> None:
        whole = plan_for("Llama-2-7B", 24 * GB)
        for share in (0.9, 0.6, 0.4):
            disk = int(share * whole.disk_bytes)
            made = plan_for("Llama-2-7B", 24 * GB, disk=disk)
            assert made.disk_bytes <= disk < whole.disk_bytes
            assert made.boundary_stride > 1
            assert 2 < made.weight_passes < 3
            again = (made.weight_bytes_read - whole.weight_bytes_read) // (
                2 * num_weights(llama_block(MODELS["Llama-2-7B"]))
            )
            assert made.flops["forward"] * 32 == whole.flops["forward"] * (32 + again)
            assert made.num_replays == whole.num_replays

    def test_what_the_file_system_has_thins_them_out_too_and_refuses_nothing(self) -> None:
        def within(room: int) -> Plan:
            return make_plan(
                MemoryBudget(24 * GB, 0, None),
                CANDIDATES,
                lambda tokens: llama_workload(MODELS["Llama-2-7B"], tokens),
                rank=8,
                keep_statistics=False,
                host_is_device=False,
                disk_room=room,
            )

        assert within(100 * GB).boundary_stride == 1
        assert within(50 * GB).boundary_stride == 2
        assert within(GB).disk_bytes > GB


class TestFlops:
    def test_they_are_those_counted_by_hand(self) -> None:
        """One block, q [6, 4] alone, 10 rows; a panel holds it all."""
        spec = drawn_block([(4, 6)])
        cost = BlockCost(spec, 48, 24, 0, 0, 48, 48)
        workload = Workload(1, 10, 10, 3, 4, 11, 2, 0, 0, 0, (cost,), 96)
        made = make_plan(
            MemoryBudget(GB, 0, None), (1,), lambda _: workload, rank=2, keep_statistics=False, host_is_device=False
        )
        assert made.flops["forward"] == 2 * 24 * 10  # y = x W^T
        assert made.flops["replay"] == 2 * 24 * 10 + 2 * 24 * 10  # once more, and g W; never the gradient of W
        assert made.flops["statistics"] == 2 * 24 * 10 + 4 * 4 * 10  # g^T x, and half of x^T x
        # Cholesky, its inverse; then per step and each of 4 vectors two products with that, and two with the gradient
        assert made.flops["solve"] == 4**3 // 3 + 4**3 + EIGEN_STEPS * 4 * (4 * 4**2 + 2 * 2 * 4 * 6)

    def test_few_tokens_are_solved_on_their_span_half_of_it_in_float32(self) -> None:
        d_in, d_out, tokens = 1000, 600, 10
        spec = drawn_block([(d_in, d_out)])
        cost = BlockCost(spec, 4 * d_in * d_out, d_in * d_out, 0, 0, 4 * d_in * d_out, 4 * d_in * d_out)
        workload = Workload(1, 10, tokens, 3, 4, 11, 2, 0, 0, 0, (cost,), 96)
        made = make_plan(
            MemoryBudget(GB, 0, None), (1,), lambda _: workload, rank=2, keep_statistics=False, host_is_device=False
        )
        wide = tokens + extra_vectors(d_in, tokens)
        product, basis = 2 * d_in**2 * wide, 4 * d_in * wide**2
        assert made.flops["solve_float32"] == product + basis + 2 * d_in * d_out * tokens
        assert product + basis < made.flops["solve"] < product + basis + 50 * d_out * tokens**2
        # of sums in float64 the first product is, too
        groups = tuple(dataclasses.replace(group, moment_bytes=8) for group in spec.groups)
        wide_cost = dataclasses.replace(cost, spec=dataclasses.replace(spec, groups=groups))
        again = make_plan(
            MemoryBudget(GB, 0, None),
            (1,),
            lambda _: dataclasses.replace(workload, blocks=(wide_cost,)),
            rank=2,
            keep_statistics=False,
            host_is_device=False,
        )
        assert again.flops["solve_float32"] == 2 * d_in * d_out * tokens
        assert again.flops["solve"] == made.flops["solve"] + product + basis
        assert again.flops["statistics"] == 2 * d_in * d_out * tokens
        assert again.flops["statistics_float64"] == d_in**2 * tokens
        assert made.flops["statistics"] == again.flops["statistics"] + again.flops["statistics_float64"]

    def test_rows_of_few_tokens_are_multiplied_in_float64_only(self) -> None:
        d_in, widths, tokens = 1000, (600, 300), 10
        linears = tuple(LinearSpec(f"b.{width}", d_in, width) for width in widths)
        spec = BlockSpec(0, "b", linears, (InputGroup(("b.600", "b.300"), d_in, tokens),))
        cost = BlockCost(spec, 4 * d_in * 900, d_in * 900, 0, 0, 4 * d_in * 900, 4 * d_in * 900)
        workload = Workload(1, 10, tokens, 3, 4, 11, 2, 0, 0, 0, (cost,), 96)
        made = make_plan(
            MemoryBudget(GB, 0, None), (1,), lambda _: workload, rank=2, keep_statistics=False, host_is_device=False
        )
        assert made.flops["statistics"] == made.flops["solve_float32"] == 0
        # x x^T, and of each layer g g^T; twice two eigenvectors, times x and times g; and small matrices
        products = 2 * tokens**2 * (d_in + sum(widths)) + 2 * 2 * tokens * (2 * d_in + sum(widths))
        assert products < made.flops["solve"] <= products + (3 * 12 + 2 * 4) * tokens**3

    @pytest.mark.parametrize("tokens", [2500, 3500])
    def test_rows_along_a_basis_need_no_product_with_inputs_per_layer(self, tokens: int) -> None:
        d_in, d_out = 3000, 600
        spec = BlockSpec(0, "b", (LinearSpec("b.w", d_in, d_out),), (InputGroup(("b.w",), d_in, tokens),))
        cost = BlockCost(spec, 4 * d_in * d_out, d_in * d_out, 0, 0, 4 * d_in * d_out, 4 * d_in * d_out)
        workload = Workload(1, 10, tokens, 3, 4, 11, 2, 0, 0, 0, (cost,), 96)
        made = make_plan(
            MemoryBudget(GB, 0, None), (1,), lambda _: workload, rank=2, keep_statistics=False, host_is_device=False
        )
        assert made.flops["statistics"] == 0
        k = min(tokens, d_in)
        pairs = sum(min(token, k) for token in range(tokens))  # of a token and a direction before it
        # orthogonal twice over, there and back; the output gradients along the basis
        assert made.flops["solve_float32"] == pytest.approx(pairs * (2 * 4 * d_in + 2 * d_out), rel=1e-3)
        squares = sum(min(token, k) ** 2 for token in range(tokens))  # M^T M, half of it
        steps = EIGEN_STEPS * 10 * (4 * k**2 + 4 * k * d_out)
        assert made.flops["solve"] == pytest.approx(squares + k**3 / 3 + steps, rel=1e-3)

    @pytest.mark.parametrize("model", MODELS)
    def test_a_pass_over_a_real_model_costs_two_per_weight_and_row(self, model: str) -> None:
        made = plan_for(model, 80 * GB)
        rows, shape = 256 * 1024, MODELS[model]
        spec = llama_block(shape)
        weights = shape.blocks * num_weights(spec)
        assert made.num_replays == shape.blocks
        assert made.flops["forward"] == 2 * weights * rows
        assert made.flops["replay"] == 4 * weights * rows
        squares = shape.blocks * sum(group.d_in**2 for group in spec.groups)
        assert made.flops["statistics"] == 2 * weights * rows + squares * rows
        cholesky = sum(group.d_in**3 / 3 for group in spec.groups)
        # rank 8 and the guard vectors of wide layers, in four triangular solves and two products per step
        step = 32 * sum(4 * linear.d_in**2 + 4 * linear.d_in * linear.d_out for linear in spec.linears)
        assert made.flops["solve"] == pytest.approx(shape.blocks * (cholesky + EIGEN_STEPS * step), rel=1e-9)

    @pytest.mark.parametrize("unread", [0, 40_000])
    def test_a_replay_for_input_moments_alone_costs_a_forward_pass_but_for_what_no_gradient_needs(
        self, unread: int
    ) -> None:
        spec = drawn_block([(4000, 10)])
        cost = BlockCost(spec, 80_000, 40_000, 0, 0, 80_000, 80_000, unread_count=unread)
        workload = Workload(1, 10, 10, 3, 4000, 11, 2, 0, 0, 0, (cost,), 96)
        flops = {}
        for size in (minimum_bytes(workload, 0, 0), GB):
            made = make_plan(
                MemoryBudget(size, 0, None),
                (1,),
                lambda _: workload,
                rank=0,
                keep_statistics=False,
                host_is_device=False,
            )
            flops[made.num_replays] = made.flops["replay"] // (40_000 * 10)
        # the moments' two panels are 16.8 and 31.2 MB: the second fills a replay of its own
        assert flops == ({1: 2, 2: 2 + 0} if unread else {1: 4, 2: 4 + 2})
