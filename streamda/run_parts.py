"""What a run was started with, by part and field, compared with what it would be continued with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamda import files
from streamda.errors import MismatchError
from streamda.files import JSON, shown
from streamda.quoting import named

_ABSENT = object()
_MOST_CHARACTERS = 60  # of one value


def canonical_digest(obj: JSON) -> str:
    """The sha256 of the canonical JSON of ``obj``, in hexadecimal."""
    return hashlib.sha256(files.canonical_json(obj)).hexdigest()


def require_equal(path: Path, old: Mapping[str, Any], new: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Raise a `MismatchError` that names the first few fields in which the parts differ."""
    old, new = ({name: part for name, part in parts.items() if name not in ignored} for parts in (old, new))
    found = list(differences(old, json.loads(files.canonical_json(new))))
    if found:
        accept = ", or accept other numbers with --allow-environment-change" if _are_of(found, "numerics") else ""
        raise MismatchError(
            f"{shown(path)} belongs to another run: {named(found)}; "
            f"choose another folder, or --overwrite to start over{accept}"
        )


def _are_of(found: Sequence[str], part: str) -> bool:
    return all(text.startswith(part + ".") for text in found)


def differences(old: Any, new: Any, field: str = "") -> Iterator[str]:
    """One clause for each field in which two nested mappings differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{field}.{key}" if field else key)
    elif old is _ABSENT or new is _ABSENT or files.canonical_json(old) != files.canonical_json(new):
        yield f"{shown(field)} was {_shortened(old)} and is now {_shortened(new)}"


def _shortened(value: Any) -> str:
    text = "absent" if value is _ABSENT else files.canonical_json(value).decode("ascii")
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]}...{text[-half:]}"
