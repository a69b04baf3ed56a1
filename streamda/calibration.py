"""The calibration set: which rows of a data set are used, and how a row's columns become a sample.

Rows of unequal form are not guessed at: the columns decide once, or the options of `DataConfig` do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import re
import string
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from streamda.bad_rows import BadRowError, BadRows
from streamda.config import DataConfig
from streamda.errors import ConfigError, DataError
from streamda.json_rows import JsonLines, Row
from streamda.quoting import kind, one_line, quoted
from streamda.rows import Rows, open_rows
from streamda.samples import Sample, SampleEncoder, describe_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CalibrationSet", "Sample", "describe_sample", "load_calibration"]

SHIPPED_FILE = "calibration_set.jsonl"
SHIPPED_TEMPLATE = "{prompt}\n"
"""The shipped prompts end, and its completions start, without white space."""

COMPLETION_COLUMNS = ("completion", "answer", "output")
"""Where the completion is looked for if only the prompt is described."""


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationSet:
    """Tokenized samples in file order, and where they come from."""

    samples: tuple[Sample, ...]
    """Each has at least one token with loss."""
    population_size: int
    """Rows of the whole split."""
    num_skipped: int
    """Rows drawn that had no label token left."""
    num_truncated: int
    """How many of `samples` were cut to the maximal length."""
    source: str
    """Hub id, path, or the name of the shipped file."""
    is_shipped: bool
    """Whether this is the general set that comes with streamda."""
    row_numbers: tuple[int, ...] = ()
    """Of each sample the row that it was made of, from 0."""
    num_bad_lines: int = 0
    """Lines of the file, and rows drawn, that were malformed and skipped because the options allow it."""
    first_bad_line: str | None = None
    """What was wrong with the first of them."""

    @property
    def num_duplicates(self) -> int:
        """How many samples have the tokens and labels of an earlier one."""
        return len(self.samples) - len({_digest((sample,)) for sample in self.samples})

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should be told of the data."""
        found = []
        if self.first_bad_line is not None:
            found.append(f"bad lines skipped, as --skip-bad-lines allows: {self.num_bad_lines}, {self.first_bad_line}")
        if count := self.num_duplicates:
            found.append(f"{count} of {len(self.samples)} samples repeat an earlier one, and count as often")
        return tuple(found)

    def digest(self) -> str:
        """SHA-256 over token ids, labels and order: of what was tokenized, whatever file and tokenizer it came from."""
        return _digest(self.samples)


def _digest(samples: Iterable[Sample]) -> str:
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(struct.pack("<q", sample.num_tokens))
        for tensor in (sample.input_ids, sample.labels):
            sha.update(tensor.numpy().astype("<i8").tobytes())
    return sha.hexdigest()


