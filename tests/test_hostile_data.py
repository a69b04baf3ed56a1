"""Calibration data that is broken, mistaken or hostile: one line with the place, exit code 4, and nothing else.

Not covered: folders and data sets of the hub with broken files in them, which `datasets` reads by itself.
"""

from __future__ import annotations

import gc
import json
import random
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import streamda
from streamda import json_rows
from streamda.bad_rows import BadRows
from streamda.errors import DataError, MismatchError
from streamda.json_rows import MAX_ROW_BYTES, JsonDocument, JsonLines
from tests.command_line import flags, run, within
from tests.golden_options import golden_options
from tests.test_calibration import BYTES, CHATML, EOS, VOCAB_SIZE, attempt, load, parts, with_template, write

# pandas leaves a table that it cannot read open: it is closed, and warned of, when memory is tidied up
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def files_left_open() -> Iterator[None]:
    """Tidies up at the end of the test that left them, and not in whichever comes later."""
    yield
    gc.collect()


GOOD = b'{"text": "good"}\n'
TERMINAL = "\x1b[2J\x1b]8;;http:x\x07\r\u202e\u2028\x9b"
"""Clears the screen, opens a link, returns the carriage, turns the writing direction, breaks a line."""


def refused(dataset: str, **options: Any) -> str:
    """What is said of a data set that must be refused."""
    with pytest.raises(DataError) as caught:
        load(dataset, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


# ------------------------------------------------------------------------------------------------ lines


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        ('{"text": "a"}\n'.encode("utf-16"), "1", "not UTF-8 (byte 0xff at byte 1)"),
        ('{"text": "a"}\n'.encode("utf-16-le"), "1", "not JSON"),
        (b'{"text": "a"}\r{"text": "b"}\r', "1", "not JSON (Extra data"),
        (b"<!DOCTYPE html>\n<html></html>\n", "1", "not JSON (Expecting value at column 1)"),
        (
            b'{"text": "a"\r\n{"text": "b"}\n',
            "1",
            "not JSON (Expecting ',' delimiter at column 13); --skip-bad-lines N",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "1", "not JSON"),
        (GOOD + b'{"text": "a\x00"}\n', "2", "Invalid control character"),
        (GOOD + b'{"text": "a", "x": 1e999}\n', "2", "1e999 is beyond any float"),
        (GOOD + b'{"text": "a", "x": -' + b"9" * 400 + b".0}\n", "2", "is beyond any float"),
        (GOOD * 3 + b'{"text": "cut of', "4", "not JSON (Unterminated string"),
        (b"\n\n\xef\xbb\xbf" + GOOD, "3", "Unexpected UTF-8 BOM"),
        (GOOD + b'{"text": "' + b"a" * MAX_ROW_BYTES + b'"}\n', "2", "longer than 8 MiB"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, content: bytes, place: str, reason: str) -> None:
    message = refused(write(tmp_path, content))
    assert f"data.jsonl:{place}: " in message
    assert reason in message


def test_a_line_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    wrapping = len(b'{"input_ids": [1, 2]}')
    line = b'{"input_ids": [1, 2]' + b" " * (MAX_ROW_BYTES - wrapping) + b"}"
    assert len(line) == MAX_ROW_BYTES
    path = Path(write(tmp_path, line + b"\n", GOOD, line))  # with its end and without
    rows = JsonLines(path)
    assert len(rows) == 3
    assert rows.read(0) == rows.read(2) == {"input_ids": [1, 2]}


def test_a_line_longer_than_memory_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(GOOD)
        file.seek(1 << 27)  # a hole: zeros that take no disk
        file.write(b"\n" + GOOD)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"data\.jsonl:2: longer than 8 MiB"):
            JsonLines(path)
        bad = BadRows(1)
        assert len(JsonLines(path, bad=bad)) == 2
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_ROW_BYTES
    finally:
        tracemalloc.stop()
    assert [JsonLines(path, bad=BadRows(1)).locate(index)[-7:] for index in (0, 1)] == ["jsonl:1", "jsonl:3"]


