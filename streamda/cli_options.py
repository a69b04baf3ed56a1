"""The options of a command, made from the dataclasses of `streamda.config`: name, default and help text exist once."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from streamda.config import PRESETS, CollectConfig, DataConfig, RunConfig, SolveConfig, flag, option_fields

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
TRACEBACKS = "Tracebacks with errors."


def command_options(
    skip: Collection[str] = (),
    *,
    hide: Collection[str] = (),
    texts: Mapping[str, str] = MappingProxyType({}),
    shows_sample: bool = True,
) -> list[inspect.Parameter]:
    """Parameters for Typer, one for each option of `RunConfig` and those of the command line itself.

    All default to None, which is "not given".

    Args:
        skip: names of options that the command does not take.
        hide: names of options that it takes, so that one set of them serves several commands, but has no use for: its
            help leaves them out.
        texts: help of options that mean something else to the command.
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
        # what is none of the choices is for the configuration to refuse, as it does a file's
        kind = str if choices else next((arg for arg in get_args(hint) if arg is not type(None)), hint)
        name = flag(entry)
        shown = entry.default if stage and entry.default is not None and kind is not bool else None
        text = texts.get(entry.name, entry.metadata["help"])
        names = [name]
        if kind is bool and entry.name not in _SWITCHES:
            names = [f"{name}/--no-{name[2:]}"]
            text += f"  [default: {'on' if entry.default else 'off'}]"
        elif shown is not None:
            text += f"  [default: {f'{shown:g}' if kind is float else shown}]"
        option = typer.Option(
            *names,
            help=text,
            metavar=_metavar(choices) if choices else None,
            show_default=False,
            rich_help_panel=_SECTIONS[stage],
            hidden=entry.name in hide,
        )
        parameters.append(_parameter(entry.name, kind, option))
    presets = typer.Option(
        "--preset",
        help="Settings of the method by name; options given beside it win.",
        metavar=_metavar(tuple(PRESETS)),
        show_default=False,
        rich_help_panel="Method",
        hidden="preset" in hide,
    )
    parameters.append(_parameter("preset", str, presets))
    config = typer.Option("--config", help="YAML file with options; the command line wins.", show_default=False)
    parameters.append(_parameter("config", Path, config))
    verbose = "Show one sample with its mask; tracebacks with errors." if shows_sample else TRACEBACKS
    for name, text in {"quiet": "No progress, and no notices before the report.", "verbose": verbose}.items():
        option = typer.Option(f"--{name}", help=text, show_default=False, hidden=name in hide)
        parameters.append(_parameter(name, bool, option))
    machine = typer.Option("--json", help="One JSON object on stdout instead of a table.", show_default=False)
    parameters.append(_parameter("as_json", bool, machine))
    return parameters


def _metavar(choices: Sequence[str]) -> str:
    return f"<{'|'.join(choices)}>"


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
