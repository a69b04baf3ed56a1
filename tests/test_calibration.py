"""Rows become exactly the tokens and labels that a reader of the row would write down by hand.

Not covered: a download from the hub (no network), tokenizers of particular model families.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from streamda.calibration import CalibrationSet, Sample, describe_sample, load_calibration
from streamda.config import DataConfig
from streamda.errors import ConfigError, DataError, StorageError, StreamdaError
from streamda.json_rows import JsonLines
from streamda.rows import open_rows
from streamda.samples import SampleEncoder

VOCAB_SIZE = 400

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}$\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}$\n{% endfor %}"
)
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]

fuzz = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def byte_tokenizer(
    merges: tuple[tuple[str, str], ...] = (), *, bos: bool = False, eos: str | None = "</s>", closes: bool = False
) -> PreTrainedTokenizerFast:
    """One token per byte, plus merges; `bos` and `closes` say what it adds around a text by itself."""
    vocab = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    single = ("<s> " if bos else "") + "$A" + (" </s>" if closes else "")
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)


BYTES = byte_tokenizer()
EOS = BYTES.eos_token_id


def with_template(template: str | None, tokenizer: PreTrainedTokenizerFast | None = None) -> PreTrainedTokenizerFast:
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return str(path)


def load(
    dataset: str | None, tokenizer: Any = BYTES, *, max_positions: int | None = None, **options: Any
) -> CalibrationSet:
    config = DataConfig(dataset=dataset, **options)
    return load_calibration(config, tokenizer, vocab_size=VOCAB_SIZE, max_positions=max_positions)


def attempt(*args: Any, **options: Any) -> CalibrationSet | DataError:
    try:
        return load(*args, **options)
    except DataError as error:
        return error


def parts(sample: Sample, tokenizer: Any = BYTES) -> tuple[str, str]:
    """The text of a sample, and the text of what is trained; checks that labels are ids, not shifted."""
    trained = sample.labels != -100
    assert sample.input_ids.dtype == sample.labels.dtype == torch.int64
    assert torch.equal(sample.labels[trained], sample.input_ids[trained])
    return tokenizer.decode(sample.input_ids), tokenizer.decode(sample.input_ids[trained])


# ------------------------------------------------------------------------------------------------ forms of rows


@pytest.mark.parametrize(
    ("row", "options", "text", "trained"),
    [
        ({"text": "ab c"}, {}, "ab c</s>", "ab c</s>"),
        ({"prompt": "Q: ", "completion": "A"}, {}, "Q: A</s>", "A</s>"),
        ({"prompt": "", "completion": "A"}, {}, "A</s>", "A</s>"),
        ({"prompt": "é", "completion": "ü\u2028"}, {}, "éü\u2028</s>", "ü\u2028</s>"),
        ({"question": "why?", "answer": "so", "text": "no"}, {}, "why?\nso</s>", "so</s>"),
        ({"instruction": "add", "input": "1 2", "output": "3"}, {}, "add\n1 2\n3</s>", "3</s>"),
        ({"instruction": "hi", "input": "", "output": "yo"}, {}, "hi\nyo</s>", "yo</s>"),
        ({"instruction": "hi", "input": None, "output": "yo"}, {}, "hi\nyo</s>", "yo</s>"),
        ({"instruction": "hi", "output": "yo"}, {}, "hi\nyo</s>", "yo</s>"),
        ({"body": "x", "text": "y"}, {"text_column": "body"}, "x</s>", "x</s>"),
        ({"q": "x", "r": "y"}, {"prompt_column": "q", "completion_column": "r"}, "xy</s>", "y</s>"),
        ({"q": "x", "output": "y"}, {"prompt_column": "q"}, "xy</s>", "y</s>"),
        ({"prompt": "x", "r": "y"}, {"completion_column": "r"}, "xy</s>", "y</s>"),
        ({"q": "x", "n": 3, "answer": "y"}, {"template": "{n}{{{q}}}\n"}, "3{x}\ny</s>", "y</s>"),
        ({"q": "{n}", "answer": "y"}, {"template": r"Q: {q}\n\\\tA: "}, "Q: {n}\n\\\tA: y</s>", "y</s>"),
        ({"q": "x", "r": "y"}, {"template": "", "completion_column": "r"}, "y</s>", "y</s>"),
        ({"text": "literal eos</s>"}, {}, "literal eos</s>", "literal eos</s>"),
    ],
)
def test_form_of_rows_decides_text_and_mask(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], text: str, trained: str
) -> None:
    sample = load(write(tmp_path, row), **options).samples[0]
    assert parts(sample) == (text, trained)


def test_labels_are_not_shifted_and_the_first_never_counts(tmp_path: Path) -> None:
    sample = load(write(tmp_path, {"text": "ab"})).samples[0]
    ids = [*BYTES("ab")["input_ids"], EOS]
    assert sample.input_ids.tolist() == sample.labels.tolist() == ids
    assert (sample.num_tokens, sample.num_label_tokens) == (3, 2)
    sample = load(write(tmp_path, {"prompt": "ab", "completion": "c"})).samples[0]
    assert sample.labels.tolist() == [-100, -100, *BYTES("c")["input_ids"], EOS]
    assert sample.num_label_tokens == 2


def test_tokenizer_without_eos_adds_none(tmp_path: Path) -> None:
    assert parts(load(write(tmp_path, {"text": "ab"}), byte_tokenizer(eos=None)).samples[0])[0] == "ab"


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("prompt", ["Q", "", "<s>Q"])
def test_special_tokens_come_once(tmp_path: Path, closes: bool, prompt: str) -> None:
    tokenizer = byte_tokenizer(bos=True, closes=closes)
    sample = load(write(tmp_path, {"prompt": prompt, "completion": "A"}), tokenizer).samples[0]
    assert parts(sample, tokenizer) == ("<s>" + prompt.removeprefix("<s>") + "A</s>", "A</s>")
    sample = load(write(tmp_path, {"text": prompt + "A"}), tokenizer).samples[0]
    assert parts(sample, tokenizer)[0] == "<s>" + prompt.removeprefix("<s>") + "A</s>"


def test_prompt_keeps_its_own_tokens_where_the_boundary_melts(tmp_path: Path) -> None:
    """With a token ":4" the prompt "q:" is no prefix of "q:42": the model would never be given the start of ":4"."""
    tokenizer = byte_tokenizer(merges=((":", "4"), ("4", "2")))
    sample = load(write(tmp_path, {"prompt": "q:", "completion": "42"}), tokenizer).samples[0]
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    assert tokens == ["q", ":", "42", "</s>"]
    assert (sample.labels != -100).tolist() == [False, False, True, True]


def test_completion_tokenized_apart_gains_no_space(tmp_path: Path) -> None:
    """Tokenizers of Llama's kind put a space before any text; joined to a prompt it would stand in the middle."""
    vocab = {char: number for number, char in enumerate(["<unk>", "</s>", "▁", "\n", *"Q:The", "▁T"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "T")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    sample = load(write(tmp_path, {"prompt": "Q: ", "completion": "The"}), tokenizer).samples[0]
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    assert tokens == ["▁", "Q", ":", "▁", "T", "h", "e", "</s>"]
    assert (sample.labels != -100).tolist() == [False] * 4 + [True] * 4


# ------------------------------------------------------------------------------------------------ conversations


def test_conversation_trains_the_assistant_only(tmp_path: Path) -> None:
    dataset = write(tmp_path, {"messages": TALK})
    tokenizer = with_template(CHATML, byte_tokenizer(bos=True, closes=True))
    text = "<system>be kind$\n<user>one$\n<assistant>two$\n<user>three$\n<assistant>four$\n"
    assert parts(load(dataset, tokenizer).samples[0], tokenizer) == (text, "two$\nfour$\n")
    tokenizer = with_template(MARKED)
    sample = load(dataset, tokenizer).samples[0]
    assert parts(sample, tokenizer) == (text, "twofour")
    oracle = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert sample.input_ids.tolist() == oracle["input_ids"]
    assert (sample.labels != -100).tolist() == [flag == 1 for flag in oracle["assistant_masks"]]


def test_turn_ending_in_a_space_does_not_train_what_follows(tmp_path: Path) -> None:
    tokenizer = with_template(MARKED)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    talk = [{"role": "assistant", "content": "two "}, {"role": "user", "content": "three"}]
    trained = parts(load(write(tmp_path, {"messages": talk}), tokenizer).samples[0], tokenizer)[1]
    assert trained.strip() == "two"


def test_token_across_the_edge_of_a_turn_belongs_to_the_prompt(tmp_path: Path) -> None:
    tokenizer = with_template(CHATML, byte_tokenizer(merges=((">", "t"),)))
    sample = load(write(tmp_path, {"messages": TALK[:3]}), tokenizer).samples[0]
    assert parts(sample, tokenizer)[1] == "wo$\n"


def test_prompt_and_completion_may_be_conversations(tmp_path: Path) -> None:
    tokenizer = with_template(CHATML)
    sample = load(write(tmp_path, {"prompt": TALK[:4], "completion": TALK[4:]}), tokenizer).samples[0]
    assert parts(sample, tokenizer)[1] == "four$\n"


def test_absent_keys_that_a_table_filled_with_null_stay_absent(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if 'name' in m %}{{ m['name'] }}{% endif %}{{ m['content'] }}{% endfor %}"
    talk = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": None}]
    tokenizer = with_template(template)
    assert parts(load(write(tmp_path, {"messages": talk}), tokenizer).samples[0], tokenizer) == ("qa", "a")


def test_template_that_writes_the_date_gives_the_same_tokens_tomorrow(tmp_path: Path) -> None:
    tokenizer = with_template(
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %Y-%m-%d') }}{% endif %}" + CHATML
    )
    text, _ = parts(load(write(tmp_path, {"messages": TALK}), tokenizer).samples[0], tokenizer)
    assert text.startswith("26 Jul 2024, 2024-07-26<system>")


class CharTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, which has no offsets; "ab" is one token."""

    def __init__(self) -> None:
        self._vocab = {chr(number): number for number in range(128)} | {"ab": 128}
        super().__init__()

    @property
    def vocab_size(self) -> int:
        return len(self._vocab)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._vocab)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [piece for word in text.split("ab") for piece in (*word, "ab")][:-1]

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocab[token]

    def _convert_id_to_token(self, index: int) -> str:
        return list(self._vocab)[index]


def test_tokenizer_without_offsets_finds_the_turns_by_their_prefixes(tmp_path: Path) -> None:
    tokenizer: Any = with_template(CHATML, CharTokenizer())
    sample = load(write(tmp_path, {"messages": TALK}), tokenizer).samples[0]
    trained = sample.labels[sample.labels != -100].tolist()
    assert "".join(map(chr, trained)) == "two$\nfour$\n"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"jsonl:1: a token reaches across the edge of a turn"):
        load(write(tmp_path, {"messages": talk}), tokenizer)


REWRITES = "{% for m in messages %}{% if loop.last %}<think>{% endif %}{{ m['content'] }}{% endfor %}"
RAISES = "{{ raise_exception('roles must\nalternate \x1b[31m') }}"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, TALK, "no chat template"),
        (REWRITES, TALK, "writes earlier turns anew"),
        (RAISES, TALK, r"refuses the conversation: roles must alternate \\x1b\[31m; --skip-bad-lines N"),
        (
            MARKED.replace("{{ m['content'] }}", "{{ m['content'].x.y }}"),
            TALK,
            "refuses the conversation: .*has no attribute",
        ),
        (CHATML, TALK[2:], "starts with the assistant"),
        (CHATML, [], "messages must be a list of messages, this is empty"),
        (CHATML, None, "messages must be a list of messages, this is null"),
        (CHATML, "hello", "messages must be a list of messages, this is text"),
        (CHATML, ["hello"], "objects with a role"),
        (CHATML, [{"content": "hello"}], "objects with a role"),
        (CHATML, [{"role": "user", "content": 3}], "content of a message must be text, this is a number"),
    ],
)
def test_bad_conversations(tmp_path: Path, template: str | None, messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"jsonl:1: .*" + message):
        load(write(tmp_path, {"messages": messages}), with_template(template))


def test_conversation_without_assistant_is_skipped(tmp_path: Path) -> None:
    chosen = load(write(tmp_path, {"messages": TALK[:2]}, {"messages": TALK}), with_template(CHATML))
    assert (len(chosen.samples), chosen.num_skipped) == (1, 1)


# ------------------------------------------------------------------------------------------------ tokenized rows


@pytest.mark.parametrize(
    ("row", "ids", "labels"),
    [
        ({"input_ids": [5, 6, 7]}, [5, 6, 7], [5, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": None}, [5, 6, 7], [5, 6, 7]),
        ({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, [5, 6, 7], [-100, -100, 7]),
        ({"input_ids": [0, 0, 5, 6], "labels": [-100, -100, 5, 6], "attention_mask": [0, 0, 1, 1]}, [5, 6], [5, 6]),
        ({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}, [5, 6], [5, 6]),
    ],
)
def test_tokenized_rows_need_no_tokenizer(
    tmp_path: Path, row: dict[str, Any], ids: list[int], labels: list[int]
) -> None:
    sample = load(write(tmp_path, row), None).samples[0]
    assert (sample.input_ids.tolist(), sample.labels.tolist()) == (ids, labels)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"input_ids": [5, VOCAB_SIZE]},
            "token id 400 .* vocabulary of 400: the tokenizer does not belong to this model",
        ),
        ({"input_ids": [5, -1]}, "token id -1 .* does not belong to this model"),
        ({"input_ids": [5, 10**40]}, r"token id 1{0,1}0+\.\.\. is outside"),
        ({"input_ids": [5, 6], "labels": [5]}, "labels has 1 entries for 2 input_ids"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, "a label is neither -100 nor its own input id"),
        ({"input_ids": [5, 6.0]}, "input_ids must hold integers, this is a number"),
        ({"input_ids": [5, True]}, "input_ids must hold integers, this is a truth value"),
        ({"input_ids": [5, [6]]}, "input_ids must hold integers, this is a list"),
        ({"input_ids": "56"}, "input_ids must be a list of integers, this is text"),
        ({"input_ids": [5, 6], "labels": {"a": 1}}, "labels must be a list of integers, this is an object"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "attention_mask has a gap"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 1]}, "attention_mask has 2 entries for 3 input_ids"),
        ({"labels": [5, 6, 7]}, "input_ids must be a list of integers, this is null"),
    ],
)
def test_bad_tokenized_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:2: " + message):
        load(write(tmp_path, {"input_ids": [1, 2]}, row), None)


def test_tokenizer_of_another_model_is_noticed(tmp_path: Path) -> None:
    config = DataConfig(dataset=write(tmp_path, {"text": "abc"}))
    with pytest.raises(DataError, match=r"jsonl:1: token id 257 .* vocabulary of 257: the tokenizer does not belong"):
        load_calibration(config, BYTES, vocab_size=EOS, max_positions=None)


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a tokenizer is needed for rows of text"):
        load(write(tmp_path, {"text": "abc"}), None)
    with pytest.raises(DataError, match="a tokenizer is needed"):
        _ = SampleEncoder(None, 10).tokenizer


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("row", "options", "error", "message"),
    [
        (
            {"a": "x", "b": "y"},
            {},
            DataError,
            "no known form of rows; the columns are 'a', 'b'. Name them by --prompt-column",
        ),
        ({"a\x1b[2J": "x"}, {}, DataError, r"the columns are 'a\\x1b\[2J'"),
        ({"a": "x"}, {"text_column": "b"}, DataError, "no column 'b'; the columns are 'a'"),
        ({"a": "x"}, {"prompt_column": "a"}, DataError, "which column is the completion"),
        ({"a": "x"}, {"completion_column": "a"}, DataError, "which column is the prompt"),
        ({"a": "x", "answer": "y"}, {"prompt_column": "c"}, DataError, "no column 'c'"),
        ({"a": "x", "answer": "y"}, {"template": "{c}"}, DataError, "no column 'c'"),
        ({"a": "x", "answer": "y"}, {"template": "{a"}, ConfigError, r"template '{a': expected '}'"),
        ({"a": "x", "answer": "y"}, {"template": "{a!r}"}, ConfigError, "only the names of columns"),
        ({"a": "x", "answer": "y"}, {"template": "{a.__class__}"}, DataError, "no column 'a.__class__'"),
        ({"a": "x", "answer": "y"}, {"template": "{}"}, DataError, "no column ''"),
        ({"a": "x"}, {"template": "{a}", "prompt_column": "a"}, ConfigError, "template and prompt_column both"),
        ({"text": 5}, {}, DataError, "jsonl:1: column 'text' holds a number, not text"),
        ({"text": None}, {}, DataError, "jsonl:1: column 'text' holds null, not text"),
        ({"a": ["x"], "answer": "y"}, {"template": "{a}"}, DataError, "jsonl:1: column 'a' holds a list"),
        ({"a": True, "answer": "y"}, {"template": "{a}"}, DataError, "jsonl:1: column 'a' holds a truth value"),
        ({"prompt": "x", "completion": [1]}, {}, DataError, "jsonl:1: column 'completion' holds a list"),
        ({"prompt": TALK, "completion": "x"}, {}, DataError, "jsonl:1: completion must be a list of messages"),
        ({"text": "x"}, {"split": "test"}, DataError, "no split 'test'; there is train"),
        ({"text": "x"}, {"dataset_config": "main"}, ConfigError, "dataset_config names a configuration on the hub"),
    ],
)
def test_bad_options_and_columns(
    tmp_path: Path, row: Any, options: dict[str, Any], error: type[StreamdaError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        load(write(tmp_path, row), with_template(CHATML), **options)
    assert str(caught.value).isprintable()


def test_row_that_lacks_the_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"jsonl:3: column 'text' is missing"):
        load(write(tmp_path, {"text": "a"}, b"\n", {"txt": "b"}))


# ------------------------------------------------------------------------------------------------ length and choice


def test_long_samples_are_cut_on_the_right_and_counted(tmp_path: Path) -> None:
    dataset = write(tmp_path, {"prompt": "ab", "completion": "cdef"}, {"prompt": "a", "completion": "b"})
    chosen = load(dataset, max_length=4)
    assert [parts(sample) for sample in chosen.samples] == [("abcd", "cd"), ("ab</s>", "b</s>")]
    assert (chosen.num_truncated, chosen.num_skipped, chosen.population_size) == (1, 0, 2)
    assert chosen.notices == ("1 of 2 samples are longer than 4 tokens, and cut",)
    assert load(dataset, max_positions=4).notices == chosen.notices
    assert load(dataset, max_positions=4).digest() == chosen.digest()
    assert load(dataset, max_length=4, max_positions=1000).digest() == chosen.digest()


def test_rows_without_label_token_are_skipped_and_counted(tmp_path: Path) -> None:
    dataset = write(
        tmp_path,
        {"prompt": "a", "completion": ""},  # no loss on the end of nothing
        {"prompt": "too long a prompt", "completion": "x"},
        {"prompt": "", "completion": ""},
        {"prompt": "p", "completion": "c"},
    )
    chosen = load(dataset, max_length=5)
    assert [parts(sample) for sample in chosen.samples] == [("pc</s>", "c</s>")]
    assert (chosen.num_skipped, chosen.num_truncated, chosen.population_size) == (3, 0, 4)
    assert [notice.endswith("passed over: 3") for notice in chosen.notices] == [True]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data.jsonl: no rows"),
        ([b"\n\r\n \n"], "data.jsonl: no rows"),
        ([{"text": ""}, {"text": ""}], "none of 2 rows has a token to learn within the first 8; completions are empty"),
        ([{"prompt": "123456789", "completion": "x"}], "none of 1 rows"),
    ],
)
def test_nothing_to_learn_from_is_an_error(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, *rows), max_length=8)


def test_one_token_is_no_sample(tmp_path: Path) -> None:
    dataset = write(tmp_path, {"input_ids": [3]}, {"input_ids": []}, {"input_ids": [3, 4], "labels": [3, -100]})
    with pytest.raises(DataError, match="none of 3 rows"):
        load(dataset, None)


@fuzz
@given(
    is_usable=st.lists(st.booleans(), min_size=1, max_size=40).filter(any),
    num_samples=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
)
def test_choice_is_seeded_ordered_and_as_large_as_the_data_allows(
    tmp_path: Path, is_usable: list[bool], num_samples: int, seed: int
) -> None:
    dataset = write(
        tmp_path, *({"input_ids": [number, 1] if good else [number]} for number, good in enumerate(is_usable))
    )
    chosen = load(dataset, None, num_samples=num_samples, seed=seed)
    rows = [int(sample.input_ids[0]) for sample in chosen.samples]
    assert rows == sorted(set(rows))
    assert all(is_usable[row] for row in rows)
    assert len(rows) == min(num_samples, sum(is_usable))
    assert chosen.num_skipped <= is_usable.count(False)
    assert chosen.population_size == len(is_usable)
    assert load(dataset, None, num_samples=num_samples, seed=seed).digest() == chosen.digest()
    if num_samples > 1:  # a smaller choice of the same seed is part of the larger one
        fewer = load(dataset, None, num_samples=num_samples - 1, seed=seed).samples
        if len(is_usable) > num_samples:
            assert {int(sample.input_ids[0]) for sample in fewer} <= set(rows)


def test_choice_depends_on_the_seed_and_reaches_every_row(tmp_path: Path) -> None:
    dataset = write(tmp_path, *({"input_ids": [number, 1]} for number in range(20)))
    drawn = [
        tuple(int(sample.input_ids[0]) for sample in load(dataset, None, num_samples=5, seed=seed).samples)
        for seed in range(40)
    ]
    assert len(set(drawn)) > 30
    assert {row for rows in drawn for row in rows} == set(range(20))


@fuzz
@given(
    prompts=st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=8),
    max_length=st.integers(2, 16),
)
def test_no_sample_is_ever_left_without_a_label(
    tmp_path: Path, prompts: list[tuple[str, str]], max_length: int
) -> None:
    dataset = write(tmp_path, *({"prompt": prompt, "completion": completion} for prompt, completion in prompts))
    # rows of one byte per token: prompt and completion in full, then the end
    sizes = [(len(prompt.encode()), len(completion.encode())) for prompt, completion in prompts]
    usable = [(p, c) for p, c in sizes if c > 0 and p < max_length]
    chosen = attempt(dataset, max_length=max_length)
    if isinstance(chosen, DataError):
        assert usable == []
        assert "has a token to learn" in str(chosen)
        return
    assert [sample.num_tokens for sample in chosen.samples] == [min(p + c + 1, max_length) for p, c in usable]
    expected = [min(p + c + 1, max_length) - max(p, 1) for p, c in usable]
    assert [sample.num_label_tokens for sample in chosen.samples] == expected
    assert all(count > 0 for count in expected)
    assert chosen.num_truncated == sum(p + c + 1 > max_length for p, c in usable)
    assert chosen.num_skipped == len(prompts) - len(usable)


# ------------------------------------------------------------------------------------------------ digest


@st.composite
def token_samples(draw: st.DrawFn) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    rows = draw(st.lists(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=3), max_size=3))
    return [(tuple(i for i, _ in row), tuple(i if keep else -100 for i, keep in row)) for row in rows]


@fuzz
@given(token_samples(), token_samples())
def test_digest_is_equal_exactly_for_equal_tokens_labels_and_order(first: Any, second: Any) -> None:
    def digest(rows: Any, source: str) -> str:
        samples = tuple(Sample(*(torch.tensor(part, dtype=torch.int64) for part in row)) for row in rows)
        return CalibrationSet(samples, 10, 0, 0, source, False, 1024).digest()

    assert (digest(first, "a") == digest(second, "b")) == (first == second)


# ------------------------------------------------------------------------------------------------ JSON lines


def test_jsonl_as_other_systems_write_it_is_accepted(tmp_path: Path) -> None:
    separators = json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False).encode()
    dataset = write(
        tmp_path, b'\xef\xbb\xbf{"text": "bom"}\r\n', b"\n", separators + b"\n", b'{"text": "end \\ud83d\\ude00"}'
    )
    texts = [parts(sample)[0].removesuffix("</s>") for sample in load(dataset).samples]
    assert texts == ["bom", "a\u2028b\u0085c", "end \U0001f600"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 0xff at byte 11\)"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"text": NaN}', "NaN is no JSON number"),
        (b'{"text": "a", "x": [-Infinity]}', "-Infinity is no JSON number"),
        (b'{"text": "a", "text": "b"}', "duplicate key 'text'"),
        (b'{"text": "a", "x": {"\x7f\\u001b": 1, "\x7f\\u001b": 1}}', r"duplicate key '\\x7f\\x1b'"),
        (b"null", "a row must be an object, this is null"),
        (b'["a"]', "a row must be an object, this is a list"),
        (b'"a"', "a row must be an object, this is text"),
        (b"1e99", "a row must be an object, this is a number"),
        (b'{"text": "a", "x": [{"y": -1e999}]}', "-1e999 is beyond any float"),
        (b'{"text": "a"} x', r"not JSON \(Extra data at column 15\)"),
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\x1b[31m"}', "not JSON .Invalid control character"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "a", "\\udc00": 1}', "half of a surrogate pair"),
        (b'\xef\xbb\xbf{"text": "a"}', "not JSON .Unexpected UTF-8 BOM"),
        (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_malformed_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    dataset = write(tmp_path, {"text": "good"}, line + b"\n", {"text": "good"})
    with pytest.raises(DataError, match=r"data\.jsonl:2: " + message) as caught:
        load(dataset, num_samples=1)  # every line is checked, drawn or not
    assert str(caught.value).isprintable()


def test_file_that_changes_between_check_and_reading_is_noticed(tmp_path: Path) -> None:
    path = Path(write(tmp_path, {"text": "a"}, {"text": "b"}))
    rows = JsonLines(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"jsonl:2: the file changed"):
        rows.read(1)
    path.unlink()
    with pytest.raises(DataError, match=r"data\.jsonl: cannot be read \(No such file"):
        rows.read(0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | json_values, "content": json_values}
    ),
    max_size=4,
)
columns = st.sampled_from(
    ["text", "messages", "prompt", "completion", "question", "answer", "input_ids", "labels", "input"]
)
objects = st.dictionaries(columns, json_values | messages | st.lists(st.integers(-2, 500)), max_size=4)
lines = st.one_of(
    st.binary(max_size=60),
    objects.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    objects.map(lambda row: json.dumps(row).encode()),
    st.tuples(objects, st.integers(0, 40), st.integers(0, 255)).map(
        lambda pick: (lambda raw: raw[: pick[1]] + bytes([pick[2]]) + raw[pick[1] + 1 :])(json.dumps(pick[0]).encode())
    ),
)


@settings(fuzz, max_examples=1000)
@given(st.lists(lines, max_size=4))
def test_whatever_the_lines_hold_only_a_data_error_comes_out(tmp_path: Path, content: list[bytes]) -> None:
    dataset = write(tmp_path, b"\n".join(content))
    for template in (CHATML, MARKED):
        chosen = attempt(dataset, with_template(template), max_length=20)
        if isinstance(chosen, DataError):
            assert str(chosen).isprintable()
        else:
            assert all(sample.num_label_tokens > 0 for sample in chosen.samples)


# ------------------------------------------------------------------------------------------------ other sources


def test_csv_stays_text(tmp_path: Path) -> None:
    """Guessed types would make 7 of "007", and nothing of "NA"."""
    path = tmp_path / "a[1]*.csv"
    path.write_bytes('\ufeffquestion,answer\r\n007?,NA\r\n"a, ""b""\nc",\r\n1.50,None\r\n'.encode())
    chosen = load(str(path))
    assert [parts(sample)[0] for sample in chosen.samples] == ["007?\nNA</s>", "1.50\nNone</s>"]
    assert (chosen.num_skipped, chosen.population_size) == (1, 3)


ROWS = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(5)]


def write_folder(path: Path) -> None:
    path.mkdir()
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (path / "test.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')


SOURCES: dict[str, Callable[[Path], Any]] = {
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.csv": lambda path: path.write_text("prompt,completion\n" + "".join(f"p{i},c{i}\n" for i in range(5))),
    "rows.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "folder": write_folder,
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "saved_splits": lambda path: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_samples_quietly_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    SOURCES[name](tmp_path / name)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    capfd.readouterr()
    expected = load(write(tmp_path, *ROWS), num_samples=3)
    before = sorted(tmp_path.rglob("*"))
    chosen = load(str(tmp_path / name), num_samples=3)
    assert (chosen.digest(), chosen.population_size) == (expected.digest(), 5)
    assert sorted(tmp_path.rglob("*")) == before
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    with pytest.raises(DataError, match=r"""(no split|Unknown split) ['"]dev['"].*train""") as caught:
        load(str(tmp_path / name), split="dev")
    assert str(caught.value).isprintable()
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "the file is empty"),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"text\n", "corresponds to no data"),
        ("a.csv", b"text,text\na,b\n", "two columns of one name"),
        ("a.csv", b'text\n"a', "EOF inside string"),
        ("a.csv", b"text\n\xff\n", "can't decode byte"),
        ("a.csv", b"text,n\na,b,c\n", "Length of header"),
        ("a.csv", b"text\na\nb,c\n", "Expected 1 fields in line 3, saw 2"),
        ("a.csv", b"question,answer\nonly\n", "none of 1 rows has a token to learn"),
        ("a.json", b'[{"text": "a"}, {"te', r"a\.json: "),
        ("a.json", b"[]", r"a\.json: "),
        ("a.parquet", b"PAR1 garbage", "magic bytes"),
        ("a.txt", b"text", r"unknown kind of file; known are \.jsonl"),
    ],
)
def test_unreadable_files_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(write(tmp_path, content, name=name))
    assert name in str(caught.value)
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "dataset", ["nowhere.jsonl", "./nowhere", "/no/where", "a/b/c", "", " ", "~nobody/x", "x" * 5000]
)
def test_missing_paths_are_named(dataset: str) -> None:
    with pytest.raises(DataError, match=r"no such file or folder|name too long|determine home"):
        load(dataset)


