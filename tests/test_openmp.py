"""A process that imports streamda first has PyTorch's threads sleep soon; the user's own choice stands."""

from __future__ import annotations

import os
import subprocess
import sys

from streamda.openmp import SPINS, SWITCHES


def settings(**environment: str) -> dict[str, str]:
    """What libgomp runs with, as it reports itself when it is loaded."""
    plain = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    command = [sys.executable, "-c", "import streamda"]
    shown = plain | environment | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(command, env=shown, capture_output=True, text=True, check=True)
    lines = [line.split(" = ") for line in done.stderr.splitlines() if " = " in line]
    return {name.split()[-1]: value.strip("'") for name, value in lines}


def test_threads_sleep_soon_unless_the_user_has_decided() -> None:
    assert settings()["GOMP_SPINCOUNT"] == SPINS
    assert settings(GOMP_SPINCOUNT="77")["GOMP_SPINCOUNT"] == "77"
    decided = settings(OMP_WAIT_POLICY="ACTIVE")
    assert decided["OMP_WAIT_POLICY"] == "ACTIVE"
    assert decided["GOMP_SPINCOUNT"] != SPINS
