"""What a run computes in, whatever the program around it has allowed PyTorch to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import streamda
from streamda.precision import full_precision
from streamda.setup import choose_dtype
from tests.golden_options import golden_options

MATMUL = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def state() -> tuple[Any, ...]:
    try:
        asked = torch.get_float32_matmul_precision()
    except RuntimeError:
        asked = "by kind of device"
    return (asked, *(each.fp32_precision for each in MATMUL))


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    settings = [each.fp32_precision for each in MATMUL]
    yield
    torch.set_float32_matmul_precision("highest")
    for each, setting in zip(MATMUL, settings, strict=True):
        each.fp32_precision = setting


def older(precision: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(precision)


def newer(which: int, precision: str) -> Callable[[], None]:
    return lambda: setattr(MATMUL[which], "fp32_precision", precision)


@pytest.mark.parametrize(
    "ask", [lambda: None, older("high"), older("medium"), newer(0, "tf32"), newer(1, "bf16")], ids=range(5)
)
def test_float32_is_multiplied_in_float32_and_what_was_asked_for_comes_back(ask: Callable[[], None]) -> None:
    ask()
    before = state()
    with full_precision():
        assert all(each.fp32_precision in ("ieee", "none") for each in MATMUL)
    assert state() == before
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert state() == before


def test_a_program_that_allows_less_gets_the_same_adapter(tmp_path: Path) -> None:
    adapters = []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        options = golden_options(tmp_path) | {"output_dir": str(tmp_path / precision)}
        streamda.initialize(**options)
        assert torch.get_float32_matmul_precision() == precision
        adapters.append((tmp_path / precision / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float32), (8, torch.bfloat16), (12, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(
    major: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    gpu = torch.device("cuda", 0)
    assert choose_dtype("auto", gpu) == dtype
    assert choose_dtype("bfloat16", gpu) == torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
