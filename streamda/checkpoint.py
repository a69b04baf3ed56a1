"""The model: a skeleton without weights, and its safetensors read one part at a time.

Accelerate builds the skeleton (`init_empty_weights`) and places each tensor (`set_module_tensor_to_device`). Names in
the files become names in the model once, by transformers' own conversion rules; tensors that a rule fuses or splits
(experts of a mixture) go through transformers' converter with one part's tensors only.

Files are read with ``pread``: a memory-mapped shard would count as resident memory, and kill the process with SIGBUS
if it were truncated meanwhile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
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

READ_CHUNK_BYTES = 32 << 20  # 32 MiB: what a cast from the stored dtype may hold twice
SAMPLED_BYTES = 1 << 20  # 1 MiB from each end of a shard goes into the fingerprint
STORED_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


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
        raise ModelError(f"{folder / 'config.json'} cannot be used: {_first_line(error)}") from error
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
            f"no causal language model can be built from the configuration: {_first_line(error)}"
        ) from error
    model.tie_weights()
    model.config.use_cache = False
    model.eval()
    model.requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    return model


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a shard."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    target: str
    """Name in the model; of the first target where a conversion has several."""
    converted: bool
    """True where transformers fuses or splits it on the way."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        size = STORED_DTYPES[self.dtype]
        for side in self.shape:
            size *= side
        return size


class Checkpoint:
    """Weights of a model folder, placed into a skeleton on demand and counted as they are read."""

    def __init__(self, folder: Path, model: PreTrainedModel, device: torch.device) -> None:
        """Reads the headers of all shards and maps their names; no weight is read.

        Raises:
            ModelError: no safetensors, a damaged or missing shard, or tensors that do not fit the configuration.
        """
        self.folder = folder
        self.bytes_read = 0
        self._model = model
        self._device = device
        self._conversions = get_model_conversion_mapping(model)
        self._expected = dict(model.state_dict())
        self.shards = _find_shards(folder)
        self._tensors = list(self._read_headers())
        self._by_target: dict[str, list[StoredTensor]] = {}
        for tensor in self._tensors:
            self._by_target.setdefault(tensor.target, []).append(tensor)
        self._aliases = self._find_aliases()
        self._check()
        self.total_bytes = sum(tensor.num_bytes for tensor in self._tensors)

    def load(self, names: Iterable[str]) -> None:
        """Places parameters on the device, in the skeleton's dtype.

        Args:
            names: full parameter names; a module's name stands for all that lies below it.

        Raises:
            ModelError: a tensor cannot be read, or holds NaN or Inf.
        """
        wanted: list[tuple[StoredTensor, str]] = []
        for name in names:
            for target in self._targets_below(name):
                wanted += [(tensor, target) for tensor in self._by_target[self._aliases.get(target, target)]]
        plain = [(tensor, target) for tensor, target in wanted if not tensor.converted]
        for _, value, target in self._values(plain):
            set_module_tensor_to_device(
                self._model, target, self._device, value=value, dtype=value.dtype, clear_cache=False
            )
        fused = [(tensor, target) for tensor, target in wanted if tensor.converted]
        if fused:
            self._convert({tensor.key: value for tensor, value, _ in self._values(fused)})

    def release(self, names: Iterable[str]) -> None:
        """Puts parameters back on meta and so frees them; names as in `load`."""
        for name in names:
            module, _, leaf = name.rpartition(".")
            owner = self._model.get_submodule(module)
            if leaf in owner._parameters:
                set_module_tensor_to_device(self._model, name, "meta", clear_cache=False)
                continue
            for below, _ in self._model.get_submodule(name).named_parameters():
                set_module_tensor_to_device(self._model, f"{name}.{below}", "meta", clear_cache=False)

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
            with _opened(shard) as handle:
                for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    if key in seen:
                        raise ModelError(f"tensor {key} is in {seen[key].name} and again in {shard.name}")
                    seen[key] = shard
                    target, pattern = rename_source_key(key, renamings, converters, prefix, self._expected)
                    if target not in self._expected and key in self._expected:
                        target, pattern = key, None
                    if target not in self._expected:
                        continue  # files may hold more than the model, such as old rotary buffers
                    view = handle.get_slice(key)
                    if view.get_dtype() not in STORED_DTYPES:
                        raise ModelError(f"{shard.name}: {key} is stored as {view.get_dtype()}, which is not a weight")
                    yield StoredTensor(
                        key, shard, tuple(view.get_shape()), view.get_dtype(), target, pattern is not None
                    )

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

    def _values(self, wanted: Sequence[tuple[StoredTensor, str]]) -> Iterator[tuple[StoredTensor, torch.Tensor, str]]:
        """Reads tensors shard by shard, in the order of the files."""
        for shard in dict.fromkeys(tensor.file for tensor, _ in wanted):
            with _opened(shard) as handle:
                for tensor, target in wanted:
                    if tensor.file == shard:
                        value = _read_tensor(handle, tensor, self._expected[tensor.target].dtype, self._device)
                        self.bytes_read += tensor.num_bytes
                        yield tensor, value, target

    def _convert(self, tensors: dict[str, torch.Tensor]) -> None:
        """Lets transformers fuse or split one part's tensors on their way into the model."""
        dtype = next(iter(tensors.values())).dtype
        mapping: Any = get_model_conversion_mapping(self._model)  # made anew: its entries remember what they have seen
        config = LoadStateDictConfig(dtype=dtype, device_map={"": str(self._device)}, weight_mapping=mapping)
        with _quiet_progress():
            info, _ = convert_and_load_state_dict_in_model(self._model, tensors, config)
        if info.conversion_errors:
            name, reason = next(iter(info.conversion_errors.items()))
            raise ModelError(f"{self.folder}: {name} cannot be converted: {str(reason).splitlines()[0]}")
        self._model.requires_grad_(False)


