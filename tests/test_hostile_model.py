"""Model folders that are broken, contradict themselves or mean harm: one line, exit code 3, nothing run or written.

Every case goes through the command line. What is not covered: payloads whose bits have rotted, which safetensors
cannot tell and only NaN or Inf would show.
"""

from __future__ import annotations

import json
import os
import pickle
import pty
import random
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import streamda
from streamda.errors import ConfigError, MismatchError, ModelError, NumericalError, StreamdaError
from streamda.shards import read_header
from streamda.sweep import Sweep
from tests.command_line import flags, run, within
from tests.conftest import GOLDEN
from tests.golden_options import golden_options, read_adapter
from tests.models import LENGTHS, make_model, make_samples, write_checkpoint, write_samples

Damage = Callable[[Path], object]

SECONDS = 5.0
"""None takes more than one on an idle machine; a busy one must not fail."""
TERMINAL = "\x1b[31m\n\x07\x9b"
WEIGHT = "model.layers.1.mlp.up_proj.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 40000\n"
HTML = b"<!DOCTYPE html><html><body>Not found</body></html>"
INDEX = "model.safetensors.index.json"


class Evil:
    """A pickle that leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("unpickled", "w")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a good model, in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(GOLDEN / "model", tmp_path / "model"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The adapter of the good model."""
    folder = tmp_path_factory.mktemp("plain")
    report = streamda.initialize(**golden_options(folder, **QUICK))
    assert not any("this model does not have" in notice for notice in report.notices)
    return read_adapter(folder / "adapter")


def options(folder: Path, **changed: Any) -> dict[str, Any]:
    return golden_options(folder.parent, model=str(folder)) | changed


QUICK: dict[str, Any] = {"num_samples": 3, "rank": 2}


def assert_refused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    reason: str,
    *arguments: str,
    command: str = "init",
) -> None:
    """Runs a command and looks at all it must not do."""
    before = sorted(folder.parent.rglob("*"))
    capfd.readouterr()
    start = time.monotonic()
    assert run(monkeypatch, command, *flags(options(folder)), *arguments) == 3
    seconds = time.monotonic() - start
    error = capfd.readouterr().err
    assert re.search(reason, error), error
    assert error.count("\n") == 1, error
    assert error.rstrip("\n").isprintable()
    assert len(error) < 1200
    assert sorted(folder.parent.rglob("*")) == before
    assert seconds < SECONDS


def sampled(cases: dict[str, tuple[Any, ...]], always: set[str]) -> list[Any]:
    """Parameters; those that are not always run are part of the long sweep."""
    assert always <= set(cases)
    return [
        pytest.param(*case, id=name, marks=[] if name in always else [pytest.mark.faults])
        for name, case in cases.items()
    ]


# ------------------------------------------------------------------------------------------------ config.json