# ------------------------------------------------------------------------------------------------ skipping


BAD_LINES = [b"not json\n", b"null\n", b'{"text": NaN}\n', b'{"text": "\xff"}\n', b'{"text": "a", "text": "b"}\n']


def test_skipped_lines_leave_the_samples_of_the_others_as_they_were(tmp_path: Path) -> None:
    good = [json.dumps({"text": f"line {number}"}).encode() + b"\n" for number in range(40)]
    mixed = list(good)
    for number, line in enumerate(BAD_LINES):
        mixed.insert(7 * number, line)
    clean = load(write(tmp_path, *good, name="clean.jsonl"), num_samples=10)
    chosen = load(write(tmp_path, *mixed), num_samples=10, skip_bad_lines=5)
    assert chosen.digest() == clean.digest()
    assert (chosen.population_size, chosen.num_bad_lines, chosen.num_skipped) == (40, 5, 0)
    assert re.search(r"5, \S+data\.jsonl:1: not JSON", chosen.notices[0])
    assert load(write(tmp_path, *good), num_samples=10, skip_bad_lines=5).digest() == clean.digest()
    assert clean.notices == ()


def test_one_bad_line_more_than_allowed_ends_the_run_and_is_named(tmp_path: Path) -> None:
    dataset = write(tmp_path, GOOD, *BAD_LINES)
    assert "data.jsonl:2: not JSON" in refused(dataset)
    message = refused(dataset, skip_bad_lines=4)
    assert "data.jsonl:6: duplicate key 'text'; this is bad line 5, and --skip-bad-lines allows 4" in message
    assert load(dataset, skip_bad_lines=5).num_bad_lines == 5


def test_rows_without_their_columns_are_bad_lines_too(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"txt": "b"}, {"text": 3}, {"text": ""}, {"text": "c"}]
    chosen = load(write(tmp_path, *rows), skip_bad_lines=2)
    assert [parts(sample)[0] for sample in chosen.samples] == ["a</s>", "c</s>"]
    assert (chosen.num_bad_lines, chosen.num_skipped, chosen.population_size) == (2, 1, 5)
    assert chosen.first_bad_line is not None
    assert chosen.first_bad_line.endswith("data.jsonl:2: column 'text' is missing")
    assert "data.jsonl:3: column 'text' holds a number" in refused(write(tmp_path, *rows), skip_bad_lines=1)
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    dataset = write(tmp_path, {"messages": talk}, {"messages": talk[1:]}, {"messages": 5})
    assert load(dataset, with_template(CHATML), skip_bad_lines=2).num_bad_lines == 2
    dataset = write(tmp_path, {"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [1]}, {"input_ids": "12"})
    assert load(dataset, None, skip_bad_lines=2).num_bad_lines == 2


def test_what_no_other_line_would_mend_is_never_skipped(tmp_path: Path) -> None:
    message = refused(write(tmp_path, {"input_ids": [1, 2]}, {"input_ids": [1, VOCAB_SIZE]}), skip_bad_lines=9)
    assert f"data.jsonl:2: token id {VOCAB_SIZE} is outside the model's vocabulary" in message
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert "no chat template" in refused(write(tmp_path, {"messages": talk}), skip_bad_lines=9)
    assert "no column 'x'" in refused(write(tmp_path, GOOD), text_column="x", skip_bad_lines=9)
    assert "no rows" in refused(write(tmp_path, *BAD_LINES), skip_bad_lines=9)


# ------------------------------------------------------------------------------------------------ texts and tokens


def test_texts_of_nothing_but_special_tokens_are_skipped_before_any_pass(tmp_path: Path) -> None:
    chosen = load(write(tmp_path, {"text": "</s>"}, {"text": "<s>"}, {"text": "<s></s>"}, {"text": "a"}))
    assert ([parts(sample)[0] for sample in chosen.samples], chosen.num_skipped) == (["a</s>"], 3)
    rows = ({"prompt": "p", "completion": completion} for completion in ("</s>", "<s></s>", "a"))
    chosen = load(write(tmp_path, *rows))
    assert ([parts(sample)[0] for sample in chosen.samples], chosen.num_skipped) == (["pa</s>"], 2)
    assert "none of 1 rows has a token to learn" in refused(write(tmp_path, {"text": "</s>"}))


def test_masked_and_single_tokens_are_skipped_before_any_pass(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]},
        {"input_ids": [1, 2, 3], "labels": [1, -100, -100]},  # nothing predicts the first
        {"input_ids": [1, 2], "attention_mask": [0, 0]},
        {"input_ids": [1]},
        {"input_ids": []},
        {"input_ids": [1, 2], "labels": [-100, 2]},
    ]
    chosen = load(write(tmp_path, *rows), None)
    assert (len(chosen.samples), chosen.num_skipped) == (1, 5)
    assert "none of 5 rows has a token to learn" in refused(write(tmp_path, *rows[:5]), tokenizer=None)