def test_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"[Nn]o \(supported\) data files|any data file"):
        load(str(tmp_path))


def test_hub_that_cannot_be_reached_is_one_line_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub") from OSError("timed \x1b out")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"some/data: .*check name, split and network.*: timed \\x1b out$"):
        load("some/data")


def test_full_disk_is_no_fault_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: object, **options: object) -> None:
        raise ValueError("could not convert") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", fill)
    with pytest.raises(StorageError, match=r"some/data: .*no space left"):
        load("some/data")


def test_hub_id_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(*args: object, **options: object) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", record)
    chosen = load("some/data", dataset_config="main", split="train[:5]")
    assert calls == [(("some/data", "main"), {"split": "train[:5]", "cache_dir": None})]
    assert (chosen.source, len(chosen.samples), chosen.is_shipped) == ("some/data", 5, False)


def test_rows_know_where_they_stand(tmp_path: Path) -> None:
    with open_rows(write(tmp_path, b"\n", {"a": 1, "b": 2}), None, "train") as rows:
        assert (len(rows), rows.columns, rows.read(0), rows.locate(0)[-7:]) == (
            1,
            ("a", "b"),
            {"a": 1, "b": 2},
            "jsonl:2",
        )


# ------------------------------------------------------------------------------------------------ the shipped set


