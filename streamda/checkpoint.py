"""The model: a skeleton without weights, and its safetensors read one part at a time.

Accelerate builds the skeleton (`init_empty_weights`) and places each tensor (`set_module_tensor_to_device`). Names in
the files become names in the model once, by transformers' own conversion rules; tensors that a rule fuses or splits
(experts of a mixture) go through transformers' converter with one part's tensors only. Reading touches no module, so a
thread may do it; placing is for the one that runs the model.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from streamda.errors import ModelError
from streamda.memory import CopyMark, DeviceCopier, hand_over
from streamda.shards import (
    STORED_DTYPES,
    StoredTensor,
    announce,
    find_shards,
    first_line,
    opened,
    read_header,
    read_tensor,
)
from streamda.stored_weights import StoredWeight

SAMPLED_BYTES = 1 << 20  # 1 MiB from each end of a shard goes into the fingerprint


def load_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """Reads the configuration of a model folder.

    Raises:
        ModelError: unreadable, of an unknown architecture, quantized, not a decoder, or in need of its own code.
    """
    try:
        raw = json.loads((folder / "config.json").read_bytes())
        if "auto_map" in raw and not trust_remote_code:
            raise ModelError(f"{folder} brings its own Python code; add --trust-remote-code if you trust it")
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be used: {first_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{folder} is a quantized checkpoint; gradients need the original weights")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{folder} is an encoder-decoder model; streamda reads decoder-only language models")
    return config


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with every weight on meta and every buffer real, in evaluation mode, nothing requiring gradients.

    Raises:
        ModelError: transformers has no causal language model for this configuration, or cannot build it.
    """
    try:
        with init_empty_weights(include_buffers=False):
            auto: Any = AutoModelForCausalLM
            model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"no causal language model can be built from the configuration: {first_line(error)}"
        ) from error
    model.tie_weights()
    model.config.use_cache = False
    model.eval()
    model.requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    return model


@dataclass(frozen=True, slots=True)
class ReadWeights:
    """Tensors on the device that are not yet in the model."""

    values: list[tuple[StoredTensor, torch.Tensor, str]]
    """Each with the name that it gets."""
    filled: CopyMark
    """When they are complete."""