def config(**changes: Any) -> Damage:
    """Other values in config.json; None removes one."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != ...}))

    return edit


def config_bytes(content: bytes) -> Damage:
    return lambda folder: (folder / "config.json").write_bytes(content)


def config_is_a_link_outside(folder: Path) -> None:
    shutil.move(folder / "config.json", folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to("../elsewhere.json")


CANNOT = r"config\.json cannot be used: "
CONFIGS: dict[str, tuple[Damage, str]] = {
    "html": (config_bytes(HTML), CANNOT + r".*\(a web page was saved in its place"),
    "git-lfs": (config_bytes(LFS), CANNOT + r".*run `git lfs pull`"),
    "empty": (config_bytes(b""), CANNOT),
    "binary": (config_bytes(b"\xff\xfe\x00\x01"), CANNOT),
    "a list": (config_bytes(b"[]"), CANNOT + "it should hold a JSON object"),
    "null": (config_bytes(b"null"), CANNOT + "it should hold a JSON object"),
    "text": (config_bytes(b'"auto_map"'), CANNOT + "it should hold a JSON object"),
    "nested deep": (config_bytes(b'{"a":' + b"[" * 100_000), CANNOT + "it is nested too deep"),
    "NaN": (config_bytes(b'{"model_type": "llama", "rms_norm_eps": NaN}'), CANNOT + "it holds NaN"),
    "link outside": (config_is_a_link_outside, r"is a link to .*elsewhere\.json, outside the model's folder"),
    "no kind": (config(model_type=..., architectures=...), CANNOT),
    "kind is a list": (config(model_type=["llama"]), CANNOT),
    "unknown kind": (config(model_type=f"x{TERMINAL}y"), CANNOT),
    "other width": (config(hidden_size=64), r"embed_tokens\.weight has shape \[320, 48\], config\.json asks for"),
    "fewer tokens": (
        config(vocab_size=100),
        r"embed_tokens\.weight has shape \[320, 48\], config\.json asks for \[100",
    ),
    "more tokens": (config(vocab_size=400), r"embed_tokens\.weight has shape \[320, 48\], config\.json asks for \[400"),
    "fewer blocks": (config(num_hidden_layers=2), r"holds model\.layers\.2\..*config\.json asks for 2 blocks only"),
    "more blocks": (config(num_hidden_layers=4), r"lacks 9 tensors that config\.json asks for: model\.layers\.3\."),
    "other heads": (config(num_key_value_heads=3), r"k_proj\.weight has shape \[24, 48\], config\.json asks for \[36"),
    "biases": (config(attention_bias=True), r"lacks 12 tensors that config\.json asks for"),
    "heads do not divide": (config(hidden_size=49), CANNOT + ".*not a multiple of the number of attention heads"),
    "odd head": (config(head_dim=7), CANNOT + ".*even rotary dimension"),
    "no blocks": (config(num_hidden_layers=0), r"has num_hidden_layers 0; models have from 1 to"),
    "minus one block": (config(num_hidden_layers=-1), r"has num_hidden_layers -1"),
    "a billion blocks": (config(num_hidden_layers=10**9), r"has num_hidden_layers 1000000000"),
    "no width": (config(hidden_size=0), r"has hidden_size 0"),
    "negative width": (config(hidden_size=-48), r"has hidden_size -48"),
    "absurd width": (config(hidden_size=10**30), r"has hidden_size 1000"),
    "absurd inner width": (config(intermediate_size=10**13), "has intermediate_size 1000"),
    "no heads": (config(num_attention_heads=0), CANNOT + "ZeroDivisionError"),
    "no keys": (config(num_key_value_heads=0), r"has num_key_value_heads 0"),
    "no head": (config(head_dim=0), r"has head_dim 0"),
    "no tokens": (config(vocab_size=0), r"has vocab_size 0"),
    "absurd tokens": (config(vocab_size=10**13), r"has vocab_size 1000"),
    "blocks are text": (config(num_hidden_layers="three"), CANNOT + ".*expected int, got str"),
    "blocks are a fraction": (config(num_hidden_layers=3.0), CANNOT + ".*expected int, got float"),
    "width is a list": (config(hidden_size=[48]), CANNOT + ".*expected int, got list"),
    "epsilon is text": (config(rms_norm_eps="x"), CANNOT + ".*expected float, got str"),
    "tie is text": (config(tie_word_embeddings="yes"), CANNOT + ".*expected bool, got str"),
    "padding is text": (config(pad_token_id="x"), CANNOT),
    "padding outside": (config(pad_token_id=10**9), "no causal language model can be built"),
    "dtype": (config(dtype="float99"), CANNOT),
    "activation": (config(hidden_act=TERMINAL), "no causal language model can be built .*KeyError"),
    "rope is text": (config(rope_parameters="x"), CANNOT),
    "rope of base 0": (config(rope_parameters={"rope_theta": 0, "rope_type": "default"}), "gives its blocks NaN"),
    "unknown rope": (
        config(rope_parameters={"rope_theta": 1e4, "rope_type": "none such"}),
        "no causal language model can be built",
    ),
    "types of blocks": (config(layer_types=["full_attention"] * 7), CANNOT),
    "method replaced": (config(to_dict="x"), CANNOT),
    "quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "is a quantized checkpoint"),
    "quantized with nothing": (config(quantization_config={}), "is a quantized checkpoint"),
    "encoder-decoder": (config_bytes(b'{"model_type": "t5"}'), "is an encoder-decoder model"),
    "no decoder": (
        config_bytes(b'{"model_type": "bert", "num_hidden_layers": 1}'),
        "tensors that config.json asks for",
    ),
    "own code": (config(auto_map={"AutoConfig": "own.Config"}), "own Python code; add --trust-remote-code"),
    "kernels of the hub": (
        config(_attn_implementation="someone/kernel"),
        r"asks for code from the hub \(_attn_implementation 'someone/kernel'\); add --trust-remote-code",
    ),
    "kernels for experts": (
        config(experts_implementation="someone/kernel"),
        r"asks for code from the hub \(experts_implementation 'someone/kernel'\); add --trust-remote-code",
    ),
}
CONFIG_SAMPLE = {
    "html", "text", "nested deep", "NaN", "link outside", "fewer tokens", "fewer blocks", "heads do not divide",
    "a billion blocks", "no heads", "width is a list", "padding outside", "rope of base 0", "kernels of the hub",
}  # fmt: skip


@pytest.mark.parametrize(("damage", "reason"), sampled(CONFIGS, CONFIG_SAMPLE))
def test_a_configuration_that_makes_no_sense_is_refused(
    damage: Damage,
    reason: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(folder)
    assert_refused(folder, monkeypatch, capfd, reason)


def test_a_plan_for_an_absurd_model_is_refused_though_no_weights_are_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    no_safetensors(folder)
    config(num_hidden_layers=10**6)(folder)
    assert_refused(folder, monkeypatch, capfd, "has num_hidden_layers 1000000", command="plan")


def test_own_code_is_not_run_and_nobody_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a terminal on stdin transformers would ask whether to run it, and wait; without one it would fail."""
    (folder / "own.py").write_text("open('executed', 'w')\n")
    config(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(folder)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}')
    master, slave = pty.openpty()
    with open(master, "rb"), open(slave) as terminal:
        for stdin in (terminal, None):
            monkeypatch.setattr("sys.stdin", stdin)
            with within(20):
                assert_refused(folder, monkeypatch, capfd, "own Python code; add --trust-remote-code if you trust it")


