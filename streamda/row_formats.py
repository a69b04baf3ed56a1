"""How a row's columns become a sample.

Rows of unequal form are not guessed at: the columns decide once, or the options of `DataConfig` do.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from streamda.bad_rows import BadRowError
from streamda.config import DataConfig
from streamda.errors import ConfigError, DataError
from streamda.json_rows import Row
from streamda.quoting import kind, one_line, quoted
from streamda.rows import Rows
from streamda.samples import Sample, SampleEncoder

COMPLETION_COLUMNS = ("completion", "answer", "output")
"""Where the completion is looked for if only the prompt is described."""


def are_described(config: DataConfig) -> bool:
    """Whether options say which columns of text rows are made of."""
    options = (config.text_column, config.template, config.prompt_column, config.completion_column)
    return any(option is not None for option in options)


def are_tokenized(config: DataConfig, columns: Sequence[str]) -> bool:
    """Whether rows are token ids already; an option that names columns of text wins."""
    return "input_ids" in columns and not are_described(config)


def choose_format(
    config: DataConfig, rows: Rows, encoder: SampleEncoder, source: str, may_assume: bool
) -> Callable[[Row], Sample]:
    """The function that turns a row into a sample.

    Args:
        config: The options that may describe rows.
        rows: Where they come from; none is read.
        encoder: Makes samples.
        source: Name of the rows, for messages.
        may_assume: Accept text without a tokenizer; the function must not be called then.

    Raises:
        DataError: No rows, or none of a form that is known or described, or text without a tokenizer.
        ConfigError: Options that contradict each other, or a malformed template.
    """
    if len(rows) == 0:
        raise DataError(f"{source}: no rows")
    columns = rows.columns
    try:
        if are_tokenized(config, columns):
            return lambda row: encoder.encode_tokens(row.get("input_ids"), row.get("labels"), row.get("attention_mask"))
        if not may_assume:
            _ = encoder.tokenizer  # refused before the first row is read
        if config.text_column is not None:
            return _text_format(_known(config.text_column, columns), encoder)
        if are_described(config):
            return _chosen_format(config, columns, encoder)
        return _detected_format(columns, encoder)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def _detected_format(columns: Sequence[str], encoder: SampleEncoder) -> Callable[[Row], Sample]:
    has = set(columns).issuperset
    if has({"messages"}):
        return lambda row: encoder.encode_chat(row.get("messages"))
    if has({"prompt", "completion"}):
        return _pair_format("prompt", "completion", encoder)
    if has({"question", "answer"}):
        return _layout_format(_Template("{question}\n").fill, "answer", encoder)
    if has({"instruction", "output"}):
        return _layout_format(_instruction_prompt, "output", encoder)
    if has({"text"}):
        return _text_format("text", encoder)
    raise DataError(
        f"no known form of rows; {_listed(columns)}. Name them by --prompt-column and --completion-column, "
        "by --text-column, or by --template"
    )


def _chosen_format(config: DataConfig, columns: Sequence[str], encoder: SampleEncoder) -> Callable[[Row], Sample]:
    if config.template is not None and config.prompt_column is not None:
        raise ConfigError("template and prompt_column both describe the prompt; give one of them")
    found = config.completion_column or next((name for name in COMPLETION_COLUMNS if name in columns), None)
    if found is None:
        raise DataError(f"which column is the completion? {_listed(columns)}; give completion_column")
    completion = _known(found, columns)
    if config.template is None:
        if config.prompt_column is None and "prompt" not in columns:
            raise DataError(f"which column is the prompt? {_listed(columns)}; give prompt_column or template")
        return _pair_format(_known(config.prompt_column or "prompt", columns), completion, encoder)
    template = _Template(config.template)
    for name in template.columns:
        _known(name, columns)
    return _layout_format(template.fill, completion, encoder)


def _text_format(column: str, encoder: SampleEncoder) -> Callable[[Row], Sample]:
    return lambda row: encoder.encode_text(_text(row, column))


def _layout_format(prompt: Callable[[Row], str], column: str, encoder: SampleEncoder) -> Callable[[Row], Sample]:
    return lambda row: encoder.encode_completion(prompt(row), _text(row, column))


def _pair_format(prompt: str, completion: str, encoder: SampleEncoder) -> Callable[[Row], Sample]:
    def encode(row: Row) -> Sample:
        if isinstance(row.get(prompt), list):
            return encoder.encode_chat_completion(row[prompt], row.get(completion))
        return encoder.encode_completion(_text(row, prompt), _text(row, completion))

    return encode


def _instruction_prompt(row: Row) -> str:
    details = _text(row, "input") if row.get("input") is not None else ""
    return _text(row, "instruction") + "\n" + (details + "\n" if details else "")


class _Template:
    """A prompt with the names of columns in braces. Only names: an attribute or index would run code on data."""

    def __init__(self, template: str) -> None:
        escapes = {"n": "\n", "t": "\t", "\\": "\\"}
        text = re.sub(r"\\([nt\\])", lambda match: escapes[match[1]], template)
        try:
            self._pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"template {quoted(template)}: {error}; double a brace that stands for itself") from error
        self.columns = [name for _, name, _, _ in self._pieces if name is not None]
        if any(spec or conversion for _, _, spec, conversion in self._pieces):
            raise ConfigError(f"template {quoted(template)}: only the names of columns may stand in braces")

    def fill(self, row: Row) -> str:
        """The prompt of a row."""
        return "".join(text + ("" if name is None else _text(row, name, True)) for text, name, _, _ in self._pieces)


def _text(row: Row, column: str, accept_numbers: bool = False) -> str:
    value = row.get(column)
    if isinstance(value, str):
        return value
    if accept_numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    state = f"holds {kind(value)}, not text" if column in row else "is missing"
    raise BadRowError(f"column {quoted(column)} {state}")


def _known(name: str, columns: Sequence[str]) -> str:
    if name not in columns:
        raise DataError(f"no column {quoted(name)}; {_listed(columns)}")
    return name


def _listed(columns: Sequence[str]) -> str:
    return "the columns are " + one_line(", ".join(map(quoted, columns)))
