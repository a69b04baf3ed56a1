"""Statistics on disk: what was written comes back, what was damaged does not, and other tools can read it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from streamda import block_statistics, panels, store
from streamda.block_statistics import StatisticsSink
from streamda.collected import open_statistics
from streamda.config import StatisticsCodec
from streamda.errors import ConfigError, DamagedError, LockedError
from streamda.layers import BlockSpec, InputGroup, LinearSpec
from streamda.panels import block_panels
from streamda.rundir import RunDirectory
from streamda.store import ZARR_FOLDER, BlockStatisticsReader, BlockStatisticsWriter, stats_unit

CPU = torch.device("cpu")
CODECS: tuple[StatisticsCodec, ...] = ("none", "zstd", "blosc", "bitround")
NUM_TOKENS, NUM_SAMPLES = 40, 8


def block(d_in: int, d_out: int, index: int = 0, moment_bytes: int = 4) -> BlockSpec:
    """Three layers: q and k share an input, o has its own; k is a Conv1D."""
    prefix = f"model.layers.{index}"
    q = LinearSpec(f"{prefix}.self_attn.q_proj", d_in, d_out)
    k = LinearSpec(f"{prefix}.self_attn.k_proj", d_in, max(1, d_out // 2), transposed=True)
    o = LinearSpec(f"{prefix}.self_attn.o_proj", d_out, d_in)
    both, alone = InputGroup((q.name, k.name), d_in), InputGroup((o.name,), d_out)
    groups = tuple(dataclasses.replace(group, moment_bytes=moment_bytes) for group in (both, alone))
    return BlockSpec(index, prefix, (q, k, o), groups)


def draw(spec: BlockSpec, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Sums of float32 for every layer of a block; input moments whole and symmetric."""
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, dict[str, torch.Tensor]] = {}
    for linear in spec.linears:
        sums[linear.name] = {
            "gradient": torch.randn(linear.d_out, linear.d_in, generator=generator),
            "output_moment": torch.rand(linear.d_out, generator=generator),
        }
    for group in spec.groups:
        x = torch.randn(5, group.d_in, generator=generator)
        wide = x if group.moment_bytes == 4 else x.double()
        sums[group.name]["input_moment"] = wide.T @ wide
    return sums


def facts(module: str) -> dict[str, Any]:
    return {"num_tokens": NUM_TOKENS, "num_samples": NUM_SAMPLES, "weight_norm": 1.5 + len(module)}


def fill(sink: StatisticsSink, spec: BlockSpec, sums: dict[str, dict[str, torch.Tensor]]) -> None:
    """As the first pass does it: panel by panel, above the diagonal whatever is left there."""
    for panel in block_panels(spec):
        values = sums[panel.module][panel.statistic][panel.start : panel.stop]
        if panel.statistic == "input_moment":
            rubbish = torch.full((panel.stop - panel.start, panel.columns), 1e9)
            values = values[:, : panel.columns].tril(panel.start) + rubbish.triu(panel.start + 1)
        sink.write_panel(panel, values.clone())
    for linear in spec.linears:
        sink.write_facts(linear.name, facts(linear.name))


def write(
    run: RunDirectory, spec: BlockSpec, sums: dict[str, dict[str, torch.Tensor]], codec: StatisticsCodec = "none"
) -> None:
    """Commits the statistics of a block."""
    with run.units.create(stats_unit(spec.index)) as draft:
        fill(BlockStatisticsWriter(draft.path, spec, codec), spec, sums)
        draft.metadata |= {"prefix": spec.prefix, "modules": [linear.name for linear in spec.linears]}


def set_tile(patch: pytest.MonkeyPatch, tile: int) -> None:
    """Cuts panels and tiles smaller, wherever their size is known."""
    for module in (store, block_statistics):
        patch.setattr(module, "TILE", tile)
    patch.setattr(panels, "PANEL_ROWS", tile)


@contextmanager
def a_run(folder: Path, tile: int = 16) -> Iterator[RunDirectory]:
    """An open run directory, with small tiles and panels."""
    with pytest.MonkeyPatch.context() as patch:
        set_tile(patch, tile)
        with RunDirectory.open(folder, {"model": {"id": "m"}}, settings={}) as run:
            yield run


