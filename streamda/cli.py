"""The command line: options become a `RunConfig`, a stage runs, its report is printed. Nothing else."""

from __future__ import annotations

import inspect
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from streamda import __version__, pipeline, stopping
from streamda.cli_options import TRACEBACKS, command_options
from streamda.commands import NOT_FOR_COLLECT, NOT_FOR_INIT, solving
from streamda.config import RunConfig, option_fields
from streamda.config_file import read_config_file
from streamda.errors import StoppedError, StorageError, StreamdaError
from streamda.inspection import inspect_folder
from streamda.limits import limit_errors
from streamda.plan_table import plan_table
from streamda.quoting import printable, printable_lines
from streamda.repair import repair_folder
from streamda.report import InitReport
from streamda.requirements import require_platform
from streamda.verification import verify_folder

app = typer.Typer(
    name="streamda",
    help="Data-aware LoRA initialization (LoRA-DA) for models far larger than the GPU at hand.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long names in a narrow terminal, and take [default: 8] for markup
    context_settings={"help_option_names": ["-h", "--help"]},
)

_METHOD = tuple(entry.name for stage, entry in option_fields() if stage == "solve")
_FOR_SOLVE = {*_METHOD, "output_dir", "statistics", "max_gpu_mem", "device", "profile", "skip_bad_layers", "seed"}
_FOR_SOLVE |= {"unsafe_filesystem", "overwrite", "trust_remote_code"}
_NOT_FOR_PLAN = {*_METHOD, "preset", "skip_bad_layers", "overwrite", "resume", "allow_environment_change", "quiet"}
_NOT_FOR_PLAN -= {"rank"}
_NOT_FOR_SOLVE = {entry.name for _, entry in option_fields()} - _FOR_SOLVE
_SOLVE_TEXTS = {
    "output_dir": "Where the adapter goes. Required.",
    "statistics": "Folder of collected statistics. Required.",
    "max_gpu_mem": "Memory budget of the device, for example 24GB or 22GiB. Default: what it has.",
}
_COLLECT_TEXTS = {"statistics": "Where the statistics go. Required."}


class _SectionedCommand(TyperCommand):
    """A command whose help lists its options in sections."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes them; overrides Typer's, which knows of sections in tables only."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or "Other", []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _with_options(parameters: list[inspect.Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a function that takes ``**options`` the signature that Typer reads."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
        return function

    return decorate


def _run_config(options: dict[str, Any]) -> RunConfig:
    """The configuration file, if any, under what the command line gives."""
    path: Path | None = options.pop("config", None)
    given = {name: value for name, value in options.items() if value is not None}
    return RunConfig.from_options((read_config_file(path) if path is not None else {}) | given)


def _take_flags(options: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Removes and returns quiet, verbose and json."""
    return bool(options.pop("quiet")), bool(options.pop("verbose")), bool(options.pop("as_json"))


def _print_report(report: InitReport, as_json: bool) -> None:
    if as_json:
        _show(report.to_json())
        return
    _show(report.to_table())
    if report.already_done and report.output_dir:
        _show("\nalready done: the adapter is there, checked again and left as it is; --overwrite makes it anew")
    elif report.output_dir:
        _show(f"\ntrain from it: PeftModel.from_pretrained(base, {report.output_dir!r}, is_trainable=True)")
    elif report.statistics_dir:
        if report.already_done:
            _show("\nalready done: the statistics are there, and left as they are; --overwrite makes them anew")
        rank = report.config["solve"]["rank"]
        _show(f"\nsolve from them, as often as wanted: {solving(report.statistics_dir)} --rank {rank}")


@app.command("init", cls=_SectionedCommand)
@_with_options(command_options(skip=NOT_FOR_INIT))
def init_command(**options: Any) -> None:
    """Compute the starting point of a LoRA adapter. Plans, collects, solves and writes."""
    quiet, verbose, as_json = _take_flags(options)
    _print_report(pipeline.initialize(_run_config(options), quiet=quiet, verbose=verbose), as_json)


@app.command("plan", cls=_SectionedCommand)
@_with_options(command_options(skip=(*NOT_FOR_INIT, "profile"), hide=_NOT_FOR_PLAN, shows_sample=False))
def plan_command(**options: Any) -> None:
    """Show what `init` would do and need. Reads the model's configuration and the samples, and no weights."""
    _, _, as_json = _take_flags(options)
    plan, facts = pipeline.plan(_run_config(options))
    if as_json:
        _show(json.dumps({"plan": plan.to_dict()} | facts, indent=2, sort_keys=True))
    else:
        _show(plan_table(plan.to_dict(), facts))


