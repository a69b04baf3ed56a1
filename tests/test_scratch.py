"""What does not fit in memory comes back bit for bit, leaves no file, and is not believed when it changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from streamda.errors import DamagedError, StorageError
from streamda.files import system_calls
from streamda.scratch import SpilledBands

CPU = torch.device("cpu")


def bands(count: int = 4, rows: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, rows * (i + 1), generator=generator, dtype=torch.float64) for i in range(count)]


@pytest.mark.parametrize("in_memory", [0, 1, 3, 4, 9])
def test_every_band_comes_back_and_the_folder_stays_empty(tmp_path: Path, in_memory: int) -> None:
    with SpilledBands(tmp_path, in_memory, CPU) as spilled:
        for index, band in enumerate(bands()):
            spilled[index] = band.clone()
            assert len(spilled) == index + 1
        assert not list(tmp_path.iterdir())
        for index in (3, 0, 2, 1, 1):
            assert torch.equal(spilled[index], bands()[index])


def test_a_second_attempt_takes_the_place_of_the_first(tmp_path: Path) -> None:
    with SpilledBands(tmp_path, 1, CPU) as spilled:
        for index, band in enumerate(bands()):
            spilled[index] = band
        for index in (0, 1):
            spilled[index] = bands()[index] * 2
        assert [bool(torch.equal(spilled[i], bands()[i] * (2 if i < 2 else 1))) for i in range(4)] == [True] * 4


def test_its_descriptor_is_closed_and_what_it_held_is_gone(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with SpilledBands(tmp_path, 0, CPU) as spilled:
        spilled[0] = bands()[0]
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(spilled) == 0


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(system_calls, "write", full)
    with SpilledBands(tmp_path, 0, CPU) as spilled, pytest.raises(StorageError):
        spilled[0] = bands()[0]


@pytest.mark.parametrize("damage", ["shorter", "other bytes"])
def test_bytes_that_changed_are_noticed(tmp_path: Path, damage: str) -> None:
    with SpilledBands(tmp_path, 0, CPU) as spilled:
        spilled[0] = bands()[3]
        assert spilled._descriptor is not None
        if damage == "shorter":
            os.ftruncate(spilled._descriptor, 100)
        else:
            os.pwrite(spilled._descriptor, b"\x40\x40", 22)
        with pytest.raises(DamagedError, match="other bytes than were written"):
            spilled[0]
