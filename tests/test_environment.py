"""The machine around a run: its limits, its file systems, its places, its clock, its locale. Each refusal is one line.

Not here: locks and the record of a run (test_rundir), a disk that fills up meanwhile (test_disk), kills (test_resume).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import streamda
from streamda import collect_stage, files, filesystem, limits, places, setup, sweep
from streamda.config import RunConfig
from streamda.errors import BudgetError, ConfigError, LockedError, StorageError, StreamdaError
from streamda.memory import MemoryBudget, anonymous_bytes
from tests.killed import PROCESSES, weights
from tests.models import SMALL, make_samples, run_options, write_inputs, write_samples

IS_ROOT = os.geteuid() == 0
NOBODY = 65534


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and samples, which tests leave as it is."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def options(inputs: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(**given: Any) -> dict[str, Any]:
        return SMALL | run_options(inputs, output_dir=str(tmp_path / "adapter")) | given

    return make


@dataclass
class Outcome:
    """How a run in a process of its own ended."""

    code: int
    message: str


def outcome(
    options: dict[str, Any],
    *,
    limits: dict[int, int] | None = None,
    user: int | None = None,
    umask: int | None = None,
    growth: int | None = None,
) -> Outcome:
    """Runs `initialize` in a process of its own, under limits of the system or as another user."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_outcome, args=(theirs, options, limits or {}, user, umask, growth))
    process.start()
    theirs.close()
    with ours:
        found = ours.recv() if ours.poll(120) else (-1, "no answer")
    process.join()
    return Outcome(*found)


