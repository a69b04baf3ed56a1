"""Statistics on disk: plain Zarr v3 that any reader of Zarr can open, one committed unit per block.

    units/stats-0012/COMMIT.json
    units/stats-0012/statistics.zarr/    a Zarr group
        0000.self_attn.q_proj/           attributes: module name, counts, norm of the weight, group of its input
            gradient_sum                 [d_out, d_in] float32, tiles of 2048 x 2048
            output_moment_sum            [d_out]
            input_moment_sum             [d_in, d_in]; in the first module of each input group; its lower tiles only
            input_moment_rest            likewise: what float32 leaves of sums in float64; the sum is both together

Where a run that keeps no statistics has few tokens, `input_rows` [tokens, d_in] and `output_rows` [tokens, d_out] stand
in the place of the input moments and the gradients, in tiles of as many rows as a panel of them has.

Sums and counts are stored, never means (see `streamda.factors`). A chunk that is lost reads as data in Zarr; here the
unit's manifest says what must be there, the crc32c codec guards each chunk, and NaN as fill value is the second net.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from zarr.buffer.cpu import NDBuffer

from streamda import files
from streamda.block_statistics import TILE, TILES_AT_A_TIME, BlockStatistics, zero_panel
from streamda.config import StatisticsCodec
from streamda.errors import DamagedError
from streamda.factors import is_finite, mirror_lower_
from streamda.layers import BlockSpec, InputGroup, LinearSpec
from streamda.panels import FLOAT32_BYTES, Panel, panel_tokens
from streamda.quoting import printable
from streamda.statistics_codecs import zarr_codecs
from streamda.units import UnitStore

ZARR_FOLDER = "statistics.zarr"
CHUNK_CONCURRENCY = TILES_AT_A_TIME
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


def _array_name(statistic: str) -> str:
    return statistic if statistic.endswith("_rows") else f"{statistic}_sum"


_MOMENT, _REST = "input_moment_sum", "input_moment_rest"


def _array_shapes(spec: BlockSpec, linear: LinearSpec) -> dict[str, tuple[int, ...]]:
    """Arrays of a module, by name."""
    group = spec.group_of(linear.name)
    tokens, is_first = group.token_rows, group.name == linear.name
    shapes: dict[str, tuple[int, ...]] = {"output_moment_sum": (linear.d_out,)}
    if tokens:
        shapes["output_rows"] = (tokens, linear.d_out)
    else:
        shapes["gradient_sum"] = (linear.d_out, linear.d_in)
    if is_first and tokens:
        shapes["input_rows"] = (tokens, group.d_in)
    elif is_first:
        arrays = (_MOMENT,) if group.moment_bytes == FLOAT32_BYTES else (_MOMENT, _REST)
        shapes |= dict.fromkeys(arrays, (group.d_in, group.d_in))
    return shapes


class BlockStatisticsWriter:
    """Writes the statistics of one block, panel by panel, into the folder of a unit that is being built."""

    new_panel = staticmethod(zero_panel)

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
                group = spec.group_of(linear.name)
                height = panel_tokens(group.d_in, [spec.linear(each).d_out for each in group.modules])
                for name, shape in _array_shapes(spec, linear).items():
                    self._create(linear.name, name, shape, height if name.endswith("_rows") else TILE, codec)

    def _create(self, module: str, name: str, shape: tuple[int, ...], height: int, codec: StatisticsCodec) -> None:
        self._groups[module].create_array(
            name,
            shape=shape,
            chunks=(min(height, shape[0]), *(min(TILE, side) for side in shape[1:])),
            dtype="float32",
            fill_value=float("nan"),
            config={"write_empty_chunks": True},
            **zarr_codecs(codec),
        )

    def write_panel(self, panel: Panel, values: torch.Tensor) -> None:
        """As `StatisticsSink` says."""
        host = values.to("cpu")
        if panel.statistic == "input_moment":
            mirror_lower_(host[:, panel.start : panel.stop])
        name = _array_name(panel.statistic)
        if host.dtype == torch.float64:
            for column in range(0, panel.columns, TILE):  # not two: its two parts are there beside Zarr's copies
                part = host[:, column : column + TILE]
                high = part.float()
                self._write(panel, name, high, column)
                part.sub_(high)
                self._write(panel, _REST, high.copy_(part), column)
        else:
            # one call for the whole row of tiles: Zarr encodes as many at a time as `_zarr_limits` allows it
            self._write(panel, name, host[:, : panel.columns] if host.ndim > 1 else host)

    def _write(self, panel: Panel, name: str, values: torch.Tensor, column: int = 0) -> None:
        data: npt.NDArray[np.float32] = values.numpy()
        with self._writing():
            array = self._groups[panel.module][name]
            assert isinstance(array, zarr.Array)
            if values.ndim == 1:
                array[panel.start : panel.stop] = data
            else:
                array[panel.start : panel.stop, column : column + values.shape[1]] = data

    def write_facts(self, module: str, facts: Mapping[str, Any]) -> None:
        """As `StatisticsSink` says."""
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
                    **({"token_rows": group.token_rows} if group.token_rows else {}),
                    **({"moment_bytes": group.moment_bytes} if group.moment_bytes > FLOAT32_BYTES else {}),
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


class BlockStatisticsReader(BlockStatistics):
    """The committed statistics of one block, read from disk as they are asked for."""

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
            InputGroup(
                (first, *(name for name in names if name != first)),  # as it was collected
                facts[first]["d_in"],
                facts[first].get("token_rows", 0),
                moment_bytes=facts[first].get("moment_bytes", FLOAT32_BYTES),
            )
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
                tokens = self.spec.group_of(name).token_rows
                if 0 < tokens < facts["num_tokens"]:
                    raise self._damage(f"{name} counts more tokens than it has rows")
                if any(facts[key] != first[key] for key in ("num_tokens", "num_samples", "d_in")):
                    raise self._damage(f"{name} and {group.name} share an input but not its counts")

    def facts(self, module: str) -> dict[str, Any]:
        """As `BlockStatistics` says."""
        return self._facts[module]

    def sums(self, module: str, statistic: str, *where: slice) -> torch.Tensor:
        """As `BlockStatistics` says."""
        values = self._read(self._array(module, _array_name(statistic)), *where)
        if statistic == "input_moment" and self.spec.group_of(module).moment_bytes > FLOAT32_BYTES:
            values = values.double()
            values += self._read(self._array(module, _REST), *where)
        return values

    def _array(self, module: str, name: str) -> zarr.Array[Any]:
        with self._reading():
            array = self._groups[module][name]
        shape = _array_shapes(self.spec, self.spec.linear(module)).get(name)
        # an edited zarr.json could ask for any amount of memory
        if not isinstance(array, zarr.Array) or array.shape != shape or array.dtype != np.dtype("float32"):
            raise self._damage(f"{module} {name} is not the array that was committed")
        return array

    def _read(self, array: zarr.Array[Any], *where: slice) -> torch.Tensor:
        shape = [len(range(side)[each]) for each, side in zip(where, array.shape, strict=True)]
        values = torch.empty(shape)  # not NumPy's, whose alignment varies, and with it the bits of a product
        with self._reading(array.name):
            array.get_basic_selection(where, out=NDBuffer.from_numpy_array(values.numpy()))
        if not is_finite(values):  # as all was when it was written
            raise self._damage(f"{array.name} holds values that were never written; a chunk is missing")
        return values

    @contextmanager
    def _reading(self, array: str = "") -> Iterator[None]:
        """Zarr raises ValueError, RuntimeError and KeyError for damage, without the file's name."""
        try:
            with _zarr_limits():
                yield
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self._damage(f"{array.lstrip('/') or 'it'} cannot be read ({printable(reason)})") from error

    def _damage(self, what: str) -> DamagedError:
        return DamagedError(f"{self._path}: {what}; {self._units.repair(self._unit)}")