def test_duplicates_are_counted(tmp_path: Path) -> None:
    chosen = load(write(tmp_path, *({"text": text} for text in ("a", "b", "a", "a", "c", "b"))))
    assert (len(chosen.samples), chosen.num_duplicates) == (6, 3)
    assert chosen.notices == ("3 of 6 samples repeat an earlier one, and count as often",)
    assert load(write(tmp_path, {"text": "a"}, {"text": "b"})).notices == ()


def test_a_tokenizer_without_padding_token_will_do(tmp_path: Path) -> None:
    assert BYTES.pad_token_id is None
    assert [sample.num_tokens for sample in load(write(tmp_path, {"text": "abcdef"}, {"text": "a"})).samples] == [7, 2]


def test_texts_keep_their_escapes_in_the_tokens_and_lose_them_in_messages(tmp_path: Path) -> None:
    sample = load(write(tmp_path, {"text": TERMINAL})).samples[0]
    assert parts(sample)[0] == TERMINAL + "</s>"
    assert sample.input_ids[-1] == EOS
    assert repr(TERMINAL)[1:-1] in streamda.calibration.describe_sample(sample, BYTES)
    for dataset, options in (
        (write(tmp_path, {TERMINAL: "a"}, name="hostile.jsonl"), {}),
        (write(tmp_path, {"text": "a"}), {"text_column": TERMINAL}),
        (write(tmp_path, {"text": "a"}), {"split": TERMINAL}),
        (write(tmp_path, b"null", name=f"{TERMINAL}.jsonl"), {}),
        (write(tmp_path, b"null", name=f"{TERMINAL}.json"), {}),
        (write(tmp_path, b"null", name=f"{TERMINAL}.parquet"), {}),
        (write(tmp_path, b"te\x1b[2Jxt,b\nx,y\n", name="a.csv"), {"text_column": "c"}),
        (f"/no/where/{TERMINAL}", {}),
    ):
        assert "\\x1b[2J" in refused(dataset, **options)


# ------------------------------------------------------------------------------------------------ documents