def assert_holds(
    folder: Path, specs: list[BlockSpec], sums: list[dict[str, dict[str, torch.Tensor]]], rtol: float = 1e-6
) -> None:
    """Opened afresh, all layers have the means that these sums make."""
    with open_statistics(folder) as statistics:
        assert list(statistics) == [linear.name for spec in specs for linear in spec.linears]
        assert len(statistics) == sum(len(spec.linears) for spec in specs)
        for spec, block_sums in zip(specs, sums, strict=True):
            for linear in spec.linears:
                layer = statistics[linear.name]
                moment = block_sums[spec.group_of(linear.name).name]["input_moment"] / NUM_TOKENS
                expected = block_sums[linear.name]
                assert layer.name == linear.name
                assert (layer.num_tokens, layer.num_samples) == (NUM_TOKENS, NUM_SAMPLES)
                assert layer.weight_norm == facts(linear.name)["weight_norm"]
                torch.testing.assert_close(layer.gradient, expected["gradient"] / NUM_SAMPLES, rtol=rtol, atol=1e-30)
                torch.testing.assert_close(
                    layer.output_moment, expected["output_moment"] / NUM_TOKENS, rtol=rtol, atol=1e-30
                )
                torch.testing.assert_close(layer.input_moment, moment, rtol=rtol, atol=1e-6)
                assert torch.equal(layer.input_moment, layer.input_moment.T)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from(CODECS[:3]))
def test_what_is_written_comes_back_whatever_its_shape(d_in: int, d_out: int, codec: StatisticsCodec) -> None:
    """Less than a tile, whole tiles, and a tile and a bit; compressed or not."""
    with tempfile.TemporaryDirectory() as folder:
        spec = block(d_in, d_out)
        with a_run(Path(folder)) as run:
            write(run, spec, draw(spec), codec)
        with pytest.MonkeyPatch.context() as patch:
            set_tile(patch, 16)
            assert_holds(Path(folder), [spec], [draw(spec)])


@pytest.mark.parametrize("codec", CODECS[:3])
@pytest.mark.parametrize("d_in", [9, 16, 48, 71])
def test_bands_are_the_same_in_either_precision_and_whatever_was_done_to_the_last_one(
    tmp_path: Path, d_in: int, codec: StatisticsCodec
) -> None:
    """One tile, several, more than are read at a time, and a part of one."""
    spec = block(d_in, 40)
    sums = draw(spec)
    expected = (sums[spec.groups[0].name]["input_moment"] / NUM_TOKENS).double()
    with a_run(tmp_path) as run:
        write(run, spec, sums, codec)
        reader = BlockStatisticsReader(run.units, spec.index)
        moment = reader.moment(spec.groups[0], torch.device("cpu"))
        torch.testing.assert_close(moment.diagonal(), expected.diagonal(), rtol=1e-6, atol=0)
        for dtype in (torch.float64, torch.float32):
            for index in range(len(moment)):
                band = moment.band(index, dtype)
                rows = slice(16 * index, min(16 * index + 16, d_in))
                assert band.dtype == dtype
                torch.testing.assert_close(band.double(), expected[rows, : rows.stop], rtol=1e-6, atol=1e-6)
                assert torch.equal(band.double(), moment.band(index))
                band.fill_(7.0)
        name = spec.linears[0].name
        bands = list(reader.gradient_bands(name, torch.device("cpu")))
        torch.testing.assert_close(torch.cat(bands), sums[name]["gradient"] / NUM_SAMPLES, rtol=1e-6, atol=1e-30)
        assert all(band.data_ptr() % 64 == 0 for band in bands)  # bits may depend on it


def test_two_blocks_come_back_at_the_real_size_of_tiles(tmp_path: Path) -> None:
    specs = [block(2100, 3, index) for index in range(2)]
    with a_run(tmp_path, tile=2048) as run:
        for spec in specs:
            write(run, spec, draw(spec, spec.index))
    assert_holds(tmp_path, specs, [draw(spec, spec.index) for spec in specs])


def test_rounding_to_twelve_bits_loses_at_most_one_part_in_eight_thousand(tmp_path: Path) -> None:
    spec = block(40, 20)
    with a_run(tmp_path) as run:
        write(run, spec, draw(spec), "bitround")
        reader = BlockStatisticsReader(run.units, 0)
        exact = draw(spec)[spec.linears[0].name]["gradient"] / NUM_SAMPLES
        found = reader.gradient(spec.linears[0].name, torch.float32, CPU)
        assert 0 < float(((found - exact) / exact).abs().max()) <= 2**-13 * 1.001


