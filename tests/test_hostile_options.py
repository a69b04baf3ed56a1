"""Options and configuration files that are mistaken or hostile: exit code 2 and one line that names the option.

Also that nothing a user, a file or a folder is called reaches the terminal raw, in any locale.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamda
from streamda.config import RunConfig
from streamda.config_file import MAX_CONFIG_BYTES, read_config_file
from streamda.errors import ConfigError, StreamdaError
from streamda.memory import parse_size
from streamda.requirements import require_platform
from tests.command_line import flags, run
from tests.golden_options import golden_options
from tests.test_hostile_data import TERMINAL

RATES = "flops=1e9,flops64=1e9,read=1e9,write=1e9"


def read(folder: Path, content: str | bytes) -> RunConfig:
    path = folder / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return RunConfig.from_options(read_config_file(path))


# ------------------------------------------------------------------------------------------------ configuration files


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "must hold options as"),
        ("null", "must hold options as"),
        ("- rank: 4", "must hold options as"),
        ("rank", "must hold options as"),
        ("rnak: 4", "unknown option 'rnak'; did you mean 'rank'?"),
        ('"r\\e[31mnak": 4', r"unknown option 'r\x1b[31mnak'"),
        ("config: x", "unknown option 'config'"),
        ("[a, b]: 3", "unknown option"),
        ("3: 4", "unknown option '3'"),
        ("rank: four", "rank is 'four'; expected int"),
        ("rank: 4.0", "rank is 4.0; expected int"),
        ("rank:", "rank is None; expected int"),
        ("rank: 010", "rank is '010'; expected int"),  # octal in YAML 1.1
        ("rank: [4]", "rank is [4]; expected int"),
        ("rank: 2001-01-01", "rank is datetime.date(2001, 1, 1); expected int"),
        ("rank: 2001-99-99", "'rank' is '2001-99-99', which YAML cannot read"),
        ("rank: =", "'rank' is '=', which YAML cannot read"),
        ("rank: " + "9" * 5000, "'rank' is '999"),
        ("rank: " + "a" * 60_000, "expected int"),
        ("rslora: 1", "rslora is 1; expected bool"),
        ("gamma: .nan", "gamma is nan; allowed is a finite number"),
        ("gamma: nan", "gamma is nan; allowed is a finite number"),
        ("damping: -.inf", "damping is -inf; allowed is a finite number"),
        ("preset: [released]", "preset is ['released']; allowed is released"),
        ("rank: 4\ngamma: 5\nrank: 6", "gives 'rank' twice, again in line 3"),
        ("max-length: 4\nmax_length: 5", "gives 'max_length' twice"),
        ("fisher: true\nuse_fisher: true", "gives 'use_fisher' twice"),
        ("rank: !!python/object/apply:os.mkdir [made]", "has the tag 'tag:yaml.org,2002:python/object/apply:os.mkdir'"),
        ("!!python/name:os.system", "has the tag"),
        ("rank: !x 3", "has the tag '!x' in line 1"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nrank: *b", "has an anchor or alias in line 1"),
        ("<<: {rank: 4}", "unknown option '<<' (line 1)"),
        ("rank: {a: 4}", "is a mapping; expected a plain value"),
        ("rank: {a: {b: 1}}", "is nested in line 1"),
        ("target_modules: [[q_proj]]", "is nested in line 1"),
        ("rank: " + "[" * 60_000, "is nested in line 1"),
        ("- " * 30_000, "is nested in line 1"),
        ("rank: 4\n" * 20_000, "is larger than 64 KiB"),
        (b"model: \xff", "cannot be read"),
        ("rank: 4".encode("utf-16"), "cannot be read"),
        ("rank: \x00", "cannot be read"),
        ("\trank: 4", "cannot be read"),
        ('rank: "abc', "cannot be read"),
        ("rank: 4\n---\nrank: 5", "expected a single document"),
        ('model: "\\ud800"', "model is '\\ud800'; allowed is text without zero bytes"),
        ('model: "a\\0b"', "model is 'a\\x00b'; allowed is text without zero bytes"),
        ('model: ""', "model is ''; allowed is a name"),
    ],
    ids=range(47),
)
def test_a_mistake_in_a_config_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert says in message
    assert message.isprintable()
    assert len(message) < 800
    assert time.monotonic() - started < 5
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_a_config_file_keeps_what_it_means(tmp_path: Path) -> None:
    config = read(
        tmp_path, "\ufeff--max-length: 7\r\nrevision: 0755\r\nmodel: 007\r\nrslora: no\r\ngamma: 1e1\r\nrank: 12\r\n"
    )
    assert (config.data.max_length, config.revision, config.model) == (7, "0755", "007")
    assert (config.solve.rslora, config.solve.gamma, config.solve.rank) == (False, 10.0, 12)
    assert read(tmp_path, "target_modules: [q_proj, v_proj]\nrevision: 1_000\nskip_bad_lines: 3").revision == "1_000"


def test_numbers_in_a_config_file_are_written_as_yaml_has_them(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "num_samples: 1_000\nmax_length: 0x10\nseed: 007\ngamma: 1_024\nmax_gpu_mem: 24_000_000_000\n"
        "micro_batch_tokens: 4_096\n",
    )
    assert (config.data.num_samples, config.data.max_length, config.data.seed) == (1000, 16, 7)
    assert (config.solve.gamma, config.collect.micro_batch_tokens) == (1024.0, "4096")
    assert parse_size(str(config.max_gpu_mem)) == 24 * 10**9


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "/", "/nowhere/at/all"])
def test_a_config_file_that_is_none_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=f"--config {place} "):
        read_config_file(Path(place))


def test_a_config_file_may_come_through_a_pipe(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"rank: 4\n")
    os.close(writing)
    assert read_config_file(Path(f"/dev/fd/{reading}")) == {"rank": 4}
    os.close(reading)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=80)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.lists(
        st.sampled_from(["rank", "gamma", "model", "<<", "?", "- ", ": ", "\n", "&a ", "*a ", "!!", "[", "]", "{", "}"])
        | st.sampled_from(
            ['"', "'", "|", ">", "%", "1e3", "0o7", "12:30", "2001-02-30", "~", "yes", "=", "\\", "\x1b", "\u2028"]
        ),
        max_size=14,
    ).map(lambda pieces: "".join(pieces).encode())
)
def test_whatever_a_config_file_holds_only_a_config_error_comes_out(tmp_path: Path, content: bytes) -> None:
    try:
        read(tmp_path, content)
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
    assert message.isprintable()


def test_a_config_file_is_no_larger_than_it_says(tmp_path: Path) -> None:
    content = b"rank: 4\n#".ljust(MAX_CONFIG_BYTES, b"x")
    assert read(tmp_path, content).solve.rank == 4
    with pytest.raises(ConfigError, match="is larger than 64 KiB"):
        read(tmp_path, content + b"x")


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("option", "value", "code", "says"),
    [
        ("max-gpu-mem", "24 potatoes", 2, "--max-gpu-mem is '24 potatoes'; expected a size"),
        ("max-gpu-mem", "-1GB", 2, "--max-gpu-mem is '-1GB'"),
        ("max-gpu-mem", "0", 2, "--max-gpu-mem is '0'; it must be above zero"),
        ("max-gpu-mem", "nan", 2, "--max-gpu-mem is 'nan'"),
        ("max-gpu-mem", "inf", 2, "--max-gpu-mem is 'inf'"),
        ("max-gpu-mem", "1e9", 2, "--max-gpu-mem is '1e9'"),
        ("max-gpu-mem", "", 2, "--max-gpu-mem is ''"),
        ("max-gpu-mem", "\u0663GB", 2, "--max-gpu-mem is"),
        ("max-gpu-mem", "9" * 400 + "GB", 2, "no machine has that much"),
        ("max-gpu-mem", "9" * 5000, 2, "no machine has that much"),
        ("max-gpu-mem", "100B", 8, "too small"),
        ("max-host-mem", "-1", 2, "--max-host-mem is '-1'"),
        ("max-disk", TERMINAL, 2, "--max-disk is"),
        ("target-modules", "../q_proj", 2, "matches no linear layer; this model has down_proj"),
        ("target-modules", "/", 2, "matches no linear layer"),
        ("target-modules", "..", 2, "matches no linear layer"),
        ("target-modules", ",", 2, "matches no linear layer"),
        ("target-modules", " ", 2, "target_modules is ' '"),
        ("target-modules", "q_proj,nope", 2, "target_modules names 'nope', which is no linear layer"),
        ("target-modules", "(", 2, "is no regular expression"),
        ("target-modules", "*", 2, "is no regular expression"),
        ("target-modules", "a" * 70_000, 2, "matches no linear layer"),
        ("target-modules", TERMINAL, 2, "target_modules "),
        ("micro-batch-tokens", "9" * 5000, 2, "micro_batch_tokens is '999"),
        ("population-size", "9" * 400, 2, "population_size is a number of more than 77 digits"),
        ("device", "cuda:99999999999999999999", 2, "device is 'cuda:999"),
        ("device", TERMINAL, 2, "device is"),
        ("gamma", "nan", 2, "gamma is nan"),
        ("gamma", "1e-320", 2, "gamma is 1e-320"),
        ("lora-alpha", "1e308", 2, "lora_alpha is 1e+308"),
        ("skip-bad-lines", "-1", 2, "skip_bad_lines is -1; allowed is 0 to 1e9"),
        ("model", "", 2, "model is ''"),
        ("model", TERMINAL, 3, "neither a local folder nor"),
        ("dataset", "", 4, "the name of the dataset is empty"),
        ("dataset", f"./{TERMINAL}", 4, "no such file or folder"),
        ("split", TERMINAL, 4, "no split"),
        ("output-dir", "", 2, "output_dir is ''"),
        ("output-dir", "a\x00b", 2, "output_dir is"),
        ("output-dir", "a\udcffb", 2, "output_dir is 'a\\udcffb'; allowed is a path in UTF-8"),
        ("work-dir", " ", 2, "work_dir is ' '"),
        ("rates", TERMINAL, 2, "--rates has"),
        ("config", TERMINAL, 2, "cannot be read"),
    ],
    ids=range(42),
)
def test_a_mistaken_option_is_one_line_with_its_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    code: int,
    says: str,
) -> None:
    options: dict[str, Any] = golden_options(tmp_path, rates=RATES) | {option.replace("-", "_"): value}
    started = time.monotonic()
    assert run(monkeypatch, "plan", *flags(options)) == code
    out, error = capsys.readouterr()
    assert says in error
    assert out == ""
    assert error.count("\n") == 1
    assert error[:-1].isprintable()
    assert len(error) < 1000
    assert time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--rank", TERMINAL], [f"--{TERMINAL}", "3"], ["--preset", TERMINAL], [TERMINAL]]
)
def test_wrong_usage_shows_no_control_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(monkeypatch, "plan", *flags(golden_options(tmp_path)), *arguments) == 2
    out, error = capsys.readouterr()
    assert not [char for char in (out + error).replace("\n", "") if unicodedata.category(char) == "Cc"]


@pytest.mark.parametrize(("text", "size"), [("24gb", 24 * 10**9), ("24GiB", 24 << 30), (" 1.5 kb ", 1500), ("7", 7)])
def test_sizes_are_bytes_in_any_case(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_an_expression_that_takes_ages_is_refused_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streamda.layers.REGEX_SECONDS", 1)
    options = golden_options(tmp_path, target_modules=r"(\w+\.?)+!", rates=RATES)
    assert run(monkeypatch, "plan", *flags(options)) == 2
    assert "takes more than 1 s to be matched" in capsys.readouterr().err
    options["target_modules"] = r"model\.layers\.(0|2)\..*(q|v)_proj"
    assert run(monkeypatch, "plan", *flags(options), "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_layers"] == 4


def test_the_python_interface_refuses_what_the_command_line_refuses(tmp_path: Path) -> None:
    for options in (
        {"rank": 10**5000},
        {"rank": [10**5000]},
        {"output_dir": "a\0b"},
        {"model": "\ud800"},
        {"modle": "x"},
    ):
        with pytest.raises(ConfigError) as caught:
            streamda.initialize(**(golden_options(tmp_path) | options))
        assert str(caught.value).isprintable()


# ------------------------------------------------------------------------------------------------ names and locales


def test_any_name_in_any_locale_runs_and_is_shown_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces, line breaks, escapes, letters beyond ASCII; of the data also bytes that are no text."""
    name = "a b\n\x1b[2J\u202e\u00e9\u0436"
    folder = tmp_path / name
    folder.mkdir()
    options = golden_options(folder, output_dir=str(folder / "out"))
    data, model = folder / os.fsdecode(b"\xff.jsonl"), folder / "model"
    shutil.copy(options["dataset"], data)
    shutil.copytree(options["model"], model)
    options |= {"dataset": str(data), "model": str(model)}
    no_utf8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "streamda", "init", *flags(options)]
    done = subprocess.run(command, capture_output=True, env=os.environ | no_utf8, cwd=tmp_path)
    shown = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, shown
    assert "a b\\n\\x1b[2J\\u" in shown
    assert shown.replace("\n", "").isprintable()
    assert json.loads((folder / "out" / "streamda_report.json").read_text())["data"]["source"].endswith(".jsonl")
    # and where the names are known, but the terminal has no such letters
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run(monkeypatch, "plan", *flags(options), "--rates", RATES) == 0
    terminal.flush()
    shown = terminal.buffer.getvalue().decode("latin-1")
    assert "a b\\n\\x1b[2J\\u202e\u00e9\\u0436" in shown


