"""Signals stop a run where it is safe to, lost terminals do not, and either way the same command continues.

Sent by the process to itself at points with a name, so that they strike in the middle of what must not be cut short.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import streamda
from streamda import cli, pipeline, rows, setup, skeleton, stopping
from streamda.block_calls import BlockCall
from streamda.blocks import DecoderStack
from streamda.errors import ModelError, StoppedError, StreamdaError
from tests.killed import LEFTOVER, Action, finish, run_command, weights, whole_units

MIDDLE = "folders-synced:4"
"""In the commit of the fourth unit: everything is written, nothing is committed."""


@pytest.fixture(name="options")
def _options(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return tiny | {"output_dir": str(tmp_path / "adapter")}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def send_and_hang(number: int) -> None:
    """Two signals while the main thread is in C for minutes, as in a factorization, where no handler is ever run."""

    def send_both() -> None:
        send(number)
        time.sleep(2 * stopping.ECHO_SECONDS)
        send(number)

    threading.Timer(0.3, send_both).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 28)


def send_twice(number: int) -> None:
    send(number)
    send(number)


def be_stopped_while_downloading() -> None:
    def prepare(*_arguments: Any, **_options: Any) -> None:
        send(signal.SIGTERM)
        time.sleep(60)
        os._exit(99)

    pipeline.prepare = prepare


def be_stopped_in_a_library(*_arguments: Any, **_options: Any) -> None:
    """Which turns whatever is raised in it into an error of its own."""
    try:
        send(signal.SIGTERM)
        time.sleep(60)
        os._exit(99)
    except StoppedError as error:
        raise ValueError("the file is broken") from error


def be_stopped_while_reading_data() -> None:
    rows._load_table = be_stopped_in_a_library


def be_stopped_while_reading_a_configuration() -> None:
    skeleton.AutoConfig.from_pretrained = be_stopped_in_a_library


def be_stopped_where_nobody_looks() -> None:
    def find(*_arguments: Any, **_options: Any) -> None:
        try:
            be_stopped_in_a_library()
        except ValueError as error:
            raise ModelError("the model is broken") from error

    setup.find_model = find


def be_stopped_while_reporting() -> None:
    report = cli._report_error

    def stopped_and_report(error: StreamdaError, verbose: bool) -> int:
        send(signal.SIGTERM)
        return report(error, verbose)

    cli._report_error = stopped_and_report


def be_stopped_between_failing_and_reporting() -> None:
    def cause_of(_error: Exception) -> Exception:
        send(signal.SIGTERM)
        time.sleep(60)
        os._exit(99)

    stopping.cause_of = cause_of


def ignore_hangups() -> None:
    """What ``nohup`` does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def break_pipes() -> None:
    """Standard output and error go where nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))


def close_streams() -> None:
    """As under ``<&- >&- 2>&-``."""
    for number in (0, 1, 2):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None


def fill_stdout() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.faults),
        pytest.param(signal.SIGHUP, marks=pytest.mark.faults),
    ],
)
def test_a_signal_lets_the_commit_end_and_the_same_command_continues(
    tmp_path: Path, options: dict[str, Any], uninterrupted: bytes, number: signal.Signals
) -> None:
    ended = run_command(tmp_path, options, at=MIDDLE, act=partial(send, number))
    assert ended.code == 75
    assert ended.stderr.splitlines()[-1:] == [
        f"streamda: error: stopped by {number.name}; the same command continues from here"
    ]
    assert not [path for path in tmp_path.rglob("*") if LEFTOVER.search(path.name)]
    assert "grads-0002" in whole_units(tmp_path / "adapter.work")  # which was being committed
    finish(tmp_path, options, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.faults)])
def test_a_second_signal_leaves_at_once_and_is_as_safe(
    tmp_path: Path, options: dict[str, Any], uninterrupted: bytes, number: signal.Signals
) -> None:
    begun = time.monotonic()
    ended = run_command(tmp_path, options, at=MIDDLE, act=partial(send_and_hang, number))
    assert ended.code == 128 + number
    assert time.monotonic() - begun < 50  # it would have hung for 60
    assert whole_units(tmp_path / "adapter.work") == {"acts-0000", "acts-0001", "acts-0002"}
    finish(tmp_path, options, uninterrupted)


@pytest.mark.faults
def test_a_signal_and_its_echo_are_one(tmp_path: Path, options: dict[str, Any], uninterrupted: bytes) -> None:
    assert run_command(tmp_path, options, at=MIDDLE, act=partial(send_twice, signal.SIGTERM)).code == 75
    finish(tmp_path, options, uninterrupted)


def test_a_signal_before_anything_is_written_stops_at_once(tmp_path: Path, options: dict[str, Any]) -> None:
    ended = run_command(tmp_path, options, before=be_stopped_while_downloading)
    assert ended.code == 75
    assert "stopped by SIGTERM" in ended.stderr
    assert not (tmp_path / "adapter.work").exists()


@pytest.mark.parametrize(
    "be_stopped",
    [be_stopped_while_reading_data, be_stopped_while_reading_a_configuration, be_stopped_where_nobody_looks],
)
def test_what_a_library_makes_of_a_signal_is_still_a_stop(
    tmp_path: Path, options: dict[str, Any], be_stopped: Action
) -> None:
    table = tmp_path / "samples.csv"
    table.write_text("text\nsome text\n")
    ended = run_command(tmp_path, options | {"dataset": str(table)}, before=be_stopped)
    assert ended.code == 75
    assert ended.stderr == "streamda: error: stopped by SIGTERM; the same command continues from here\n"


@pytest.mark.parametrize(
    ("be_stopped", "code", "says"),
    [
        (be_stopped_while_reporting, 3, "is not a folder"),
        (be_stopped_between_failing_and_reporting, 75, "stopped by SIGTERM"),
    ],
)
def test_a_signal_at_the_end_of_a_failed_command_is_harmless(
    tmp_path: Path, options: dict[str, Any], be_stopped: Action, code: int, says: str
) -> None:
    ended = run_command(tmp_path, options | {"model": "/nowhere/at/all"}, before=be_stopped)
    assert ended.code == code
    assert says in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


INTERRUPTED = "import os, signal, time\nos.kill(os.getpid(), signal.{})\ntime.sleep(60)\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("start", ["module", "script"])
def test_a_signal_while_libraries_are_imported_ends_the_command_in_one_line(
    tmp_path: Path, start: str, number: signal.Signals
) -> None:
    (tmp_path / "torch.py").write_text(INTERRUPTED.format(number.name))
    script = tmp_path / "bin" / "streamda"
    script.parent.mkdir()
    script.write_text("import sys\nfrom streamda.cli import main\nsys.exit(main())\n")
    ended = import_streamda(tmp_path, *{"module": ["-m", "streamda", "plan"], "script": [str(script), "plan"]}[start])
    assert ended.returncode == 75
    assert ended.stderr == f"streamda: error: stopped by {number.name} before it did anything\n"


def test_other_programs_that_import_streamda_keep_their_signals(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(INTERRUPTED.format("SIGINT"))
    program = "try:\n    import streamda\nexcept KeyboardInterrupt:\n    print('mine')\n"
    ended = import_streamda(tmp_path, "-c", program)
    assert (ended.returncode, ended.stdout) == (0, "mine\n")


def import_streamda(first: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with a folder before all others in which modules are looked for."""
    path = os.pathsep.join([str(first), str(Path(streamda.__file__).parent.parent)])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=first, capture_output=True, text=True, timeout=50)