@pytest.mark.parametrize("codec", CODECS[:3])
def test_lossless_codecs_return_the_very_bits(tmp_path: Path, codec: StatisticsCodec) -> None:
    spec = block(40, 20)
    with a_run(tmp_path) as run:
        write(run, spec, draw(spec), codec)
        folder = run.units.path(stats_unit(0)) / ZARR_FOLDER
        stored = zarr.open_group(folder, mode="r")["0000.self_attn.q_proj/gradient_sum"][:]
    assert np.array_equal(stored, draw(spec)[spec.linears[0].name]["gradient"].numpy())


def test_the_reader_knows_the_block_as_it_was_collected(tmp_path: Path) -> None:
    spec = block(20, 36)
    with a_run(tmp_path) as run:
        write(run, spec, draw(spec))
        reader = BlockStatisticsReader(run.units, 0)
        assert reader.spec == spec
        assert reader.facts(spec.linears[1].name)["num_tokens"] == NUM_TOKENS


def test_a_moment_is_read_in_the_precision_asked_for_and_only_below_the_diagonal(tmp_path: Path) -> None:
    spec = block(40, 20)
    with a_run(tmp_path) as run:
        write(run, spec, draw(spec))
        moment = BlockStatisticsReader(run.units, 0).input_moment(spec.groups[0], torch.float64, CPU)
    # divided in float32 like the public statistics, and only then widened: the very same numbers
    expected = (draw(spec)[spec.groups[0].name]["input_moment"] / NUM_TOKENS).double()
    assert moment.dtype == torch.float64
    assert torch.equal(moment.tril(), expected.tril())
    assert not bool(moment[:16, 16:].any())


def test_a_layer_that_saw_no_token_has_zero_moments_and_no_nan(tmp_path: Path) -> None:
    spec = block(5, 4)
    nothing = {
        name: {key: torch.zeros_like(value) for key, value in values.items()} for name, values in draw(spec).items()
    }
    with a_run(tmp_path) as run, run.units.create(stats_unit(0)) as draft:
        writer = BlockStatisticsWriter(draft.path, spec, "none")
        for panel in block_panels(spec):
            writer.write_panel(panel, nothing[panel.module][panel.statistic][panel.start : panel.stop])
        for linear in spec.linears:
            writer.write_facts(linear.name, {"num_tokens": 0, "num_samples": 3, "weight_norm": 0.0})
        draft.metadata |= {"prefix": spec.prefix, "modules": [linear.name for linear in spec.linears]}
    with open_statistics(tmp_path) as statistics:
        for layer in statistics.values():
            for tensor in (layer.gradient, layer.input_moment, layer.output_moment):
                assert not bool(tensor.any())