def load_calibration(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int, max_positions: int | None
) -> CalibrationSet:
    r"""Reads, chooses and tokenizes the calibration samples.

    The form of the rows follows from the options, else from the columns, the first that fits: ``input_ids`` (with or
    without ``labels``), ``messages``, ``prompt`` and ``completion`` (texts, joined as they are, or lists of messages),
    ``question`` and ``answer`` (prompt ``{question}\n``), ``instruction``, ``input`` and ``output`` (prompt
    ``{instruction}\n{input}\n``, without a line for an empty or absent input), ``text``. ``prompt_column`` and
    ``completion_column`` join as they are, too; ``template`` lays out a prompt, where ``\n``, ``\t`` and ``\\`` typed
    in a shell are read as the characters they stand for. The shipped set uses ``{prompt}\n``.

    If there are more rows than ``num_samples``, rows are drawn by a seeded permutation, skipping those without label
    tokens, until there are enough; the drawn ones stay in file order.

    Up to ``skip_bad_lines`` malformed lines and drawn rows are left out and counted. All other rows give the samples
    that they give in a file without the bad ones. A tokenizer or template that does not fit is never skipped.

    Args:
        config: What to read and how.
        tokenizer: The model's; may be None for rows that are tokenized already.
        vocab_size: Rows of the model's embedding.
        max_positions: Longest sequence that the model knows, if it has a limit; bounds ``max_length``.

    Raises:
        DataError: The data is missing, malformed or empty, or does not belong to this model.
        ConfigError: Options that contradict each other, or a malformed template.
        StorageError: No space to convert the data.
    """
    max_tokens = config.max_length if max_positions is None else min(config.max_length, max_positions)
    source = f"streamda/{SHIPPED_FILE}" if config.dataset is None else config.dataset
    samples: dict[int, Sample] = {}
    num_skipped = num_truncated = 0
    bad = BadRows(config.skip_bad_lines)
    with _open_source(config, bad) as rows:
        encode = _choose_format(
            _with_shipped_layout(config), rows, SampleEncoder(tokenizer, vocab_size), one_line(source)
        )
        for index in _draw(len(rows), config.num_samples, config.seed):
            row = rows.read(index)
            try:
                whole = encode(row)
            except BadRowError as error:
                bad.skip(_placed(error, rows.locate(index)))
                continue
            except DataError as error:
                raise _placed(error, rows.locate(index)) from error.__cause__
            sample = whole.cut(max_tokens)
            if sample.num_label_tokens == 0:  # also what has a single token
                num_skipped += 1
                continue
            num_truncated += sample is not whole
            samples[index] = sample
            if len(samples) == config.num_samples:
                break
        population_size = len(rows)
    if not samples:
        raise DataError(
            f"{one_line(source)}: none of {population_size} rows has a token to learn within the first {max_tokens}; "
            "completions are empty, or prompts fill max_length"
        )
    return CalibrationSet(
        samples=tuple(samples[index] for index in sorted(samples)),
        population_size=population_size,
        num_skipped=num_skipped,
        num_truncated=num_truncated,
        source=source,
        is_shipped=config.dataset is None,
        row_numbers=tuple(sorted(samples)),
        num_bad_lines=bad.count,
        first_bad_line=bad.first,
    )


def _placed(error: DataError, place: str) -> DataError:
    return DataError(f"{place}: {error}")


@contextmanager
def _open_source(config: DataConfig, bad: BadRows) -> Iterator[Rows]:
    if config.dataset is not None:
        with open_rows(config.dataset, config.dataset_config, config.split, bad) as rows:
            yield rows
        return
    if config.split != "train" or config.dataset_config is not None:
        raise ConfigError("split and dataset_config are for a dataset; the shipped calibration set has neither")
    with importlib.resources.as_file(importlib.resources.files("streamda") / SHIPPED_FILE) as path:
        yield JsonLines(path, f"streamda/{SHIPPED_FILE}")


def _with_shipped_layout(config: DataConfig) -> DataConfig:
    options = (config.text_column, config.prompt_column, config.completion_column, config.template)
    if config.dataset is not None or any(option is not None for option in options):
        return config
    return dataclasses.replace(config, template=SHIPPED_TEMPLATE)


def _draw(num_rows: int, num_samples: int, seed: int) -> Iterable[int]:
    """Row numbers in the order in which they are tried."""
    if num_rows <= num_samples:
        return range(num_rows)
    order: list[int] = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def _choose_format(config: DataConfig, rows: Rows, encoder: SampleEncoder, source: str) -> Callable[[Row], Sample]:
    """The function that turns a row into a sample."""
    if len(rows) == 0:
        raise DataError(f"{source}: no rows")
    columns = rows.columns
    is_chosen = (config.template, config.prompt_column, config.completion_column) != (None, None, None)
    try:
        if config.text_column is None and not is_chosen and "input_ids" in columns:
            return lambda row: encoder.encode_tokens(row.get("input_ids"), row.get("labels"), row.get("attention_mask"))
        _ = encoder.tokenizer  # refused before the first row is read
        if config.text_column is not None:
            return _text_format(_known(config.text_column, columns), encoder)
        if is_chosen:
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
