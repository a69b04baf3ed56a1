"""JSON files that carry their own checksum, so that one changed byte in them is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c

from streamda import files
from streamda.errors import DamagedError
from streamda.files import JSON, shown


def seal_of(obj: JSON) -> int:
    """The crc32c of the canonical JSON of ``obj``."""
    return google_crc32c.value(files.canonical_json(obj))  # type: ignore[no-any-return]  # untyped


def write_sealed_json(path: Path, obj: Mapping[str, JSON]) -> None:
    """`files.write_json_atomic` with ``self_crc``, the `seal_of` ``obj``, added."""
    files.write_json_atomic(path, {**obj, "self_crc": seal_of(obj)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What `write_sealed_json` wrote, without the seal. One changed byte anywhere in the file is a `DamagedError`."""
    obj = files.read_json(path)
    seal = obj.get("self_crc") if isinstance(obj, dict) else None
    # The bytes are compared as well: another spelling of the same value is a changed file too.
    if seal is None or files.read_bytes(path) != files.json_text(obj):
        raise DamagedError(f"{shown(path)} does not match its own checksum")
    del obj["self_crc"]
    if seal != seal_of(obj):
        raise DamagedError(f"{shown(path)} does not match its own checksum")
    return obj  # type: ignore[no-any-return]  # its seal says that it is what was written
