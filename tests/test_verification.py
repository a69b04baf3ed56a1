"""What `verify` and `repair` find, say and refuse; the damages themselves are in `test_damage`."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file

import streamda
from streamda import cli, files, inspection, verification
from streamda.boundary import BoundaryStore
from streamda.errors import ConfigError, DamagedError, LockedError, StorageError
from streamda.methods import LayerSolution, SolveStatus
from streamda.model_copy import copy_configuration
from streamda.rundir import RunDirectory
from streamda.sealed_json import read_sealed_json, write_sealed_json
from streamda.solutions import write_solutions
from streamda.store import ZARR_FOLDER, BlockStatisticsReader, stats_unit
from streamda.units import FileRecord, UnitStore
from tests.golden_options import golden_options
from tests.test_store import block, draw, write

SPEC = block(24, 20)
MODULES = [linear.name for linear in SPEC.linears]
STATISTICS = Path("units", stats_unit(0), ZARR_FOLDER)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of unit."""
    folder = tmp_path_factory.mktemp("pristine") / "run"
    parts: dict[str, Any] = {"method": {"modules": MODULES}}
    settings: dict[str, Any] = {"adapted_blocks": [0, 1], "keeps_statistics": True}
    with RunDirectory.open(folder, parts, settings=settings) as run:
        write(run, SPEC, draw(SPEC))
        boundaries = BoundaryStore(run.units, [(1, 3, 4)], torch.bfloat16, 0)
        for name in ("acts-0000", "grads-0001"):
            with boundaries.write(name) as writer:
                writer.append(torch.ones(1, 3, 4, dtype=torch.bfloat16))
        solutions = [
            LayerSolution(linear.name, torch.ones(2, linear.d_in), torch.ones(linear.d_out, 2), SolveStatus.OK, None)
            for linear in SPEC.linears
        ]
        write_solutions(run.units, 0, {"rank": 2}, solutions, {})
    return folder


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def reseal(folder: Path, unit: str) -> None:
    """Makes a manifest for what is there now, as a bug would that writes wrong values and commits them."""
    marker = folder / "units" / unit / "COMMIT.json"
    manifest = read_sealed_json(marker)
    for name in manifest["files"]:
        data = (marker.parent / name).read_bytes()
        end = int.from_bytes(data[-4:], "little")
        manifest["files"][name] = FileRecord(len(data), google_crc32c.value(data), end)
    write_sealed_json(marker, manifest)