def _outcome(
    pipe: Connection,
    options: dict[str, Any],
    limits: dict[int, int],
    user: int | None,
    umask: int | None,
    growth: int | None,
) -> None:
    if umask is not None:
        os.umask(umask)
    if user is not None:
        os.setuid(user)
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
    if growth is not None:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                most = int(line.split()[1]) * 1024 + growth
                resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    try:
        streamda.initialize(**options)
        found = (0, "")
    except StreamdaError as error:
        found = (error.exit_code, str(error))
    except BaseException as error:  # the test wants to see it
        found = (1, repr(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    pipe.send(found)


class TestPlaces:
    @pytest.fixture
    def refused(self, options: Callable[..., dict[str, Any]]) -> Callable[..., str]:
        """The message of a run that is refused before its model, which is not there, is missed."""

        def attempt(code: int, **given: Any) -> str:
            started = time.monotonic()
            with pytest.raises(StreamdaError) as caught:
                streamda.initialize(**options(**({"model": "./no-such-model"} | given)))
            assert caught.value.exit_code == code, caught.value
            assert len(str(caught.value).splitlines()) == 1
            assert time.monotonic() - started < 1
            return str(caught.value)

        return attempt

    def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_looked_for(
        self, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        file = tmp_path / "file"
        file.write_bytes(b"mine")
        loop = tmp_path / "loop"
        loop.symlink_to(loop)
        for option in ("output_dir", "work_dir"):
            for place in (file, file / "below" / "it", loop, loop / "below"):
                assert place.name in refused(7, **{option: str(place)}) or place.parent.name in ("below", "loop")
        assert file.read_bytes() == b"mine"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]

    @pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
    @pytest.mark.parametrize("mode", [0o555, 0o666, 0o000], ids=["read-only", "no execute bit", "closed"])
    def test_a_folder_without_permission_is_refused_before_the_model_is_looked_for(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]], mode: int
    ) -> None:
        closed, opened = tmp_path / "closed", tmp_path / "opened"
        for folder in (closed, opened):
            (folder / "old").mkdir(parents=True)
        for parent in (opened, *tmp_path.parents[:3], tmp_path):
            with contextlib.suppress(OSError):
                parent.chmod(0o777)
        closed.chmod(mode)
        for given in (
            {"output_dir": str(closed / "new"), "work_dir": str(opened / "w")},
            {"output_dir": str(opened / "a"), "work_dir": str(closed / "new")},
        ):
            found = outcome(options(model="./no-such-model", **given), user=NOBODY)
            assert found.code == 7, found
            assert "Permission denied" in found.message
        assert sorted(path.name for path in opened.iterdir()) == ["old"]

    def test_an_output_in_use_is_refused_before_the_model_is_looked_for(
        self, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "thesis.txt").write_bytes(b"years")
        assert "is not empty" in refused(2)
        assert "thesis.txt" in refused(2, overwrite=True)
        assert (tmp_path / "adapter" / "thesis.txt").read_bytes() == b"years"

    def test_places_in_each_other_are_refused_through_links_too(
        self, inputs: Path, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        model = tmp_path / "model"
        shutil.copytree(inputs / "model", model)
        (tmp_path / "link").symlink_to(tmp_path)
        (tmp_path / "to-model").symlink_to(model)
        here, there = str(tmp_path / "a"), str(tmp_path / "link" / "a")
        for output, work in ((here, there), (here, there + "/w"), (here + "/o", there)):
            assert "beside each other" in refused(2, output_dir=output, work_dir=work)
        before = sorted(path.name for path in model.iterdir())
        for given in (
            {"output_dir": str(model)},
            {"work_dir": str(model)},
            {"work_dir": str(tmp_path / "to-model" / "run")},
            {"output_dir": str(tmp_path / "link" / "model" / "deep" / "out")},  # and the run beside it
        ):
            assert "lies in the model's folder" in refused(2, model=str(tmp_path / "to-model"), **given)
        assert sorted(path.name for path in model.iterdir()) == before

    def test_an_adapter_below_the_model_s_folder_is_no_part_of_the_model(
        self, inputs: Path, tmp_path: Path, options: Callable[..., dict[str, Any]]
    ) -> None:
        model = Path(shutil.copytree(inputs / "model", tmp_path / "model"))
        given = options(model=str(model), output_dir=str(model / "deep" / "adapter"), work_dir=str(tmp_path / "work"))
        assert not streamda.initialize(**given).already_done
        assert streamda.initialize(**given).already_done

    @pytest.mark.parametrize("code", [errno.EBUSY, errno.EACCES, errno.EROFS])
    def test_a_run_folder_in_a_place_that_cannot_be_changed_is_used_and_stays(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        """A mount point, as of a container, or a folder that an administrator made."""
        work = tmp_path / "disk" / "work"
        work.mkdir(parents=True)

        class Fixed(files.SystemCalls):
            @staticmethod
            def mkdir(path: Path) -> None:
                if path.parent == work.parent:
                    raise OSError(code, os.strerror(code))
                os.mkdir(path)

            @staticmethod
            def rmdir(path: Path) -> None:
                if path == work:
                    raise OSError(code, os.strerror(code))
                os.rmdir(path)

        monkeypatch.setattr(files, "system_calls", Fixed())
        for already_done in (False, True):
            assert streamda.initialize(**options(work_dir=str(work))).already_done == already_done
            assert os.listdir(work) == []

    def test_an_empty_folder_for_the_run_outlives_a_run_that_was_done_already(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]]
    ) -> None:
        streamda.initialize(**options())
        (tmp_path / "adapter.work").mkdir()
        assert streamda.initialize(**options()).already_done
        assert (tmp_path / "adapter.work").is_dir()

    def test_names_are_made_of_the_folders_that_dots_stand_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = tmp_path / "here"
        (here / "deeper").mkdir(parents=True)
        monkeypatch.chdir(here)
        for dots, meant in ((".", here), ("./", here), ("..", tmp_path), ("deeper/..", here)):
            config = RunConfig(model="org/name", output_dir=dots)
            assert places.output_dir(config) == meant
            assert places.work_dir(config) == meant.with_name(f"{meant.name}.work")
            assert places.output_dir(RunConfig(model=dots)) == Path(f"{meant.name}-lora-da")
        for model in ("org/name", "org/name/", "./name"):
            assert str(places.work_dir(RunConfig(model=model))) == "name-lora-da.work"
        assert str(places.work_dir(RunConfig(model="m", output_dir="a/b/"))) == "a/b.work"

    def test_a_linked_run_folder_is_used_where_it_points_and_stays_a_link(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]]
    ) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "disk")
        streamda.initialize(**options(work_dir=str(tmp_path / "run"), keep_statistics=True))
        assert (tmp_path / "run").is_symlink()
        assert (tmp_path / "disk" / "run.json").is_file()

    def test_links_inside_a_run_are_never_written_through(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]]
    ) -> None:
        work, target = tmp_path / "adapter.work", tmp_path / "target"
        streamda.initialize(**options(keep_statistics=True))
        for name in ("units", "units/stats-0001", "units/solve-0000"):
            (work / name).rename(target)
            (work / name).symlink_to(target)
            before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
            with pytest.raises(StreamdaError) as caught:
                streamda.initialize(**options(output_dir=str(tmp_path / "b"), work_dir=str(work), rank=3))
            assert caught.value.exit_code == 10
            assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
            (work / name).unlink()
            target.rename(work / name)

    def test_two_runs_with_one_output_the_second_to_end_is_refused_and_keeps_its_work(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Meanwhile(collect_stage.Collection):
            def collect(self, solver: Any) -> None:
                super().collect(solver)
                monkeypatch.undo()
                streamda.initialize(**options(work_dir=str(tmp_path / "first"), rank=3))

        monkeypatch.setattr("streamda.pipeline.Collection", Meanwhile)
        with pytest.raises(ConfigError, match="is not empty; give another --output-dir"):
            streamda.initialize(**options(work_dir=str(tmp_path / "second")))
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["r"] == 3
        report = streamda.initialize(**options(work_dir=str(tmp_path / "second"), output_dir=str(tmp_path / "other")))
        assert report.resumed
        assert report.bytes["weights_read"] == 0

    def test_an_adapter_that_its_own_disk_cannot_hold_is_refused_before_any_work(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory = Path("/dev/shm")
        if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev or not os.access(memory, os.W_OK):
            pytest.skip("there is no second file system here")
        real = os.statvfs

        class Full:
            f_frsize, f_bavail = 1, 1000

        def statvfs(path: Path) -> Any:
            return Full() if memory in [path, *path.parents] else real(path)

        monkeypatch.setattr(files.SystemCalls, "statvfs", staticmethod(statvfs))
        output = memory / f"streamda-test-{os.getpid()}"
        with pytest.raises(StorageError, match=r"the adapter needs .* and a reserve"):
            streamda.initialize(**options(output_dir=str(output), work_dir=str(tmp_path / "work")))
        assert not output.exists()
        assert os.listdir(tmp_path / "work" / "units") == []

    def test_a_run_in_use_is_refused_before_the_model_is_looked_for(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]], refused: Callable[..., str]
    ) -> None:
        streamda.initialize(**options(keep_statistics=True))
        work = tmp_path / "adapter.work"
        with streamda.rundir.RunDirectory.open_existing(work, exclusive=True):
            message = refused(6, work_dir=str(work), output_dir=str(tmp_path / "b"))
            assert f"process {os.getpid()} on {os.uname().nodename} since " in message
            with pytest.raises(LockedError):
                streamda.solve(statistics=str(work), output_dir=str(tmp_path / "b"))


