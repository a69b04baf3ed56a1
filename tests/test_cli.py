"""The command line as a user meets it: exit codes, one line per error, output for people and for programs."""

import errno
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamda import cli, pipeline, session
from streamda.config import PRESETS, RunConfig, option_fields
from streamda.errors import StorageError
from streamda.report import InitReport
from streamda.rundir import RunDirectory
from tests.command_line import flags, run
from tests.conftest import GOLDEN
from tests.golden_options import golden_options

_INIT_ONLY = ("output_dir", "spill_statistics")


def configuration_alone(folder: Path) -> Path:
    """A model's folder without weights and tokenizer."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_bytes((GOLDEN / "model" / "config.json").read_bytes())
    return model


def collect_flags(folder: Path) -> list[str]:
    """Those of `golden_options` that `collect` takes."""
    return flags({name: value for name, value in golden_options(folder).items() if name not in _INIT_ONLY})


def init_without_adapter(monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    """An `init` that ends with all solved and its adapter unwritten."""

    def fail(*_: object) -> None:
        raise StorageError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_write_adapter", fail)
        assert run(patched, "init", *given) == 7


def test_init_inspect_solve_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", *flags(golden_options(tmp_path)), "--keep-statistics", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["modules"]) == 21
    assert run(monkeypatch, "inspect", str(tmp_path / "adapter")) == 0
    assert "21 ok" in capsys.readouterr().out
    work = tmp_path / "adapter.work"
    assert run(monkeypatch, "inspect", str(work), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["collected_blocks"] == facts["solved_blocks"] == [0, 1, 2]
    arguments = ["--statistics", str(work), "--output-dir", str(tmp_path / "other"), "--rank", "4"]
    assert run(monkeypatch, "solve", *arguments) == 0
    assert "train from it" in capsys.readouterr().out
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["r"] == 4
    # the same settings again: the same bits as init wrote
    assert run(monkeypatch, "solve", "--statistics", str(work), "--output-dir", str(tmp_path / "again")) == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_inspect_tells_how_far_a_run_at_work_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", *flags(golden_options(tmp_path)), "--keep-statistics", "--quiet") == 0
    work = tmp_path / "adapter.work"
    with RunDirectory.open_existing(work, exclusive=True) as at_work:
        at_work.units.drop("solve-0000")
        (work / "units" / "stats-0007.0123abcd.part").mkdir()  # being written
        capsys.readouterr()
        assert run(monkeypatch, "inspect", str(work), "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert run(monkeypatch, "inspect", str(work)) == 0
        text = capsys.readouterr().out
        assert "at work" in text
        assert re.search(r"solved +2 of 3 blocks", text)
    assert facts["at_work"]
    assert facts["solved_blocks"] == [1, 2]
    assert set(facts["units"].values()) == {None}
    assert run(monkeypatch, "inspect", str(work), "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert not after["at_work"]
    assert after["units"].keys() == facts["units"].keys()
    assert min(after["units"].values()) > 0
    assert run(monkeypatch, "inspect", str(work)) == 0
    assert "interrupted" not in capsys.readouterr().out
    with RunDirectory.open_existing(work, exclusive=True) as at_work:
        at_work.units.drop("stats-0000")
    assert run(monkeypatch, "inspect", str(work)) == 0
    assert "adapter.work, incomplete\n" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "adapter")  # as before the end of a first run
    assert run(monkeypatch, "inspect", str(tmp_path / "adapter")) == 2
    assert f"is not a folder; the run that makes it is in {work}" in capsys.readouterr().err


def test_plan_needs_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = configuration_alone(tmp_path)
    options = golden_options(tmp_path, model=str(model))
    assert run(monkeypatch, "plan", *flags(options)) == 0
    assert "backward" in capsys.readouterr().out
    assert run(monkeypatch, "plan", *flags(options), "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"]["peak_bytes"] > 0
    assert run(monkeypatch, "init", *flags(options)) == 3
    assert "holds no model.safetensors" in capsys.readouterr().err


def test_a_plan_needs_no_tokenizer_either_and_says_what_it_took_samples_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = configuration_alone(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "a"}\n' * 9)
    options = ["--model", str(model), "--max-gpu-mem", "400MB", "--max-length", "50"]
    for data, count in (([], 256), (["--dataset", str(rows)], 9), (["--dataset", str(rows), "--num-samples", "4"], 4)):
        assert run(monkeypatch, "plan", *options, *data, "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["num_samples"], facts["num_tokens"]) == (count, 50 * count)
        assert f"no tokenizer: assumed are {count} samples of 50 tokens, as many and" in " ".join(facts["notices"])
        assert not any("repeat" in notice for notice in facts["notices"])
    assert run(monkeypatch, "plan", *options, "--dataset", str(rows), "--text-column", "body") == 4  # is still refused
    assert "no column 'body'" in capsys.readouterr().err
    options[1] = str(GOLDEN / "model")
    assert run(monkeypatch, "init", *options, "--output-dir", str(tmp_path / "adapter")) == 4
    assert "the model's folder has none: put its tokenizer files there" in capsys.readouterr().err


def test_a_run_tells_the_command_that_began_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        *collect_flags(tmp_path),
        "--rank",
        "4",
        "--num-samples",
        "3",
        "--statistics",
        str(tmp_path / "statistics"),
    ]
    assert run(monkeypatch, "collect", *given) == 0
    capsys.readouterr()
    assert run(monkeypatch, "inspect", str(tmp_path / "statistics")) == 0
    command = re.search(r"^  command +streamda (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert command is not None
    again = shlex.split(command[1])
    assert again[0] == "collect"
    assert sorted(again[1:]) == sorted(given)
    assert run(monkeypatch, *again) == 0
    shown = capsys.readouterr()
    assert "already done: the statistics are there" in shown.out
    assert "continuing" not in shown.err


class TestRepair:
    """What `repair` says to run makes everything again, whatever the run was begun with, and nothing else."""

    @staticmethod
    def repaired(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *units: str
    ) -> list[str]:
        """Drops units one by one; what the last repair says to run."""
        for unit in units:
            capsys.readouterr()
            assert run(monkeypatch, "repair", str(folder), "--drop", unit) == 0
        told = capsys.readouterr().out
        return told.partition("to run next, from where it was begun:\n  ")[2].rstrip().split("\n  ")

    @pytest.mark.parametrize("more", [[], ["--overwrite"], ["--no-resume"]])
    def test_statistics_of_a_finished_run_are_collected(
        self, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        work, adapter = tmp_path / "adapter.work", tmp_path / "adapter" / "adapter_model.safetensors"
        given = [*flags(golden_options(tmp_path)), "--keep-statistics", "--quiet", *more]
        assert run(monkeypatch, "init", *given) == 0
        before = adapter.read_bytes()
        collect, solve = self.repaired(monkeypatch, capsys, work, "stats-0000", "stats-0001")
        assert solve == f"streamda solve --statistics {work} --output-dir DIR ..., where its adapter is wanted again"
        kept = (work / "units" / "stats-0002").stat().st_ino
        assert run(monkeypatch, "inspect", str(work)) == 0
        shown = capsys.readouterr().out
        assert "adapter.work, incomplete\n" in shown
        assert f"  to continue  {collect}\n" in shown
        assert "begun in" not in shown
        begun_in = Path.cwd()
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path)
            assert run(elsewhere, "inspect", str(work)) == 0
        assert f"  begun in     {begun_in}\n" in capsys.readouterr().out
        assert run(monkeypatch, "verify", str(work)) == 0
        assert f"1 of 3 blocks are collected; to continue: {collect}\n" in capsys.readouterr().out
        solving = ["solve", "--statistics", str(work), "--output-dir", str(tmp_path / "again"), "--quiet"]
        assert run(monkeypatch, *solving) == 2
        assert f"of 2 blocks; first run, from where it was begun: {collect}\n" in capsys.readouterr().err
        assert run(monkeypatch, *shlex.split(collect)[1:], "--quiet") == 0
        assert (work / "units" / "stats-0002").stat().st_ino == kept
        assert run(monkeypatch, *solving) == 0
        assert (tmp_path / "again" / adapter.name).read_bytes() == before
        assert self.repaired(monkeypatch, capsys, work, "solve-0001") == [solve]

    @pytest.mark.parametrize("more", [[], ["--keep-statistics"], ["--keep-statistics", "--overwrite"]])
    def test_a_run_without_its_adapter_is_continued_though_all_is_solved(
        self, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        init_without_adapter(monkeypatch, *flags(golden_options(tmp_path)), "--quiet", *more)
        work = tmp_path / "adapter.work"
        for look in ("inspect", "verify"):
            capsys.readouterr()
            assert run(monkeypatch, look, str(work)) == 0
            assert re.search(r"to continue:?  ?streamda init --model", capsys.readouterr().out)
        assert run(monkeypatch, "solve", "--statistics", str(work), "--output-dir", str(tmp_path / "b")) == (
            0 if more else 2
        )
        if not more:
            assert "`streamda collect` makes them, in another folder" in capsys.readouterr().err
        unit = "stats-0001" if more else "solve-0001"
        (again,) = self.repaired(monkeypatch, capsys, work, unit)
        kept = (work / "units" / "solve-0002").stat().st_ino
        if more:  # another command that only helps does not take its place
            assert run(monkeypatch, "collect", *collect_flags(tmp_path), "--quiet", "--statistics", str(work)) == 0
            assert (work / "units" / "solve-0002").stat().st_ino == kept
            assert self.repaired(monkeypatch, capsys, work, unit) == [again]
        assert shlex.split(again)[:2] == ["streamda", "init"]
        assert run(monkeypatch, *shlex.split(again)[1:], "--quiet") == 0
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

    def test_of_collected_statistics_nothing_names_init(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "statistics"
        given = [*collect_flags(tmp_path), "--statistics", str(folder), "--quiet", "--overwrite"]
        assert run(monkeypatch, "collect", *given) == 0
        (collect,) = self.repaired(monkeypatch, capsys, folder, "stats-0002")
        kept = (folder / "units" / "stats-0001").stat().st_ino
        assert run(monkeypatch, *shlex.split(collect)[1:], "--quiet") == 0
        assert (folder / "units" / "stats-0001").stat().st_ino == kept
        assert run(monkeypatch, "verify", str(folder)) == 0

    def test_an_adapter_that_was_put_in_place_last_thing_is_noticed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def write_and_fail(*arguments: Any) -> None:
            write(*arguments)
            raise StorageError("disk full")

        write = pipeline._write_adapter
        given = [*flags(golden_options(tmp_path)), "--quiet", "--keep-statistics"]
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, "_write_adapter", write_and_fail)
            assert run(patched, "init", *given) == 7
        assert run(monkeypatch, "init", *given) == 0  # already done
        (collect, _) = self.repaired(monkeypatch, capsys, tmp_path / "adapter.work", "stats-0001")
        assert collect.startswith("streamda collect")

    def test_a_command_that_was_refused_is_not_remembered(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = [*flags(golden_options(tmp_path)), "--keep-statistics", "--quiet"]
        assert run(monkeypatch, "init", *given) == 0
        work = tmp_path / "adapter.work"
        with RunDirectory.open_existing(work, exclusive=True) as opened:
            opened.update_settings({"skipped_samples": [{"sample": 0, "row": 0, "reason": "NaN"}]})
        before = json.loads((work / "run.json").read_text())["settings"]
        other = ["--rank", "4", "--output-dir", str(tmp_path / "b"), "--work-dir", str(work)]
        assert run(monkeypatch, "init", *given, *other) == 5
        assert "give --skip-bad-samples again" in capsys.readouterr().err
        after = json.loads((work / "run.json").read_text())["settings"]
        assert (after["stage"], after["options"]) == (before["stage"], before["options"])


def test_collect_leaves_the_work_directory_of_an_init_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init_without_adapter(monkeypatch, *flags(golden_options(tmp_path)), "--quiet")
    record = (tmp_path / "adapter.work" / "run.json").read_bytes()
    assert run(monkeypatch, "collect", *collect_flags(tmp_path), "--statistics", str(tmp_path / "adapter.work")) == 5
    assert "is the work directory of an `init` that keeps no statistics" in capsys.readouterr().err
    assert (tmp_path / "adapter.work" / "run.json").read_bytes() == record


def test_a_start_that_undoes_the_model_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", *flags(golden_options(tmp_path)), "--preset", "theorem", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    large = [facts for facts in report["modules"].values() if facts["step_zero_change"] > 0.5]
    assert large
    assert any(f"of {len(large)} layers the weight is changed by more than 50%" in line for line in report["notices"])
    assert run(monkeypatch, "init", *flags(golden_options(tmp_path)), "--overwrite", "--json") == 0
    assert not any("undoes" in line for line in json.loads(capsys.readouterr().out)["notices"])


def test_a_plan_says_what_a_run_would_do_on_this_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*flags(golden_options(tmp_path)), "--json"]
    assert run(monkeypatch, "plan", *options) == 0
    plan = json.loads(capsys.readouterr().out)
    need = plan["plan"]["disk_bytes"]
    assert not any("the disk has room" in notice for notice in plan["notices"])
    monkeypatch.setattr(pipeline, "room_for_run", lambda _: 1)
    assert run(monkeypatch, "plan", *options) == 0
    there = json.loads(capsys.readouterr().out)
    assert there["plan"] == plan["plan"]
    assert re.search("the disk has room for 1 B .*: a run needs .*, and a new one is refused", there["notices"][-1])
    thinned = SimpleNamespace(boundary_stride=2, weight_passes=2.4, disk_bytes=need - 1)
    prepared: Any = SimpleNamespace(plan=lambda **_: thinned, config=RunConfig())
    planned: Any = SimpleNamespace(disk_bytes=need)
    assert session.disk_notices(prepared, planned, need) == []
    (notice,) = session.disk_notices(prepared, planned, need - 1)
    assert notice.endswith("a run would keep every 2nd of the boundary states and read weights 2.4 times")


def test_another_run_s_adapter_is_refused_with_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*flags(golden_options(tmp_path)), "--num-samples", "3", "--keep-statistics", "--quiet"]
    assert run(monkeypatch, "init", *options) == 0
    assert run(monkeypatch, "init", *options, "--rank", "4") == 2
    error = capsys.readouterr().err
    assert "add --overwrite: it has the adapter of another run, where solve.rank was 8 and is now 4" in error
    assert f"; `streamda solve --statistics {tmp_path}/adapter.work --output-dir DIR` makes others" in error
    skipping = [*options, "--skip-bad-samples"]
    report = json.loads((tmp_path / "adapter" / "streamda_report.json").read_text())
    solve = ["solve", "--statistics", str(tmp_path / "adapter.work"), "--output-dir", str(tmp_path / "adapter")]
    assert run(monkeypatch, *solve) == 2
    assert "it has an adapter with the same settings; `streamda" in capsys.readouterr().err
    assert run(monkeypatch, *solve[:2], str(tmp_path / "adapter"), *solve[3:]) == 2
    assert re.search("there is no streamda run in .*, but an adapter; there is one in .*work", capsys.readouterr().err)
    with monkeypatch.context() as patched:  # as where a sample was left out
        skipped = InitReport.from_dict({**report, "skipped_samples": [{"sample": 0, "row": 0, "reason": "NaN"}]})
        patched.setattr(session, "read_report", lambda _: skipped)
        assert run(patched, "init", *skipping) == 0  # already done
        skipped.config["skip_bad_samples"] = True
        capsys.readouterr()
        assert run(patched, "init", *options) == 2
    assert "adapter of another run, where skip_bad_samples was true and is now false; `" in capsys.readouterr().err
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    assert run(monkeypatch, "init", *options, "--rank", "4") == 2
    assert "holds mine.txt, not written by streamda" in (error := capsys.readouterr().err)
    assert "add --overwrite" not in error
    assert run(monkeypatch, "init", *options, "--output-dir", str(tmp_path / "adapter.work")) == 2
    assert "it holds a run, or its statistics: give another --output-dir" in capsys.readouterr().err


def test_a_plan_at_given_rates_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ["--rates", "flops=1e9,flops64=5e8,read=1e6,write=2e6"]
    assert run(monkeypatch, "plan", *flags(golden_options(tmp_path)), *rates, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    bounds, plan = facts["bounds"], facts["plan"]
    assert bounds["rates"] == {"flops": 1e9, "flops64": 5e8, "read": 1e6, "write": 2e6}
    seconds = {
        name: count / (5e8 if name in ("solve", "statistics_float64") else 1e9) for name, count in plan["flops"].items()
    }
    assert bounds["phase_seconds"] == seconds
    read = plan["weight_bytes_read"] + sum(plan["bytes_read"].values())
    assert bounds["read_seconds"] == pytest.approx(read / 1e6)
    assert bounds["write_seconds"] == pytest.approx(sum(plan["bytes_written"].values()) / 2e6)
    assert bounds["in_turn_seconds"] == pytest.approx(sum(seconds.values()) + bounds["disk_seconds"])
    assert run(monkeypatch, "plan", *flags(golden_options(tmp_path)), *rates) == 0
    text = capsys.readouterr().out
    assert "at 1 GFLOP/s, 0.5 GFLOP/s in float64" in text
    assert "at 1.00 MB/s" in text


def test_profile_writes_a_trace_and_a_drawing_which_overwriting_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*flags(golden_options(tmp_path)), "--profile", "--rates", "flops=1e9,flops64=5e8,read=1e9,write=1e9"]
    work = ["--keep-statistics", "--work-dir", str(tmp_path / "work")]
    for arguments in (["init", *options, *work, "--json"], ["init", *options, *work, "--json", "--overwrite"]):
        assert run(monkeypatch, *arguments) == 0
        report = json.loads(capsys.readouterr().out)
        events = json.loads((tmp_path / "adapter" / "streamda_trace.json").read_text())["traceEvents"]
        names = {event["name"] for event in events if event["ph"] == "X"}
        assert {"prepare", "read weights", "forward", "backward", "write statistics", "commit"} <= names
        assert {"read statistics", "cholesky", "eigenvectors", "write adapter"} <= names
        assert "backward, " in (tmp_path / "adapter" / "streamda_timeline.svg").read_text()
        assert sum(seconds for name, seconds in report["busy"].items() if "(" not in name) <= report["wall_seconds"]
        assert sum(report["seconds"].values()) <= report["wall_seconds"] + report["seconds"]["write"]
        bounds = report["bounds"]
        assert bounds["flops"] == report["plan"]["flops"]
        assert bounds["bytes_read"] >= report["bytes"]["weights_read"] + report["bytes"]["boundaries_read"]
        assert bounds["times_the_bound"] == pytest.approx(report["wall_seconds"] / bounds["compute_seconds"])
    solve = ["solve", "--statistics", str(tmp_path / "work"), "--output-dir", str(tmp_path / "again"), "--profile"]
    for arguments in (solve, [*solve, "--overwrite"]):
        assert run(monkeypatch, *arguments) == 0
        assert "solve, " in (tmp_path / "again" / "streamda_timeline.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "/nowhere/at/all"], 3, "is not a folder"),
        (["--max-gpu-mem", "24 bananas"], 2, "--max-gpu-mem is '24 bananas'"),
        (["--max-gpu-mem", "5MB"], 8, "smallest|at least"),
        (["--rank", "49"], 2, r"of 21 layers, narrowest model\.layers\.0.*; use --rank \d+ or less"),
        (["--rank", "0"], 2, "rank is 0"),
        (["--preset", "bare"], 2, "preset is 'bare'; allowed is released, theorem"),
        (["--token-mask", "all"], 2, "token_mask is 'all'; allowed is attention or labels"),
        (["--target-modules", "nothing"], 2, "matches no linear layer; this model has"),
        (["--target-modules", "lm_head"], 2, "outside the decoder blocks"),
        (["--dataset", "missing.jsonl"], 4, r"missing\.jsonl"),
        (["--device", "cuda:99"], 2, "no CUDA device|CUDA"),
        (["--gamma", "-1"], 2, "gamma is -1"),
        (["--rates", "flops=fast"], 2, "--rates has 'flops=fast'"),
        (["--no-fisher"], 2, "--variance-weight 0"),
        (["--config", "missing.yaml"], 2, "cannot be read"),
    ],
)
def test_mistakes_end_in_one_line_and_their_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    given = dict(zip(arguments[::2], arguments[1::2], strict=False)) if len(arguments) > 1 else {}
    options = {k: v for k, v in golden_options(tmp_path).items() if f"--{k.replace('_', '-')}" not in given}
    assert run(monkeypatch, "init", *flags(options), *arguments) == code
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert len([line for line in error.splitlines() if not line.startswith("note:")]) == 1
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 8, "out of memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            8,
            "out of memory",
        ),
        (OSError(errno.EMFILE, "Too many open files"), 7, "ulimit -n"),
    ],
)
def test_a_limit_of_the_system_is_named_by_every_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    says: str,
) -> None:
    def fail(_folder: Path) -> None:
        raise error

    monkeypatch.setattr(cli, "verify_folder", fail)
    assert run(monkeypatch, "verify", str(tmp_path)) == code
    assert says in capsys.readouterr().err


def test_a_bug_is_no_limit_and_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_folder: Path) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(cli, "verify_folder", fail)
    monkeypatch.setattr("sys.argv", ["streamda", "verify", str(tmp_path)])
    monkeypatch.setattr(cli.stopping, "install", lambda: None)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli.main()


def test_an_unknown_option_names_the_near_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", "--rnk", "3") == 2
    assert "--rank" in capsys.readouterr().err


def test_a_config_file_gives_options_and_the_command_line_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank: 4\nmax-gpu-mem: 300MB\ndamping: 1e-5\ntarget_modules: [q_proj, v_proj]\nfisher: true\n")
    options = {k: v for k, v in golden_options(tmp_path).items() if k != "max_gpu_mem"}
    assert run(monkeypatch, "init", "--config", str(file), *flags(options), "--rank", "2", "--json") == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["solve"]["rank"] == 2
    assert config["solve"]["damping"] == 1e-5
    assert config["collect"]["target_modules"] == "q_proj,v_proj"
    file.write_text("rnak: 4\n")
    assert run(monkeypatch, "init", "--config", str(file), *flags(golden_options(tmp_path))) == 2
    assert f"{file}: unknown option 'rnak'; did you mean 'rank'? (line 1)" in capsys.readouterr().err


def test_verbose_shows_one_sample_with_its_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", *flags(golden_options(tmp_path)), "--verbose") == 0
    assert "[no loss]" in capsys.readouterr().err


def test_help_names_every_option_and_its_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "init", "--help") == 0
    text = capsys.readouterr().out
    for stage, entry in option_fields():
        if entry.name != "statistics":
            name = f"--{(entry.metadata['flag'] or entry.name).replace('_', '-')}"
            assert f"\n  {name} " in text, entry.name
            described = text.partition(f"\n  {name} ")[2].partition("\n  --")[0]
            if stage and type(entry.default) in (int, str):
                assert f"[default: {entry.default}]" in " ".join(described.split()), entry.name
    assert all(preset in text for preset in PRESETS)


@pytest.mark.parametrize(
    ("command", "has", "has_not"),
    [
        ("plan", ["--rank", "--rates", "--verbose"], ["--quiet", "--overwrite", "--resume", "--gamma", "--preset"]),
        (
            "collect",
            ["--statistics ", "--population-size", "--quiet"],
            ["--rank", "--preset", "--damping", "--work-dir"],
        ),
        (
            "solve",
            ["--statistics ", "--rank", "--preset", "--quiet"],
            ["--model", "--dataset", "--dtype", "--max-disk"],
        ),
    ],
)
def test_a_command_offers_what_it_has_a_use_for(
    command: str,
    has: list[str],
    has_not: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in has)
    assert not any(name in text for name in has_not)


@pytest.mark.parametrize("command", ["plan", "collect"])
def test_one_set_of_options_serves_several_commands(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = golden_options(tmp_path) | {"rank": 4, "preset": "theorem"}
    if command == "collect":
        options["statistics"] = str(tmp_path / "statistics")
        del options["output_dir"], options["spill_statistics"]
    assert run(monkeypatch, command, *flags(options), "--quiet", "--overwrite") == 0
    assert capsys.readouterr().err == ""


def test_the_command_of_the_mission_runs_on_a_cached_sibling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`streamda init --model meta-llama/Llama-2-13b --max-gpu-mem 24GB`, offline, with only the -hf sibling cached."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--meta-llama--Llama-2-13b-hf"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(GOLDEN / "model", snapshot)
    _write_tokenizer(snapshot)
    (repository / "blobs").mkdir()
    for file in list(snapshot.iterdir()):  # as the hub's client keeps them: links into a store of blobs
        blob = repository / "blobs" / f"{file.name}-blob"
        file.rename(blob)
        file.symlink_to(Path("..") / ".." / "blobs" / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    command = ["init", "--model", "meta-llama/Llama-2-13b", "--max-gpu-mem", "24GB"]
    assert run(monkeypatch, *command, "--num-samples", "4") == 0
    error = capsys.readouterr().err
    assert "using meta-llama/Llama-2-13b-hf" in error
    assert "small general set" in error
    config = json.loads((tmp_path / "Llama-2-13b-lora-da" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-2-13b-hf"
    assert sorted(os.listdir(tmp_path)) == ["Llama-2-13b-lora-da", "hub"]


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, which fits the golden model's 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {char: 3 + index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
