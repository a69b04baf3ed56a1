"""The command line: options become a `RunConfig`, a stage runs, its report is printed. Nothing else.

Each command's signature is made from the dataclasses of `streamda.config`, so an option, its default and its help text
exist once.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from streamda import __version__, pipeline, stopping
from streamda.config import (
    PRESETS,
    CollectConfig,
    DataConfig,
    RunConfig,
    SolveConfig,
    option_fields,
)
from streamda.config_file import read_config_file
from streamda.errors import StoppedError, StorageError, StreamdaError
from streamda.inspection import inspect_folder
from streamda.limits import limit_errors
from streamda.quoting import printable, printable_lines
from streamda.repair import repair_folder
from streamda.report import InitReport, plan_table
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

_SECTIONS = {"": "Run", "data": "Data", "collect": "Statistics", "solve": "Method"}
_SWITCHES = (
    "trust_remote_code",
    "keep_statistics",
    "spill_statistics",
    "skip_bad_samples",
    "skip_bad_layers",
    "profile",
    "overwrite",
    "allow_environment_change",
    "unsafe_filesystem",
)
"""Options that are only ever turned on."""
_TRACEBACKS = "Tracebacks with errors."
_METHOD = tuple(entry.name for stage, entry in option_fields() if stage == "solve")
_FOR_SOLVE = {*_METHOD, "output_dir", "statistics", "max_gpu_mem", "device", "profile", "skip_bad_layers", "seed"}
_FOR_SOLVE |= {"unsafe_filesystem", "overwrite", "trust_remote_code"}
_NOT_FOR_PLAN = {*_METHOD, "preset", "skip_bad_layers", "overwrite", "resume", "allow_environment_change", "quiet"}
_NOT_FOR_PLAN -= {"rank"}
_NOT_FOR_SOLVE = {entry.name for _, entry in option_fields()} - _FOR_SOLVE


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


def _options(
    skip: Collection[str] = (), *, hide: Collection[str] = (), shows_sample: bool = True
) -> list[inspect.Parameter]:
    """Parameters for Typer, one for each option of `RunConfig` and those of the command line itself.

    All default to None, which is "not given".

    Args:
        skip: names of options that the command does not take.
        hide: names of options that it takes, so that one set of them serves several commands, but has no use for: its
            help leaves them out.
        shows_sample: whether it shows one of its samples if asked to.
    """
    kinds = {"": RunConfig, "data": DataConfig, "collect": CollectConfig, "solve": SolveConfig}
    hints = {stage: get_type_hints(kind) for stage, kind in kinds.items()}
    parameters = []
    for stage, entry in option_fields():
        if entry.name in skip:
            continue
        hint = hints[stage][entry.name]
        choices = get_args(hint) if "Literal" in str(hint) else ()
        kind = hint if choices else next((arg for arg in get_args(hint) if arg is not type(None)), hint)
        name = "--" + (entry.metadata["flag"] or entry.name).replace("_", "-")
        shown = entry.default if stage and entry.default is not None and kind is not bool else None
        text = entry.metadata["help"]
        names = [name]
        if kind is bool and entry.name not in _SWITCHES:
            names = [f"{name}/--no-{name[2:]}"]
            text += f"  [default: {'on' if entry.default else 'off'}]"
        elif shown is not None:
            text += f"  [default: {f'{shown:g}' if kind is float else shown}]"
        option = typer.Option(
            *names,
            help=text,
            show_default=False,
            rich_help_panel=_SECTIONS[stage],
            hidden=entry.name in hide,
        )
        parameters.append(_parameter(entry.name, kind, option))
    presets = typer.Option(
        "--preset",
        help="Settings of the method by name; options given beside it win.",
        show_default=False,
        rich_help_panel="Method",
        hidden="preset" in hide,
    )
    parameters.append(_parameter("preset", Literal.__getitem__(tuple(PRESETS)), presets))
    config = typer.Option("--config", help="YAML file with options; the command line wins.", show_default=False)
    parameters.append(_parameter("config", Path, config))
    verbose = "Show one sample with its mask; tracebacks with errors." if shows_sample else _TRACEBACKS
    for name, text in {"quiet": "No progress, and no notices before the report.", "verbose": verbose}.items():
        option = typer.Option(f"--{name}", help=text, show_default=False, hidden=name in hide)
        parameters.append(_parameter(name, bool, option))
    machine = typer.Option("--json", help="One JSON object on stdout instead of a table.", show_default=False)
    parameters.append(_parameter("as_json", bool, machine))
    return parameters


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


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
    if report.already_done:
        _show("\nalready done: the adapter is there, checked again and left as it is; --overwrite makes it anew")
    elif report.output_dir:
        _show(f"\ntrain from it: PeftModel.from_pretrained(base, {report.output_dir!r}, is_trainable=True)")
    elif report.statistics_dir:
        given = shlex.quote(report.statistics_dir)
        _show(f"\nsolve from them, as often as wanted: streamda solve --statistics {given} --output-dir DIR --rank 8")


@app.command("init", cls=_SectionedCommand)
@_with_options(_options(skip=("statistics",)))
def init_command(**options: Any) -> None:
    """Compute the starting point of a LoRA adapter. Plans, collects, solves and writes."""
    quiet, verbose, as_json = _take_flags(options)
    _print_report(pipeline.initialize(_run_config(options), quiet=quiet, verbose=verbose), as_json)


@app.command("plan", cls=_SectionedCommand)
@_with_options(_options(skip=("statistics", "profile"), hide=_NOT_FOR_PLAN, shows_sample=False))
def plan_command(**options: Any) -> None:
    """Show what `init` would do and need. Reads the model's configuration alone."""
    _, _, as_json = _take_flags(options)
    plan, facts = pipeline.plan(_run_config(options))
    if as_json:
        _show(json.dumps({"plan": plan.to_dict()} | facts, indent=2, sort_keys=True))
    else:
        _show(plan_table(plan.to_dict(), facts))


@app.command("collect", cls=_SectionedCommand)
@_with_options(
    _options(
        skip=("output_dir", "work_dir", "keep_statistics", "spill_statistics", "rates", "profile"),
        hide={*_METHOD, "preset"} - {"population_size"},  # which statistics remember for `solve`
    )
)
def collect_command(**options: Any) -> None:
    """Collect statistics of all layers, for `solve`."""
    quiet, verbose, as_json = _take_flags(options)
    _print_report(pipeline.collect(_run_config(options), quiet=quiet, verbose=verbose), as_json)


@app.command("solve", cls=_SectionedCommand)
@_with_options(_options(skip=_NOT_FOR_SOLVE, shows_sample=False))
def solve_command(**options: Any) -> None:
    """Solve an adapter from collected statistics, as often as wanted."""
    quiet, _, as_json = _take_flags(options)
    _print_report(pipeline.solve(_run_config(options), quiet=quiet), as_json)


@app.command("inspect")
def inspect_command(
    folder: Annotated[Path, typer.Argument(help="Statistics, a work directory, or an adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help=_TRACEBACKS)] = False,
) -> None:
    """Show what is in a folder that streamda wrote."""
    facts, text = inspect_folder(folder)
    _show(json.dumps(facts, indent=2, sort_keys=True) if as_json else text)


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="Statistics, a work directory, or an adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help=_TRACEBACKS)] = False,
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
    verbose: Annotated[bool, typer.Option("--verbose", help=_TRACEBACKS)] = False,
) -> None:
    """Drop damaged parts of a run. The same command as before then makes them again."""
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