def _find_shards(folder: Path) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is no index of a sharded checkpoint: {_first_line(error)}") from error
        for name in names:
            if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
                raise ModelError(f"{index} names the shard {name!r}; it must be a plain file name")
            if not (folder / name).is_file():
                raise ModelError(f"{folder} lacks the shard {name} that its index names")
        return tuple(folder / name for name in names)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"{folder} holds pickled weights only; convert them once with transformers' save_pretrained, which writes "
            "safetensors"
        )
    raise ModelError(f"{folder} holds no model.safetensors and no model.safetensors.index.json")


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, framework="pt", backend="pread") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        hint = ""
        with suppress(OSError), shard.open("rb") as stream:
            hint = (
                " (a git-lfs pointer: run `git lfs pull`)" if stream.read(20).startswith(b"version https://git") else ""
            )
        raise ModelError(f"{shard} cannot be read: {_first_line(error)}{hint}") from error


def _read_tensor(handle: Any, tensor: StoredTensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Reads one tensor in the target dtype; a large one by bands, so that no two whole copies exist at a time."""
    if tensor.num_bytes <= READ_CHUNK_BYTES or len(tensor.shape) < 2:
        value: torch.Tensor = handle.get_tensor(tensor.key).to(device=device, dtype=dtype)
    else:
        view = handle.get_slice(tensor.key)
        value = torch.empty(tensor.shape, dtype=dtype, device=device)
        rows = max(1, READ_CHUNK_BYTES // (tensor.num_bytes // tensor.shape[0]))
        for start in range(0, tensor.shape[0], rows):
            stop = min(start + rows, tensor.shape[0])  # unlike a tensor, the file's view refuses to be cut past its end
            value[start:stop] = view[start:stop].to(device)
    # a sum is finite only if every term is (or overflows, hence the second look)
    if not bool(torch.isfinite(value.sum(dtype=torch.float32))) and not bool(torch.isfinite(value).all()):
        raise ModelError(f"{tensor.file.name}: {tensor.key} holds NaN or Inf")
    return value


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


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
