"""A limit that the kernel enforces: it bites, it lets pass, and it leaves nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import run_limited
from tools.run_limited import NoCgroupError, folder_bytes, memory_cgroup

TOUCH = "bytearray(b'x') * 200_000_000"


@pytest.fixture
def _cgroup() -> None:
    try:
        with memory_cgroup(100_000_000):
            pass
    except NoCgroupError as error:
        pytest.skip(f"needs a memory cgroup of its own, and none can be made here: {error}")


def run(limit: str, code: str, tmp_path: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    facts = tmp_path / "facts.json"
    command = [sys.executable, "-m", "tools.run_limited", "--memory", limit, "--json", str(facts), *options, "--"]
    result = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert facts.is_file(), result.stderr
    return result, json.loads(facts.read_text())


@pytest.mark.usefixtures("_cgroup")
def test_a_command_that_needs_more_is_killed(tmp_path: Path) -> None:
    result, facts = run("100MB", TOUCH, tmp_path)
    assert result.returncode == facts["exit_code"] == 137
    assert facts["kills"] == 1
    assert facts["limit_hits"] > 0
    assert facts["cgroup_peak_bytes"] <= 100_000_000
    assert "1 processes killed" in result.stderr


@pytest.mark.usefixtures("_cgroup")
def test_a_command_that_needs_less_runs_and_is_measured(tmp_path: Path) -> None:
    code = f"import time; block = {TOUCH}; time.sleep(0.3); print(len(block))"
    result, facts = run("400MB", code, tmp_path)
    assert result.returncode == 0
    assert result.stdout == "200000000\n"
    assert facts["kills"] == 0
    assert 200_000_000 <= facts["private_peak_bytes"] <= facts["cgroup_peak_bytes"] <= 400_000_000
    assert facts["seconds"] >= 0.3


@pytest.mark.usefixtures("_cgroup")
def test_exit_code_and_disk_pass_through_and_the_cgroup_is_gone(tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    code = (
        "import pathlib, sys, time\n"
        f"folder = pathlib.Path({str(watched)!r}); folder.mkdir()\n"
        "(folder / 'file').write_bytes(b'x' * 3_000_000)\n"
        "print(next(l for l in open('/proc/self/cgroup') if 'streamda-limited' in l).strip().rpartition('/')[2])\n"
        "time.sleep(1.2); (folder / 'file').unlink(); sys.exit(7)"
    )
    result, facts = run("100MB", code, tmp_path, "--watch-disk", str(watched))
    assert result.returncode == 7
    assert 3_000_000 <= facts["folder_peak_bytes"][str(watched)] < 3_100_000
    name = result.stdout.strip()
    assert name.startswith("streamda-limited-")
    assert not [parent for parent, _ in run_limited._parents() if (parent / name).exists()]


@pytest.mark.usefixtures("_cgroup")
def test_what_the_command_leaves_running_is_ended(tmp_path: Path) -> None:
    code = (
        "import subprocess\n"
        "quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}\n"
        "print(subprocess.Popen(['sleep', '60'], **quiet).pid)"
    )
    result, facts = run("100MB", code, tmp_path)
    assert facts["exit_code"] == 0
    left = Path(f"/proc/{int(result.stdout)}/stat")
    assert not left.exists() or left.read_text().rpartition(")")[2].split()[0] == "Z"


def test_where_no_cgroup_can_be_made_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(run_limited, "_parents", lambda: iter([(tmp_path / "absent", 1)]))
    assert run_limited.main(["--memory", "1GB", "--", "true"]) == run_limited.NO_CGROUP
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "no memory cgroup can be made" in text


def test_the_size_of_a_folder_counts_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"x" * 1_000_000)
    alone = folder_bytes(tmp_path)
    assert alone >= 1_000_000
    os.link(tmp_path / "inner" / "file", tmp_path / "second name")
    (tmp_path / "link").symlink_to(tmp_path / "inner" / "file")
    assert folder_bytes(tmp_path) - alone < 10_000
    assert folder_bytes(tmp_path / "absent") == 0