def document_rows(path: Path, bad: BadRows | None = None) -> list[Any]:
    rows = JsonDocument(path, bad or BadRows())
    return [rows.read(index) for index in range(len(rows))]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=3), min_size=1, max_size=6),
    indent=st.none() | st.integers(0, 3),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
    form=st.sampled_from(["list", "list with a mark", "lines", "run together"]),
)
def test_a_document_gives_the_rows_that_python_s_reader_gives_whatever_the_chunk(
    tmp_path: Path, content: list[Any], indent: int | None, ascii_only: bool, chunk: int, form: str
) -> None:
    def dumps(value: Any) -> bytes:
        return json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()

    whole = {
        "list": lambda: dumps(content),
        "list with a mark": lambda: b"\xef\xbb\xbf \r\n" + dumps(content) + b"\n\n",
        "lines": lambda: b"\n".join(map(dumps, content)),
        "run together": lambda: b"".join(map(dumps, content)),
    }[form]()
    path = tmp_path / "a.json"
    path.write_bytes(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK_BYTES", chunk)
        assert document_rows(path) == content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b" \n", "no rows"),
        (b"\xef\xbb\xbf", "no rows"),
        (b"[\xd8]", "not UTF-8 (byte 0xd8 at byte 2 of the file)"),
        ("[]".encode("utf-16"), "not UTF-8 (byte 0xff at byte 1 of the file)"),
        (b"[]", "no rows"),
        (b"[ ] x", "row 1, line 1: text after the list"),
        (b"<!DOCTYPE html>\n<html></html>", "row 1, line 1: not JSON (Expecting value)"),
        (b"null", "row 1: a row must be an object, this is null"),  # pyarrow's reader ends the process here
        (b"3", "row 1: a row must be an object, this is a number"),
        (b'["a", "b"]', "row 1: a row must be an object, this is text"),
        (b'[{"text": "a"}, 3]', "row 2: a row must be an object, this is a number"),
        (b'[{"text": "a"},\n{"text": NaN}]', "row 2: NaN is no JSON number"),
        (b'[{"text": "a", "text": "b"}]', "row 1: duplicate key 'text'"),
        (b'[{"text": "\\ud800"}]', "row 1: half of a surrogate pair"),
        (b'[{"text": "a", "x": 1e999}]', "row 1: 1e999 is beyond any float"),
        (b'[{"text": "a"},\n{"text":\n "\xff"}]', "not UTF-8 (byte 0xff at byte 28 of the file)"),
        (b'[{"text": "a"},\n{"te', "row 2, line 2: not JSON"),
        (b'[{"text": "a"}\n', "the list is not closed, so the file is cut off"),
        (b'[{"text": "a"}\n{"text": "b"}]', "row 2, line 2: no comma between two rows"),
        (b'[{"text": "a"},]', "row 2, line 1: not JSON"),
        (b'[{"text": "a"}] {"text": "b"}', "row 2, line 1: text after the list"),
        (b'{"text": "a"}, {"text": "b"}', "row 2, line 1: not JSON"),
        (b"[" * 100_000, "row 1, line 1: nested too deeply"),
        (b'[{"text": "a", "x": ' + b"9" * 5000 + b"}]", "row 1, line 1: Exceeds the limit"),
        (b'[{"text": "' + b"a" * MAX_ROW_BYTES + b'"}]', "row 1, line 1: longer than 8 MiB"),
        (b'[{"text": "' + b"a" * (MAX_ROW_BYTES + (1 << 20)), "row 1, line 1: no JSON value within 8 MiB"),
    ],
)
def test_a_document_that_is_no_list_of_rows_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    with within(20):
        message = refused(write(tmp_path, content, name="a.json"))
    assert "a.json: " in message
    assert reason in message


def test_values_of_a_document_that_are_no_rows_may_be_skipped(tmp_path: Path) -> None:
    content = b'[{"text": "a"}, null, {"text": NaN}, {"text": "b"}, {"text": 5}, {"text": "c"}]'
    chosen = load(write(tmp_path, content, name="a.json"), skip_bad_lines=3)
    assert [parts(sample)[0] for sample in chosen.samples] == ["a</s>", "b</s>", "c</s>"]
    assert (chosen.num_bad_lines, chosen.population_size) == (3, 4)
    assert "a.json: row 5: column 'text'" in refused(write(tmp_path, content, name="a.json"), skip_bad_lines=2)
    assert "not JSON" in refused(write(tmp_path, content[:-3], name="a.json"), skip_bad_lines=9)


def test_texts_of_a_document_stay_what_they_are(tmp_path: Path) -> None:
    """Tables guess dates out of texts; here nothing is guessed."""
    content = [{"text": "2024-01-01"}, {"text": "a\u2028\u0085b"}, {"text": "007"}]
    chosen = load(write(tmp_path, json.dumps(content, ensure_ascii=False).encode(), name="a.json"))
    assert [parts(sample)[0].removesuffix("</s>") for sample in chosen.samples] == [row["text"] for row in content]


