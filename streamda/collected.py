"""The statistics of a whole run as a read-only mapping: what `collect` is for, beside `solve`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch

from streamda.block_statistics import sums_dtype
from streamda.factors import LayerStatistics, mirror_lower_
from streamda.rundir import RunDirectory
from streamda.store import BlockStatisticsReader, stats_unit


class Statistics(Mapping[str, LayerStatistics]):
    """The statistics of a whole run: a read-only mapping from module names, each layer read when asked for.

    A layer whose statistics hold NaN or Inf, and were therefore left out, is not in it.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        names = [name for name in run.units.names() if name.startswith("stats-")]
        self._blocks = {int(name.removeprefix("stats-")): name for name in names}
        self._modules: dict[str, int] = {}
        for index in self._blocks:
            metadata = run.units.metadata(stats_unit(index))
            for module in metadata["modules"]:
                if module not in metadata.get("skipped", {}):
                    self._modules[module] = index

    def __getitem__(self, name: str) -> LayerStatistics:
        reader = BlockStatisticsReader(self._run.units, self._modules[name])
        cpu = torch.device("cpu")
        facts = reader.facts(name)
        group = reader.spec.group_of(name)
        moment = reader.input_moment(group, sums_dtype(group.moment_bytes), cpu)
        return LayerStatistics(
            name=name,
            gradient=reader.gradient(name, torch.float32, cpu),
            input_moment=mirror_lower_(moment),
            output_moment=reader.output_moment(name, cpu),
            num_tokens=facts["num_tokens"],
            num_samples=facts["num_samples"],
            weight_norm=facts["weight_norm"],
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __enter__(self) -> Statistics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets writers at the directory again."""
        self._run.close()


def open_statistics(folder: str | Path) -> Statistics:
    """Opens collected statistics for reading.

    Args:
        folder: what `collect --statistics` wrote, or the work directory of `init --keep-statistics`.

    Raises:
        ConfigError: no statistics there.
        LockedError: a run is writing them.
    """
    return Statistics(RunDirectory.open_existing(Path(folder), exclusive=False))
