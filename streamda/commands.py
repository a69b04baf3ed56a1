"""The command that a run was begun with, told again: by `inspect`, and where something is to be made once more."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamda.config import flag, option_fields

NOT_FOR_INIT = ("statistics",)
"""Options that ``init`` and ``plan`` do not take; a file of options for all commands may hold them."""
NOT_FOR_COLLECT = ("output_dir", "work_dir", "keep_statistics", "spill_statistics", "rates", "profile")
"""Options of ``init`` that ``collect`` does not take."""


def record(stage: str, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a run's settings keep of the command that is at work there; its end sets ``finished``.

    Args:
        stage: ``init`` or ``collect``.
        options: `RunConfig.given`.
        folder: of the run.
    """
    return {"stage": stage, "options": dict(options), "begun_in": here(), "name": folder.name, "finished": False}


def here() -> str | None:
    """The folder that relative paths are from; None where it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return None


def lacks_adapter(settings: Mapping[str, Any]) -> bool:
    """Whether a run is an `init` that has not put its adapter in place, so that its own command goes on with it."""
    return settings.get("stage") == "init" and not settings.get("finished", False)


def only_collects(settings: Mapping[str, Any]) -> bool:
    """Whether all that can be missing of a run is statistics: an adapter is there, or was never to be."""
    return settings.get("stage") == "collect" or bool(settings.get("finished", False))


def continuing(settings: Mapping[str, Any], folder: Path) -> str | None:
    """The command of a run, such that it continues the run in a folder; None where that was not recorded."""
    if "stage" not in settings:
        return None
    if settings["stage"] == "collect":
        return collecting(settings, folder)
    # an overwriting that was stopped is continued by its own command, one that is done would be begun again
    anew = () if settings.get("overwriting") is not None else ("overwrite",)
    # a folder that goes by another name now is not found without being told
    place = {} if folder.name == settings["name"] else {"work_dir": str(folder)}
    return _text("init", {**_options(settings), **place}, {"resume", *anew, *NOT_FOR_INIT})


def collecting(settings: Mapping[str, Any], folder: Path) -> str | None:
    """The command that collects what is missing among the statistics of a folder; None as for `continuing`."""
    if "stage" not in settings:
        return None
    options = {**_options(settings), "statistics": str(folder)}
    return _text("collect", options, {"resume", "overwrite", *NOT_FOR_COLLECT})


def completing(settings: Mapping[str, Any], folder: Path) -> str:
    """What makes what a run's folder lacks: the command, or where that was not recorded words for it."""
    if settings.get("keeps_statistics", True) and only_collects(settings):
        return collecting(settings, folder) or "the same `streamda collect` as before"
    return continuing(settings, folder) or "the same command as before"


def solving(statistics: str) -> str:
    """The command that solves from a folder of statistics, but for its settings."""
    return f"streamda solve --statistics {shlex.quote(statistics)} --output-dir DIR"


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the run, and what it cannot be continued without: another command may have left samples out."""
    return {**settings["options"], **({"skip_bad_samples": True} if settings.get("skipped_samples") else {})}


def _text(stage: str, options: Mapping[str, Any], left_out: set[str]) -> str:
    words, wanted = ["streamda", stage], options.keys() - left_out
    for _, entry in option_fields():  # in the order in which help shows them; another version may have had others
        if entry.name not in wanted:
            continue
        value, written = options[entry.name], flag(entry)
        if isinstance(value, bool):
            words.append(written if value else f"--no-{written[2:]}")
        else:
            text = repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
            words += [f"{written}={text}"] if text.startswith("-") else [written, text]
    return shlex.join(words)