@app.command("collect", cls=_SectionedCommand)
@_with_options(
    command_options(
        skip=NOT_FOR_COLLECT,
        hide={*_METHOD, "preset"} - {"population_size"},  # which statistics remember for `solve`
        texts=_COLLECT_TEXTS,
    )
)
def collect_command(**options: Any) -> None:
    """Collect statistics of all layers, for `solve`."""
    quiet, verbose, as_json = _take_flags(options)
    _print_report(pipeline.collect(_run_config(options), quiet=quiet, verbose=verbose), as_json)


@app.command("solve", cls=_SectionedCommand)
@_with_options(command_options(skip=_NOT_FOR_SOLVE, texts=_SOLVE_TEXTS, shows_sample=False))
def solve_command(**options: Any) -> None:
    """Solve an adapter from collected statistics, as often as wanted."""
    quiet, _, as_json = _take_flags(options)
    _print_report(pipeline.solve(_run_config(options), quiet=quiet), as_json)


@app.command("inspect")
def inspect_command(
    folder: Annotated[Path, typer.Argument(help="Statistics, a work directory, or an adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help=TRACEBACKS)] = False,
) -> None:
    """Show what is in a folder that streamda wrote."""
    facts, text = inspect_folder(folder)
    _show(json.dumps(facts, indent=2, sort_keys=True) if as_json else text)


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="Statistics, a work directory, or an adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help=TRACEBACKS)] = False,
) -> None:
    """Check every byte of what streamda wrote. Changes nothing; exit code 10 where anything is damaged."""
    found = verify_folder(folder)
    _show(json.dumps(found.to_dict(), indent=2, sort_keys=True) if as_json else found.to_table())
    found.require_sound()


@app.command("repair")
def repair_command(
    folder: Annotated[Path, typer.Argument(help="Statistics, or a work directory.")],
    drop: Annotated[list[str], typer.Option("--drop", help="A unit, as `verify` names it; may be given again.")],
    unsafe_filesystem: Annotated[
        bool, typer.Option("--unsafe-filesystem", help="Go on with a file system that cannot lock or sync.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help=TRACEBACKS)] = False,
) -> None:
    """Drop damaged parts of a run, and say what makes them again."""
    done = repair_folder(folder, drop, unsafe_filesystem)
    _show(json.dumps(done.to_dict(), indent=2, sort_keys=True) if as_json else done.to_text())


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        _show(f"streamda {__version__}")
        raise typer.Exit


def _show(text: str) -> None:
    """Prints to stdout. That nobody reads it any more is no error: the work itself is done or safe on disk.

    Raises:
        StorageError: stdout is a file, and cannot be written.
    """
    try:
        typer.echo(printable_lines(text))
    except BrokenPipeError:
        pass
    except OSError as error:
        raise StorageError(f"what was asked for is done, but stdout cannot be written: {error.strerror}") from error


def _open_standard_streams() -> None:
    """Leads closed standard streams nowhere, or the next file opened would take their numbers, and get their output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115 - for good
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a terminal may know ASCII only


def _leave(code: int | str | None) -> NoReturn:
    """Exits. What a broken stream still holds is thrown away, or the interpreter would fail at its last flush."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    sys.exit(code)


def main() -> NoReturn:
    """Entry point: runs a command and turns errors into one line and an exit code."""
    code: int | str | None = 0
    failure: Exception | None = None
    try:
        _open_standard_streams()
        stopping.install()
        try:
            require_platform()
            with limit_errors():
                app()
        except SystemExit as done:  # Typer's own: 0, or 2 for wrong usage
            code = done.code
        except Exception as error:  # whatever it is ends in one line and an exit code
            failure = stopping.cause_of(error)
        stopping.hold()
    except StoppedError as error:  # between the lines above; it is raised once at most
        stopping.hold()
        failure = error
    if isinstance(failure, StreamdaError):
        code = _report_error(failure, "--verbose" in sys.argv)
    elif failure is not None:
        raise failure
    _leave(code)


def _report_error(error: StreamdaError, verbose: bool) -> int:
    if verbose:
        with suppress(OSError):
            traceback.print_exception(error)
    with suppress(OSError):  # the exit code says it too
        print(f"streamda: error: {printable(str(error))}", file=sys.stderr)
    return error.exit_code
