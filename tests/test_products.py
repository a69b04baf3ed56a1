"""Products by pieces, through oneDNN or of columns, are the plain ones, wherever they are taken."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

import streamda
from streamda import processor, products
from streamda.products import (
    add_product_,
    add_triangle_,
    cpu_products,
    in_model,
    linear,
    product_library,
)
from streamda.stored_weights import StoredWeight
from tests.conftest import GOLDEN
from tests.golden_options import products as update_of
from tests.golden_options import read_adapter, worst_error

CPU = torch.device("cpu")
LENGTHS = [1, 63, 64, 65, 200, 256, 300, 321, 575]


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Of the results of all products that are cut into columns."""
    seen: list[torch.Size] = []
    plain = products._by_columns

    def watched(result: torch.Tensor, *operands: Any) -> None:
        seen.append(result.shape)
        plain(result, *operands)

    monkeypatch.setattr(products, "_by_columns", watched)
    return seen


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_is(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """As good as float32 sums of some hundred terms are."""
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_layer_and_its_gradient(
    length: int, with_bias: bool, way: str, shapes: list[object], cuts: list[object]
) -> None:
    weight, bias = draw(70, 33), draw(70) if with_bias else None
    x = draw(length, 33).requires_grad_(True)
    exact = x.detach().double().requires_grad_(True)
    output = linear(x, weight, bias)
    expected = F.linear(exact, weight.double(), None if bias is None else bias.double())
    assert_is(output.detach(), expected.detach())
    above = draw(length, 70, seed=1)
    output.backward(above)
    expected.backward(above.double())
    assert x.grad is not None
    assert exact.grad is not None
    assert_is(x.grad, exact.grad)
    assert bool(shapes) == (way.startswith("onednn") and length >= 64)
    assert len(cuts) == (2 if way == "by_columns" and length >= 64 else 0)


@pytest.mark.parametrize("shape", [(2, 150, 40), (300, 40), (3, 2, 50, 40)])
def test_every_form_of_input_and_of_gradient(shape: tuple[int, ...], by_onednn: bool, shapes: list[object]) -> None:
    weight = draw(30, 40)
    x = draw(*shape[:-2], shape[-1], shape[-2]).mT.requires_grad_(True)  # not row-major
    assert not x.is_contiguous()
    output = linear(x, weight)
    assert output.shape == (*shape[:-1], 30)
    assert_is(output.detach(), F.linear(x.detach().double(), weight.double()))
    output.sum().backward()  # a gradient of one number everywhere
    assert x.grad is not None
    assert_is(x.grad, weight.double().sum(0).expand(shape))


def test_terms_of_a_gradient_are_summed_by_pieces(by_onednn: bool, shapes: list[object]) -> None:
    """More outputs than terms are multiplied at a time, of a weight that the backward pass reads transposed."""
    num_outputs = products.MAX_STEP + 100
    weight, x = draw(num_outputs, 20), draw(130, 20).requires_grad_(True)
    above = draw(130, num_outputs)
    linear(x, weight).backward(above)
    assert x.grad is not None
    assert_is(x.grad, above.double() @ weight.double())


def test_a_weight_with_gaps_takes_the_plain_way(by_onednn: bool, shapes: list[object]) -> None:
    """A plain product is a hundred times faster than what oneDNN has for it."""
    x, weight = draw(100, 40), draw(30, 90)[:, 50:]
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not shapes
    assert_is(linear(x, draw(40, 30).T), x.double() @ draw(40, 30).double())
    assert bool(shapes) == by_onednn


def test_a_weight_that_asks_for_a_gradient_gets_it(by_onednn: bool) -> None:
    weight, x = draw(30, 40).requires_grad_(True), draw(100, 40)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert_is(weight.grad, x.double().sum(0).expand(30, 40))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_plain_way(dtype: torch.dtype, by_onednn: bool, shapes: list[object]) -> None:
    x, weight = draw(100, 40).to(dtype), draw(30, 40).to(dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    total = torch.zeros(40, 40, dtype=dtype)
    add_product_(total, x, x)
    assert torch.equal(total, x.T @ x)
    assert not shapes


@settings(deadline=None, max_examples=40)
@given(
    terms=st.integers(1, 1400),
    rows=st.integers(1, 300),
    columns=st.integers(1, 40),
    wide=st.booleans(),
    transposed=st.booleans(),
    onednn=st.booleans(),
)
def test_a_product_is_added_to_what_is_there(
    terms: int, rows: int, columns: int, wide: bool, transposed: bool, onednn: bool
) -> None:
    """Each term once, whatever is left over behind the pieces."""
    left, right = draw(terms, rows), draw(terms, columns + 3)[:, 3:]
    if transposed:
        left = draw(rows, terms).T
    total = draw(rows, columns, seed=1).to(torch.float64 if wide else torch.float32)
    expected = total.double() + left.double().T @ right.double()
    with pytest.MonkeyPatch.context() as patch:
        has_it = hasattr(torch.ops.mkldnn, "_linear_pointwise")
        patch.setattr(products, "cpu_products", lambda: products.ONEDNN if onednn and has_it else products.PLAIN)
        add_product_(total, left, right)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-3 if terms > 300 else 2e-4)


@pytest.mark.parametrize("terms", LENGTHS)
@pytest.mark.parametrize(("start", "rows"), [(0, 300), (300, 130), (512, 600)])
def test_a_triangle_is_that_of_the_dense_product(
    terms: int, start: int, rows: int, by_onednn: bool, shapes: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "TILE_COLUMNS", 400)  # several tiles side by side
    x = draw(terms, start + rows + 7)
    total = torch.zeros(rows, start + rows)
    add_triangle_(total, x, start)
    add_triangle_(total, x, start)
    expected = 2 * x.double().T @ x.double()
    actual = total.tril(start)
    assert_is(actual, expected[start : start + rows, : start + rows].tril(start))


@pytest.mark.parametrize("columns", [64, 70])
def test_operands_with_gaps_are_copied_first(columns: int, way: str, shapes: list[object]) -> None:
    left, right = draw(300, 50), draw(300, columns + 9)[:, 9:]
    total = torch.zeros(50, columns)
    add_product_(total, left, right)
    assert_is(total, left.double().T @ right.double())
    assert bool(shapes) == (way == "onednn")


def test_long_sums_lose_less_in_a_wider_total(onednn: None) -> None:
    """Of positive terms: their rounding in float32 grows with their number."""
    left, right = draw(20000, 64).abs(), draw(20000, 64, seed=1).abs()
    expected = left.double().T @ right.double()
    errors = []
    for dtype in (torch.float32, torch.float64):
        total = torch.zeros(64, 64, dtype=dtype)
        add_product_(total, left, right)
        errors.append(float((total.double() - expected).norm() / expected.norm()))
    assert errors[1] < errors[0] / 2


def test_many_lengths_and_spans_are_few_shapes(shapes: list[tuple[int, ...]], onednn: None) -> None:
    """OneDNN keeps a kernel for each shape for as long as the process lives."""
    weight, total, square = draw(48, 64), torch.zeros(48, 64), torch.zeros(64, 64)
    for length in range(1, 1500, 7):
        x = draw(length, 64).requires_grad_(True)
        output = linear(x, weight)
        output.sum().backward()
        add_product_(total, output.detach(), x.detach())
        add_triangle_(square, x.detach(), 0)
    assert len(shapes) > 1000
    assert len(set(shapes)) <= 16  # half a megabyte each, of a layer
    shapes.clear()
    for directions in range(1, 129):
        add_product_(torch.zeros(48, directions, dtype=torch.float64), draw(64, 48), draw(64, directions))
    assert len(set(shapes)) == 2


def most_bytes(work: Callable[[], object]) -> int:
    """Of tensors that are made meanwhile, at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    assert changes
    return max(itertools.accumulate(size for _, size in changes))


@pytest.mark.parametrize(
    ("terms", "rows", "columns"),
    [(2040, 2048, 8100), (2040, 1000, 1000), (1000, 2000, 2000), (540, 1536, 576), (3000, 300, 5120), (130, 8192, 70)],
)
def test_a_product_takes_no_more_memory_than_it_says(terms: int, rows: int, columns: int, onednn: None) -> None:
    """Also where its last piece overlaps the one before it, or operands are copied to have no odd columns."""
    left, right = torch.ones(terms, rows), torch.ones(terms, columns)
    total, triangle = torch.zeros(rows, columns), torch.zeros(min(rows, 2048), rows)
    bound = products.work_bytes(CPU, terms, max(rows, columns))
    assert most_bytes(lambda: add_product_(total, left, right)) <= bound
    start = rows - triangle.shape[0]
    assert most_bytes(lambda: add_triangle_(triangle, left, start)) <= products.work_bytes(CPU, terms, rows)


def test_a_model_may_change_an_output_in_place(by_onednn: bool) -> None:
    """OLMo clips what its projections give."""
    x, exact = draw(2, 50, 40).requires_grad_(True), draw(2, 50, 40).double().requires_grad_(True)
    weight = draw(30, 40)
    linear(x, weight).clamp_(-1, 1).sum().backward()
    F.linear(exact, weight.double()).clamp_(-1, 1).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert_is(x.grad, exact.grad)


def test_a_second_derivative_is_refused_and_not_wrong(onednn: None) -> None:
    x = draw(100, 40).requires_grad_(True)
    (gradient,) = torch.autograd.grad(linear(x, draw(30, 40)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_pytorch_refuses_is_refused(by_onednn: bool) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        linear(draw(80, 50), draw(30, 40))
    with pytest.raises(RuntimeError):
        linear(draw(80, 40), draw(30, 40), draw(7))


def test_every_form_of_bias(by_onednn: bool, shapes: list[object]) -> None:
    x, weight = draw(80, 40), draw(30, 40)
    for bias in (draw(30, 5)[:, 2], draw(1), draw(30)):
        assert_is(linear(input=x, weight=weight, bias=bias), x.double() @ weight.double().T + bias.double())
    assert len(shapes) == (2 if by_onednn else 0)  # for the last one, in two pieces


def test_a_models_linear_layers_take_it_inside_the_context_only(by_onednn: bool, shapes: list[object]) -> None:
    module = nn.Linear(16, 8).requires_grad_(False)
    x = draw(70, 16)
    plain = module(x)
    assert not shapes
    with in_model(CPU):
        inside = module(x)
    assert bool(shapes) == by_onednn
    assert_is(inside, plain.double())
    shapes.clear()
    with in_model(torch.device("cuda")):
        module(x)
    assert not shapes


def test_a_weight_in_its_stored_dtype_takes_it_too(way: str, shapes: list[object], cuts: list[object]) -> None:
    stored = draw(24, 40).bfloat16()
    weight, x = StoredWeight.keep(stored, torch.float32), draw(90, 40).requires_grad_(True)
    with in_model(CPU):
        output = F.linear(x, weight)
    output.sum().backward()
    assert_is(output.detach(), F.linear(x.detach().double(), stored.double()))
    assert x.grad is not None
    assert_is(x.grad, stored.double().sum(0).expand(90, 40))
    assert len(shapes) == (4 if way.startswith("onednn") else 0)  # two pieces, forward and backward
    assert len(cuts) == (2 if way == "by_columns" else 0)


def test_columns_are_for_few_rows_long_sums_and_large_weights(
    by_columns: None, cuts: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "MKL_LEAST_TERMS", 40)
    monkeypatch.setattr(products, "LARGE_WEIGHT", 30 * 40)
    monkeypatch.setattr(products, "MKL_MOST_ROWS", 80)
    weight, few = draw(30, 40), draw(80, 40)
    assert_is(linear(few, weight), few.double() @ weight.double().T)
    assert len(cuts) == 1
    plain = [(draw(81, 40), weight), (few[:63], weight), (few, weight[:29]), (few.double(), weight.double())]
    for x, other in [*plain, (draw(80, 39), draw(90, 39)), (few[:0], weight)]:
        assert torch.equal(linear(x, other), F.linear(x, other))
    assert len(cuts) == 1


@pytest.mark.parametrize("least_terms", [30, 35])
def test_a_gradient_is_a_product_of_its_own(
    least_terms: int, by_columns: None, cuts: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the sums may be too short to be worth a copy."""
    monkeypatch.setattr(products, "MKL_LEAST_TERMS", least_terms)
    with in_model(CPU):
        output = nn.Linear(40, 30).requires_grad_(False)(draw(70, 40).requires_grad_(True))
    assert len(cuts) == 1
    output.sum().backward()
    assert len(cuts) == (2 if least_terms <= 30 else 1)


def test_only_linear_layers_of_large_weights_go_to_onednn_where_its_vectors_are_halved(
    onednn_for_large: None, shapes: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "LARGE_WEIGHT", 30 * 40)
    weight, x = draw(30, 40), draw(300, 40)
    assert_is(linear(x, weight), x.double() @ weight.double().T)
    assert len(shapes) == 2
    plain = [(x[:63], weight), (x, weight[:29]), (x.double(), weight.double())]
    for rows, other in plain:
        assert torch.equal(linear(rows, other), F.linear(rows, other))
    total = torch.zeros(40, 40)
    add_product_(total, x, x)
    assert torch.equal(total, torch.zeros(40, 40).addmm_(x.T, x))
    add_triangle_(total.zero_(), x, 0)
    assert_is(total.tril(), (x.double().T @ x.double()).tril())
    assert len(shapes) == 2


@pytest.mark.parametrize("fixture", ["onednn", "onednn_for_large"])
@pytest.mark.parametrize(("d_in", "d_out"), [(2048, 4096), (4096, 2048)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_linear_layer_makes_a_piece_of_its_result_at_a_time(
    fixture: str, d_in: int, d_out: int, transposed: bool, request: pytest.FixtureRequest
) -> None:
    """And oneDNN copies a megabyte or two of operands, never the weight."""
    request.getfixturevalue(fixture)
    x, weight = torch.ones(2000, d_in), torch.ones(d_in, d_out).T if transposed else torch.ones(d_out, d_in)
    piece = 4 * products.PIECES[0] * d_out
    assert most_bytes(functools.partial(linear, x, weight)) <= 4 * 2000 * d_out + piece + (2 << 20)


CPU_INFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel name\t: some processor\n"


@pytest.mark.parametrize(
    ("facts", "capability", "expected"),
    [
        (CPU_INFO.format("AuthenticAMD", 26), "AVX512", "oneDNN"),
        (CPU_INFO.format("AuthenticAMD", 25), "AVX512", "oneDNN for large weights"),
        (CPU_INFO.format("AuthenticAMD", "?"), "AVX512", "oneDNN"),
        (CPU_INFO.format("HygonGenuine", 25), "AVX512", "oneDNN"),
        (CPU_INFO.format("GenuineIntel", 6), "AVX512", "default"),
        (CPU_INFO.format("GenuineIntel", 6), "AVX2", "default"),
        (CPU_INFO.format("AuthenticAMD", 25), "AVX2", "MKL by columns"),
        ("processor\t: 0\n", "AVX512", "default"),
        (None, "AVX512", "default"),
    ],
)
def test_what_multiplies_depends_on_vectors_and_on_whose_they_are(
    facts: str | None, capability: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OneDNN takes wide vectors that MKL leaves unused; MKL is cut where it does not know the processor."""
    if expected.startswith("oneDNN") and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    if facts is not None:
        (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr(processor, "FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    cpu_products.cache_clear()
    try:
        assert product_library(CPU) == expected
        assert product_library(torch.device("cuda")) == "default"
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        cpu_products.cache_clear()
        assert product_library(CPU) == (expected if expected.startswith("oneDNN") else "default")
    finally:
        cpu_products.cache_clear()


@pytest.mark.parametrize("other", ["onednn", "onednn_for_large", "by_columns"])
def test_a_whole_run_gives_the_same_adapter_every_way(
    other: str, tmp_path: Path, shapes: list[object], cuts: list[object], request: pytest.FixtureRequest
) -> None:
    found = {}
    for way in ("plainly", other):
        request.getfixturevalue(way)
        streamda.initialize(
            model=str(GOLDEN / "model"),
            dataset=str(GOLDEN / "calibration.jsonl"),
            output_dir=str(tmp_path / way),
            max_gpu_mem="400MB",
            device="cpu",
            dtype="float32",
            rank=4,
        )
        found[way] = update_of(read_adapter(tmp_path / way))
        assert bool(shapes) == way.startswith("onednn")
        assert bool(cuts) == (way == "by_columns")
    assert worst_error(found["plainly"], found[other]) < 1e-3