def test_a_sound_run_is_said_to_be_sound_and_is_not_changed(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = streamda.verify(str(run))
    assert found.is_sound
    assert set(found.units) == {"acts-0000", "grads-0001", "stats-0000", "solve-0000"}
    assert found.notes == ("not finished: 1 of 2 blocks are collected; to continue: the same command as before",)
    text = found.to_table()
    assert "boundary gradients  1" in text
    assert "every file is what was written" in text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert json.loads(json.dumps(found.to_dict()))["sound"] is True


def test_statistics_are_checked_tile_by_tile(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the width of a layer, no more than a tile of it is in memory, and every entry is read once."""
    read: list[torch.Size] = []
    sums = BlockStatisticsReader.sums

    def recorded(reader: BlockStatisticsReader, *region: Any) -> torch.Tensor:
        found = sums(reader, *region)
        read.append(found.shape)
        return found

    monkeypatch.setattr(verification, "TILE", 8)
    monkeypatch.setattr(BlockStatisticsReader, "sums", recorded)
    streamda.verify(run)
    matrices = [shape for shape in read if len(shape) == 2]
    assert all(max(shape) <= 8 for shape in matrices)
    gradients = sum(linear.d_in * linear.d_out for linear in SPEC.linears)
    lower = sum(-(-group.d_in // 8) * (-(-group.d_in // 8) + 1) // 2 for group in SPEC.groups)
    tiles = sum(-(-linear.d_in // 8) * -(-linear.d_out // 8) for linear in SPEC.linears)
    assert len(matrices) == tiles + lower
    assert sum(shape.numel() for shape in matrices[:tiles]) == gradients


def test_every_damaged_unit_is_listed_and_the_error_names_the_first(run: Path) -> None:
    (run / "units" / "acts-0000" / "states.bin").write_bytes(b"")
    (run / "units" / "solve-0000" / "COMMIT.json").unlink()
    found = streamda.verify(run, strict=False)
    assert len(found.damages) == 2
    assert set(found.units) == {"grads-0001", "stats-0000"}
    text = found.to_table()
    assert f"streamda repair {run} --drop solve-0000" in text
    assert "is what was written" not in text
    with pytest.raises(DamagedError, match=r"acts-0000/states\.bin has 0 bytes.*--drop acts-0000`.*\(and 1 more\)"):
        streamda.verify(run)


def test_what_is_not_ours_is_noted_and_left_alone(run: Path) -> None:
    for place in (run / ".DS_Store", run / "units" / "backup~"):
        place.write_bytes(b"mine")
    found = streamda.verify(run)
    assert [note for note in found.notes if "left alone" in note] == [
        f"{run / '.DS_Store'} is not part of it, and left alone",
        f"{run / 'units' / 'backup~'} is not part of it, and left alone",
    ]
    with RunDirectory.open(run, {"method": {"modules": MODULES}}, settings={}):
        pass
    assert (run / ".DS_Store").read_bytes() == b"mine"


def stored(run: Path, module: int, name: str) -> zarr.Array[Any]:
    slug = sorted(path.name for path in (run / STATISTICS).iterdir() if path.is_dir())[module]
    array = zarr.open_group(run / STATISTICS, mode="r+")[slug][name]
    assert isinstance(array, zarr.Array)
    return array


def negative_output(run: Path) -> None:
    stored(run, 0, "output_moment_sum")[3] = -1.0


def negative_diagonal(run: Path) -> None:
    stored(run, 0, "input_moment_sum")[2, 2] = -1.0


def infinite_gradient(run: Path) -> None:
    stored(run, 1, "gradient_sum")[1, 1] = float("inf")


def other_counts(run: Path) -> None:
    edit_attributes(run, 1, num_tokens=39)


def impossible_counts(run: Path) -> None:
    for module in (0, 1):
        edit_attributes(run, module, num_tokens=-40)


def other_modules(run: Path) -> None:
    edit_attributes(run, 2, module="model.layers.0.elsewhere")


def huge_shape(run: Path) -> None:
    path = next((run / STATISTICS).glob("0000.*/gradient_sum/zarr.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [10**9, 10**9]}))


def edit_attributes(run: Path, number: int, **changes: Any) -> None:
    path = sorted((run / STATISTICS).glob("000?.*/zarr.json"))[number]
    record = json.loads(path.read_text())
    record["attributes"] |= changes
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (negative_output, "an output moment below zero in .*q_proj"),
        (negative_diagonal, "an input moment with a diagonal below zero in .*q_proj"),
        (infinite_gradient, "gradient_sum holds values that were never written"),
        (other_counts, "k_proj and .*q_proj share an input but not its counts"),
        (impossible_counts, "q_proj has counts that cannot be"),
        (other_modules, "an input moment is not where its layers look for it"),
        (huge_shape, "q_proj gradient_sum is not the array that was committed"),
    ],
)
def test_statistics_that_were_committed_wrong_are_found(run: Path, harm: Callable[[Path], None], says: str) -> None:
    harm(run)
    reseal(run, "stats-0000")
    with pytest.raises(DamagedError, match=rf"{says}.*--drop stats-0000"):
        streamda.verify(run)


@pytest.mark.parametrize("harm", [other_counts, impossible_counts])
def test_contradicting_counts_stop_the_solver_too(run: Path, harm: Callable[[Path], None]) -> None:
    harm(run)
    reseal(run, "stats-0000")
    with RunDirectory.open_existing(run, exclusive=False) as opened, pytest.raises(DamagedError, match="counts"):
        BlockStatisticsReader(opened.units, 0)


def test_a_boundary_that_is_not_finite_is_found(run: Path) -> None:
    (run / "units" / "grads-0001" / "states.bin").write_bytes(b"\xff\xff" * 12)
    reseal(run, "grads-0001")
    with pytest.raises(DamagedError, match=r"states\.bin holds what no boundary state can be.*--drop grads-0001"):
        streamda.verify(run)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors[f"{MODULES[0]}.lora_A"].fill_(float("nan")), "q_proj that are not finite"),
        (lambda tensors: tensors.pop(f"{MODULES[1]}.lora_A"), "lists other modules"),
        (
            lambda tensors: tensors.update({f"{MODULES[2]}.lora_A": torch.ones(3, 4)}),
            "o_proj that do not fit each other",
        ),
    ],
)
def test_a_solution_that_was_committed_wrong_is_found(run: Path, change: Callable[[Any], object], says: str) -> None:
    path = run / "units" / "solve-0000" / "factors.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    reseal(run, "solve-0000")
    with pytest.raises(DamagedError, match=rf"{says}.*--drop solve-0000"):
        streamda.verify(run)


def test_a_file_that_ends_in_its_own_checksum_is_told_from_another_one(tmp_path: Path) -> None:
    store = UnitStore(tmp_path, "f")
    datas = [data + google_crc32c.value(data).to_bytes(4, "little") for data in (b"one", b"two")]
    assert google_crc32c.value(datas[0]) == google_crc32c.value(datas[1])
    with store.create("unit") as draft:
        (draft.path / "chunk").write_bytes(datas[0])
    store.verify("unit")
    store.check_ends("unit")
    (store.path("unit") / "chunk").write_bytes(datas[1])
    for look in (store.verify, store.check_ends):
        with pytest.raises(DamagedError, match="chunk does not have the bytes"):
            look("unit")


def test_a_run_in_use_is_not_looked_at_and_not_repaired(run: Path) -> None:
    with RunDirectory.open_existing(run, exclusive=True):
        for look in (lambda: streamda.verify(run), lambda: streamda.repair(run, drop=["acts-0000"])):
            with pytest.raises(LockedError):
                look()
    with RunDirectory.open_existing(run, exclusive=False):
        assert streamda.verify(run).is_sound  # readers share it
        with pytest.raises(LockedError):
            streamda.repair(run, drop=["acts-0000"])


def look_at(folder: Path) -> None:
    """As a reader, in every way."""
    assert streamda.verify(folder).is_sound
    RunDirectory.open_existing(folder, exclusive=False).close()
    streamda.open_statistics(folder).close()


def test_readers_need_no_lock_file_and_make_none(run: Path) -> None:
    (run / "LOCK").unlink()
    look_at(run)
    assert sorted(path.name for path in run.iterdir()) == ["run.json", "units"]


def test_where_locks_are_not_supported_readers_go_on_and_a_repair_if_that_is_accepted(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.SystemCalls, "flock", staticmethod(flock))
    look_at(run)
    arguments = ("repair", str(run), "--drop", "acts-0000")
    assert TestCommands.command(monkeypatch, *arguments) == 7
    assert TestCommands.command(monkeypatch, *arguments, "--unsafe-filesystem") == 0
    assert not (run / "units" / "acts-0000").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_folder_without_permission_is_one_line(run: Path, mode: int) -> None:
    for parent in (run.parent, *run.parent.parents[:3]):
        with contextlib.suppress(OSError):
            parent.chmod(0o755)
    run.chmod(mode)
    os.seteuid(65534)
    try:
        for look in (streamda.verify, inspection.inspect_folder):
            with pytest.raises(StorageError, match=f"{run}: Permission denied") as caught:
                look(run)
            assert len(str(caught.value).splitlines()) == 1
    finally:
        os.seteuid(0)


def test_copies_of_a_configuration_are_on_the_disk_with_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(files.SystemCalls, "fsync", staticmethod(fsync))
    copy_configuration(tmp_path, tmp_path / "run", with_code=False)
    copy = tmp_path / "run" / "model" / "config.json"
    assert synced[-2:] == [str(copy), str(copy.parent)]


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"is not a folder|no streamda run"):
            streamda.verify(folder)
        with pytest.raises(ConfigError, match="no streamda run"):
            streamda.repair(folder, drop=["acts-0000"])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_whose_record_is_lost_or_damaged_says_so(run: Path) -> None:
    record = (run / "run.json").read_bytes()
    for data in (b"", record[:-9], record.replace(b'"format"', b'"fOrmat"')):
        (run / "run.json").write_bytes(data)
        for look in (lambda: streamda.verify(run), lambda: streamda.repair(run, drop=["acts-0000"])):
            with pytest.raises(DamagedError, match=r"run\.json .*restore it from a copy, or delete"):
                look()
    (run / "run.json").unlink()
    with pytest.raises(DamagedError, match=r"run\.json is missing; restore it"):
        streamda.verify(run)
    with pytest.raises(DamagedError, match=r"run\.json is missing; restore it"):
        RunDirectory.open(run, {"method": {"modules": MODULES}}, settings={})


@pytest.mark.parametrize("file", ["stats-0000/COMMIT.json", "acts-0000/states.bin", "solve-0000/factors.safetensors"])
def test_a_run_is_looked_at_before_it_is_continued(run: Path, file: str) -> None:
    """Names and sizes of all units, without reading them; nothing is changed, and starting over stays possible."""
    path = run / "units" / file
    path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in (run / "units").rglob("*") if path.is_file()}
    parts: dict[str, Any] = {"method": {"modules": MODULES}}
    for opening in (
        lambda: RunDirectory.open(run, parts, settings={"new": 1}),
        lambda: RunDirectory.open_existing(run, exclusive=True),
    ):
        with pytest.raises(DamagedError, match=rf"{path}.*streamda repair {run} --drop {path.parent.name}`"):
            opening()
    assert {path: path.read_bytes() for path in (run / "units").rglob("*") if path.is_file()} == before
    RunDirectory.open_existing(run, exclusive=True, check=False).close()
    with RunDirectory.open(run, parts, settings={}, restart=True) as opened:
        assert opened.units.names() == []


def test_what_a_killed_run_left_half_done_is_no_damage(run: Path) -> None:
    for name in ("stats-0001.0123abcd.part", "acts-0001.0123abcd.trash"):
        shutil.copytree(run / "units" / "acts-0000", run / "units" / name)
        (run / "units" / name / "COMMIT.json").unlink()
    found = streamda.verify(run)
    assert not [note for note in found.notes if "left alone" in note]


class TestRepair:
    def test_a_unit_goes_with_what_was_made_from_it(self, run: Path) -> None:
        done = streamda.repair(run, drop=["stats-0000", "acts-0000", "acts-0000"])
        assert (done.dropped, done.dependents) == (("stats-0000", "acts-0000"), ("solve-0000",))
        assert [path.name for path in (run / "units").iterdir()] == ["grads-0001"]
        assert "dropped with it, because made from it: solve-0000" in done.to_text()
        assert streamda.verify(run).is_sound

    def test_where_statistics_are_freed_the_solution_is_all_that_is_left_and_stays(self, run: Path) -> None:
        with RunDirectory.open_existing(run, exclusive=True) as opened:
            opened.update_settings({"keeps_statistics": False})
        assert streamda.repair(run, drop=["stats-0000"]).dependents == ()
        assert (run / "units" / "solve-0000").is_dir()

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("stats-0001", r"did you mean .*stats-0000"),
            ("stat-0000", "did you mean stats-0000"),
            ("../run.json", "it has acts-0000, grads-0001, solve-0000, stats-0000"),
            ("", "it has"),
        ],
    )
    def test_a_name_that_is_no_unit_is_refused_with_near_ones_and_nothing_goes(
        self, run: Path, name: str, says: str
    ) -> None:
        with pytest.raises(ConfigError, match=says):
            streamda.repair(run, drop=["acts-0000", name])
        assert len(list((run / "units").iterdir())) == 4
        with pytest.raises(ConfigError, match="no unit is named"):
            streamda.repair(run, drop=[])

    def test_a_killed_repair_is_asked_for_again(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Failing(files.SystemCalls):
            @staticmethod
            def rename(source: Path, target: Path) -> None:
                if source.name == "stats-0000":
                    raise KeyboardInterrupt
                files.SystemCalls.rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files, "system_calls", Failing())
            with pytest.raises(KeyboardInterrupt):
                streamda.repair(run, drop=["stats-0000"])
        assert streamda.repair(run, drop=["stats-0000"]).dependents == ()


class TestCommands:
    @staticmethod
    def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["streamda", *arguments])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    def test_exit_codes_and_output(
        self, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.command(monkeypatch, "verify", str(run)) == 0
        assert "every file is what was written" in capsys.readouterr().out
        (run / "units" / "stats-0000" / "COMMIT.json").write_bytes(b"{}")
        assert self.command(monkeypatch, "verify", str(run), "--json") == 10
        shown = capsys.readouterr()
        assert json.loads(shown.out)["sound"] is False
        assert len(shown.err.splitlines()) == 1
        assert "stats-0000/COMMIT.json" in shown.err
        assert "--drop stats-0000" in shown.err
        assert self.command(monkeypatch, "inspect", str(run)) == 10
        assert self.command(monkeypatch, "repair", str(run), "--drop", "stats-0009") == 2
        assert "did you mean stats-0000" in capsys.readouterr().err
        assert self.command(monkeypatch, "repair", str(run)) == 2
        assert self.command(monkeypatch, "repair", str(run), "--drop", "stats-0000", "--drop", "acts-0000") == 0
        assert "to run next, from where it was begun:\n  the same command as before" in capsys.readouterr().out
        assert self.command(monkeypatch, "verify", str(run)) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    streamda.initialize(**golden_options(folder, num_samples=2, target_modules="q_proj,down_proj"))
    return folder / "adapter"


class TestAdapter:
    @pytest.fixture
    def adapter(self, made: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(made, tmp_path / "adapter"))

    @staticmethod
    def forget_checksums(adapter: Path) -> None:
        """As an older streamda wrote the report."""
        report = json.loads((adapter / "streamda_report.json").read_text())
        del report["self_crc"], report["files"]
        (adapter / "streamda_report.json").write_text(json.dumps(report))

    def test_the_report_holds_what_the_files_came_to(self, adapter: Path) -> None:
        report = json.loads((adapter / "streamda_report.json").read_text())
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            data = (adapter / name).read_bytes()
            assert report["files"][name] == {"size": len(data), "crc32c": google_crc32c.value(data)}
        found = streamda.verify(adapter)
        assert found.kind == "adapter"
        assert found.notes == ()
        assert "adapter_model.safetensors" in found.to_table()

    def test_one_in_a_hub_s_cache_is_read_through_its_links(self, adapter: Path, tmp_path: Path) -> None:
        blobs = Path(shutil.copytree(adapter, tmp_path / "blobs"))
        for number, path in enumerate(sorted(blobs.iterdir())):
            (adapter / path.name).unlink()
            (adapter / path.name).symlink_to(path.rename(blobs / str(number)))
        assert streamda.verify(adapter).is_sound
        weights = (adapter / "adapter_model.safetensors").resolve()
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(DamagedError, match=r"adapter_model\.safetensors does not have the bytes"):
            streamda.verify(adapter)

    def test_a_configuration_that_peft_refuses_is_damage(self, adapter: Path) -> None:
        self.forget_checksums(adapter)
        path = adapter / "adapter_config.json"
        contradiction = {"target_modules": "o_proj", "layers_to_transform": [1]}
        path.write_text(json.dumps(json.loads(path.read_text()) | contradiction))
        with pytest.raises(DamagedError, match=r"PEFT refuses .*adapter_config\.json"):
            streamda.verify(adapter)

    def test_one_without_checksums_is_still_checked_by_its_meaning(self, adapter: Path) -> None:
        self.forget_checksums(adapter)
        assert "older streamda" in streamda.verify(adapter).notes[0]
        weights = adapter / "adapter_model.safetensors"
        tensors = load_file(weights)
        first = sorted(tensors)[0]
        for change, says in (
            ({first: torch.full_like(tensors[first], torch.inf)}, "is not finite"),
            ({first: tensors[first].T.contiguous()}, "has shape"),
            ({"base_model.model.other.lora_A.weight": torch.ones(8, 4)}, "which the report does not name"),
        ):
            save_file(tensors | change, weights)
            with pytest.raises(DamagedError, match=says):
                streamda.verify(adapter)
        save_file({name: tensor for name, tensor in tensors.items() if name != first}, weights)
        with pytest.raises(DamagedError, match="has no tensor for lora_A"):
            streamda.verify(adapter)
        save_file(tensors, weights)
        settings = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
        with pytest.raises(DamagedError, match=r"adapter_config\.json does not adapt .*down_proj"):
            streamda.verify(adapter)

    def test_an_adapter_that_was_trained_in_place_is_not_taken_for_the_start(self, adapter: Path) -> None:
        weights = adapter / "adapter_model.safetensors"
        save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, weights)
        with pytest.raises(DamagedError, match=r"was changed since, as by training that saves here; move .* away"):
            streamda.verify(adapter)

    def test_an_adapter_saved_by_training_is_nobody_s_damage(self, adapter: Path) -> None:
        (adapter / "streamda_report.json").unlink()
        weights = adapter / "adapter_model.safetensors"
        save_file(load_file(weights), weights, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match="an adapter that streamda did not write, such as training saves"):
            streamda.verify(adapter)
        with pytest.raises(ConfigError, match=r"there is no streamda run in .*, but an adapter"):
            streamda.repair(adapter, drop=["stats-0000"])

    def test_without_its_report_nobody_knows_what_was_written(self, adapter: Path) -> None:
        (adapter / "streamda_report.json").unlink()
        with pytest.raises(DamagedError, match=r"streamda_report\.json is missing"):
            streamda.verify(adapter)
