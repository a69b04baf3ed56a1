"""One run's folder: opened or continued with the plan it was begun with, its facts written down, its end tidied."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamda import files
from streamda.disk_plan import stride_text
from streamda.disk_space import START_RESERVE_BYTES, room_for_run
from streamda.errors import StorageError
from streamda.memory import format_size
from streamda.plan import Plan
from streamda.report import InitReport
from streamda.rundir import RunDirectory, canonical_digest
from streamda.setup import Prepared, versions

CONFIG_COPY = "model"
"""Folder inside a run with a copy of the model's config.json, all that `solve` needs of the model."""


@contextmanager
def open_run(
    work: Path, prepared: Prepared, parts: dict[str, dict[str, Any]], made: Plan, *, solves: bool
) -> Iterator[tuple[RunDirectory, Plan]]:
    """Opens or continues a run directory, with the plan that it was, or will be, run with.

    Args:
        work: the directory.
        prepared: the run.
        parts: what decides its statistics.
        made: the plan for what the directory's file system has free.
        solves: whether this run also solves.

    Raises:
        StorageError: the disk cannot hold a run that has not begun.
        StreamdaError: as `RunDirectory.open` does.
    """
    config = prepared.config
    keeps = config.keep_statistics or not solves
    facts = _run_facts(prepared, made) | {"keeps_statistics": keeps}
    begins = config.overwrite or not (work / "run.json").exists()
    if begins:
        _require_space(work, made)
    with RunDirectory.open(
        work, parts, settings=facts if begins else {}, resume=config.resume, restart=config.overwrite
    ) as run:
        # the bits of a run depend on its micro-batches, so a continued one keeps them under any budget; statistics
        # that were once to be kept are never freed behind their owner's back
        chosen, kept = run.settings["micro_batch_tokens"], bool(run.settings["keeps_statistics"])
        if chosen != made.micro_batch_tokens or kept > keeps:
            keeps = keeps or kept
            made = prepared.plan(
                solves=solves, keep_statistics=keeps, micro_batch_tokens=chosen, disk_room=room_for_run(work)
            )
        run.update_settings({"keeps_statistics": keeps})
        _copy_configuration(prepared.source.folder, run.path / CONFIG_COPY, config.trust_remote_code)
        yield run, made


def new_report(prepared: Prepared, made: Plan) -> InitReport:
    """A report with all that is known before the start."""
    calibration = prepared.calibration
    return InitReport(
        config=prepared.config.to_dict(),
        versions=versions(),
        model={
            "name": prepared.source.name,
            "revision": prepared.source.revision,
            "num_blocks": len(prepared.stack.blocks),
            "num_layers": len(prepared.targets.linears),
            "dtype": str(prepared.dtype).removeprefix("torch."),
        },
        data={
            "source": calibration.source,
            "is_shipped": calibration.is_shipped,
            "num_samples": len(calibration.samples),
            "num_tokens": sum(prepared.lengths),
            "num_rows": prepared.num_rows(made.micro_batch_tokens),
            "num_label_tokens": sum(sample.num_label_tokens for sample in calibration.samples),
            "num_truncated": calibration.num_truncated,
            "num_skipped": calibration.num_skipped,
            "population_size": prepared.population_size,
        },
        plan=made.to_dict(),
        budget_bytes=prepared.budget.device_bytes,
        notices=[*prepared.notices, *stride_notices(made)],
    )


def stride_notices(made: Plan) -> list[str]:
    """Says what a run costs that cannot keep all boundaries."""
    if made.boundary_stride == 1:
        return []
    return [
        f"disk is short: boundaries kept: {stride_text(made.boundary_stride)}, weights are read "
        f"{made.weight_passes:.1f} times"
    ]


def remove_leftover(work: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Removes what a run left that was killed between putting its adapter in place and cleaning up."""
    if (work / "run.json").is_file():
        with RunDirectory.open_existing(work, exclusive=True) as run:
            ours = canonical_digest(dict(run.parts)) == canonical_digest(parts)
            if ours and not run.settings["keeps_statistics"]:
                run.remove()


def _run_facts(prepared: Prepared, made: Plan) -> dict[str, Any]:
    """What a run remembers of itself, so that `solve` needs nothing else."""
    report = new_report(prepared, made)
    return {
        "micro_batch_tokens": made.micro_batch_tokens,
        "population_size": prepared.population_size,
        "adapted_blocks": [index for index, replays in enumerate(made.replays) if replays],
        "model": report.model,
        "data": report.data,
        "notices": list(prepared.notices),
    }


def _require_space(work: Path, made: Plan) -> None:
    """Refuses to begin what the disk cannot hold."""
    room = room_for_run(work)
    if room < made.disk_bytes:
        raise StorageError(
            f"the run needs {format_size(made.disk_bytes)} of disk, even if of the boundary states it keeps "
            f"{stride_text(made.boundary_stride)}, and a reserve of {format_size(START_RESERVE_BYTES)}; {work} has "
            f"{format_size(files.free_bytes(work))} free: give --work-dir on a larger disk, more --max-host-mem, or "
            "fewer or shorter samples"
        )


def _copy_configuration(source: Path, target: Path, with_code: bool) -> None:
    """Copies all that `solve` needs of the model; in a hub cache the sources are links into its store of blobs."""
    files.make_folders(target)
    for path in (source / "config.json", *(sorted(source.glob("*.py")) if with_code else ())):
        with files.storage_errors("copy to", target):
            content = path.read_bytes()
            copy = target / path.name
            if copy.is_file() and copy.read_bytes() == content:
                continue
            with contextlib.suppress(FileNotFoundError):
                copy.unlink()
        with files.FileWriter(copy) as stream:
            stream.write(content)
