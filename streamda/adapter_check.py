"""An adapter folder read back: the bytes that were written, and what PEFT makes of them.

Adapters are also read where they were not written: in a hub's cache all files are links into a store of blobs, so links
are followed here.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from streamda import files
from streamda.errors import DamagedError
from streamda.quoting import named
from streamda.units import FileRecord

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TENSOR_NAME = "base_model.model.{}.lora_{}.weight"
"""PEFT's names on disk of a module's two tensors, without the adapter's name."""


def check_recorded(folder: Path, written: Mapping[str, FileRecord]) -> None:
    """Compares files of an adapter, by name, with what they came to when they were written.

    Raises:
        DamagedError: naming the first one that is missing or other.
    """
    for name, record in written.items():
        path = folder / name
        source = _followed(path)
        size = source.stat().st_size if source.is_file() else -1
        if (size, files.crc32c_of_file(source)) != (record.size, record.crc32c):
            raise DamagedError(
                f"{files.shown(path)} does not have the bytes that were written: it is damaged, or was changed since, "
                f"as by training that saves here; move {files.shown(folder)} away and make the adapter again"
            )


def verify_adapter(folder: Path, written: Mapping[str, FileRecord], modules: Sequence[str]) -> None:
    """Checks all of an adapter that can be checked without its base model: bytes, configuration, names, shapes, values.

    Args:
        folder: the adapter.
        written: what its files came to, as its report has it.
        modules: full names of the adapted modules, as its report has them.

    Raises:
        DamagedError: naming the file and what is wrong in it.
    """
    check_recorded(folder, written)
    config = _lora_config(folder)
    tensors = _finite_tensors_on_meta(folder / WEIGHTS_FILE)
    config_path, weights_path = files.shown(folder / CONFIG_FILE), files.shown(folder / WEIGHTS_FILE)
    for name in modules:
        for letter, side in (("A", 0), ("B", 1)):
            tensor = tensors.pop(TENSOR_NAME.format(name, letter), None)
            if tensor is None or tensor.dim() != 2 or tensor.shape[side] != config.r:
                found = "no tensor" if tensor is None else f"shape {list(tensor.shape)}"
                raise DamagedError(f"{weights_path} has {found} for lora_{letter} of {name} at rank {config.r}")
        if not check_target_module_exists(config, name):
            raise DamagedError(f"{config_path} does not adapt {name}, which the weights are for")
    if tensors:
        raise DamagedError(f"{weights_path} holds {named(sorted(tensors))}, which the report does not name")


def check_adapter(folder: Path, skeleton: PreTrainedModel) -> None:
    """Reads an adapter back the way PEFT does: finite, and every name and shape used, none missing.

    PEFT itself only warns about missing names, is silent about unexpected ones, and trains from the standard start.

    Args:
        folder: the adapter.
        skeleton: its base model, weights on meta or not; unchanged on return.

    Raises:
        DamagedError: naming the file, and the tensors that are missing, unexpected, misshapen or not finite.
    """
    config = _lora_config(folder)
    config_path, weights_path = files.shown(folder / CONFIG_FILE), files.shown(folder / WEIGHTS_FILE)
    tensors = _finite_tensors_on_meta(folder / WEIGHTS_FILE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever PEFT warns of is an error below, or PEFT's own correction
        try:
            model = PeftModel(_copy_on_meta(skeleton), config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedError(f"PEFT refuses {config_path} for this model: {error}") from error
        try:
            result: Any = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=True)
        except RuntimeError as error:  # load_state_dict: one line per tensor under a headline
            reason = named([line.strip() for line in str(error).splitlines()[1:]])
            raise DamagedError(f"{weights_path} does not fit the model: {reason}") from error
    missing = [key for key in result.missing_keys if "lora_" in key]  # the base model's own are not ours to load
    if missing:
        raise DamagedError(f"{weights_path} lacks {named(missing)}, which {CONFIG_FILE} asks for")
    if result.unexpected_keys:
        raise DamagedError(f"{weights_path} holds {named(result.unexpected_keys)}, which {CONFIG_FILE} does not use")


def _followed(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _lora_config(folder: Path) -> LoraConfig:
    """The configuration as PEFT reads it."""
    values = files.read_json(_followed(folder / CONFIG_FILE))
    if not isinstance(values, dict) or values.get("peft_type") != "LORA" or not isinstance(values.get("r"), int):
        raise DamagedError(f"{files.shown(folder / CONFIG_FILE)} is not the configuration of a LoRA adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever PEFT warns of is an error below, or PEFT's own correction
        try:
            config: LoraConfig = LoraConfig.from_pretrained(str(folder))
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedError(f"PEFT refuses {files.shown(folder / CONFIG_FILE)}: {error}") from error
    return config


def _finite_tensors_on_meta(path: Path) -> dict[str, Tensor]:
    """Name -> an empty tensor of the stored shape and dtype, after the values were seen to be finite."""
    tensors = {}
    with files.damage_errors(path):
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    tensor = file.get_tensor(key)
                    if not bool(tensor.isfinite().all()):
                        raise DamagedError(f"{files.shown(path)} is damaged: {key} is not finite")
                    tensors[key] = torch.empty_like(tensor, device="meta")
        except SafetensorError as error:
            raise DamagedError(f"{files.shown(path)} is damaged: {error}") from error
    return tensors


def _copy_on_meta(skeleton: PreTrainedModel) -> PreTrainedModel:
    """A copy without weights, because PEFT changes the model it is given."""
    memo: dict[int, object] = {}  # deepcopy takes from here what would otherwise copy loaded weights
    for parameter in skeleton.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in skeleton.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for module in skeleton.modules():  # some recurrent blocks keep their last state, with its graph
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and id(value) not in memo:
                memo[id(value)] = torch.empty_like(value, device="meta", requires_grad=False)
    return copy.deepcopy(skeleton, memo)
