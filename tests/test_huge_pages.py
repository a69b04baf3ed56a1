"""A process that imports streamda first has its large tensors on huge pages; the user's own choice stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamda import huge_pages
from streamda.huge_pages import SETTING, SWITCH

PROGRAM = """
import streamda, torch
values = torch.zeros(1 << 24)  # 64 MiB
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""


def huge_bytes(**environment: str) -> int:
    """Of a process with one large tensor."""
    plain = {name: value for name, value in os.environ.items() if name != SWITCH}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=plain | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(encoding="ascii"),
    reason="this system gives huge pages to everyone or to no one",
)
def test_large_tensors_lie_on_huge_pages_unless_the_user_does_not_want_it() -> None:
    assert huge_bytes() >= 32 << 20
    assert huge_bytes(**{SWITCH: "0"}) == 0


@pytest.mark.parametrize("setting", ["always madvise [never]", "[always] madvise never", None])
def test_no_one_is_asked_who_would_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "enabled")
    if setting is not None:
        (tmp_path / "enabled").write_text(setting, encoding="ascii")
    huge_pages.request()
    assert SWITCH not in os.environ