def test_a_tokenizer_of_own_code_is_not_run_and_nobody_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "own.py").write_text("open('executed', 'w')\n")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}')
    master, slave = pty.openpty()
    with open(master, "rb"), open(slave) as terminal, within(20):
        monkeypatch.setattr("sys.stdin", terminal)
        assert run(monkeypatch, "init", *flags(options(folder))) == 4
    assert re.fullmatch(
        r"streamda: error: the tokenizer .* cannot be loaded: .*custom code.*\n", capfd.readouterr().err
    )
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


@pytest.mark.parametrize(
    "content", [b"{", b"{}", b"[" * 100_000, HTML, b"\xff"], ids=["cut", "empty", "deep", "html", "binary"]
)
def test_a_damaged_tokenizer_is_refused_in_one_line(
    content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    assert run(monkeypatch, "init", *flags(options(folder))) == 4
    assert re.fullmatch(r"streamda: error: the tokenizer in .* cannot be loaded: .*\n", capfd.readouterr().err)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


# ------------------------------------------------------------------------------------------------ headers


def a_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def with_header(text: bytes, length: int | None = None) -> Damage:
    """Another header before the values."""

    def edit(folder: Path) -> None:
        data = a_shard(folder).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        a_shard(folder).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[end:])

    return edit


def header_edited(edit: Callable[[dict[str, Any], list[str]], object]) -> Damage:
    """Another header; the edit gets it and the names of its tensors."""

    def damage(folder: Path) -> None:
        data = a_shard(folder).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        edit(header, [key for key in header if key != "__metadata__"])
        with_header(json.dumps(header).encode())(folder)

    return damage


def first_entry(**values: Any) -> Damage:
    return header_edited(lambda header, names: header[names[0]].update(values))


def length_of(length: int) -> Damage:
    return lambda folder: a_shard(folder).write_bytes(struct.pack("<Q", length) + a_shard(folder).read_bytes()[8:])


def shard_bytes(edit: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: a_shard(folder).write_bytes(edit(a_shard(folder).read_bytes()))


def one_name_twice(folder: Path) -> None:
    """The last one would win in safetensors, the first one in other readers."""
    data = a_shard(folder).read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].decode().rstrip()
    name, entry = next((key, value) for key, value in json.loads(header).items() if key != "__metadata__")
    with_header(f"{header[:-1]}, {json.dumps(name)}: {json.dumps(entry)}}}".encode())(folder)