class Checkpoint:
    """Weights of a model folder, placed into a skeleton on demand and counted as they are read."""

    def __init__(self, folder: Path, model: PreTrainedModel, device: torch.device) -> None:
        """Reads the headers of all shards and maps their names; no weight is read.

        Raises:
            ModelError: no safetensors, a damaged or missing shard, or tensors that do not fit the configuration.
        """
        self.folder = folder
        self.bytes_read = 0
        self._reading = threading.Lock()  # one read at a time: they share the copier, and the count
        self._copier = DeviceCopier(device)
        self._model = model
        self._device = device
        self._conversions = get_model_conversion_mapping(model)
        self._expected = dict(model.state_dict())
        self.shards = find_shards(folder)
        self._tensors = list(self._read_headers())
        self._by_target: dict[str, list[StoredTensor]] = {}
        for tensor in self._tensors:
            self._by_target.setdefault(tensor.target, []).append(tensor)
        self._aliases = self._find_aliases()
        self._check()
        self.total_bytes = sum(tensor.num_bytes for tensor in self._tensors)

    def load(self, names: Iterable[str], *, keep_stored: bool = False) -> None:
        """Reads parameters and places them on the device, in the skeleton's dtype.

        Args:
            names: full parameter names; a module's name stands for all that lies below it.
            keep_stored: matrices that the files hold in a narrower dtype stay in it and are cast for each product
                (`streamda.stored_weights`); no result changes.

        Raises:
            ModelError: a tensor cannot be read, or holds NaN or Inf.
        """
        self.place(self.read(names, keep_stored=keep_stored))

    def read(self, names: Iterable[str], *, keep_stored: bool = False) -> ReadWeights:
        """Reads parameters to the device and leaves the model alone; any thread may. For the rest as `load`."""
        wanted: list[tuple[StoredTensor, str]] = []
        for name in names:
            for target in self._targets_below(name):
                wanted += [(tensor, target) for tensor in self._stored(target)]
        values: list[tuple[StoredTensor, torch.Tensor, str]] = []
        with self._reading, self._copier as copier:
            for shard in dict.fromkeys(tensor.file for tensor, _ in wanted):
                with opened(shard) as descriptor:
                    for tensor, target in wanted:
                        if tensor.file == shard:
                            dtype = self._read_dtype(tensor, keep_stored)
                            values.append((tensor, read_tensor(descriptor, tensor, dtype, copier), target))
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
            self._convert(fused)

    def announce(self, names: Iterable[str]) -> None:
        """Asks the system to read parameters into its page cache, for a `load` that follows; names as there."""
        tensors = [tensor for name in names for target in self._targets_below(name) for tensor in self._stored(target)]
        for shard in dict.fromkeys(tensor.file for tensor in tensors):
            with opened(shard) as descriptor:
                for tensor in tensors:
                    if tensor.file == shard:
                        announce(descriptor, tensor)

    def release(self, names: Iterable[str]) -> None:
        """Puts parameters back on meta and so frees them; names as in `load`."""
        for name in names:
            module, _, leaf = name.rpartition(".")
            owner = self._model.get_submodule(module)
            if leaf in owner._parameters:
                self._empty(name)
                continue
            for below, _ in self._model.get_submodule(name).named_parameters():
                self._empty(f"{name}.{below}")

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the weights: of each shard name, size, and a digest of its header and both its ends."""
        shards = {}
        for shard in self.shards:
            digest = hashlib.sha256()
            size = shard.stat().st_size
            with shard.open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(header))
                digest.update(stream.read(SAMPLED_BYTES))
                stream.seek(max(8 + header, size - SAMPLED_BYTES))
                digest.update(stream.read(SAMPLED_BYTES))
            shards[shard.name] = [size, digest.hexdigest()]
        return {"config": hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest(), "shards": shards}

    def _stored(self, target: str) -> list[StoredTensor]:
        return self._by_target[self._aliases.get(target, target)]

    def _read_dtype(self, tensor: StoredTensor, keep_stored: bool) -> torch.dtype:
        """Norms and biases are always cast: they are small, and used in ways of their own."""
        dtype = self._expected[tensor.target].dtype
        narrower = tensor.dtype.itemsize < dtype.itemsize
        is_matrix = len(tensor.shape) > 1 or tensor.converted
        return tensor.dtype if keep_stored and narrower and is_matrix else dtype

    def _put(self, target: str, value: torch.Tensor) -> None:
        dtype = self._expected[target].dtype
        if value.dtype == dtype:
            set_module_tensor_to_device(self._model, target, self._device, value=value, dtype=dtype, clear_cache=False)
            return
        module, _, leaf = target.rpartition(".")
        self._model.get_submodule(module)._parameters[leaf] = StoredWeight.keep(value, dtype)  # type: ignore[assignment]

    def _empty(self, target: str) -> None:
        module, _, leaf = target.rpartition(".")
        owner = self._model.get_submodule(module)
        if isinstance(owner._parameters[leaf], StoredWeight):
            # accelerate would keep the stored dtype, and take a cast for the way
            empty = torch.empty_like(self._expected[target], device="meta")
            owner._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)
            return
        set_module_tensor_to_device(self._model, target, "meta", clear_cache=False)

    def _targets_below(self, name: str) -> list[str]:
        if name in self._by_target or name in self._aliases:
            return [name]
        return [target for target in (*self._by_target, *self._aliases) if target.startswith(name + ".")]

    def _read_headers(self) -> Iterator[StoredTensor]:
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        prefix = self._model.base_model_prefix
        seen: dict[str, Path] = {}
        for shard in self.shards:
            for entry in read_header(shard):
                key = entry.key
                if key in seen:
                    raise ModelError(f"tensor {key} is in {seen[key].name} and again in {shard.name}")
                seen[key] = shard
                target, pattern = rename_source_key(key, renamings, converters, prefix, self._expected)
                if target not in self._expected and key in self._expected:
                    target, pattern = key, None
                if target not in self._expected:
                    continue  # files may hold more than the model, such as old rotary buffers
                if entry.dtype not in STORED_DTYPES:
                    raise ModelError(f"{shard.name}: {key} is stored as {entry.dtype}, which is not a weight")
                dtype = STORED_DTYPES[entry.dtype]
                yield StoredTensor(key, shard, entry.shape, dtype, entry.offset, target, pattern is not None)

    def _find_aliases(self) -> dict[str, str]:
        """Parameters that the files hold under the name of the one they are tied to."""
        groups: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        aliases: dict[str, str] = {}
        for names in groups.values():
            stored = [name for name in names if name in self._by_target]
            aliases |= {name: stored[0] for name in names if stored and name not in self._by_target}
        return aliases

    def _check(self) -> None:
        produced = set(self._by_target) | set(self._aliases)
        for converter in self._conversions:
            if isinstance(converter, WeightConverter) and len(converter.target_patterns) > 1:
                first = converter.target_patterns[0]
                for target in list(self._by_target):
                    produced |= {target.replace(first, other) for other in converter.target_patterns}
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        missing = sorted(parameters - produced)
        if missing:
            raise ModelError(
                f"{self.folder} lacks {len(missing)} tensors that config.json asks for: {', '.join(missing[:5])}"
                + (" ..." if len(missing) > 5 else "")
            )
        for tensor in self._tensors:
            expected = tuple(self._expected[tensor.target].shape)
            if not tensor.converted and tensor.shape != expected:
                raise ModelError(
                    f"{tensor.file.name}: {tensor.key} has shape {list(tensor.shape)}, config.json asks for "
                    f"{list(expected)}"
                )

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
            raise ModelError(f"{self.folder}: {name} cannot be converted: {str(reason).splitlines()[0]}")
        self._model.requires_grad_(False)
        for name in before:
            value = self._model.get_parameter(name)
            if not value.is_meta and value.dtype != self._expected[name].dtype:
                self._put(name, value.data)


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
