"""Bounds: work over rates, by hand; and rates as users write them."""

from __future__ import annotations

import json

import pytest

from streamda.bounds import Bounds, Rates, parse_rates
from streamda.errors import ConfigError

RATES = Rates(flops=100e9, flops64=50e9, read=1e9, write=2e8)
BOUNDS = Bounds(RATES, {"forward": 2 * 10**12, "solve": 10**12}, bytes_read=4 * 10**9, bytes_written=10**9)


def test_each_phase_has_the_rate_of_its_precision() -> None:
    assert BOUNDS.precision == {"forward": "compute", "solve": "float64"}
    assert BOUNDS.phase_seconds == {"forward": 20.0, "solve": 20.0}
    assert BOUNDS.compute_seconds == 40.0
    assert (BOUNDS.read_seconds, BOUNDS.write_seconds, BOUNDS.disk_seconds) == (4.0, 5.0, 9.0)
    assert (BOUNDS.at_least_seconds, BOUNDS.in_turn_seconds) == (40.0, 49.0)


@pytest.mark.parametrize(("flops", "larger", "times"), [(2 * 10**12, "compute", 1.5), (0, "disk", 60 / 24)])
def test_a_run_is_held_against_the_larger_bound(flops: int, larger: str, times: float) -> None:
    values = Bounds(RATES, {"forward": flops, "solve": flops // 2 * 2 // 2}, 14 * 10**9, 2 * 10**9).to_dict(60.0)
    assert (values["larger"], values["times_the_bound"]) == (larger, times)
    assert values["flops_by_precision"] == {"compute": flops, "float32": 0, "float64": flops // 2}
    assert json.loads(json.dumps(values, allow_nan=False)) == values


@pytest.mark.parametrize(("flops", "flops64", "seconds"), [(100e9, 50e9, 10.0), (20e9, 50e9, 20.0), (None, None, None)])
def test_float32_beside_another_dtype_has_the_higher_rate(
    flops: float | None, flops64: float | None, seconds: float | None
) -> None:
    bounds = Bounds(Rates(flops=flops, flops64=flops64), {"solve_float32": 10**12}, bytes_read=0, bytes_written=0)
    assert bounds.precision == {"solve_float32": "float32"}
    assert bounds.phase_seconds == {"solve_float32": seconds}
    assert bounds.to_dict()["flops_by_precision"]["float32"] == 10**12


def test_what_is_not_known_is_none_and_not_zero() -> None:
    values = Bounds(Rates(flops=1e9, flops64=1e9), {"forward": 10**10}, 10**9, 10**9).to_dict(20.0)
    assert values["compute_seconds"] == 10.0
    assert values["disk_seconds"] is values["at_least_seconds"] is values["in_turn_seconds"] is None
    assert (values["larger"], values["times_the_bound"]) == ("compute", 2.0)


def test_rates_are_given_in_any_order_and_in_part() -> None:
    assert parse_rates(None) == Rates()
    assert parse_rates("write=4e8, flops=150e9") == Rates(flops=150e9, write=4e8)
    assert parse_rates("flops=100e9,flops64=50e9,read=1e9,write=2e8") == RATES
    assert Rates(read=5.0).or_else(RATES) == Rates(100e9, 50e9, 5.0, 2e8)


@pytest.mark.parametrize(
    "text",
    ["", "flops", "flops=", "flops=fast", "flop=1", "read=0", "read=-1", "read=nan", "read=inf", "read=1,read=2"],
)
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--rates has '.*'; expected name=number .*flops64 \(FLOP/s\)"):
        parse_rates(text)