READ = r"model-00002-of-00003\.safetensors cannot be read: "
HEADERS: dict[str, tuple[Damage, str]] = {
    "length 0": (length_of(0), READ),
    "length 2^63": (length_of(2**63), READ + ".*too large"),
    "length 2^64 - 1": (length_of(2**64 - 1), READ + ".*too large"),
    "length above 100 MB": (length_of(100_000_001), READ + ".*too large"),
    "length above the file": (length_of(10**6), READ),
    "no JSON": (with_header(b"hello"), READ),
    "no UTF-8": (with_header(b'{"a\xff": 1}'), READ),
    "nested deep": (with_header(b'{"a":' * 20_000 + b"1" + b"}" * 20_000), READ),
    "a list": (with_header(b"[" * 20_000), READ),
    "a number in the metadata": (header_edited(lambda h, _: h.update(__metadata__={"a": 5})), READ),
    "negative offset": (first_entry(data_offsets=[-5, 3]), READ),
    "offsets reversed": (first_entry(data_offsets=[500, 3]), READ),
    "offsets are text": (first_entry(data_offsets=["0", "5"]), READ),
    "overlap": (header_edited(lambda h, n: h[n[1]].update(data_offsets=h[n[0]]["data_offsets"])), READ),
    "hole": (header_edited(lambda h, n: h.pop(n[0])), READ),
    "shape overflows": (first_entry(shape=[2**40, 2**40]), READ + ".*overflow"),
    "negative shape": (first_entry(shape=[-1, 3]), READ),
    "shape does not fit": (first_entry(shape=[3, 3]), READ),
    "unknown dtype": (first_entry(dtype=f"X{TERMINAL}"), READ),
    "dtype is a number": (first_entry(dtype=4), READ),
    "a dtype newer than us": (first_entry(dtype="F4"), READ),
    "one name twice": (one_name_twice, READ + "its header has 'model.*' twice"),
    "empty file": (shard_bytes(lambda _: b""), READ),
    "five bytes": (shard_bytes(lambda data: data[:5]), READ),
    "cut by one byte": (shard_bytes(lambda data: data[:-1]), READ),
    "cut in half": (shard_bytes(lambda data: data[: len(data) // 2]), READ),
    "one byte more": (shard_bytes(lambda data: data + b"x"), READ),
    "html": (shard_bytes(lambda _: HTML), READ + r".*\(a web page was saved in its place"),
    "git-lfs": (shard_bytes(lambda _: LFS), READ + r".*run `git lfs pull`"),
}
HEADER_SAMPLE = {"length 2^63", "no UTF-8", "nested deep", "overlap", "unknown dtype", "one name twice", "html"}


@pytest.mark.parametrize(("damage", "reason"), sampled(HEADERS, HEADER_SAMPLE))
def test_a_damaged_header_is_refused(
    damage: Damage,
    reason: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(folder)
    assert_refused(folder, monkeypatch, capfd, reason)


def scramble(data: bytes, seed: int) -> bytes:
    """Some bytes of a shard's header changed, removed, added or repeated."""
    chance = random.Random(seed)
    end = 8 + int.from_bytes(data[:8], "little")
    head = bytearray(data[:end])
    for _ in range(chance.choice((1, 1, 2, 5))):
        place, kind = chance.randrange(len(head)), chance.randrange(5)
        if kind == 0:
            head[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            head[place] = chance.choice(b'0123456789{}[],:"-.eE\\ \x00\xff')
        elif kind == 2:
            del head[place : place + chance.randrange(1, 20)]
        elif kind == 3:
            head[place:place] = head[place : place + chance.randrange(1, 40)]
        else:
            head[place:place] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
    if chance.random() < 0.5:  # with a length that fits, so that more than the length is looked at
        head[:8] = struct.pack("<Q", max(0, len(head) - 8))
    return bytes(head) + data[end:]


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 2000), marks=pytest.mark.faults)], ids=["some", "many"]
)
def test_a_scrambled_header_is_read_right_or_refused(seeds: range, folder: Path) -> None:
    """What is read of it lies within the file, whatever was changed."""
    shard = a_shard(folder)
    good = shard.read_bytes()
    refused = []
    for seed in seeds:
        shard.write_bytes(scramble(good, seed))
        try:
            entries = read_header(shard)
        except ModelError as error:
            refused.append(str(error))
        else:
            assert all(8 <= entry.offset <= shard.stat().st_size for entry in entries)
    assert len(refused) > len(seeds) * 0.8
    assert all(text.isprintable() and len(text) < 1000 for text in refused)


@pytest.mark.faults
def test_a_scrambled_header_ends_a_run_in_one_line(folder: Path) -> None:
    shard = a_shard(folder)
    good = shard.read_bytes()
    for seed in range(300):
        shard.write_bytes(scramble(good, seed))
        with pytest.raises(StreamdaError) as caught:  # the budget ends what gets past the model
            streamda.initialize(**options(folder, max_gpu_mem="1MB"))
        assert caught.value.exit_code in (3, 8), seed
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


# ------------------------------------------------------------------------------------------------ files of a folder


def index(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Another weight_map in the index."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / INDEX).read_text())
        edit(values["weight_map"])
        (folder / INDEX).write_text(json.dumps(values))

    return damage


def index_bytes(content: bytes) -> Damage:
    return lambda folder: (folder / INDEX).write_bytes(content)


def names_shard(name: Any) -> Damage:
    return index(lambda weight_map: weight_map.update({"lm_head.weight": name}))


def tensors(edit: Callable[[dict[str, Tensor]], object], of: str = WEIGHT) -> Damage:
    """Other tensors in the shard that holds a weight."""

    def damage(folder: Path) -> None:
        for shard in sorted(folder.glob("*.safetensors")):
            found = load_file(shard)
            if of in found:
                edit(found)
                save_file(found, shard)
                return

    return damage


def no_safetensors(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def only_a_pickle(name: str) -> Damage:
    def damage(folder: Path) -> None:
        no_safetensors(folder)
        (folder / name).write_bytes(pickle.dumps(Evil()))

    return damage


def only_gguf(folder: Path) -> None:
    no_safetensors(folder)
    (folder / "model-q4.gguf").write_bytes(b"GGUF")


def replaced_by(make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        shard = a_shard(folder)
        shard.rename(folder.parent / "elsewhere.safetensors")
        make(shard)

    return damage


PLAIN = "must be a plain file name that ends in .safetensors"
FILES: dict[str, tuple[Damage, str]] = {
    "index: up": (names_shard("../x.safetensors"), f"names the shard '../x.safetensors'; it {PLAIN}"),
    "index: absolute": (names_shard("/etc/passwd"), PLAIN),
    "index: NUL": (names_shard("a\0b.safetensors"), PLAIN),
    "index: terminal": (names_shard(f"a{TERMINAL}.safetensors"), PLAIN),
    "index: surrogate": (names_shard("a\udcff.safetensors"), PLAIN),
    "index: long": (names_shard("a" * 5000 + ".safetensors"), PLAIN),
    "index: empty": (names_shard(""), PLAIN),
    "index: dot": (names_shard("."), PLAIN),
    "index: number": (names_shard(5), PLAIN),
    "index: null": (names_shard(None), PLAIN),
    "index: list": (names_shard(["x"]), PLAIN),
    "index: pickle": (names_shard("pytorch_model.bin"), PLAIN),
    "index: config": (names_shard("config.json"), PLAIN),
    "index: missing shard": (names_shard("z.safetensors"), r"lacks the shard z\.safetensors that its index names"),
    "index: nothing": (index(dict.clear), "holds 3 shards .* that its index does not name"),
    "index: no map": (index_bytes(b"{}"), "is no index of a sharded checkpoint"),
    "index: map is a list": (index_bytes(b'{"weight_map": [1]}'), "is no index of a sharded checkpoint"),
    "index: a list": (index_bytes(b"[1]"), "it should hold a JSON object"),
    "index: html": (index_bytes(HTML), "a web page was saved in its place"),
    "index: git-lfs": (index_bytes(LFS), "git lfs pull"),
    "index: binary": (index_bytes(b"\xff\xfe\0"), "cannot be used"),
    "index: nested deep": (index_bytes(b"[" * 100_000), "nested too deep"),
    "tensor absent": (
        index(lambda weight_map: weight_map.update({"ghost": "model-00001-of-00003.safetensors"})),
        r"model-00001-of-00003\.safetensors lacks 1 tensor \(ghost\) that the folder's index puts in it",
    ),
    "tensor elsewhere": (names_shard("model-00001-of-00003.safetensors"), r"lacks 1 tensor \(lm_head\.weight\)"),
    "extra shard": (
        lambda folder: save_file({"x": torch.ones(2)}, folder / "model-00004-of-00003.safetensors"),
        r"holds 1 shard \(model-00004-of-00003\.safetensors\) that its index does not name",
    ),
    "no index": (lambda folder: (folder / INDEX).unlink(), "holds no model.safetensors and no model.safetensors.index"),
    "nothing": (no_safetensors, "holds no model.safetensors and no"),
    "tensor in two shards": (
        tensors(lambda found: found.update({"model.embed_tokens.weight": torch.ones(320, 48)})),
        r"tensor model\.embed_tokens\.weight is in .* and again in",
    ),
    "one weight under two names": (
        tensors(lambda found: found.update({WEIGHT.removeprefix("model."): found[WEIGHT].clone()})),
        "twice, as layers.1.mlp.up_proj.weight and as model.layers.1.mlp.up_proj.weight",
    ),
    "pickle": (only_a_pickle("pytorch_model.bin"), "pickled weights only; convert them once.*save_pretrained"),
    "pt": (only_a_pickle("model.pt"), "pickled weights only; convert them once.*save_pretrained"),
    "gguf": (only_gguf, "holds GGUF weights only"),
    "link outside": (
        replaced_by(lambda shard: shard.symlink_to("../elsewhere.safetensors")),
        "is a link to .*, outside the model's folder; give the folder that holds the files themselves as --model",
    ),
    "link to itself": (replaced_by(lambda shard: shard.symlink_to(shard.name)), "lacks the shard"),
    "device": (replaced_by(lambda shard: shard.symlink_to("/dev/zero")), "lacks the shard"),
    "pipe": (replaced_by(os.mkfifo), "lacks the shard"),
    "folder": (replaced_by(Path.mkdir), "lacks the shard"),
    "float8": (
        tensors(lambda found: found.update({WEIGHT: found[WEIGHT].to(torch.float8_e4m3fn)})),
        "stored as F8_E4M3, which is not a weight",
    ),
    "int8": (
        tensors(lambda found: found.update({WEIGHT: found[WEIGHT].to(torch.int8)})),
        "stored as I8, which is not a weight",
    ),
    "no dimension": (tensors(lambda found: found.update({WEIGHT: torch.tensor(1.0)})), r"has shape \[\]"),
    "no size": (tensors(lambda found: found.update({WEIGHT: torch.ones(0, 48)})), r"has shape \[0, 48\]"),
    "three dimensions": (tensors(lambda found: found.update({WEIGHT: torch.ones(112, 48, 1)})), "has shape"),
}
FILE_SAMPLE = {
    "index: up", "index: terminal", "index: long", "index: null", "index: nested deep", "tensor absent", "extra shard",
    "one weight under two names", "pickle", "gguf", "link outside", "float8", "no size",
}  # fmt: skip


@pytest.mark.parametrize(("damage", "reason"), sampled(FILES, FILE_SAMPLE))
def test_files_that_are_not_those_of_a_model_are_refused(
    damage: Damage,
    reason: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(folder)
    assert_refused(folder, monkeypatch, capfd, reason)


def as_in_the_hub_s_cache(folder: Path) -> Path:
    """Snapshots of links into a folder of blobs; the folder of the snapshot."""
    blobs, snapshot = (folder.parent / "models--a--b" / part for part in ("blobs", "snapshots/0123abc"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def links_into_a_cache_elsewhere(folder: Path) -> Path:
    """As tools leave it that gather a model's files without copying them."""
    blobs = folder.parent / "cache" / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    return folder


def harmless(folder: Path) -> Path:
    """Pickles beside safetensors, and tensors that no parameter is made of, with names like paths and escapes."""
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Evil()))
    tensors(lambda found: found.update({f"../../evil{TERMINAL}": torch.ones(2), "a" * 3000: torch.ones(2)}))(folder)
    return folder


@pytest.mark.parametrize("arrange", [as_in_the_hub_s_cache, links_into_a_cache_elsewhere, harmless])
def test_what_is_unusual_and_legal_changes_nothing(
    arrange: Callable[[Path], Path], folder: Path, plain: dict[str, Tensor]
) -> None:
    report = streamda.initialize(**options(arrange(folder), output_dir=str(folder.parent / "adapter"), **QUICK))
    found = read_adapter(folder.parent / "adapter")
    assert set(found) == set(plain)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert not (folder.parent / "unpickled").exists()
    noted = [notice for notice in report.notices if "this model does not have" in notice]
    assert len(noted) == (arrange is harmless)
    assert all(notice.isprintable() and len(notice) < 400 for notice in noted)


def test_experts_of_another_number_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path / "model", "mixtral")
    config(num_local_experts=3)(folder)
    # also the router has another shape; without that only the sum of the experts tells
    tensors(
        lambda found: found.update({"model.layers.0.block_sparse_moe.gate.weight": torch.ones(3, 32)}),
        of="model.layers.0.block_sparse_moe.gate.weight",
    )(folder)
    tensors(
        lambda found: found.update({"model.layers.1.block_sparse_moe.gate.weight": torch.ones(3, 32)}),
        of="model.layers.1.block_sparse_moe.gate.weight",
    )(folder)
    data = write_samples(tmp_path / "samples.jsonl", make_samples(LENGTHS))
    assert_refused(folder, monkeypatch, capfd, r"holds \d+ values for model\.layers.*experts", "--dataset", str(data))


def test_a_tied_head_is_counted_once_and_gets_no_adapter(tmp_path: Path) -> None:
    """Whether the files hold it as well or not."""
    folder = write_checkpoint(tmp_path / "model", "llama-tied")
    plain = streamda.initialize(**tied_options(folder, output_dir=str(tmp_path / "plain")))
    name = "model.embed_tokens.weight"
    assert not any("lm_head.weight" in load_file(shard) for shard in folder.glob("*.safetensors"))
    tensors(lambda found: found.update({"lm_head.weight": found[name].clone()}), of=name)(folder)
    names = {tensor: shard.name for shard in sorted(folder.glob("*.safetensors")) for tensor in load_file(shard)}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    report = streamda.initialize(**tied_options(folder))
    assert report.bytes["weights_read"] == plain.bytes["weights_read"]
    found, expected = read_adapter(tmp_path / "adapter"), read_adapter(tmp_path / "plain")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any("lm_head" in name for name in report.modules)


def tied_options(folder: Path, **changed: Any) -> dict[str, Any]:
    data = folder.parent / "samples.jsonl"
    if not data.exists():
        write_samples(data, make_samples(LENGTHS))
    return options(folder, dataset=str(data), rank=2, **changed)


# ------------------------------------------------------------------------------------------------ values


def fill(value: float, count: int) -> Damage:
    return tensors(lambda found: found[WEIGHT].view(-1)[5 : 5 + count].fill_(value))


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 7), (float("-inf"), 1)])
def test_nan_in_a_weight_is_named_with_its_count(value: float, count: int, folder: Path) -> None:
    fill(value, count)(folder)
    with pytest.raises(
        ModelError, match=rf"{re.escape(WEIGHT)} holds NaN or Inf: {count} of its 5376 values in float32"
    ):
        streamda.initialize(**options(folder, **QUICK))
    assert not (folder.parent / "adapter").exists()


def test_a_layer_whose_weight_holds_nan_can_be_left_out(folder: Path) -> None:
    """The model is run with zeros in the place of the damaged values, so the other layers are as with those zeros."""
    fill(float("nan"), 7)(folder)
    left_out = streamda.initialize(**options(folder, skip_bad_layers=True, **QUICK))
    found = read_adapter(folder.parent / "adapter")
    layer = WEIGHT.removesuffix(".weight")
    assert left_out.modules[layer]["status"] == "skipped"
    assert "7 of its values" in json.dumps(left_out.modules[layer])
    assert not any(layer in name for name in found)
    fill(0.0, 7)(folder)
    streamda.initialize(**options(folder, output_dir=str(folder.parent / "zeros"), **QUICK))
    expected = read_adapter(folder.parent / "zeros")
    assert {name for name in expected if layer not in name} == set(found)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_nan_outside_the_adapted_layers_is_an_error_even_then(folder: Path) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    tensors(lambda found: found[norm].fill_(float("nan")), of=norm)(folder)
    with pytest.raises(ModelError, match=rf"{re.escape(norm)} holds NaN or Inf: 48 of its 48 values"):
        streamda.initialize(**options(folder, skip_bad_layers=True, **QUICK))


def test_an_overflow_names_the_module_and_the_wider_dtype(folder: Path) -> None:
    tensors(lambda found: found[WEIGHT].fill_(3e38))(folder)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj gives NaN or Inf.*try --dtype float32"):
        streamda.initialize(**options(folder, dtype="bfloat16", **QUICK))


def a_byte_in_the_middle(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        (a_byte_in_the_middle, MismatchError, r"changed while the run went on \(time of change\); put the file back"),
        (cut, ModelError, "cannot be read: it ends"),
        pytest.param(Path.unlink, ModelError, "cannot be read: ", marks=pytest.mark.faults),
    ],
)
def test_a_shard_that_changes_between_the_passes_stops_the_run(
    change: Callable[[Path], None],
    kind: type[StreamdaError],
    reason: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    plain: dict[str, Tensor],
) -> None:
    """Else gradients of one model would be taken at the states of another."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    kept, epilogue = shard.read_bytes(), Sweep.epilogue

    def change_then(sweep: Sweep, *arguments: Any) -> float:
        loss = epilogue(sweep, *arguments)
        change(shard)
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(Sweep, "epilogue", change_then)
        with pytest.raises(kind, match=reason):
            streamda.initialize(**options(folder, **QUICK))
    assert not (folder.parent / "adapter").exists()
    shard.write_bytes(kept)
    assert streamda.initialize(**options(folder, **QUICK)).resumed
    found = read_adapter(folder.parent / "adapter")
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_shard_that_is_replaced_by_a_copy_of_itself_stops_no_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, plain: dict[str, Tensor]
) -> None:
    """Not every file system keeps a file's number and time."""
    epilogue = Sweep.epilogue

    def copy_then(sweep: Sweep, *arguments: Any) -> float:
        loss = epilogue(sweep, *arguments)
        for shard in folder.glob("*.safetensors"):
            shutil.copy(shard, shard.with_suffix(".new"))
            shard.with_suffix(".new").replace(shard)
            os.utime(shard, (0, 0))
        return loss

    monkeypatch.setattr(Sweep, "epilogue", copy_then)
    streamda.initialize(**options(folder, **QUICK))
    found = read_adapter(folder.parent / "adapter")
    assert all(torch.equal(found[name], plain[name]) for name in plain)