# ------------------------------------------------------------------------------------------------ requirements


def test_what_is_installed_here_will_do() -> None:
    require_platform()


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"python": (3, 10, 14)}, "needs Python 3.11 or newer; this is 3.10.14"),
        ({"versions": {"zarr": "3.1.2", "torch": "2.8.0"}}, "needs zarr 3.1.3 or newer; this is 3.1.2"),
        ({"versions": {"zarr": "2.18.7", "torch": "2.8.0"}}, "needs zarr 3.1.3 or newer"),
        ({"versions": {"zarr": "3.2.0", "torch": "2.7.1+cu118"}}, "needs torch 2.8 or newer; this is 2.7.1"),
        ({"byte_order": "big"}, "little-endian"),
        ({"has_lapack": False}, "LAPACK"),
    ],
)
def test_a_platform_that_would_fail_late_is_refused(facts: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        require_platform(**facts)
    require_platform(versions={"zarr": "3.10.0rc1", "torch": "3.0"})


def test_both_interfaces_look_at_the_platform_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streamda.requirements.MIN_PYTHON", (9, 0))
    assert run(monkeypatch, "plan", *flags(golden_options(tmp_path))) == 2
    assert capsys.readouterr().err.startswith("streamda: error: streamda needs Python 9.0 or newer")
    for stage in (streamda.initialize, streamda.collect, streamda.solve):
        with pytest.raises(StreamdaError, match=r"needs Python 9\.0"):
            stage(**golden_options(tmp_path))
