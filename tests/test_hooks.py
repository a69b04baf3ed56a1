"""What the hooks accumulate equals what autograd and a formula give on the same small block, in float64.

Not covered: which panels go into which replay (test_plan.py), the sums themselves (test_factors.py).
"""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from streamda import panels
from streamda.batches import Batch, collate
from streamda.errors import ModelError, NumericalError
from streamda.hooks import PanelCollector
from streamda.layers import BlockSpec, InputGroup, LinearSpec
from streamda.panels import Panel, Replay, block_panels

CPU = torch.device("cpu")
SIZE = 6


class Block(nn.Module):
    """Three layers, two of which read the block's input; `third` may be called on some rows, twice, or never."""

    def __init__(self, mode: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mode = mode
        self.first, self.second, self.third = nn.Linear(SIZE, 4), nn.Linear(SIZE, 4), nn.Linear(4, SIZE)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        other = hidden.clone() if self.mode == "another input" else hidden
        inner = torch.tanh(self.first(hidden)) * self.second(other)
        match self.mode:
            case "never":
                return hidden + inner.sum(dim=-1, keepdim=True)
            case "twice":
                return hidden + self.third(inner) + self.third(2 * inner)
            case "routed":
                flat = inner.reshape(-1, 4)
                output = torch.zeros(len(flat), SIZE)
                output[::2] = self.third(flat[::2])
                return hidden + output.reshape(hidden.shape)
        return hidden + self.third(inner)


SPEC = BlockSpec(
    0,
    "h.0",
    (LinearSpec("h.0.first", SIZE, 4), LinearSpec("h.0.second", SIZE, 4), LinearSpec("h.0.third", 4, SIZE)),
    (InputGroup(("h.0.first", "h.0.second"), SIZE), InputGroup(("h.0.third",), 4)),
)
PANELS = (
    *(Panel("output_moment", spec.name, 0, spec.d_out, 1) for spec in SPEC.linears),
    *(Panel("gradient", spec.name, 0, spec.d_out, spec.d_in) for spec in SPEC.linears),
    *(Panel("input_moment", group.name, 0, group.d_in, group.d_in) for group in SPEC.groups),
)


def make_batch(lengths: tuple[int, ...] = (5, 5), token_mask: str = "attention") -> Batch:
    ids = [torch.arange(length) for length in lengths]
    return collate(ids, [torch.where(torch.arange(n) < 2, -100, 1) for n in lengths], token_mask, CPU)


def make_states(batch: Batch, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states, and the gradient from above: zero where there is padding, as a causal decoder has it."""
    generator = torch.Generator().manual_seed(seed)
    hidden, gradient = (torch.randn(*batch.shape, SIZE, generator=generator) for _ in range(2))
    for row, sample in enumerate(batch.ids):
        gradient[row, sample.numel() :] = 0
    return hidden, gradient


def pass_through(block: Block, collector: PanelCollector, batch: Batch, states: tuple[Tensor, Tensor]) -> None:
    collector.begin(batch)
    hidden, gradient = states
    block(hidden.requires_grad_()).backward(gradient)


def oracle(block: Block, states: tuple[Tensor, Tensor], rows: Tensor | slice) -> dict[tuple[str, str], Tensor]:
    """Sums by autograd in float64: weight gradients from the weights themselves."""
    twin = Block(block.mode).double().requires_grad_()
    seen: list[tuple[str, Tensor, Tensor]] = []

    def keep(name: str) -> object:
        def hook(_module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            seen.append((f"h.0.{name}", args[0].detach(), output))

        return hook

    for name, module in twin.named_children():
        module.register_forward_hook(keep(name))
    torch.set_default_dtype(torch.float64)
    try:
        twin(states[0].detach().double()).backward(states[1].double())
    finally:
        torch.set_default_dtype(torch.float32)
    sums: dict[tuple[str, str], Tensor] = {}
    for name, x, y in seen:
        x, g = x.reshape(-1, x.shape[-1]), y.grad.reshape(-1, y.shape[-1])
        chosen = rows if len(x) == states[0][..., 0].numel() else slice(None)
        for kind, value in (("input_moment", x[chosen].T @ x[chosen]), ("output_moment", (g[chosen] ** 2).sum(0))):
            sums[kind, name] = sums.get((kind, name), 0) + value
        sums["gradient", name] = twin.get_submodule(name.removeprefix("h.0.")).weight.grad
    return sums


def require_equal(collector: PanelCollector, expected: dict[tuple[str, str], Tensor]) -> None:
    for panel, total in collector.totals.items():
        wanted = expected[panel.statistic, panel.module]
        if panel.statistic == "input_moment":
            total, wanted = total.tril(), wanted.tril()  # the rest is not kept
        assert wanted.norm() > 0.1
        torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["plain", "twice", "routed"])
def test_sums_equal_autograd(mode: str) -> None:
    block, batch = Block(mode), make_batch()
    states = make_states(batch)
    with PanelCollector(block, SPEC, PANELS, CPU) as collector:
        pass_through(block, collector, batch, states)
    collector.require_finite()
    require_equal(collector, oracle(block, states, slice(None)))
    assert collector.num_tokens == {
        "h.0.first": 10,
        "h.0.second": 10,
        "h.0.third": {"plain": 10, "twice": 20, "routed": 5}[mode],
    }


@pytest.mark.parametrize(("lengths", "token_mask"), [((5, 3), "attention"), ((5, 5), "labels"), ((6, 4), "labels")])
def test_only_chosen_rows_enter_the_moments_and_all_enter_the_gradient(
    lengths: tuple[int, ...], token_mask: str
) -> None:
    block, batch = Block(), make_batch(lengths, token_mask)
    states = make_states(batch)
    with PanelCollector(block, SPEC, PANELS, CPU) as collector:
        pass_through(block, collector, batch, states)
    assert batch.moment_rows is not None
    require_equal(collector, oracle(block, states, batch.moment_rows))
    assert set(collector.num_tokens.values()) == {batch.moment_rows.numel()}


def test_micro_batches_add_up() -> None:
    block, batches = Block(), [make_batch((5, 5)), make_batch((4, 3, 2))]
    states = [make_states(batch, seed) for seed, batch in enumerate(batches)]
    with PanelCollector(block, SPEC, PANELS, CPU) as collector:
        for batch, pair in zip(batches, states, strict=True):
            pass_through(block, collector, batch, pair)
    first = oracle(block, states[0], slice(None))
    second = oracle(block, states[1], batches[1].moment_rows)
    require_equal(collector, {key: first[key] + second[key] for key in first})


def test_a_panel_holds_just_its_rows() -> None:
    block, batch = Block(), make_batch()
    states = make_states(batch)
    panels = (
        Panel("gradient", "h.0.third", 2, 5, 4),
        Panel("input_moment", "h.0.first", 3, SIZE, SIZE),
    )
    with PanelCollector(block, SPEC, panels, CPU) as collector:
        pass_through(block, collector, batch, states)
    expected = oracle(block, states, slice(None))
    torch.testing.assert_close(collector.totals[panels[0]], expected["gradient", "h.0.third"][2:5].float())
    lower = torch.ones(SIZE, SIZE).tril()[3:]
    moment = expected["input_moment", "h.0.first"][3:].float()
    torch.testing.assert_close(collector.totals[panels[1]] * lower, moment * lower)


def test_input_moments_need_no_gradients() -> None:
    block, batch = Block(), make_batch()
    states = make_states(batch)
    panels = tuple(panel for panel in PANELS if panel.statistic == "input_moment")
    with PanelCollector(block, SPEC, panels, CPU) as collector, torch.no_grad():
        collector.begin(batch)
        block(states[0])
    require_equal(collector, oracle(block, states, slice(None)))


def with_rows(tokens: int) -> BlockSpec:
    return dataclasses.replace(SPEC, groups=tuple(dataclasses.replace(each, token_rows=tokens) for each in SPEC.groups))


@pytest.mark.parametrize("tokens", [12, 5])
def test_rows_of_few_tokens_make_the_sums_that_they_stand_for(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches, one of them padded; tokens lie in the order that they come in, without padding."""
    monkeypatch.setattr(panels, "panel_tokens", lambda *_: tokens)
    spec, block = with_rows(12), Block()
    batches = [make_batch((4, 3)), make_batch((2, 2))]
    states = [make_states(batch, seed) for seed, batch in enumerate(batches)]
    with PanelCollector(block, spec, block_panels(spec), CPU) as collector:
        for batch, pair in zip(batches, states, strict=True):
            pass_through(block, collector, batch, pair)
    expected = [
        oracle(block, pair, rows) for pair, rows in zip(states, (batches[0].moment_rows, slice(None)), strict=True)
    ]
    assert sum(panel.statistic == "input_rows" for panel in collector.totals) == -(-12 // tokens) * len(spec.groups)
    totals = {
        (panel.statistic, panel.module): torch.cat([collector.totals[each] for each in alike])
        for panel in collector.totals
        if (alike := [e for e in collector.totals if (e.statistic, e.module) == (panel.statistic, panel.module)])
    }
    assert {statistic for statistic, _ in totals} == {"input_rows", "output_rows", "output_moment"}
    assert collector.num_tokens == {"h.0.first": 11, "h.0.second": 11, "h.0.third": 11}
    for linear in spec.linears:
        x, g = totals["input_rows", spec.group_of(linear.name).name], totals["output_rows", linear.name]
        assert (x.shape, g.shape) == ((12, linear.d_in), (12, linear.d_out))
        assert not x[11:].any()
        assert not g[11:].any()
        for kind, found in (("gradient", g.T @ x), ("output_moment", totals["output_moment", linear.name])):
            wanted = expected[0][kind, linear.name] + expected[1][kind, linear.name]
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        if linear.name == spec.group_of(linear.name).name:
            wanted = expected[0]["input_moment", linear.name] + expected[1]["input_moment", linear.name]
            torch.testing.assert_close((x.T @ x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_rows_of_inputs_need_no_gradients_and_those_of_outputs_no_inputs() -> None:
    spec, block, batch = with_rows(10), Block(), make_batch()
    panels = block_panels(spec)
    whole: dict[Panel, Tensor] = {}
    with PanelCollector(block, spec, panels, CPU) as collector:
        pass_through(block, collector, batch, make_states(batch))
        whole |= collector.totals
    inputs, others = ([p for p in panels if (p.statistic == "input_rows") == wanted] for wanted in (True, False))
    assert not Replay(tuple(inputs)).needs_backward
    with PanelCollector(block, spec, inputs, CPU) as collector, torch.no_grad():
        collector.begin(batch)
        block(make_states(batch)[0])
    assert all(torch.equal(total, whole[panel]) for panel, total in collector.totals.items())
    with PanelCollector(block, spec, others, CPU) as collector:
        pass_through(block, collector, batch, make_states(batch))
    assert all(torch.equal(total, whole[panel]) for panel, total in collector.totals.items())


@pytest.mark.parametrize("tokens", [4, 10])
def test_a_layer_that_sees_more_rows_than_there_are_tokens_is_an_error(tokens: int) -> None:
    spec, block, batch = with_rows(10), Block("twice"), make_batch()
    spec = dataclasses.replace(spec, groups=(spec.groups[0], dataclasses.replace(spec.groups[1], token_rows=tokens)))
    with (
        pytest.raises(ModelError, match=r"h\.0\.third sees more tokens than the samples have"),
        PanelCollector(block, spec, block_panels(spec), CPU) as collector,
    ):
        pass_through(block, collector, batch, make_states(batch))


def test_a_layer_that_is_never_called_keeps_zeros() -> None:
    block, batch = Block("never"), make_batch()
    with PanelCollector(block, SPEC, PANELS, CPU) as collector:
        pass_through(block, collector, batch, make_states(batch))
    assert collector.num_tokens["h.0.third"] == 0
    assert not any(total.any() for panel, total in collector.totals.items() if panel.module == "h.0.third")
    assert any(total.any() for panel, total in collector.totals.items() if panel.module == "h.0.first")


def test_an_input_that_is_no_longer_shared_is_an_error() -> None:
    block, batch = Block("another input"), make_batch()
    with (
        pytest.raises(ModelError, match=r"h\.0\.second does not read the input of h\.0\.first"),
        PanelCollector(block, SPEC, PANELS, CPU) as collector,
    ):
        pass_through(block, collector, batch, make_states(batch))


def test_routed_tokens_cannot_be_masked() -> None:
    block, batch = Block("routed"), make_batch((5, 3))
    with (
        pytest.raises(ModelError, match=r"h\.0\.third sees 5 of 10 tokens.*--micro-batch-tokens 1"),
        PanelCollector(block, SPEC, PANELS, CPU) as collector,
    ):
        pass_through(block, collector, batch, make_states(batch))


@pytest.mark.parametrize(("place", "statistic"), [(0, "input_moment"), (1, "gradient|output_moment")])
def test_what_is_not_finite_is_named(place: int, statistic: str) -> None:
    block, batch = Block(), make_batch()
    states = make_states(batch)
    states[place][1, 2, 3] = float("nan")
    kinds = ("input_moment",) if place == 0 else ("gradient", "output_moment")
    panels = tuple(panel for panel in PANELS if panel.statistic in kinds)
    with PanelCollector(block, SPEC, panels, CPU) as collector:
        pass_through(block, collector, batch, states)
    with pytest.raises(NumericalError, match=rf"h\.0\.\w+: its ({statistic}) holds NaN or Inf"):
        collector.require_finite()


def test_sums_are_single_precision_whatever_the_states_are() -> None:
    block, batch = Block().bfloat16(), make_batch()
    states = tuple(tensor.bfloat16() for tensor in make_states(batch))
    with PanelCollector(block, SPEC, PANELS, CPU) as collector:
        pass_through(block, collector, batch, states)
    assert {total.dtype for total in collector.totals.values()} == {torch.float32}
    moment = collector.totals[PANELS[-2]].tril()
    flat = states[0].detach().double().reshape(-1, SIZE)
    torch.testing.assert_close(moment.double(), (flat.T @ flat).tril(), rtol=1e-5, atol=1e-5)


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    block, batch = Block(), make_batch()
    # the error has to pass through the collector, so both are in the block
    with pytest.raises(RuntimeError, match="on the way"), PanelCollector(block, SPEC, PANELS, CPU) as collector:  # noqa: PT012
        assert sum(len(module._forward_hooks) for module in block.modules()) == 3
        pass_through(block, collector, batch, make_states(batch))
        raise RuntimeError("on the way")
    assert not any(module._forward_hooks or module._backward_hooks for module in block.modules())


def test_no_activation_outlives_the_collector() -> None:
    """A graph's hooks lead to the collector; were its inputs to lead back into the graph, neither would ever go."""
    block, batch = Block(), make_batch()
    seen: list[weakref.ref[Tensor]] = []
    block.third.register_forward_pre_hook(lambda _module, args: seen.append(weakref.ref(args[0])))
    with PanelCollector(block, SPEC, PANELS, CPU) as collector:
        pass_through(block, collector, batch, make_states(batch))
        assert seen[0]() is not None
    del collector
    gc.collect()
    assert seen[0]() is None