# ------------------------------------------------------------------------------------------------ targets and names


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"target_modules": "nothing_like_it"}, "matches no linear layer; this model has down_proj, gate_proj"),
        ({"target_modules": "q_prj"}, "matches no linear layer.*did you mean q_proj"),
        ({"target_modules": r".*\.Q_pro"}, "matches no linear layer.*did you mean q_proj"),
        ({"target_modules": "q_proj,kproj"}, "names 'kproj', which is no linear layer.*did you mean k_proj"),
        ({"target_modules": "q_proj,embed_tokens"}, "names 'embed_tokens', which is no linear layer"),
        ({"target_modules": "input_layernorm"}, "matches no linear layer"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"target_modules": f"q_proj{TERMINAL}|x"}, "target_modules"),
        ({"rank": 0}, "rank is 0; allowed is 1 or more"),
        ({"rank": -8}, "rank is -8; allowed is 1 or more"),
        ({"rank": 49}, r"rank 49 is above the smaller side of \d+ layers, narrowest model\.layers\.0\.self_attn"),
        ({"rank": 10**12}, "rank .*1000000000000"),
    ],
)
def test_targets_and_ranks_that_fit_no_layer_are_refused(given: dict[str, Any], reason: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        streamda.initialize(**options(folder, **given))
    assert str(caught.value).isprintable()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


@pytest.mark.parametrize(("family", "target"), [("qwen3_moe", "experts"), ("gpt2", "bias"), ("llama", "norm")])
def test_what_is_no_matrix_of_a_linear_layer_is_no_target(family: str, target: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", family)
    data = write_samples(tmp_path / "samples.jsonl", make_samples(LENGTHS))
    with pytest.raises(ConfigError, match="matches no linear layer; this model has"):
        streamda.initialize(**options(folder, dataset=str(data), target_modules=target))


NAMES = ("Up", "up", "x" * 300, "/etc/evil", "\x1b[31mred\n", "a|b`c<d", "é" * 100, "CON", " ", "[x]*", "-rf")


class OddConfig(LlamaConfig):
    model_type = "odd_names"


class OddBranches(nn.Module):
    """Linear layers under names that no file, no table and no terminal should meet as they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x).tanh() for branch in self.children()]).sum(0)


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OddBranches(config.hidden_size)


def test_modules_of_any_name_are_kept_apart_and_shown_safely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    AutoConfig.register("odd_names", OddConfig, exist_ok=True)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM, exist_ok=True)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 97}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    make_model(OddConfig(intermediate_size=16, **sizes, **tokens)).save_pretrained(tmp_path / "model")
    data = write_samples(tmp_path / "samples.jsonl", make_samples(LENGTHS))
    given = options(tmp_path / "model", dataset=str(data), rank=2)
    before = set(Path("/etc").iterdir())
    capfd.readouterr()
    assert run(monkeypatch, "init", *flags(given), "--keep-statistics") == 0
    printed = capfd.readouterr()
    assert "\x1b[31m" not in printed.out + printed.err
    assert "\x1b" not in (tmp_path / "adapter" / "README.md").read_text()
    adapter = read_adapter(tmp_path / "adapter")
    prefix = "base_model.model.model.layers.0.mlp."
    assert {name for name in NAMES if f"{prefix}{name}.lora_A.weight" in adapter} == set(NAMES)
    upper, lower = (adapter[f"{prefix}{name}.lora_B.weight"] for name in NAMES[:2])
    assert not torch.equal(upper, lower)
    assert set(Path("/etc").iterdir()) == before
    siblings = [path for path in (tmp_path / "adapter.work").rglob("*.mlp.*") if path.is_dir()]
    assert len({path.name.casefold() for path in siblings}) == len(siblings) == len(NAMES)
    assert all(re.fullmatch(r"[a-z0-9_.-]{1,64}", path.name) for path in siblings)
