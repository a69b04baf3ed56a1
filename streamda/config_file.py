"""The ``--config`` file: a flat YAML mapping from option names to plain values, and nothing else of YAML.

A mistake in it is refused by the name of the option: two values for one, a nested value, a value that YAML cannot
read. Tags are refused rather than obeyed (they construct objects), and so are anchors (a few of them can stand for
billions of values).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from streamda.config import option_fields, unknown_option
from streamda.errors import ConfigError
from streamda.quoting import one_line, printable, quoted

_NUMBERS_AS_TEXT = ("max_gpu_mem", "max_host_mem", "max_disk", "micro_batch_tokens")
MAX_CONFIG_BYTES = 64 << 10
"""Fifty options need two thousand bytes."""


def read_config_file(path: Path) -> dict[str, Any]:
    """Option names and values of a file; whether they are legal is for `RunConfig.from_options` to say.

    Args:
        path: of a regular file, or of a pipe.

    Raises:
        ConfigError: the file cannot be read, is no flat mapping, or gives an option twice.
    """
    place = f"--config {printable(str(path))}"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{place} is larger than {MAX_CONFIG_BYTES >> 10} KiB; it is to hold options only")
        text = raw.decode("utf-8-sig")
        _require_plain(text, place)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error.strerror or one_line(str(error))}") from error
    except (ValueError, yaml.YAMLError) as error:  # bytes that are not UTF-8 among them
        raise ConfigError(f"{place} cannot be read: {one_line(str(error))}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{place} must hold options as `name: value` lines")
    kinds = {entry.name: str(entry.type) for _, entry in option_fields()}
    flags = {entry.metadata["flag"]: entry.name for _, entry in option_fields() if entry.metadata["flag"]}
    options: dict[str, Any] = {}
    for key, value in root.value:
        # without its dashes, as on the command line; a key that is a list names nothing
        written = key.value.removeprefix("--").replace("-", "_") if isinstance(key, yaml.ScalarNode) else str(key.tag)
        name = flags.get(written, written)
        if name not in (*kinds, "preset"):
            raise ConfigError(f"{place}: {unknown_option(name)} (line {_line(key.start_mark)})")
        if name in options:
            raise ConfigError(f"{place} gives {quoted(name)} twice, again in line {_line(key.start_mark)}")
        # YAML 1.1 reads 0755, 1_000 and 1:30 as numbers, which a revision or a name would not survive
        is_text = "str" in kinds.get(name, "") and name not in _NUMBERS_AS_TEXT
        options[name] = _plain_value(value, f"{place}: {quoted(name)}", is_text)
    return options


def _require_plain(text: str, place: str) -> None:
    """Refuses what a flat mapping never needs, before anything is built of it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = _line(event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(f"{place} has an anchor or alias in line {line}; write the value itself")
        if (tag := getattr(event, "tag", None)) is not None:
            raise ConfigError(f"{place} has the tag {quoted(tag)} in line {line}; write the value without it")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2:
            raise ConfigError(f"{place} is nested in line {line}; options are `name: value` lines")


def _line(mark: Any) -> int:
    return int(mark.line) + 1


def _plain_value(node: yaml.Node, place: str, is_text: bool) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain_value(entry, place, is_text) for entry in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{place} is a mapping; expected a plain value")
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (ValueError, LookupError, TypeError, OverflowError, yaml.YAMLError) as error:  # a 13th month, for one
        raise ConfigError(f"{place} is {quoted(node.value)}, which YAML cannot read: {one_line(str(error))}") from error
    if type(value) is int and ((is_text and str(value) != node.value) or _is_octal(node.value, value)):
        return node.value
    return value


def _is_octal(text: str, value: int) -> bool:
    """Whether YAML 1.1 has read a number as octal that nobody meant so: 010 is 8 there, and 007 is what it seems."""
    digits = text.replace("_", "").lstrip("+-")
    return digits.isdigit() and int(digits) != abs(value)
