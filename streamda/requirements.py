"""What streamda needs of Python, of its libraries and of the machine, checked before any work.

An installer keeps to the versions of the package's metadata; an environment put together by hand may not.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Mapping

import torch

from streamda.errors import ConfigError

MIN_PYTHON = (3, 11)
MIN_VERSIONS = {
    "zarr": (3, 1, 3),  # from here on a chunk is written aside and renamed; before, a crash leaves half of one
    "torch": (2, 8),  # products of bfloat16 operands with float32 sums
}


def require_platform(
    python: tuple[int, ...] | None = None,
    versions: Mapping[str, str] | None = None,
    byte_order: str | None = None,
    has_lapack: bool | None = None,
) -> None:
    """Refuses a machine on which a run would fail late, or be wrong.

    Args:
        python: version of Python; the arguments are for tests, and default to what is here.
        versions: of the libraries.
        byte_order: ``little`` or ``big``.
        has_lapack: whether torch can factor matrices on the CPU.

    Raises:
        ConfigError: naming what is there and what is needed.
    """
    python = tuple(sys.version_info[:3]) if python is None else python
    if python < MIN_PYTHON:
        raise ConfigError(f"streamda needs Python {_text(MIN_PYTHON)} or newer; this is {_text(python)}")
    for name, least in MIN_VERSIONS.items():
        found = importlib.metadata.version(name) if versions is None else versions[name]
        if tuple(map(int, re.findall(r"\d+", found)[: len(least)])) < least:
            raise ConfigError(f"streamda needs {name} {_text(least)} or newer; this is {found}: pip install -U {name}")
    if (sys.byteorder if byte_order is None else byte_order) != "little":
        raise ConfigError("streamda needs a little-endian machine: its files are written and read in that order")
    if not (torch._C.has_lapack if has_lapack is None else has_lapack):
        raise ConfigError("this torch is built without LAPACK, which solving needs; install one of the official builds")


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
