"""Where a run reads and writes: settled, and refused where that cannot be, before anything is loaded."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from streamda.adapter import require_writable_output
from streamda.config import RunConfig
from streamda.errors import ConfigError, StorageError
from streamda.files import shown
from streamda.filesystem import clear_probes, require_safe
from streamda.output import resolved
from streamda.report import REPORT_FILE
from streamda.rundir import WORK_SUFFIX, RunDirectory, find_record


def output_dir(config: RunConfig) -> Path:
    """Where the adapter goes."""
    if config.output_dir is not None:
        return _with_name(config.output_dir)
    if config.model is None:
        raise ConfigError("no model is given; use --model with a hub id or a local folder")
    return Path(f"{_with_name(os.path.expanduser(config.model)).name}-lora-da")


def work_dir(config: RunConfig) -> Path:
    """Where the run keeps its state."""
    return Path(config.work_dir or f"{output_dir(config)}{WORK_SUFFIX}")


def _with_name(place: str) -> Path:
    """The path, spelled out where its text has no name to make others of, as ``.`` and ``..`` have none."""
    path = Path(place)
    return resolved(path) if path.name in ("", "..") else path


def require_places(config: RunConfig, work: Path, output: Path | None) -> None:
    """Refuses what a run could not use in the end. Nothing is changed where something else lies already.

    An output folder that may be this very run's finished one is left for later: that takes the run's fingerprint.

    Args:
        config: the run.
        work: folder of its state, or of its statistics.
        output: folder of the adapter; None if there will be none.

    Raises:
        ConfigError: two of the places are one or inside each other, or something else lies there.
        StorageError: a place cannot be written, or its file system is no basis for a run.
        LockedError: another run is using the folder.
        MismatchError: the folder is of another version of streamda.
        DamagedError: its record is damaged.
    """
    _require_apart(config, work, output)
    _require_run_folder(resolved(work), config.unsafe_filesystem)
    if output is not None and (config.overwrite or not os.path.isfile(output / REPORT_FILE)):
        require_writable_output(output, config.overwrite)


def _require_run_folder(work: Path, unsafe: bool) -> None:
    """Tries out the file system in the run's folder, or where that will be made, and looks whether it is in use."""
    is_run = os.path.lexists(work / "run.json")
    find_record(work)  # refuses what is neither empty nor ours, before anything is written there
    folder = work  # what is around a folder that exists may be another file system, and need not be ours to write
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    require_safe(folder, unsafe)
    if folder == work:  # where it was tried out before there was a run, and killed
        with suppress(StorageError):
            clear_probes(work.parent)
    if is_run:
        RunDirectory.open_existing(work, exclusive=False).close()


def _require_apart(config: RunConfig, work: Path, output: Path | None) -> None:
    """The model, the adapter and the run's state each have a folder of their own.

    Below the model's folder an adapter may lie: what is there is no part of the model.
    """
    inner_work = resolved(work)
    places = {"--work-dir or --statistics": (work, inner_work)}
    if output is not None:
        inner = resolved(output)
        places["--output-dir"] = (output, inner)
        if inner == inner_work or inner in inner_work.parents or inner_work in inner.parents:
            raise ConfigError(
                f"--output-dir {shown(output)} and the run's folder {shown(work)} must lie beside each other, "
                "not in one"
            )
    model = os.path.expanduser(config.model or "")
    if not os.path.isdir(model):
        return
    model_folder = Path(os.path.realpath(model))
    for name, (given, place) in places.items():
        if place == model_folder or (place == inner_work and model_folder in place.parents):
            raise ConfigError(f"{name} {shown(given)} lies in the model's folder; choose a place outside it")