# ------------------------------------------------------------------------------------------------ mutations


SEEDS: dict[str, Callable[[Path], bytes]] = {
    "a.jsonl": lambda _: b"".join(
        json.dumps({"text": f"row {number} \u00e9\U0001f600", "n": number / 3}, ensure_ascii=False).encode() + b"\n"
        for number in range(6)
    ),
    "tokens.jsonl": lambda _: b"".join(
        json.dumps({"input_ids": [number, 2, 3], "labels": [-100, 2, 3]}).encode() + b"\n" for number in range(6)
    ),
    "a.json": lambda _: json.dumps([{"prompt": f"p{number}", "completion": "c"} for number in range(6)]).encode(),
    "a.csv": lambda _: b'prompt,completion\r\n"a, ""b""\nc",d\r\n' + b"e,f\r\n" * 5,
    "a.parquet": lambda folder: _parquet(folder / "seed.parquet"),
}


def _parquet(path: Path) -> bytes:
    datasets.Dataset.from_list([{"text": f"row {number}"} for number in range(50)]).to_parquet(path)
    return path.read_bytes()


def mutated(rng: random.Random, content: bytes) -> bytes:
    """A few bytes set, removed or repeated, or the end cut off."""
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(raw))
        match rng.randrange(5):
            case 0:
                raw[start] = rng.randrange(256)
            case 1:
                raw[start] ^= 1 << rng.randrange(8)
            case 2:
                del raw[start : start + rng.randrange(1, 20)]
            case 3:
                raw[start:start] = rng.choice(
                    (b"\x00", b"\xff", b'"', b"{", b"]", b"\n", b"NaN", b"\x1b[2J", b"\\u", b"9" * 30)
                )
            case _:
                del raw[start:]
        raw = raw or bytearray(b" ")
    return bytes(raw)


def mutate_and_load(folder: Path, name: str, seed: int, count: int) -> None:
    rng = random.Random(seed)
    content = SEEDS[name](folder)
    outcomes = set()
    for _ in range(count):
        dataset = write(folder, mutated(rng, content), name=name)
        with within(20):
            chosen = attempt(dataset, max_length=64, skip_bad_lines=rng.choice((0, 0, 2)))
        outcomes.add(type(chosen))
        if isinstance(chosen, DataError):
            assert str(chosen).isprintable()
            assert name in str(chosen)
        else:
            assert chosen.samples
            assert all(sample.num_label_tokens > 0 for sample in chosen.samples)
    assert DataError in outcomes


