"""Statistics on disk: plain Zarr v3 that any reader of Zarr can open, one committed unit per block.

    units/stats-0012/COMMIT.json
    units/stats-0012/statistics.zarr/    a Zarr group
        0000.self_attn.q_proj/           attributes: module name, counts, norm of the weight, group of its input
            gradient_sum                 [d_out, d_in] float32, tiles of 2048 x 2048
            output_moment_sum            [d_out]
            input_moment_sum             [d_in, d_in]; in the first module of each input group; its lower tiles only

Sums and counts are stored, never means (see `streamda.factors`). A chunk that is lost reads as data in Zarr; here the
unit's manifest says what must be there, the crc32c codec guards each chunk, and NaN as fill value is the second net.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.buffer.cpu import NDBuffer

from streamda import files
from streamda.config import StatisticsCodec
from streamda.errors import DamagedError
from streamda.factors import mirror_lower_
from streamda.layers import BlockSpec, InputGroup, LinearSpec
from streamda.panels import PANEL_ROWS, Panel
from streamda.statistics_codecs import zarr_codecs
from streamda.units import UnitStore

TILE = PANEL_ROWS
ZARR_FOLDER = "statistics.zarr"
CHUNK_CONCURRENCY = 2
"""Chunks written or read at a time. Zarr holds about two copies of each: 2 x 2 x 16.8 MB at full tiles."""


def stats_unit(index: int) -> str:
    """Name of the unit with a block's statistics."""
    return f"stats-{index:04d}"


@contextmanager
def _zarr_limits() -> Iterator[None]:
    # Zarr's default of ten chunks at a time would be hundreds of megabytes outside any plan
    limits = {"async.concurrency": CHUNK_CONCURRENCY, "threading.max_workers": CHUNK_CONCURRENCY}
    with warnings.catch_warnings(), zarr.config.set(limits):
        # of bitround, which the user asked for, at each array that is made or opened
        warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
        yield


def _slugs(spec: BlockSpec) -> dict[str, str]:
    """Folder names of a block's modules: legal everywhere, unique also where case does not count."""
    slugs = {}
    for index, linear in enumerate(spec.linears):
        short = re.sub(r"[^a-z0-9_.-]", "_", linear.name.removeprefix(spec.prefix + ".").lower())
        slugs[linear.name] = f"{index:04d}.{short[:48].strip('.')}"
    return slugs