def test_ignored_hangups_stay_ignored(tmp_path: Path, options: dict[str, Any], uninterrupted: bytes) -> None:
    ended = run_command(tmp_path, options, before=ignore_hangups, at=MIDDLE, act=partial(send, signal.SIGHUP))
    assert ended.code == 0
    assert weights(tmp_path) == uninterrupted


@pytest.mark.parametrize("lose", [break_pipes, close_streams])
def test_a_run_outlives_its_terminal(tmp_path: Path, options: dict[str, Any], uninterrupted: bytes, lose: Any) -> None:
    """The notes on stderr come in the middle of it, the table on stdout at its end."""
    assert run_command(tmp_path, options, before=lose).code == 0
    assert weights(tmp_path) == uninterrupted


def test_a_full_disk_under_stdout_is_reported_when_all_else_is_done(
    tmp_path: Path, options: dict[str, Any], uninterrupted: bytes
) -> None:
    ended = run_command(tmp_path, options | {"json": True}, before=fill_stdout)
    assert ended.code == 7
    assert "stdout cannot be written: No space left on device" in ended.stderr
    assert weights(tmp_path) == uninterrupted


def stopped_at(number: int, folder: Path, tiny: dict[str, Any], expected: bytes) -> None:
    """Stops a run at its n-th safe point, and finishes it."""
    folder.mkdir()
    options = tiny | {"output_dir": str(folder / "adapter")}
    safe_points = iter(range(1, number))

    def check() -> None:
        if next(safe_points, None) is None:
            raise StoppedError("here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "check", check)
        with pytest.raises(StoppedError):
            streamda.initialize(**options)
    assert not [path for path in folder.rglob("*") if LEFTOVER.search(path.name)]
    finish(folder, options, expected)


def num_safe_points(tiny: dict[str, Any], folder: Path) -> int:
    folder.mkdir()
    reached: list[None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "check", lambda: reached.append(None))
        streamda.initialize(**tiny, output_dir=str(folder / "adapter"))
    return len(reached)


def test_a_run_can_be_stopped_between_any_two_micro_batches(
    tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes
) -> None:
    total = num_safe_points(tiny, tmp_path / "counted")
    assert total > 50
    for number in random.Random(0).sample(range(1, total + 1), 2):
        stopped_at(number, tmp_path / str(number), tiny, uninterrupted)


def test_no_two_micro_batches_pass_without_a_safe_point_between_them(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[str] = []
    run, embed, logits = BlockCall.run, DecoderStack.embed, DecoderStack.logits

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            passed.append(name)
            return function(*args, **kwargs)

        return noted

    monkeypatch.setattr(BlockCall, "run", noting("block", run))
    monkeypatch.setattr(DecoderStack, "embed", noting("prologue", embed))
    monkeypatch.setattr(DecoderStack, "logits", noting("head", logits))
    monkeypatch.setattr(stopping, "check", lambda: passed.append("check"))
    streamda.initialize(**options, micro_batch_tokens="1")
    assert {"block", "prologue", "head"} <= set(passed)
    assert all("check" in pair for pair in pairwise(passed)), passed


@pytest.mark.faults
def test_a_run_can_be_stopped_at_every_safe_point(tmp_path: Path, tiny: dict[str, Any], uninterrupted: bytes) -> None:
    for number in range(1, num_safe_points(tiny, tmp_path / "counted") + 1):
        stopped_at(number, tmp_path / str(number), tiny, uninterrupted)


def test_keyboard_interrupts_are_left_to_users_of_the_python_interface(
    tmp_path: Path, options: dict[str, Any], uninterrupted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("streamda.boundary.BoundaryWriter.append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            streamda.initialize(**options)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finish(tmp_path, options, uninterrupted)
