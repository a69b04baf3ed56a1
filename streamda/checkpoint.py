"""The weights of a model: its safetensors read one part at a time into a skeleton without any.

Accelerate places each tensor (`set_module_tensor_to_device`). Names in the files become names in the model once, by
transformers' own conversion rules; tensors that a rule fuses or splits (experts of a mixture) go through transformers'
converter with one part's tensors only. Reading touches no module, so a thread may do it; placing is for the one that
runs the model.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_module_tensor_to_device
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from streamda import read_ahead, stopping
from streamda.errors import MismatchError, ModelError
from streamda.file_reader import FileReader
from streamda.files import shown
from streamda.memory import CopyMark, DeviceCopier, hand_over
from streamda.quoting import one_line
from streamda.shard_values import NonFiniteWeightError, opened, read_tensor
from streamda.shards import MAX_JSON_BYTES, StoredTensor, first_line
from streamda.spare_memory import SpareMemory
from streamda.stored_weights import StoredWeight
from streamda.weight_map import WeightMap

SAMPLED_BYTES = 16 << 10
"""From each end of every tensor, for the fingerprint. Of a model that was trained further any part differs; of
a 70B model it is 24 MB in all."""


@dataclass(frozen=True, slots=True)
class ReadWeights:
    """Tensors on the device that are not yet in the model."""

    values: list[tuple[StoredTensor, torch.Tensor, str]]
    """Each with the name that it gets."""
    filled: CopyMark
    """When they are complete."""


class Checkpoint:
    """Weights of a model folder, placed into a skeleton on demand and counted as they are read."""

    def __init__(
        self, folder: Path, model: PreTrainedModel, device: torch.device, *, cache_bytes: int = sys.maxsize
    ) -> None:
        """Reads the headers of all shards and maps their names (`map`); no weight is read.

        Args:
            folder: of the model.
            model: its skeleton.
            device: where weights are placed.
            cache_bytes: of files that memory can hold. A larger checkpoint is read past the system's page cache,
                which would not keep it until it is read again.

        Raises:
            ModelError: no safetensors, a damaged or missing shard, or tensors that do not fit the configuration.
        """
        self.folder = folder
        self.bytes_read = 0
        self._reading = threading.Lock()  # one read at a time: they share the copier, and the count
        self._copier = DeviceCopier(device)
        self._spare = SpareMemory()
        self._model = model
        self._device = device
        self.map = WeightMap(folder, model)
        self.shards = self.map.shards
        self._found: dict[Path, dict[str, int]] = {}
        self._digests: dict[Path, str] = {}
        for shard in self.shards:
            with opened(shard) as reader:
                self._found[shard] = _identity(os.fstat(reader.descriptor))
                self._digests[shard] = self._sampled_digest(shard, reader.descriptor)
        self._checksums: dict[str, int] = {}  # crc32c of each tensor as it was first read, by key
        self._tolerated: frozenset[str] = frozenset()
        self._zeroed: dict[str, dict[str, int]] = {}  # values, by parameter and key: each is read more than once
        self.total_bytes = sum(tensor.num_bytes for tensor in self.map.tensors)
        self.is_read_directly = self.total_bytes > cache_bytes
        """Whether weights are read past the page cache."""

    def load(self, names: Iterable[str], *, keep_stored: bool = False) -> None:
        """Reads parameters and places them on the device, in the skeleton's dtype.

        Args:
            names: full parameter names; a module's name stands for all that lies below it.
            keep_stored: matrices that the files hold in a narrower dtype stay in it and are cast for each product
                (`streamda.stored_weights`); no result changes.

        Raises:
            ModelError: a tensor cannot be read, or holds NaN or Inf.
            MismatchError: a shard is not the file any more that it was.
        """
        self.place(self.read(names, keep_stored=keep_stored))

    def read(self, names: Iterable[str], *, keep_stored: bool = False) -> ReadWeights:
        """Reads parameters to the device and leaves the model alone; any thread may. For the rest as `load`."""
        wanted: list[tuple[StoredTensor, torch.dtype, str]] = []
        for name in names:
            for target in self.map.targets_below(name):
                for tensor in self.map.stored(target):
                    wanted.append((tensor, self._read_dtype(tensor, keep_stored), target))
        values: list[tuple[StoredTensor, torch.Tensor, str]] = []
        with self._reading, self._copier as copier:
            self._spare.trim_to((tensor.shape, dtype) for tensor, dtype, _ in wanted)
            for shard in dict.fromkeys(tensor.file for tensor, _, _ in wanted):
                with opened(shard, direct=self.is_read_directly) as reader:
                    self._require_unchanged(shard, reader.descriptor)
                    for tensor, dtype, target in wanted:
                        if tensor.file == shard:
                            stopping.check()  # in the thread that reads ahead, too: a block may take a while
                            values.append((tensor, self._read_tensor(reader, tensor, dtype, copier), target))
                            self.bytes_read += tensor.num_bytes
            return ReadWeights(values, copier.mark())

    def place(self, weights: ReadWeights) -> None:
        """Puts what `read` returned into the model, once; it is empty afterwards.

        Raises:
            ModelError: transformers cannot fuse or split it.
        """
        hand_over([value for _, value, _ in weights.values], weights.filled, self._device)
        fused: dict[str, torch.Tensor] = {}
        while weights.values:
            tensor, value, target = weights.values.pop(0)
            if tensor.converted:
                fused[tensor.key] = value
            else:
                self._put(target, value)
            del value
        if fused:
            self.free_spare()  # the conversion makes copies of its own, which the plan counts, and no more than these
            self._convert(fused)

    def announce(self, names: Iterable[str], dropped: threading.Event) -> None:
        """Asks the system to read parameters into its page cache, for a `load` that follows; any thread may.

        Does nothing where `load` goes past it.

        Args:
            names: as for `load`.
            dropped: once it is set, the rest is not asked for.
        """
        if self.is_read_directly:
            return
        tensors = [
            tensor for name in names for target in self.map.targets_below(name) for tensor in self.map.stored(target)
        ]
        for shard in dict.fromkeys(tensor.file for tensor in tensors):
            with opened(shard) as reader:
                for tensor in tensors:
                    if tensor.file == shard:
                        read_ahead.ask(reader.descriptor, tensor.offset, tensor.num_bytes, dropped)

    def release(self, names: Iterable[str], *, spare: bool = False) -> None:
        """Puts parameters back on meta and so frees them.

        Args:
            names: as for `load`.
            spare: their memory is kept for the weights that are read next, until `free_spare`.
        """
        for name in names:
            module, _, leaf = name.rpartition(".")
            owner = self._model.get_submodule(module)
            if leaf in owner._parameters:
                self._empty(name, spare)
                continue
            for below, _ in self._model.get_submodule(name).named_parameters():
                self._empty(f"{name}.{below}", spare)

    def free_spare(self) -> None:
        """Frees what `release` has kept and no `read` has taken."""
        self._spare.clear()

    def close(self) -> None:
        """Frees what is kept between reads; a later one makes it again."""
        self.free_spare()
        self._copier.close()

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the weights: of each shard its size, and a digest of its header and of each tensor's ends.

        Of the files as they were when this was made; whatever is read later is held against that.
        """
        shards = {shard.name: [self._found[shard]["size"], self._digests[shard]] for shard in self.shards}
        return {"config": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest(), "shards": shards}

    def tolerate(self, names: Iterable[str]) -> None:
        """From now on NaN and Inf in these parameters are read as zeros and counted in `not_finite`."""
        self._tolerated = frozenset(names)

    @property
    def not_finite(self) -> dict[str, int]:
        """Values of tolerated parameters that were read as zeros, counted by parameter, of those read so far."""
        # of a copy, made in one step: the next block may be read meanwhile
        return {target: sum(counts.values()) for target, counts in list(self._zeroed.items())}

    def _read_tensor(
        self, reader: FileReader, tensor: StoredTensor, dtype: torch.dtype, copier: DeviceCopier
    ) -> torch.Tensor:
        try:
            value, checksum = read_tensor(reader, tensor, dtype, copier, self._spare)
        except NonFiniteWeightError as error:
            if tensor.target not in self._tolerated:
                raise
            self._zeroed.setdefault(tensor.target, {})[tensor.key] = error.count
            value, checksum = read_tensor(reader, tensor, dtype, copier, self._spare, zero_not_finite=True)
        if self._checksums.setdefault(tensor.key, checksum) != checksum:
            raise _changed(tensor.file, f"{one_line(tensor.key)} has other bytes")
        return value

    def _sampled_digest(self, shard: Path, descriptor: int) -> str:
        """Of a shard's header and of both ends of each of its tensors."""
        digest = hashlib.sha256()
        try:
            header = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            # what lies there now may be no header; none that was accepted is longer
            digest.update(os.pread(descriptor, min(header, MAX_JSON_BYTES), 8))
            for tensor in self.map.tensors:
                if tensor.file == shard:
                    last = max(tensor.offset, tensor.offset + tensor.num_bytes - SAMPLED_BYTES)
                    for start in (tensor.offset, last):
                        digest.update(os.pread(descriptor, min(SAMPLED_BYTES, tensor.num_bytes), start))
        except OSError as error:
            raise ModelError(f"{shown(shard)} cannot be read: {first_line(error)}") from error
        return digest.hexdigest()

    def _require_unchanged(self, shard: Path, descriptor: int) -> None:
        """Refuses a shard that is no longer the file whose header was read: the passes would see two models.

        Not every file system keeps a file's number, and a copy of equal bytes may take its place; so where only number
        or time differ its samples decide, and between the samples the checksum of each tensor (`_read_tensor`).

        Raises:
            ModelError: it was cut.
            MismatchError: it was written to or replaced.
        """
        before, now = self._found[shard], _identity(os.fstat(descriptor))
        if now["size"] < before["size"]:
            raise ModelError(
                f"{shown(shard)} cannot be read: it ends {before['size'] - now['size']} bytes before where it ended "
                "when the run began"
            )
        changed = [name for name in before if now[name] != before[name]]
        if "size" in changed or (changed and self._sampled_digest(shard, descriptor) != self._digests[shard]):
            raise _changed(shard, ", ".join(changed))
        self._found[shard] = now

    def _read_dtype(self, tensor: StoredTensor, keep_stored: bool) -> torch.dtype:
        """Norms and biases are always cast: they are small, and used in ways of their own."""
        dtype = self.map.expected[tensor.target].dtype
        narrower = tensor.dtype.itemsize < dtype.itemsize
        is_matrix = len(tensor.shape) > 1 or tensor.converted
        return tensor.dtype if keep_stored and narrower and is_matrix else dtype

    def _put(self, target: str, value: torch.Tensor) -> None:
        dtype = self.map.expected[target].dtype
        if value.dtype == dtype:
            set_module_tensor_to_device(self._model, target, self._device, value=value, dtype=dtype, clear_cache=False)
            return
        module, _, leaf = target.rpartition(".")
        # it stands for a parameter, and is none
        self._model.get_submodule(module)._parameters[leaf] = StoredWeight.keep(value, dtype)  # type: ignore[assignment]

    def _empty(self, target: str, spare: bool) -> None:
        module, _, leaf = target.rpartition(".")
        owner = self._model.get_submodule(module)
        weight: Any = owner._parameters[leaf]  # a StoredWeight is no Parameter
        if spare and weight is not None:
            self._spare.keep(weight)
        if isinstance(weight, StoredWeight):
            # accelerate would keep the stored dtype, and take a cast for the way
            empty = torch.empty_like(self.map.expected[target], device="meta")
            owner._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)
            return
        set_module_tensor_to_device(self._model, target, "meta", clear_cache=False)

    def _convert(self, tensors: dict[str, torch.Tensor]) -> None:
        """Lets transformers fuse or split one part's tensors on their way into the model."""
        dtypes = {value.dtype for value in tensors.values()}
        dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
        mapping: Any = get_model_conversion_mapping(self._model)  # made anew: its entries remember what they have seen
        # without the pattern all would be cast to the skeleton's dtype; what the files hold in several dtypes is
        keeps = {"*": dtype} if len(dtypes) == 1 else {}
        config = LoadStateDictConfig(
            dtype=dtype, device_map={"": str(self._device)}, weight_mapping=mapping, dtype_plan=keeps
        )
        before = {name for name, value in self._model.named_parameters() if value.is_meta}
        with _quiet_progress():
            info, _ = convert_and_load_state_dict_in_model(self._model, tensors, config)
        if info.conversion_errors:
            name, reason = next(iter(info.conversion_errors.items()))
            raise ModelError(f"{shown(self.folder)}: {name} cannot be converted: {one_line(str(reason))}")
        self._model.requires_grad_(False)
        for name in before:
            value = self._model.get_parameter(name)
            if not value.is_meta and value.dtype != self.map.expected[name].dtype:
                self._put(name, value.data)


def _changed(shard: Path, what: str) -> MismatchError:
    return MismatchError(
        f"{shown(shard)} changed while the run went on ({what}); put the file back that it began with, and run the "
        "same command again"
    )


def _identity(facts: os.stat_result) -> dict[str, int]:
    """By what a file is known within one run, without reading it."""
    return {"size": facts.st_size, "time of change": facts.st_mtime_ns, "file": facts.st_ino}


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """Hides transformers' own bar, which would open once per block."""
    switch: Any = transformers.utils.logging
    enabled = switch.is_progress_bar_enabled()
    switch.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            switch.enable_progress_bar()