class TestFileSystems:
    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Has one kind of system call fail, as on file systems that do not know it."""

        def fail(name: str, code: int) -> None:
            calls = files.SystemCalls()
            real = getattr(calls, name)

            def call(*args: Any) -> Any:
                # every fsync of a folder, every rename of one, every lock
                path = args[0] if name == "rename" else f"/proc/self/fd/{args[0]}"
                if name == "flock" or os.path.isdir(path):
                    raise OSError(code, os.strerror(code))
                return real(*args)

            monkeypatch.setattr(calls, name, call, raising=False)
            monkeypatch.setattr(files, "system_calls", calls)

        return fail

    @pytest.mark.parametrize(
        ("name", "code", "what"),
        [
            ("flock", errno.ENOSYS, "lock a file"),
            ("flock", errno.ENOLCK, "lock a file"),
            ("fsync", errno.EINVAL, "sync a folder"),
            ("rename", errno.EXDEV, "rename a folder"),
        ],
    )
    def test_one_that_cannot_is_refused_at_once_and_leaves_nothing(
        self,
        tmp_path: Path,
        options: Callable[..., dict[str, Any]],
        broken: Callable[..., None],
        name: str,
        code: int,
        what: str,
    ) -> None:
        broken(name, code)
        with pytest.raises(StorageError, match=f"cannot {what} .*{os.strerror(code)}.*--unsafe-filesystem"):
            streamda.initialize(**options(model="./no-such-model"))
        assert list(tmp_path.iterdir()) == []

    def test_locks_that_do_not_exclude_are_none(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files.SystemCalls, "flock", staticmethod(lambda *_: None))
        with pytest.raises(StorageError, match="cannot lock a file"):
            streamda.initialize(**options(model="./no-such-model"))

    @pytest.mark.parametrize(("name", "code"), [("flock", errno.ENOSYS), ("fsync", errno.EINVAL)])
    def test_one_that_cannot_lock_or_sync_is_used_if_that_is_accepted(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]], broken: Callable[..., None], name: str, code: int
    ) -> None:
        broken(name, code)
        calls = files.system_calls
        streamda.initialize(**options(unsafe_filesystem=True))
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
        assert files.system_calls is calls

    def test_a_failing_disk_and_a_held_lock_are_never_put_up_with(self, tmp_path: Path) -> None:
        class Calls(files.SystemCalls):
            @staticmethod
            def fsync(descriptor: int) -> None:
                raise OSError(errno.EIO, "")

            @staticmethod
            def flock(descriptor: int, kind: int) -> None:
                raise BlockingIOError(errno.EAGAIN, "")

        calls = filesystem._Lenient(Calls())
        with pytest.raises(OSError, match="5"):
            calls.fsync(0)
        with pytest.raises(BlockingIOError):
            calls.flock(0, 0)

    def test_what_a_killed_attempt_left_goes_and_one_under_way_stays(self, tmp_path: Path) -> None:
        living, dead, bare = (tmp_path / f"probe.0000000{number}.part" for number in range(3))
        for folder in (living, dead, bare):
            folder.mkdir()
        (dead / "file").write_bytes(b"")
        with filesystem._locked(living / "file"):  # of whichever process on whichever host
            filesystem.require_safe(tmp_path, unsafe=False)
            assert list(tmp_path.iterdir()) == [living]
        filesystem.require_safe(tmp_path, unsafe=False)
        assert list(tmp_path.iterdir()) == []

    def test_an_attempt_that_another_run_took_for_a_leftover_is_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, cleared = os.open, []

        def clearing_open(path: Path, *args: Any) -> int:
            if path.name == "file" and not cleared:
                cleared.append(path.parent)
                shutil.rmtree(path.parent)
            return real(path, *args)

        monkeypatch.setattr(files.SystemCalls, "open", staticmethod(clearing_open))
        filesystem.require_safe(tmp_path, unsafe=False)
        assert len(cleared) == 1
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_full_or_closed_is_no_odd_file_system(
        self, tmp_path: Path, broken: Callable[..., None]
    ) -> None:
        broken("rename", errno.ENOSPC)
        with pytest.raises(StorageError) as caught:
            filesystem.require_safe(tmp_path, unsafe=True)
        assert "unsafe" not in str(caught.value)
        assert "free some space" in str(caught.value)
        assert list(tmp_path.iterdir()) == []


class TestLimits:
    @pytest.fixture
    def sharded(self, inputs: Path, tmp_path: Path) -> Path:
        """A model whose every tensor is a shard, with many more shards of tensors that it does not use."""
        folder = tmp_path / "sharded"
        folder.mkdir()
        tensors = {}
        for shard in (inputs / "model").glob("*.safetensors"):
            tensors |= load_file(shard)
        tensors |= {f"model.layers.{index}.rotary_emb.inv_freq": torch.ones(2) for index in range(300 - len(tensors))}
        where = {name: f"model-{number:05d}.safetensors" for number, name in enumerate(tensors)}
        for name, file in where.items():
            save_file({name: tensors[name]}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        shutil.copy(inputs / "model" / "config.json", folder)
        return folder

    def test_three_hundred_shards_need_few_descriptors(
        self, sharded: Path, options: Callable[..., dict[str, Any]]
    ) -> None:
        assert len(list(sharded.glob("*.safetensors"))) == 300
        found = outcome(options(model=str(sharded)), limits={resource.RLIMIT_NOFILE: 48})
        assert found == Outcome(0, "")

    @pytest.mark.parametrize("number", [11, 14])
    def test_too_few_descriptors_are_named_with_their_limit(
        self, options: Callable[..., dict[str, Any]], number: int
    ) -> None:
        found = outcome(options(spill_statistics=True), limits={resource.RLIMIT_NOFILE: number})
        assert found.code == 7, found
        assert "ulimit -n" in found.message
        assert len(found.message.splitlines()) == 1

    def test_a_limit_on_file_sizes_is_named(self, options: Callable[..., dict[str, Any]]) -> None:
        found = outcome(options(), limits={resource.RLIMIT_FSIZE: 4096})
        assert found.code == 7, found
        assert "ulimit -f" in found.message
        assert outcome(options()) == Outcome(0, "")

    def test_a_limit_on_memory_is_named_with_budget_and_need(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]]
    ) -> None:
        rows = write_samples(tmp_path / "long.jsonl", make_samples([60] * 64))
        found = outcome(options(dataset=str(rows), micro_batch_tokens="3840"), growth=4_000_000)
        assert found.code == 8, found
        assert "ulimit -d is" in found.message
        assert len(found.message.splitlines()) == 1

    @pytest.mark.parametrize(
        ("where", "error"),
        [
            ("prepare", MemoryError()),
            ("collect", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ...")),
            ("solve", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
            ("write", OSError(errno.ENOMEM, "Cannot allocate memory")),
        ],
        ids=["prepare", "collect", "solve", "write"],
    )
    def test_out_of_memory_anywhere_is_one_line_and_the_same_command_continues(
        self,
        tmp_path: Path,
        options: Callable[..., dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
        where: str,
        error: Exception,
    ) -> None:
        def fail(*_args: Any, **_kwargs: Any) -> Any:
            raise error

        place = {
            "prepare": (setup, "load_calibration"),
            "collect": (sweep.Sweep, "backward_block"),
            "solve": (streamda.solve_stage.Solver, "solve_block"),
            "write": (streamda.pipeline, "write_adapter"),
        }[where]
        with monkeypatch.context() as patch:
            patch.setattr(*place, fail)
            with pytest.raises(BudgetError) as caught:
                streamda.initialize(**options())
        message = str(caught.value)
        assert caught.value.exit_code == 8
        assert len(message.splitlines()) == 1
        assert "out of memory" in message
        if where != "prepare":
            assert "with a budget of 400 MB, of which the plan needs " in message
            assert not list((tmp_path / "adapter.work" / "units").glob("*.part"))
            assert streamda.initialize(**options()).resumed

    def test_what_is_no_limit_passes_as_it_is(self) -> None:
        for error in (RuntimeError("shapes do not match"), OSError(errno.ENOENT, "no"), ConfigError("wrong")):
            with pytest.raises(type(error)) as caught, limits.limit_errors(1, 1):
                raise error
            assert caught.value is error

    def test_a_limit_behind_another_error_is_found(self) -> None:
        try:
            raise ConfigError("the tokenizer cannot be loaded") from OSError(errno.EMFILE, "Too many open files")
        except ConfigError as error:
            caused = error
        with pytest.raises(StorageError, match=r"ulimit -n"), limits.limit_errors():
            raise caused
        with pytest.raises(BudgetError, match=r"ulimit -u"), limits.limit_errors():
            raise RuntimeError("can't start new thread")

    @pytest.mark.parametrize(
        "text",
        [
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
            "std::bad_alloc",
        ],
    )
    def test_libraries_below_torch_run_out_of_memory_too(self, text: str) -> None:
        with pytest.raises(BudgetError, match="out of memory"), limits.limit_errors():
            raise RuntimeError(text)


class TestMemoryOfTheMachine:
    @pytest.fixture
    def machine(self, tmp_path: Path) -> Callable[..., int | None]:
        def limit(memory: str, membership: str, **values: str) -> int | None:
            (tmp_path / "proc" / "self").mkdir(parents=True, exist_ok=True)
            (tmp_path / "proc" / "meminfo").write_text(memory)
            (tmp_path / "proc" / "self" / "cgroup").write_text(membership)
            for name, value in values.items():
                folder = tmp_path.joinpath("cgroup", *name.split("_"))
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "memory.max").write_text(value)
            return limits.memory_limit(tmp_path / "proc", tmp_path / "cgroup")

        return limit

    def test_it_is_the_least_of_ram_and_of_the_cgroups_above(self, machine: Callable[..., int | None]) -> None:
        ram = "MemTotal:       1000 kB\nMemAvailable: 3 kB\n"
        assert machine(ram, "0::/\n") == 1_024_000
        assert machine(ram, "0::/a/b\n", a_b="max\n", a="500000\n") == 500_000
        assert machine(ram, "0::/a/b\n", a_b="400000\n", a="500000\n") == 400_000
        assert machine(ram, "0::/a/b\n", a_b="nonsense", a="-5") == 1_024_000

    def test_the_first_version_of_cgroups_is_read_too(self, tmp_path: Path, machine: Callable[..., int | None]) -> None:
        folder = tmp_path / "cgroup" / "memory" / "job"
        folder.mkdir(parents=True)
        (folder / "memory.limit_in_bytes").write_text("300000\n")
        (folder.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")
        ram = "MemTotal:       1000 kB\n"
        assert machine(ram, "5:cpu:/job\n4:memory:/job\n0::/\n") == 300_000
        assert machine(ram, "4:memory:/elsewhere\n") == 1_024_000

    def test_a_machine_that_says_nothing_has_no_limit(self, tmp_path: Path, machine: Callable[..., int | None]) -> None:
        assert machine("", "") is None
        assert machine("MemTotal: many\n", "garbage\n::::\n") is None
        assert limits.memory_limit(tmp_path / "nowhere", tmp_path / "nowhere") is None

    def test_a_budget_above_it_is_cut_with_a_notice(self) -> None:
        asked = MemoryBudget(10**15, 0, None)
        limit = 10**12
        budget, notices = limits.bounded_budget(asked, torch.device("cpu"), limit)
        assert limit - 10**10 < budget.device_bytes <= limit - anonymous_bytes() // 2
        assert len(notices) == 1
        assert "--max-gpu-mem is 1000 TB, but this machine or its cgroup has 1.00 TB in all" in notices[0]
        small = MemoryBudget(10**9, 0, None)
        assert limits.bounded_budget(small, torch.device("cpu"), limit) == (small, [])
        assert limits.bounded_budget(asked, torch.device("cpu"), None) == (asked, [])

    def test_what_the_samples_take_is_taken_off_it(
        self, options: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held, load = [300_000_000], setup.load_calibration

        def load_many(*arguments: Any, **settings: Any) -> Any:
            held[0] += 100_000_000
            return load(*arguments, **settings)

        monkeypatch.setattr(setup, "memory_limit", lambda: 1_000_000_000)
        monkeypatch.setattr(limits, "anonymous_bytes", lambda: held[0])
        monkeypatch.setattr(setup, "load_calibration", load_many)
        config = RunConfig.from_options(options(max_gpu_mem="2GB"))
        assert setup.prepare(config, weights=False).budget.device_bytes == 600_000_000

    def test_a_run_uses_what_there_is_and_says_so(
        self, options: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(setup, "memory_limit", lambda: anonymous_bytes() + 400_000_000)
        report = streamda.initialize(**options(max_gpu_mem="900GB"))
        assert report.budget_bytes <= 400_000_000
        assert any("--max-gpu-mem is 900 GB, but this machine" in notice for notice in report.notices)
        monkeypatch.setattr(setup, "memory_limit", lambda: anonymous_bytes() + 1_000_000)
        with pytest.raises(BudgetError, match=r"too small.*900GB are asked for, but this machine has no more"):
            streamda.initialize(**options(max_gpu_mem="900GB", overwrite=True))


class TestTimeAndText:
    def test_a_run_that_is_stopped_for_a_while_goes_on(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]]
    ) -> None:
        streamda.initialize(**options())
        expected = weights(tmp_path)
        given = options(output_dir=str(tmp_path / "again" / "adapter"))
        process = PROCESSES.Process(target=streamda.initialize, kwargs=given)
        process.start()
        units = Path(given["output_dir"] + ".work") / "units"
        for number in range(3):
            deadline = time.monotonic() + 20
            while not units.exists() and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.001)
            assert number or process.is_alive()
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(0.05)
                os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.02)
        process.join(60)
        assert process.exitcode == 0
        assert weights(tmp_path / "again") == expected

    def test_a_clock_that_jumps_back_and_far_ahead_decides_nothing(
        self, tmp_path: Path, options: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        streamda.initialize(**options(keep_statistics=True))
        ticks = iter(range(10**6))
        monkeypatch.setattr(time, "time", lambda: (-1) ** next(ticks) * 4e9)
        report = streamda.initialize(**options(output_dir=str(tmp_path / "again" / "adapter"), keep_statistics=True))
        assert weights(tmp_path / "again") == weights(tmp_path)
        assert 0 < report.wall_seconds < 100
        assert all(0 <= seconds < 100 for seconds in report.seconds.values())
        work = tmp_path / "again" / "adapter.work"
        for path in [work, *work.rglob("*")]:
            os.utime(path, (4e9, 4e9))
        streamda.solve(statistics=str(work), output_dir=str(tmp_path / "third" / "adapter"), rank=2)
        assert weights(tmp_path / "third") == weights(tmp_path)

    @pytest.mark.parametrize(
        ("locale", "encoding"), [("C", "ascii"), pytest.param("C.utf8", "latin-1", marks=pytest.mark.faults)]
    )
    def test_paths_may_hold_spaces_newlines_and_letters_that_the_locale_does_not_know(
        self, inputs: Path, tmp_path: Path, locale: str, encoding: str
    ) -> None:
        odd = os.fsencode(tmp_path) + "/a b\n\u0130'\"$%I \u00e9".encode()
        os.mkdir(odd)
        shutil.copytree(os.fsencode(inputs / "model"), odd + b"/model\n x")
        shutil.copy(os.fsencode(inputs / "samples.jsonl"), odd + b"/data \xfd.jsonl")  # no text in UTF-8
        command: list[str | bytes] = [sys.executable, "-m", "streamda", "init", "--max-gpu-mem", "400MB", "--rank", "2"]
        command += [b"--model", odd + b"/model\n x", b"--dataset", odd + b"/data \xfd.jsonl", b"--keep-statistics"]
        command += [b"--output-dir", odd + b"/out\n ", b"--work-dir", odd + b"/run ", "--device", "cpu"]
        environment = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        environment |= {"PYTHONIOENCODING": encoding}
        run = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        assert os.path.isfile(odd + b"/out\n /adapter_model.safetensors")
        assert os.path.isfile(odd + b"/run /run.json")
        report = json.loads(Path(os.fsdecode(odd + b"/out\n /streamda_report.json")).read_bytes())
        assert report["data"]["num_samples"] == 5
        run.stdout.decode(encoding)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_and_folder_obeys_the_umask(
    tmp_path: Path, options: Callable[..., dict[str, Any]], umask: int
) -> None:
    rates = "flops=1e9,flops64=1e9,read=1e9,write=1e9"
    assert outcome(options(keep_statistics=True, profile=True, rates=rates), umask=umask) == Outcome(0, "")
    found = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert len(found) > 20
    for path, mode in found.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path
