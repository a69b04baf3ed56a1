"""The command that a run was begun with, told again: by `inspect`, and where something is to be made once more."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamda.config import flag, option_fields

NOT_FOR_COLLECT = ("output_dir", "work_dir", "keep_statistics", "spill_statistics", "rates", "profile")
"""Options of ``init`` that ``collect`` does not take."""


def record(stage: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's settings keep of its command.

    Args:
        stage: ``init`` or ``collect``.
        options: `RunConfig.given`.
    """
    return {"stage": stage, "options": dict(options)}


def begun_with(settings: Mapping[str, Any]) -> str | None:
    """The command of a run, or of the last process that continued it; None where that was not recorded."""
    if "stage" not in settings:
        return None
    return _text(settings["stage"], settings["options"])


def collecting(settings: Mapping[str, Any], folder: Path) -> str | None:
    """The command that collects what is missing among the statistics of a folder; None as for `begun_with`."""
    if "stage" not in settings:
        return None
    kept = {name: value for name, value in settings["options"].items() if name not in NOT_FOR_COLLECT}
    return _text("collect", kept | {"statistics": str(folder)})


def _text(stage: str, options: Mapping[str, Any]) -> str:
    flags = {entry.name: flag(entry) for _, entry in option_fields()}
    words = ["streamda", stage]
    for name in sorted(options, key=list(flags).index):  # in the order in which help shows them
        value, written = options[name], flags[name]
        if isinstance(value, bool):
            words.append(written if value else f"--no-{written[2:]}")
        else:
            text = repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
            words += [f"{written}={text}"] if text.startswith("-") else [written, text]
    return shlex.join(words)