@pytest.mark.usefixtures("files_left_open")
@pytest.mark.parametrize("name", SEEDS)
def test_mutated_files_are_refused_or_read_never_more(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fifty of the five hundred below; tables take longer to open, so there are fewer."""
    mutate_and_load(tmp_path, name, 1, 50 if "json" in name else 15)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.faults
@pytest.mark.usefixtures("files_left_open")
@pytest.mark.parametrize("name", SEEDS)
def test_five_hundred_mutated_files(tmp_path: Path, name: str) -> None:
    mutate_and_load(tmp_path, name, 2, 500)


@pytest.mark.usefixtures("files_left_open")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"te\x00xt\nab\n"),
        ("a.csv", b'"' + b"a" * 300_000 + b'"\nab\n'),
        ("a.csv", "text\na\n".encode("utf-16")),
        ("a.csv", b"\n\n"),
        ("a.csv", b"<!DOCTYPE html>\n<html></html>"),
        ("a.csv", b"text,n\na,b\nc,d,e\n"),
        ("a.parquet", b"<!DOCTYPE html>\n<html></html>"),
        ("a.parquet", b"PAR1"),
        ("a.parquet", b""),
    ],
    ids=range(9),
)
def test_broken_tables_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    assert name in refused(write(tmp_path, content, name=name))


@pytest.mark.usefixtures("files_left_open")
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_parquet_file_is_refused(tmp_path: Path, share: float) -> None:
    content = _parquet(tmp_path / "whole.parquet")
    assert "cut.parquet: " in refused(write(tmp_path, content[: int(share * len(content))], name="cut.parquet"))


def test_devices_and_pipes_are_no_data(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.jsonl")
    with within(20):
        for place in ("/dev/null", "/dev/zero", str(tmp_path / "pipe.jsonl")):
            assert place in refused(place)


def test_a_folder_whose_rows_begin_with_null_does_not_end_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, b" \nnull\n", GOOD, name="train.json")
    assert "folder: train.json begins with null" in refused(str(folder))


def test_a_script_in_a_folder_of_data_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "folder.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    write(folder, {"text": "a"}, name="train.jsonl")
    attempt(str(folder))
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_run_tells_of_bad_lines_and_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = Path(str(golden_options(tmp_path)["dataset"])).read_bytes().splitlines(keepends=True)[:3]
    options = golden_options(tmp_path, dataset=write(tmp_path, *content, b"\x1b[31m\n", content[0]))
    report = streamda.initialize(**options, skip_bad_lines=1)
    assert (report.data["num_bad_lines"], report.data["num_duplicates"], report.data["num_samples"]) == (1, 1, 4)
    assert any("data.jsonl:4: not JSON" in notice for notice in report.notices)
    assert "1 of 4 samples repeat an earlier one" in report.to_table()
    assert report.to_table().replace("\n", "").isprintable()
    # the bad line is no part of what was computed: without it the run is the same, and done
    write(tmp_path, *content, content[0])
    assert streamda.initialize(**options).already_done


def test_one_short_sample_is_enough_and_said_to_be_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = golden_options(tmp_path, dataset=write(tmp_path, {"input_ids": [1, 2]}), rates="flops=1e9,read=1e9")
    assert run(monkeypatch, "plan", *flags(options), "--json") == 0
    notices = json.loads(capsys.readouterr().out)["notices"]
    assert any("2 tokens are fewer than the inputs of 21 layers" in notice for notice in notices)
    report = streamda.initialize(**options)
    assert {facts["status"] for facts in report.modules.values()} == {"ok"}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(report.modules)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_other_data_never_continue_a_run(tmp_path: Path) -> None:
    content = Path(str(golden_options(tmp_path)["dataset"])).read_bytes().splitlines(keepends=True)
    work = {"statistics": str(tmp_path / "statistics"), "output_dir": None}
    options = golden_options(tmp_path, dataset=write(tmp_path, *content[:3])) | work
    streamda.collect(**options)
    write(tmp_path, *content[:2], content[3])
    with pytest.raises(MismatchError, match=r"data.*tokens"):
        streamda.collect(**options)
    write(tmp_path, *content[:3], b"\n\n")  # other bytes, the same tokens
    streamda.collect(**options)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no rows"),
        (b"\x1b]0;x\x07\n", "data.jsonl:1: not JSON"),
        (b'{"input_ids": [1, 320]}\n', "data.jsonl:1: token id 320 is outside the model's vocabulary of 320"),
        (b'{"input_ids": [1, -1]}\n', "data.jsonl:1: token id -1"),
        (b'{"input_ids": [1, 2], "labels": [1]}\n', "data.jsonl:1: labels has 1 entries for 2 input_ids"),
        (b'{"input_ids": [1]}\n', "none of 1 rows has a token to learn"),
    ],
)
@pytest.mark.parametrize("command", ["init", "plan", "collect"])
def test_bad_data_end_a_command_with_4_and_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    content: bytes,
    says: str,
) -> None:
    options = golden_options(tmp_path, dataset=write(tmp_path, content))
    if command == "collect":
        options["statistics"] = str(tmp_path / "statistics")
        del options["output_dir"]
    before = sorted(tmp_path.iterdir())
    if command == "collect":
        del options["spill_statistics"]  # it writes them in any case
    assert run(monkeypatch, command, *flags(options)) == 4
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert error.strip().isprintable()
    assert sorted(tmp_path.iterdir()) == before
