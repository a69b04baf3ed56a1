"""Tokenized samples: what a text, a prompt with its completion, a conversation or a list of ids becomes.

The conventions, stated once. Labels are not shifted: ``labels[t] == input_ids[t]`` where the token is trained and
-100 elsewhere, as in transformers; the first token is predicted by nothing and never counts. Only completions carry
loss (of a plain text, everything), and the end-of-sequence token that closes them does too. Special tokens come once,
as the tokenizer adds them by itself, or from the chat template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from streamda.bad_rows import BadRowError
from streamda.errors import DataError
from streamda.quoting import kind, one_line, printable_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token without loss, as in PyTorch's cross-entropy."""

Message = dict[str, Any]

FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul')"
    " | replace('%B', 'July') | replace('%Y', '2024') }}{% endmacro %}"
)
"""Stands before a chat template and hides the clock from it; the date is the one that Llama's own template falls to."""

_ADVICE = "use a template that marks the answers by {% generation %}, or rows of prompt and completion"


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One tokenized sample."""

    input_ids: torch.Tensor
    """int64 [tokens]."""
    labels: torch.Tensor
    """int64 [tokens]: the token itself where it is trained, -100 elsewhere; not shifted."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self.input_ids.numel()

    @property
    def num_label_tokens(self) -> int:
        """Number of tokens that a loss is taken of; nothing predicts the first one."""
        return int((self.labels[1:] != IGNORED).sum())

    def cut(self, max_tokens: int) -> Sample:
        """The first `max_tokens` tokens."""
        return self if self.num_tokens <= max_tokens else Sample(self.input_ids[:max_tokens], self.labels[:max_tokens])


class SampleEncoder:
    """Makes samples, whatever the form of the data, for one tokenizer and one model.

    Every method raises DataError with a reason, without the place, which the caller knows. A sample may come out
    without any label: an empty text or completion is not closed by a trained end-of-sequence token, nor is one of
    nothing but the tokens that begin, end and fill up texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            DataError: There is none.
        """
        if self._tokenizer is None:
            raise DataError(
                "a tokenizer is needed for rows of text, and the model's folder has none: put its tokenizer files "
                "there, or give a --dataset of input_ids and labels"
            )
        return self._tokenizer

    def encode_text(self, text: str) -> Sample:
        """Plain text, loss on all of it."""
        before, body, after = self._split_special(text)
        return self._sample(before + body + after, None if self._is_empty(body) else 0)

    def encode_completion(self, prompt: str, completion: str) -> Sample:
        """A prompt directly followed by its completion, loss on the completion.

        The two are tokenized together, as natural text is. Where the end of the prompt and the start of the completion
        would melt into one token, they are tokenized apart, for the model is given the prompt's own tokens.
        """
        before, body, after = self._split_special(prompt + completion)
        head = self._tokens(prompt)
        if body[: len(head)] != head:
            body = head + self._continuation(completion)
        return self._sample(
            before + body + after, None if self._is_empty(body[len(head) :]) else len(before) + len(head)
        )

    def encode_chat(self, messages: object) -> Sample:
        """A conversation in the tokenizer's chat template, loss on the turns of the assistant."""
        turns = _checked_messages(messages, "messages")
        if re.search(r"\{%-?\s*generation\s*-?%\}", self._chat_template()):
            return self._encode_spans(*self._render_marked(turns))
        text = self._render(turns)
        spans = []
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                if index == 0:
                    raise BadRowError(
                        "the conversation starts with the assistant, where no prompt tells its turn apart"
                    )
                start = _length_of_prefix(self._render(turns[:index], add_generation_prompt=True), text)
                spans.append((start, _length_of_prefix(self._render(turns[: index + 1]), text)))
        return self._encode_spans(text, spans)

    def encode_chat_completion(self, prompt: object, completion: object) -> Sample:
        """A conversation in two lists of messages, loss on all of the second."""
        turns = _checked_messages(prompt, "prompt")
        text = self._render(turns + _checked_messages(completion, "completion"))
        start = _length_of_prefix(self._render(turns, add_generation_prompt=True), text)
        return self._encode_spans(text, [(start, len(text))])

    def encode_tokens(self, input_ids: object, labels: object, attention_mask: object) -> Sample:
        """Tokens made elsewhere; without labels loss on all of them. Padding that the mask marks is left out."""
        ids = _checked_integers(input_ids, "input_ids")
        marks = ids if labels is None else _checked_integers(labels, "labels", len(ids))
        mask = (
            [1] * len(ids) if attention_mask is None else _checked_integers(attention_mask, "attention_mask", len(ids))
        )
        if any(label not in (token, IGNORED) for token, label in zip(ids, marks, strict=True)):
            raise BadRowError("a label is neither -100 nor its own input id (streamda shifts labels itself)")
        real = [index for index, flag in enumerate(mask) if flag]
        if real and real != list(range(real[0], real[-1] + 1)):
            raise BadRowError("attention_mask has a gap; only padding before or after the tokens may be masked")
        return self._checked_sample([ids[index] for index in real], [marks[index] for index in real])

    def _is_empty(self, ids: list[int]) -> bool:
        """Whether tokens say nothing: there are none, or a text's own spelling of what stands around texts."""
        tokenizer = self.tokenizer
        return set(ids) <= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}

    def _tokens(self, text: str) -> list[int]:
        # verbose=False: the tokenizer would log that a text is long, which is what cutting is for
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _split_special(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Tokens of `text`, in three parts: special tokens added before it, its own, those added after it and EOS."""
        encoded = self.tokenizer(text, verbose=False, return_special_tokens_mask=True)
        ids, flags = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        own = [index for index, flag in enumerate(flags) if not flag]
        start, stop = (own[0], own[-1] + 1) if own else (len(ids), len(ids))
        before, body, after = ids[:start], ids[start:stop], ids[stop:]
        if before and body[:1] == before[-1:]:
            before = []  # the text, rendered by a template before, brings its BOS along
        eos = self.tokenizer.eos_token_id
        if eos is not None and (body + after)[-1:] != [eos]:
            after = [*after, int(eos)]
        return before, body, after

    def _continuation(self, text: str) -> list[int]:
        """Tokens of `text` where it continues another one.

        Some tokenizers put a space before any text. They put it before the line break here, which is taken off again.
        """
        anchor = self._tokens("\n")
        anchored = self._tokens("\n" + text)
        if anchored[: len(anchor)] == anchor:
            return anchored[len(anchor) :]
        return self._tokens(text)

    def _chat_template(self) -> str:
        try:
            template = self.tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError("the tokenizer has no chat template; give rows of prompt and completion") from error
        # templates that write the date would give other tokens tomorrow, when an interrupted run is continued
        return FIXED_DATE + template if "strftime_now" in template else template

    def _render(self, turns: list[Message], add_generation_prompt: bool = False) -> str:
        template = self._chat_template()
        with _as_data_error():
            text = self.tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        return str(text)

    def _render_marked(self, turns: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and the spans of characters that the template marks as the assistant's.

        The tokenizer's own mask of assistant tokens is made from these spans, but runs on to the end of the
        conversation where a turn ends in a space, for tokenizers that count no spaces into their offsets.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotation names the text alone
        template = self._chat_template()
        special_tokens = self.tokenizer.special_tokens_map
        with _as_data_error():
            texts, spans = render([turns], chat_template=template, return_assistant_tokens_mask=True, **special_tokens)
        return texts[0], spans[0]

    def _encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> Sample:
        """A rendered conversation, with loss on the tokens that start within one of the spans of characters."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
            ids, starts = list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
            is_trained = [any(first <= start < last for first, last in spans) for start in starts]
            return self._checked_sample(
                ids, [token if trained else IGNORED for token, trained in zip(ids, is_trained, strict=True)]
            )
        ids = self._tokens(text)
        labels = [IGNORED] * len(ids)
        for first, last in spans:  # no offsets: count the tokens of the text before each end
            start, stop = (self._num_tokens_before(text, ids, char) for char in (first, last))
            labels[start:stop] = ids[start:stop]
        return self._checked_sample(ids, labels)

    def _num_tokens_before(self, text: str, ids: list[int], char: int) -> int:
        prefix = self._tokens(text[:char])
        if ids[: len(prefix)] != prefix:
            raise DataError(f"a token reaches across the edge of a turn; {_ADVICE}")
        return len(prefix)

    def _sample(self, ids: list[int], first_trained: int | None) -> Sample:
        start = len(ids) if first_trained is None else first_trained
        return self._checked_sample(ids, [IGNORED] * start + ids[start:])

    def _checked_sample(self, ids: list[int], labels: list[int]) -> Sample:
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise DataError(
                    f"token id {one_line(str(token), 20)} is outside the model's vocabulary of {self._vocab_size}: "
                    "the tokenizer does not belong to this model"
                )
        return Sample(torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))