class TestOtherTools:
    def test_what_float32_leaves_of_wider_sums_lies_beside_them(self, tmp_path: Path) -> None:
        spec = block(40, 20, moment_bytes=8)
        with a_run(tmp_path) as run:
            write(run, spec, draw(spec))
        root = zarr.open(tmp_path / "units" / "stats-0000" / "statistics.zarr", mode="r")
        q, k, _ = (root[name] for name in sorted(root))
        assert sorted(q) == ["gradient_sum", "input_moment_rest", "input_moment_sum", "output_moment_sum"]
        assert sorted(k) == ["gradient_sum", "output_moment_sum"]
        lower = np.tril(np.ones((40, 40), dtype=bool))
        expected = draw(spec)[spec.groups[0].name]["input_moment"].numpy()
        high, rest = q["input_moment_sum"][:], q["input_moment_rest"][:]
        assert high.dtype == rest.dtype == np.float32
        assert np.array_equal(high[lower], expected[lower].astype(np.float32))
        both = high[lower].astype(np.float64) + rest[lower]
        np.testing.assert_allclose(both, expected[lower], rtol=1e-14, atol=1e-14)
        with pytest.MonkeyPatch.context() as patch, open_statistics(tmp_path) as statistics:
            set_tile(patch, 16)
            moment = statistics[spec.linears[0].name].input_moment
        assert moment.dtype == torch.float64
        np.testing.assert_allclose(moment.numpy(), expected / NUM_TOKENS, rtol=1e-14, atol=1e-14)

    def test_plain_zarr_opens_it_and_finds_sums_counts_and_names(self, tmp_path: Path) -> None:
        spec = block(40, 20)
        with a_run(tmp_path) as run:
            write(run, spec, draw(spec))
        root = zarr.open(tmp_path / "units" / "stats-0000" / "statistics.zarr", mode="r")
        assert root.attrs["format"] == "streamda-statistics"
        assert sorted(root) == ["0000.self_attn.q_proj", "0001.self_attn.k_proj", "0002.self_attn.o_proj"]
        q, k, o = (root[name] for name in sorted(root))
        assert sorted(q) == ["gradient_sum", "input_moment_sum", "output_moment_sum"]
        assert sorted(k) == ["gradient_sum", "output_moment_sum"]  # its input moment is that of its group
        assert k.attrs["input_group"] == q.attrs["module"] == spec.linears[0].name
        assert (k.attrs["num_tokens"], k.attrs["num_samples"], k.attrs["transposed"]) == (NUM_TOKENS, NUM_SAMPLES, True)
        expected = draw(spec)
        for group, linear in zip((q, k, o), spec.linears, strict=True):
            assert np.array_equal(group["gradient_sum"][:], expected[linear.name]["gradient"].numpy())
            assert np.array_equal(group["output_moment_sum"][:], expected[linear.name]["output_moment"].numpy())
        moment = q["input_moment_sum"][:]
        lower = np.tril(np.ones((40, 40), dtype=bool))
        np.testing.assert_allclose(
            moment[lower], expected[spec.groups[0].name]["input_moment"].numpy()[lower], rtol=1e-7
        )
        assert np.isnan(moment[0, 39])  # what was never written is no number, rather than zero

    def test_only_lower_tiles_of_a_moment_are_on_disk(self, tmp_path: Path) -> None:
        spec = block(40, 20)
        with a_run(tmp_path) as run:
            write(run, spec, draw(spec))
            folder = run.units.path(stats_unit(0)) / ZARR_FOLDER / "0000.self_attn.q_proj"
        tiles = {tuple(map(int, path.parts[-2:])) for path in (folder / "input_moment_sum" / "c").glob("*/*")}
        assert tiles == {(row, column) for row in range(3) for column in range(row + 1)}
        assert len(list((folder / "gradient_sum" / "c").glob("*/*"))) == 2 * 3

    def test_names_that_would_clash_or_are_illegal_get_folders_of_their_own(self, tmp_path: Path) -> None:
        names = [
            "model.layers.0.A.proj",
            "model.layers.0.a.proj",
            "model.layers.0." + "x" * 90,
            "model.layers.0.a b/\u00fc",
        ]
        spec = BlockSpec(
            0,
            "model.layers.0",
            tuple(LinearSpec(name, 3, 2) for name in names),
            tuple(InputGroup((name,), 3) for name in names),
        )
        with a_run(tmp_path) as run:
            write(run, spec, draw(spec))
            folders = [path.name for path in (run.units.path(stats_unit(0)) / ZARR_FOLDER).iterdir() if path.is_dir()]
        assert len({name.lower() for name in folders}) == 4
        assert all(len(name) <= 53 and name.isascii() and " " not in name for name in folders)
        assert_holds(tmp_path, [spec], [draw(spec)])


def zarr_files(folder: Path, name: str) -> list[Path]:
    return sorted(path for path in folder.rglob(name) if path.is_file())


