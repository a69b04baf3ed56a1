"""Settings that every test shares."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

# a shell has what it runs in the background ignore Ctrl-C, and processes that tests start would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tiny matrices are faster on one thread, and two suites side by side do not fight over cores; read when torch is
# imported, here and in the processes that tests start. Tests of the real model set their own number.
os.environ["OMP_NUM_THREADS"] = "1"
# nothing in the suite may reach for the hub; read by huggingface_hub and datasets when they are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


import torch

import streamda
from streamda import products
from tests.killed import weights, write_tiny

GOLDEN = Path(__file__).parent / "golden" / "tiny-llama"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests where there is none, and tests of the real model where it has not been made."""
    # whole files go to workers in this order: the long ones first, or one worker sits on them at the end
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none")
    no_model = pytest.mark.skip(
        reason="needs the real model: run `make test`, or set STREAMDA_TEST_MODEL to its folder"
    )
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "smollm2" in getattr(item, "fixturenames", ()) and not os.environ.get("STREAMDA_TEST_MODEL"):
            item.add_marker(no_model)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real SmolLM2-135M checkpoint."""
    folder = Path(os.environ["STREAMDA_TEST_MODEL"]).resolve()
    assert (folder / "config.json").is_file(), f"{folder} holds no model; run `make model`"
    return folder


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products go to oneDNN, which has kernels for every processor, on this machine, too."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "cpu_products", lambda: products.ONEDNN)


@pytest.fixture
def onednn_for_large(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers of any weight go to oneDNN, and sums do not, on this machine, too."""
    monkeypatch.setattr(products, "cpu_products", lambda: products.ONEDNN_LARGE)
    monkeypatch.setattr(products, "LARGE_WEIGHT", 1)


@pytest.fixture
def by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of any weight are cut into a few columns each, on this machine, too."""
    monkeypatch.setattr(products, "cpu_products", lambda: products.MKL_BY_COLUMNS)
    monkeypatch.setattr(products, "MKL_COLUMNS", 13)
    monkeypatch.setattr(products, "MKL_LEAST_TERMS", 1)
    monkeypatch.setattr(products, "LARGE_WEIGHT", 1)


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are PyTorch's own."""
    monkeypatch.setattr(products, "cpu_products", lambda: products.PLAIN)


@pytest.fixture(params=["onednn", "onednn_for_large", "by_columns", "plainly"])
def way(request: pytest.FixtureRequest) -> str:
    """Every way to multiply, on every machine, by the name of its fixture."""
    request.getfixturevalue(request.param)
    return str(request.param)


@pytest.fixture
def by_onednn(way: str) -> bool:
    """Every way; whether it is oneDNN's."""
    return way.startswith("onednn")


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of all products that oneDNN is asked for; each weight must be of a form that it has fast kernels for."""
    seen: list[tuple[int, ...]] = []
    plain = products._onednn

    def watched(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.append((*rows.shape, *weight.shape))
        assert weight.is_contiguous() or weight.T.is_contiguous()
        return plain(rows, weight, bias)

    monkeypatch.setattr(products, "_onednn", watched)
    return seen


@pytest.fixture
def small_pieces(onednn: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tiny models' products go to oneDNN, too, and in several pieces; counts the pieces."""
    count, plain = [0], products._onednn

    def counted(*operands: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        return plain(*operands)

    for name in ("PIECES", "TERMS", "WIDE_TERMS"):
        monkeypatch.setattr(products, name, (8, 4))
    for name in ("TRIANGLE_ROWS", "TILE_ROWS", "TILE_COLUMNS", "MAX_STEP"):
        monkeypatch.setattr(products, name, 16)
    monkeypatch.setattr(products, "_onednn", counted)
    return count


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options, but for the output, of a run that takes less than a second."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def uninterrupted(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that it makes when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    streamda.initialize(**tiny, output_dir=str(folder / "adapter"))
    return weights(folder)
