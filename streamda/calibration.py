"""The calibration set: which rows of a data set are used, and what is to be told of them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from streamda.bad_rows import BadRowError, BadRows
from streamda.config import DataConfig
from streamda.errors import ConfigError, DataError
from streamda.json_rows import JsonLines
from streamda.quoting import one_line
from streamda.row_formats import are_described, are_tokenized, choose_format
from streamda.rows import Rows, open_rows
from streamda.samples import Sample, SampleEncoder, describe_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CalibrationSet", "Sample", "describe_sample", "load_calibration"]

SHIPPED_FILE = "calibration_set.jsonl"
SHIPPED_TEMPLATE = "{prompt}\n"
"""The shipped prompts end, and its completions start, without white space."""


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
    max_tokens: int
    """The most that a sample may have: of the options, or of the positions that the model knows."""
    row_numbers: tuple[int, ...] = ()
    """Of each sample the row that it was made of, from 0."""
    num_bad_lines: int = 0
    """Lines of the file, and rows drawn, that were malformed and skipped because the options allow it."""
    first_bad_line: str | None = None
    """What was wrong with the first of them."""
    is_assumed: bool = False
    """Whether there was no tokenizer, and all samples are as long as they may be: good for a plan, and no run."""

    @property
    def num_duplicates(self) -> int:
        """How many samples have the tokens and labels of an earlier one; of assumed ones none."""
        if self.is_assumed:
            return 0
        return len(self.samples) - len({_digest((sample,)) for sample in self.samples})

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should be told of the data."""
        found = []
        if self.first_bad_line is not None:
            found.append(f"bad lines skipped, as --skip-bad-lines allows: {self.num_bad_lines}, {self.first_bad_line}")
        if count := self.num_duplicates:
            found.append(f"{count} of {len(self.samples)} samples repeat an earlier one, and count as often")
        if self.num_truncated:
            found.append(
                f"{self.num_truncated} of {len(self.samples)} samples are longer than {self.max_tokens} tokens, and cut"
            )
        if self.num_skipped:
            found.append(
                "rows drawn with nothing to learn (no completion, or a prompt that fills max_length), passed over: "
                f"{self.num_skipped}"
            )
        if self.is_assumed:
            found.append(
                f"the model's folder has no tokenizer: assumed are {len(self.samples)} samples of "
                f"{self.samples[0].num_tokens} tokens, as many and as long as they may be, all of them labels"
            )
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
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    max_positions: int | None,
    may_assume: bool = False,
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
        may_assume: Whether lengths are all that is wanted: rows of text that nothing can tokenize then count as long as
            they may be.

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
        encode = choose_format(
            _with_shipped_layout(config), rows, SampleEncoder(tokenizer, vocab_size), one_line(source), may_assume
        )
        if tokenizer is None and not are_tokenized(config, rows.columns):
            return _longest(min(config.num_samples, len(rows)), max_tokens, len(rows), source, config)
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
        max_tokens=max_tokens,
        row_numbers=tuple(sorted(samples)),
        num_bad_lines=bad.count,
        first_bad_line=bad.first,
    )


def _longest(count: int, max_tokens: int, population_size: int, source: str, config: DataConfig) -> CalibrationSet:
    """Samples without a meaning, each as long as one may be and all of it to learn."""
    tokens = torch.zeros(1, dtype=torch.int64).expand(max_tokens)  # of whatever length, it is one number
    return CalibrationSet(
        samples=(Sample(tokens, tokens),) * count,
        population_size=population_size,
        num_skipped=0,
        num_truncated=0,
        source=source,
        is_shipped=config.dataset is None,
        max_tokens=max_tokens,
        row_numbers=tuple(range(count)),
        is_assumed=True,
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
    if config.dataset is not None or are_described(config):
        return config
    return dataclasses.replace(config, template=SHIPPED_TEMPLATE)


def _draw(num_rows: int, num_samples: int, seed: int) -> Iterable[int]:
    """Row numbers in the order in which they are tried."""
    if num_rows <= num_samples:
        return range(num_rows)
    order: list[int] = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