def flip(path: Path, place: int) -> None:
    """Flips one bit of a byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(bytes(data))


def read_everything(run: RunDirectory) -> None:
    """What solving a block reads of it, in a process of its own."""
    fresh = type(run.units)(run.units.folder, run.units.fingerprint)
    reader = BlockStatisticsReader(fresh, 0)
    for group in reader.spec.groups:
        reader.input_moment(group, torch.float64, CPU)
    for linear in reader.spec.linears:
        reader.gradient(linear.name, torch.float64, CPU)
        reader.output_moment(linear.name, CPU)


class TestDamage:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Iterator[RunDirectory]:
        spec = block(40, 20)
        with a_run(tmp_path / "run") as run:
            write(run, spec, draw(spec))
            read_everything(run)  # whole, so far
            yield run

    def folder(self, run: RunDirectory) -> Path:
        return run.units.path(stats_unit(0)) / ZARR_FOLDER

    def assert_damaged(self, run: RunDirectory) -> None:
        with pytest.raises(DamagedError) as caught:
            read_everything(run)
        assert len(str(caught.value).splitlines()) == 1
        assert "stats-0000" in str(caught.value)
        assert f"streamda repair {run.path} --drop stats-0000" in str(caught.value)

    def test_every_chunk_that_is_missing_is_noticed(self, run: RunDirectory) -> None:
        """Zarr itself would hand out its fill value."""
        chunks = [path for path in zarr_files(self.folder(run), "*") if path.name != "zarr.json"]
        assert len(chunks) > 20
        for path in chunks:
            data = path.read_bytes()
            path.unlink()
            self.assert_damaged(run)
            path.write_bytes(data)
        read_everything(run)

    def test_a_chunk_that_is_lost_while_the_unit_is_open_is_noticed_too(self, run: RunDirectory) -> None:
        """The second net: the fill value is NaN."""
        reader = BlockStatisticsReader(run.units, 0)
        for path in zarr_files(self.folder(run), "*"):
            if path.name != "zarr.json":
                path.unlink()
        group, linear = reader.spec.groups[0], reader.spec.linears[0]
        for read in (
            lambda: reader.input_moment(group, torch.float64, CPU),
            lambda: reader.gradient(linear.name, torch.float64, CPU),
            lambda: reader.output_moment(linear.name, CPU),
        ):
            with pytest.raises(DamagedError, match="a chunk is missing"):
                read()

    @pytest.mark.parametrize("place", [0, -1, 40], ids=["first byte", "checksum", "middle"])
    def test_a_flipped_bit_in_any_chunk_is_noticed(self, run: RunDirectory, place: int) -> None:
        for path in zarr_files(self.folder(run), "*"):
            if path.name != "zarr.json":
                flip(path, place)
                self.assert_damaged(run)
                flip(path, place)
        read_everything(run)

    @pytest.mark.parametrize("size", [0, 17])
    def test_a_chunk_cut_short_is_noticed(self, run: RunDirectory, size: int) -> None:
        path = next(path for path in zarr_files(self.folder(run), "*") if path.name != "zarr.json")
        path.write_bytes(path.read_bytes()[:size])
        self.assert_damaged(run)

    def test_a_flipped_bit_in_any_zarr_json_is_noticed(self, run: RunDirectory) -> None:
        """A count that is one digit off would scale a whole layer, and no chunk's checksum would know."""
        for path in zarr_files(self.folder(run), "zarr.json"):
            length = path.stat().st_size
            for place in range(0, length, max(1, length // 40)):
                flip(path, place)
                self.assert_damaged(run)
                flip(path, place)
        read_everything(run)

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ('"num_tokens": 40', '"num_tokens": 90'),
            ('"num_samples": 8', '"num_samples": 1'),
            ('"d_in": 40', '"d_in": 10'),
            ('"d_out": 20', '"d_out": 99'),
            ("q_proj", "z_proj"),
        ],
    )
    def test_an_edited_attribute_of_the_same_length_is_noticed(
        self, run: RunDirectory, before: str, after: str
    ) -> None:
        path = self.folder(run) / "0000.self_attn.q_proj" / "zarr.json"
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after))
        self.assert_damaged(run)

    def test_an_edited_shape_does_not_ask_for_any_amount_of_memory(self, run: RunDirectory) -> None:
        path = self.folder(run) / "0000.self_attn.q_proj" / "gradient_sum" / "zarr.json"
        record = json.loads(path.read_text())
        record["shape"] = [10**9, 10**9]
        path.write_text(json.dumps(record))
        self.assert_damaged(run)

    def test_a_foreign_file_in_the_unit_is_noticed(self, run: RunDirectory) -> None:
        (self.folder(run) / "notes.txt").write_text("hello")
        self.assert_damaged(run)


class TestOpening:
    def test_a_folder_without_a_run_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no streamda run"):
            open_statistics(tmp_path)
        with pytest.raises(ConfigError, match="no streamda run"):
            open_statistics(tmp_path / "nowhere")

    def test_a_module_that_is_not_there_is_a_key_error(self, tmp_path: Path) -> None:
        spec = block(4, 4)
        with a_run(tmp_path) as run:
            write(run, spec, draw(spec))
        with open_statistics(str(tmp_path)) as statistics:
            assert spec.linears[0].name in statistics
            assert "model.layers.9.q_proj" not in statistics
            with pytest.raises(KeyError):
                statistics["model.layers.9.q_proj"]

    def test_readers_stand_side_by_side_but_not_beside_a_writer(self, tmp_path: Path) -> None:
        spec = block(4, 4)
        with a_run(tmp_path) as run:
            write(run, spec, draw(spec))
            with pytest.raises(LockedError):
                open_statistics(tmp_path)
        first, second = open_statistics(tmp_path), open_statistics(tmp_path)
        assert list(first) == list(second)
        with pytest.raises(LockedError):
            RunDirectory.open_existing(tmp_path, exclusive=True)
        first.close()
        second.close()
        RunDirectory.open_existing(tmp_path, exclusive=True).close()

    def test_a_run_without_statistics_is_an_empty_mapping(self, tmp_path: Path) -> None:
        with a_run(tmp_path):
            pass
        with open_statistics(tmp_path) as statistics:
            assert len(statistics) == 0
            assert list(statistics) == []