class BlockStatisticsWriter:
    """Writes the statistics of one block, panel by panel, into the folder of a unit that is being built."""

    def __init__(self, folder: Path, spec: BlockSpec, codec: StatisticsCodec) -> None:
        self._folder = folder / ZARR_FOLDER
        self._slugs = _slugs(spec)
        self._spec = spec
        with self._writing():
            root = zarr.create_group(
                zarr.storage.LocalStore(self._folder), attributes={"format": "streamda-statistics"}
            )
            self._groups = {name: root.create_group(slug) for name, slug in self._slugs.items()}
            for linear in spec.linears:
                self._create(linear.name, "gradient_sum", (linear.d_out, linear.d_in), codec)
                self._create(linear.name, "output_moment_sum", (linear.d_out,), codec)
            for group in spec.groups:
                self._create(group.name, "input_moment_sum", (group.d_in, group.d_in), codec)

    def _create(self, module: str, name: str, shape: tuple[int, ...], codec: StatisticsCodec) -> None:
        self._groups[module].create_array(
            name,
            shape=shape,
            chunks=tuple(min(TILE, side) for side in shape),
            dtype="float32",
            fill_value=float("nan"),
            config={"write_empty_chunks": True},
            **zarr_codecs(codec),
        )

    def write_panel(self, panel: Panel, values: torch.Tensor) -> None:
        """Writes one finished panel; the diagonal tile of an input moment is made symmetric on the way.

        Args:
            panel: whole tile rows of one statistic.
            values: its sums, [rows, columns] float32 ([rows] for an output moment).
        """
        host = values.to("cpu")
        if panel.statistic == "input_moment":
            mirror_lower_(host[:, panel.start : panel.stop])
        with self._writing():
            array = self._groups[panel.module][f"{panel.statistic}_sum"]
            assert isinstance(array, zarr.Array)
            data: npt.NDArray[np.float32] = host.numpy()
            if host.ndim == 1:
                array[panel.start : panel.stop] = data
                return
            # one call for the whole row of tiles: Zarr encodes as many at a time as `_zarr_limits` allows it
            array[panel.start : panel.stop, : panel.columns] = data[:, : panel.columns]

    def write_facts(self, module: str, facts: Mapping[str, Any]) -> None:
        """Writes a module's counts and weight norm."""
        linear = self._spec.linear(module)
        group = self._spec.group_of(module)
        with self._writing():
            self._groups[module].update_attributes(
                {
                    "module": module,
                    "d_in": linear.d_in,
                    "d_out": linear.d_out,
                    "transposed": linear.transposed,
                    "input_group": group.name,
                    **facts,
                }
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with _zarr_limits():
                yield
        except (OSError, RuntimeError, ValueError) as error:
            translated = files.foreign_storage_error(error, "write", self._folder)
            if translated is None:
                raise
            raise translated from error


class BlockStatisticsReader:
    """Reads the committed statistics of one block."""

    def __init__(self, units: UnitStore, index: int) -> None:
        """Opens and checks a unit.

        Raises:
            DamagedError: its manifest, names, sizes or descriptions are not what was committed.
        """
        self._unit, self._units = stats_unit(index), units
        # a chunk's own checksum says that it is whole, its last bytes that it is not another array's
        units.check_ends(self._unit)
        self._path = units.path(self._unit) / ZARR_FOLDER
        for relpath, record in units.metadata(self._unit).files.items():
            # a chunk has its own checksum and is read once; what describes it has none, and counts stand in there
            if relpath.endswith("zarr.json") and files.crc32c_of_file(self._path.parent / relpath) != record.crc32c:
                raise self._damage(f"{relpath} does not have the bytes that were committed")
        with self._reading():
            root = zarr.open_group(zarr.storage.LocalStore(self._path, read_only=True), mode="r")
            self._groups = {str(group.attrs["module"]): group for _, group in sorted(root.groups())}
        facts: dict[str, dict[str, Any]] = {name: dict(group.attrs.asdict()) for name, group in self._groups.items()}
        linears = tuple(
            LinearSpec(name, fact["d_in"], fact["d_out"], fact["transposed"]) for name, fact in facts.items()
        )
        members: dict[str, list[str]] = {}
        for name, fact in facts.items():
            members.setdefault(fact["input_group"], []).append(name)
        if not members.keys() <= facts.keys():
            raise self._damage("an input moment is not where its layers look for it")
        groups = tuple(
            InputGroup((first, *(name for name in names if name != first)), facts[first]["d_in"])  # as it was collected
            for first, names in members.items()
        )
        self.spec = BlockSpec(index, units.metadata(self._unit)["prefix"], linears, groups)
        self._facts = facts
        self._require_consistent_counts()

    def _require_consistent_counts(self) -> None:
        """Layers that read the same input saw the same tokens: their gradients and their moment belong together."""
        for group in self.spec.groups:
            kept = [name for name in group.modules if "skipped" not in self._facts[name]]
            for name in kept:
                facts, first = self._facts[name], self._facts[kept[0]]
                least = {"num_tokens": 0, "num_samples": 1}  # a layer may never be called, but not without samples
                if any(type(facts[key]) is not int or facts[key] < value for key, value in least.items()):
                    raise self._damage(f"{name} has counts that cannot be")
                if any(facts[key] != first[key] for key in ("num_tokens", "num_samples", "d_in")):
                    raise self._damage(f"{name} and {group.name} share an input but not its counts")

    def facts(self, module: str) -> dict[str, Any]:
        """Counts and weight norm of a module."""
        return self._facts[module]

    def sums(self, module: str, statistic: str, *where: slice) -> torch.Tensor:
        """A region of the stored sums of a statistic, float32; of an input moment only its lower tiles are there.

        Raises:
            DamagedError: not what was committed, or not finite.
        """
        return self._read(self._array(module, f"{statistic}_sum"), *where)

    def moment(self, group: InputGroup, device: torch.device) -> StoredMoment:
        """The mean input moment of a group, to be read band by band."""
        return StoredMoment(self, group, device)

    def input_moment(self, group: InputGroup, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The mean input moment [d_in, d_in] of a group; only its lower triangle (and diagonal tiles) are filled."""
        bands = self.moment(group, device)
        moment = torch.zeros(group.d_in, group.d_in, dtype=dtype, device=device)
        for index in range(len(bands)):
            band = bands.band(index, dtype)
            moment[index * TILE : index * TILE + band.shape[0], : band.shape[1]] = band
        return moment

    def moment_tiles(self, group: InputGroup, row: int, columns: slice) -> torch.Tensor:
        """Tiles side by side in the lower triangle of a mean input moment, float32, on the host."""
        block = self._read(self._array(group.name, "input_moment_sum"), slice(row, row + TILE), columns)
        # divided in float32, so that what is solved and what `open_statistics` shows are the same numbers
        return block.div_(max(1, self._facts[group.name]["num_tokens"]))

    def gradient(self, module: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The mean gradient [d_out, d_in]."""
        linear = self.spec.linear(module)
        gradient = torch.empty(linear.d_out, linear.d_in, dtype=dtype, device=device)
        for index, band in enumerate(self.gradient_bands(module, device)):
            gradient[index * TILE : index * TILE + band.shape[0]] = band
        return gradient

    def gradient_bands(self, module: str, device: torch.device) -> StoredGradient:
        """The mean gradient as bands of rows, each read when it is asked for."""
        return StoredGradient(self, module, device)

    def gradient_band(self, module: str, row: int, device: torch.device) -> torch.Tensor:
        """Rows from `row` on of a mean gradient, [up to a tile's rows, d_in] float32."""
        band = self._read(self._array(module, "gradient_sum"), slice(row, row + TILE), slice(None))
        return band.div_(self._facts[module]["num_samples"]).to(device)

    def output_moment(self, module: str, device: torch.device) -> torch.Tensor:
        """The mean output moment [d_out] float32."""
        sums = self._read(self._array(module, "output_moment_sum"), slice(None)).to(device)
        return sums.div_(max(1, self._facts[module]["num_tokens"]))

    def _array(self, module: str, name: str) -> zarr.Array[Any]:
        with self._reading():
            array = self._groups[module][name]
        linear = self.spec.linear(module)
        shapes = {
            "gradient_sum": (linear.d_out, linear.d_in),
            "input_moment_sum": (linear.d_in, linear.d_in),
            "output_moment_sum": (linear.d_out,),
        }
        # an edited zarr.json could ask for any amount of memory
        if not isinstance(array, zarr.Array) or array.shape != shapes[name] or array.dtype != np.dtype("float32"):
            raise self._damage(f"{module} {name} is not the array that was committed")
        return array

    def _read(self, array: zarr.Array[Any], *where: slice) -> torch.Tensor:
        shape = [len(range(side)[each]) for each, side in zip(where, array.shape, strict=True)]
        values = torch.empty(shape)  # not NumPy's, whose alignment varies, and with it the bits of a product
        with self._reading():
            array.get_basic_selection(where, out=NDBuffer.from_numpy_array(values.numpy()))
        # every sum was checked to be finite, and is far from overflow, when it was written
        if not bool(torch.isfinite(values.sum())):
            raise self._damage(f"{array.name} holds values that were never written; a chunk is missing")
        return values

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Zarr raises ValueError, RuntimeError and KeyError for damage, without the file's name."""
        try:
            with _zarr_limits():
                yield
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self._damage(f"it cannot be read ({reason})") from error

    def _damage(self, what: str) -> DamagedError:
        return DamagedError(f"{self._path}: {what}; {self._units.repair(self._unit)}")


class StoredMoment:
    """A mean input moment on disk, by bands of rows; see `streamda.cholesky`."""

    def __init__(self, reader: BlockStatisticsReader, group: InputGroup, device: torch.device) -> None:
        self._reader, self._group, self._device = reader, group, device
        self._only_tile: torch.Tensor | None = None  # read for its diagonal, and then wanted whole

    def __len__(self) -> int:
        return -(-self._group.d_in // TILE)

    def diagonal(self) -> torch.Tensor:
        """[d_in] float64."""
        parts: list[torch.Tensor] = []
        for start in range(0, self._group.d_in, TILE):
            tile = self._reader.moment_tiles(self._group, start, slice(start, start + TILE))
            parts.append(tile.diagonal().double())
        self._only_tile = tile if len(parts) == 1 else None
        return torch.cat(parts).to(self._device)

    def band(self, index: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Band `index`, [rows, stop]; a new tensor each time."""
        start = index * TILE
        stop = min(start + TILE, self._group.d_in)
        tile, self._only_tile = self._only_tile, None
        if tile is not None:
            return tile.to(self._device, dtype)
        if dtype == torch.float32:
            return self._reader.moment_tiles(self._group, start, slice(stop)).to(self._device)
        band = torch.empty(stop - start, stop, dtype=dtype, device=self._device)
        for column in range(0, stop, TILE * CHUNK_CONCURRENCY):
            columns = slice(column, min(column + TILE * CHUNK_CONCURRENCY, stop))
            band[:, columns] = self._reader.moment_tiles(self._group, start, columns).to(self._device)
        return band


class StoredGradient(Sequence[torch.Tensor]):
    """A mean gradient on disk, by bands of rows, [up to a tile's rows, d_in] float32 each."""

    def __init__(self, reader: BlockStatisticsReader, module: str, device: torch.device) -> None:
        self._reader, self._module, self._device = reader, module, device

    def __len__(self) -> int:
        return -(-self._reader.spec.linear(self._module).d_out // TILE)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        if not 0 <= index < len(self):
            raise IndexError(index)  # what ends an iteration
        return self._reader.gradient_band(self._module, index * TILE, self._device)