@contextmanager
def _as_data_error() -> Iterator[None]:
    # A template is a program that comes with the model and runs over data: any of these may be the data's fault.
    try:
        yield
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise BadRowError(f"the chat template refuses the conversation: {one_line(str(error))}") from error


def _length_of_prefix(prefix: str, text: str) -> int:
    if not text.startswith(prefix):
        raise DataError(f"the chat template writes earlier turns anew when a later one follows; {_ADVICE}")
    return len(prefix)


def _checked_messages(value: object, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{name} must be a list of messages, this is {kind(value) if value != [] else 'empty'}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRowError(f"{name} must hold objects with a role and a content")
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise BadRowError(f"the content of a message must be text, this is {kind(message['content'])}")
    # a table fills up absent keys with null, which templates take for present
    return [{key: entry for key, entry in message.items() if entry is not None} for message in value]


def _checked_integers(value: object, name: str, length: int | None = None) -> list[int]:
    if not isinstance(value, list):
        raise BadRowError(f"{name} must be a list of integers, this is {kind(value)}")
    for entry in value:
        if type(entry) is not int:  # a truth value is an int to isinstance
            raise BadRowError(f"{name} must hold integers, this is {kind(entry)}")
    if length is not None and len(value) != length:
        raise BadRowError(f"{name} has {len(value)} entries for {length} input_ids")
    return value


def describe_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A sample as text for a terminal, each stretch marked ``[loss]`` or ``[no loss]``.

    Without a tokenizer it shows the ids. Line breaks and tabs stay; every other character that is not printable,
    such as a terminal escape, is escaped.
    """
    ids, is_trained = sample.input_ids.tolist(), (sample.labels != IGNORED).tolist()
    parts = []
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or is_trained[stop] != is_trained[start]:
            stretch = ids[start:stop]
            text = " ".join(map(str, stretch)) if tokenizer is None else str(tokenizer.decode(stretch))
            parts.append(f"{'[loss]' if is_trained[start] else '[no loss]'} {printable_lines(text)}")
            start = stop
    return "\n".join(parts)
