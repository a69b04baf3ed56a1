"""Rates are those of this machine, and measuring them leaves nothing behind."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch

from streamda import files, rates
from streamda.bounds import Rates
from streamda.errors import StorageError
from streamda.rates import ProductRates, measure_disk, measure_flops, measure_rates

CPU = torch.device("cpu")


def test_a_product_s_rate_is_its_operations_over_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks once per reading, so that each product takes one second."""
    ticks = itertools.count()
    monkeypatch.setattr(rates.time, "monotonic", lambda: float(next(ticks)))
    assert measure_flops(CPU, torch.float32) == 2 * 1536**3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_measured_in_under_two_seconds(dtype: torch.dtype) -> None:
    started = time.monotonic()
    rate = measure_flops(CPU, dtype)
    assert time.monotonic() - started < 2
    assert 1e8 < rate < 1e15


def test_along_a_run_rates_are_all_operations_over_all_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples of each precision, the second at a third of the speed; of three products the middle one counts."""
    now, took = [100.0], [0.0]
    monkeypatch.setattr(rates.time, "monotonic", lambda: now[0])
    waits = itertools.cycle((9.0, 50.0, 0.0, -0.5))  # the first one does not count
    monkeypatch.setattr(rates, "_product", lambda *_: lambda: now.append(now.pop() + took[0] + next(waits)))
    products = ProductRates(CPU, torch.float32)
    assert products.mean == Rates()
    assert not products.is_due
    for took[0] in (1.0, 3.0):
        now[0] += 100 * 300  # so that no more than a hundredth of the time goes to it
        assert products.is_due
        products.sample()
        now[0] += rates.SAMPLE_SECONDS
        assert not products.is_due
    assert products.mean == Rates(flops=2 * 1024**3 / 2, flops64=2 * 1024**3 / 2)


def test_along_a_run_products_leave_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SAMPLE_SIZE", 64)  # bfloat16 may take seconds
    state = torch.get_rng_state()
    products = ProductRates(CPU, torch.bfloat16)
    products.sample()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(1e7 < rate < 1e15 for rate in (products.mean.flops or 0, products.mean.flops64 or 0))


def test_no_gpu_is_kept_from_its_work_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates.time, "monotonic", lambda: 1e9)
    assert not ProductRates(torch.device("cuda"), torch.bfloat16).is_due


def test_the_disk_s_rates_are_bytes_over_time_and_no_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = measure_disk(tmp_path, 16 << 20)
    assert 1e5 < write < 1e12
    assert 1e5 < read < 1e12
    ticks = itertools.count()
    monkeypatch.setattr(rates.time, "monotonic", lambda: 1e-3 * next(ticks))
    # two chunks are written, with a look at the clock after each, and then it is read once more
    assert measure_disk(tmp_path, 16 << 20) == pytest.approx(((16 << 20) / 1e-3, (16 << 20) / 3e-3))
    assert not list(tmp_path.iterdir())


def test_a_slow_disk_gets_a_smaller_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(rates.time, "monotonic", lambda: 2.0 * next(ticks))
    assert measure_disk(tmp_path, 64 << 20)[1] == (8 << 20) / 4


def test_a_folder_that_is_yet_to_be_made_stands_for_its_parent(tmp_path: Path) -> None:
    assert measure_disk(tmp_path / "not" / "yet", 8 << 20)[0] > 0
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_left_alone_and_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 1 << 30)
    with pytest.raises(StorageError, match="too little free space"):
        measure_disk(tmp_path)
    found, reason = measure_rates(CPU, torch.float32, tmp_path, Rates(flops=1e9, flops64=2e9))
    assert found == Rates(flops=1e9, flops64=2e9)
    assert reason is not None
    assert "rates of the disk were not measured" in reason


def test_what_is_given_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> float:
        raise AssertionError

    given = Rates(1e9, 2e9, 3e8, 4e8)
    monkeypatch.setattr(rates, "measure_disk", lambda _: (7.0, 8.0))
    with monkeypatch.context() as patched:
        patched.setattr(rates, "measure_flops", never)
        assert measure_rates(CPU, torch.float32, tmp_path, Rates(1e9, 2e9, None, 4e8)) == (
            Rates(1e9, 2e9, 7.0, 4e8),
            None,
        )
        patched.setattr(rates, "measure_disk", never)
        assert measure_rates(CPU, torch.float32, tmp_path, given) == (given, None)
    monkeypatch.setattr(rates, "measure_flops", lambda _, dtype: 64.0 if dtype == torch.float64 else 32.0)
    assert measure_rates(CPU, torch.bfloat16, tmp_path, Rates()) == (Rates(32.0, 64.0, 7.0, 8.0), None)


def test_the_rate_is_that_of_what_multiplies_large_weights(by_onednn: bool, shapes: list[object]) -> None:
    """Or a run whose layers go to a faster library would come nearer to its bound than it is."""
    for dtype in (torch.float64, torch.float32):
        multiply = rates._product(CPU, dtype, 128)
        assert not shapes
        multiply()
    assert bool(shapes) == by_onednn