def test_shipped_set_needs_no_options() -> None:
    chosen = load(None)
    assert (len(chosen.samples), chosen.population_size, chosen.num_skipped) == (256, 256, 0)
    assert chosen.is_shipped
    assert chosen.source == "streamda/calibration_set.jsonl"
    raw = Path(__file__).parents[1] / "streamda" / "calibration_set.jsonl"
    first = json.loads(raw.read_bytes().split(b"\n")[0])
    text = first["prompt"] + "\n" + first["completion"]
    assert parts(chosen.samples[0])[0] == (text + "</s>" if len(text.encode()) < 1024 else text)[:1024]
    with pytest.raises(ConfigError, match="shipped calibration set has neither"):
        load(None, split="test")
    assert parts(load(None, template="Q: {prompt} A: ", num_samples=1).samples[0])[0].startswith("Q: ")


# ------------------------------------------------------------------------------------------------ showing a sample


def test_described_sample_marks_what_is_trained_and_shows_escapes(tmp_path: Path) -> None:
    sample = load(write(tmp_path, {"prompt": "a\tb\n", "completion": "\x1b[31m\u202ec"})).samples[0]
    assert describe_sample(sample, BYTES) == "[no loss] a\tb\n\n[loss] \\x1b[31m\\u202ec</s>"
    sample = Sample(torch.tensor([7, 8, 9]), torch.tensor([-100, 8, -100]))
    assert describe_sample(sample, None) == "[no loss] 7\n[loss] 8\n[no loss] 9"
