"""Bytes: sizes read and shown as people write them, and a meter that sees what was really allocated."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda import memory, shard_values
from streamda.errors import ConfigError
from streamda.memory import (
    READ_CHUNK_BYTES,
    RING_BUFFERS,
    DeviceCopier,
    PeakMeter,
    anonymous_bytes,
    device_limit,
    format_size,
    parse_budget,
    parse_size,
    release_unused,
)
from streamda.shards import StoredTensor

CPU = torch.device("cpu")
MIB = 1 << 20
FACTORS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "kib": 2**10,
    "m": 10**6,
    "mb": 10**6,
    "mib": 2**20,
    "g": 10**9,
    "gb": 10**9,
    "gib": 2**30,
    "t": 10**12,
    "tb": 10**12,
    "tib": 2**40,
}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24_000_000_000),
        ("24gb", 24_000_000_000),  # not gigabits, as Accelerate has it
        ("24GiB", 25_769_803_776),
        ("24gIb", 25_769_803_776),
        ("22.5 GB", 22_500_000_000),
        ("0.5GiB", 536_870_912),
        (" 512m ", 512_000_000),
        ("512MiB", 536_870_912),
        ("1000", 1000),
        (1000, 1000),
        ("1TB", 10**12),
        ("1.5k", 1500),
        ("7B", 7),
        ("9007199254740993", 9007199254740993),  # more digits than a float has
    ],
)
def test_a_size_is_read_as_people_write_it(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GB",
        "-1GB",
        "+1GB",
        "1e9",
        "1,5GB",
        "24Gbit",
        "24 G B",
        "24GBs",
        ".5GB",
        "5.GB",
        "nan",
        "inf",
        "0x10",
        "1_000",
        "\u0661GB",
        "\u00b2GB",
        "1\u00a0000",
        "24GB\n24GB",
        -5,
        2.5e30,
    ],
)
def test_what_is_no_size_is_refused_with_its_name_and_an_example(text: str | int) -> None:
    with pytest.raises(ConfigError, match=r"^--max-disk is .*; expected a size such as 24GB") as caught:
        parse_size(text, "--max-disk")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["0", "0GB", "0.0001", "0.4 b"])
def test_a_size_of_less_than_a_byte_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be above zero"):
        parse_size(text)


def test_a_budget_without_its_unit_is_refused() -> None:
    for text in ("24", " 24.0 ", 24):
        with pytest.raises(ConfigError, match=r"^--max-disk is .*24.*, which is 24 bytes; give a unit, such as 24GB$"):
            parse_budget(text, "--max-disk")
    found = [parse_budget(text, "--max-disk") for text in ("24GB", 24 << 30, "1 b")]
    assert found == [24 * 10**9, 24 << 30, 1]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 10**6), st.sampled_from(sorted(FACTORS)), st.booleans(), st.sampled_from(["", " ", "  "]))
def test_a_size_is_its_number_times_its_unit_in_any_case(number: int, unit: str, upper: bool, space: str) -> None:
    assert parse_size(f"{number}{space}{unit.upper() if upper else unit}") == number * FACTORS[unit]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1536, "1.54 kB"),
        (24e9, "24.00 GB"),
        (440_000_000_000, "440 GB"),
        (1.5e12, "1.50 TB"),
        (-2_500_000, "-2.50 MB"),
    ],
)
def test_a_size_is_shown_in_decimal_units(size: float, text: str) -> None:
    assert format_size(size) == text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.integers(1, 10**15), st.integers(1, 5).flatmap(lambda k: st.integers(10 ** (3 * k) - 999, 10 ** (3 * k)))
    )
)
def test_a_shown_size_reads_back_as_nearly_the_same_size(size: int) -> None:
    """Three digits are shown, so at most half a percent is lost; and what is shown is a legal size again."""
    assert abs(parse_size(format_size(size)) - size) <= 0.0051 * size


def touched(size: int) -> torch.Tensor:
    """Memory that is really resident: pages that were never written do not count."""
    return torch.ones(size, dtype=torch.uint8)


def test_anonymous_memory_counts_what_is_written_to_and_nothing_else() -> None:
    before = anonymous_bytes()
    untouched = torch.empty(256 * MIB, dtype=torch.uint8)
    assert anonymous_bytes() - before < 16 * MIB
    held = touched(64 * MIB)
    assert 56 * MIB < anonymous_bytes() - before < 96 * MIB
    del held, untouched
    release_unused(CPU)
    assert anonymous_bytes() - before < 16 * MIB


def test_the_meter_sees_an_allocation_that_is_gone_when_it_is_asked() -> None:
    release_unused(CPU)
    with PeakMeter(CPU, interval_seconds=0.002) as meter:
        held = touched(96 * MIB)
        time.sleep(0.1)
        assert meter.current() > 88 * MIB
        del held
        release_unused(CPU)
        assert meter.current() < 48 * MIB
        assert 88 * MIB < meter.take_peak() < 160 * MIB
        assert meter.take_peak() < 48 * MIB  # a new period, which saw nothing


def test_the_meter_counts_from_its_own_baseline() -> None:
    held = touched(96 * MIB)
    with PeakMeter(CPU, interval_seconds=0.002) as meter:
        more = touched(32 * MIB)
        time.sleep(0.05)
        assert 24 * MIB < meter.take_peak() < 80 * MIB
    assert held.numel() == 3 * more.numel()


def meter_and_fail() -> None:
    with PeakMeter(CPU) as meter:
        assert "streamda-peak-meter" in {thread.name for thread in threading.enumerate()}
        raise KeyError(meter.current())


def test_the_meter_s_thread_ends_with_it() -> None:
    with pytest.raises(KeyError):
        meter_and_fail()
    assert "streamda-peak-meter" not in {thread.name for thread in threading.enumerate()}


def test_without_an_accelerator_there_is_no_cap_to_set() -> None:
    before = torch.ones(8)
    with device_limit(CPU, 1):  # a cap of one byte would show at once
        assert bool((before + touched(MIB)[:8] == 2).all())


@pytest.mark.gpu
def test_on_cuda_the_meter_reads_the_allocator_s_reserved_peak() -> None:
    device = torch.device("cuda")
    release_unused(device)
    before = torch.cuda.memory_reserved(device)
    with PeakMeter(device) as meter:
        held = torch.ones(64 * MIB, dtype=torch.uint8, device=device)
        assert meter.current() == before + held.numel()
        del held
        release_unused(device)
        assert meter.take_peak() == before + 64 * MIB
        assert meter.take_peak() == torch.cuda.memory_reserved(device)


class TestDeviceCopier:
    def test_on_a_cpu_there_is_one_buffer_for_as_long_as_something_is_read(self) -> None:
        copier = DeviceCopier(CPU)
        with copier:
            first = copier.buffer(100)
            assert copier.buffer(50).data_ptr() == first.data_ptr()
        assert copier.mark() is None
        with copier:
            target = torch.empty(3, dtype=torch.float64)
            chunk = copier.buffer(12).view(torch.float32)
            copier.copy_(target, chunk.fill_(7))
            assert target.tolist() == [7.0] * 3

    def test_no_buffer_is_filled_again_before_its_copy_is_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a stream that copies nothing until it is waited for, as a device may."""
        under_way: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
        asked: list[tuple[torch.Tensor, torch.Tensor]] = []

        class Stream:
            def record_event(self) -> object:
                mark = object()
                under_way[mark] = asked.pop()
                return mark

        def wait(mark: object) -> None:
            if mark is not None:
                target, chunk = under_way.pop(mark)
                target.copy_(chunk)

        copier = DeviceCopier(CPU)
        monkeypatch.setattr(copier, "_ring", [None] * RING_BUFFERS)
        monkeypatch.setattr(copier, "_copied", [None] * RING_BUFFERS)
        monkeypatch.setattr(copier, "_stream", Stream())
        monkeypatch.setattr(memory, "wait_for_copy", wait)

        class Late:
            """A target on the device: what is copied into it arrives when that is waited for."""

            def __init__(self, target: torch.Tensor) -> None:
                self.target = target

            def copy_(self, chunk: torch.Tensor) -> None:
                asked.append((self.target, chunk))

        targets = [torch.empty(5) for _ in range(9)]
        places = set()
        for number, target in enumerate(targets):
            chunk = copier.buffer(20).view(torch.float32)
            places.add(chunk.data_ptr())
            chunk.fill_(number)
            copier.copy_(Late(target), chunk)  # type: ignore[arg-type]  # all that it asks of a target
            assert len(under_way) <= RING_BUFFERS
        for mark in list(under_way):
            wait(mark)
        assert [float(target.mean()) for target in targets] == list(range(9))
        assert len(places) == RING_BUFFERS

    def test_a_chunk_with_its_margin_wastes_nothing_of_a_power_of_two(self) -> None:
        """As which PyTorch allocates pinned memory."""
        tensor = StoredTensor("a", Path("x"), (1,), torch.bfloat16, 0, "a", converted=False)
        assert 2 * shard_values.values_per_chunk(tensor) + shard_values.READ_MARGIN <= READ_CHUNK_BYTES == 1 << 25
