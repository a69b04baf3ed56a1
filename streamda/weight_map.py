"""Which tensors of a model's files are which of its parameters, by transformers' own rules; held against each other.

What the files lack, hold twice, or hold in another shape than the configuration asks for is found here, from the
headers alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from streamda.errors import ModelError
from streamda.files import shown
from streamda.quoting import one_line
from streamda.shards import STORED_DTYPES, StoredTensor, find_shards, read_header


def fused_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Parameters that transformers puts together from several tensors of the files, such as fused experts.

    Returns:
        By name the copies that it makes while these tensors are there: one of each kind of them (gate, up), and one of
        all where there are several kinds.
    """
    copies: dict[str, int] = {}
    for entry in get_model_conversion_mapping(model):
        if isinstance(entry, WeightConverter):
            for name, _ in model.named_parameters():
                if any(pattern in name for pattern in entry.target_patterns):
                    copies[name] = 1 if len(entry.source_patterns) == 1 else 2
    return copies


class WeightMap:
    """The tensors of a model folder and the parameters of a skeleton."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Reads the headers of all shards; no weight is read.

        Raises:
            ModelError: no safetensors, a damaged or missing shard, or tensors that do not fit the configuration.
        """
        self._folder, self._model = folder, model
        self._conversions = get_model_conversion_mapping(model)
        self.expected: dict[str, torch.Tensor] = dict(model.state_dict())
        """Parameters and buffers of the skeleton, by name."""
        self._listed = find_shards(folder)
        self.shards = tuple(self._listed)
        self._passed_over: list[str] = []
        self.tensors = list(self._read_headers())
        self._by_target: dict[str, list[StoredTensor]] = {}
        for tensor in self.tensors:
            self._by_target.setdefault(tensor.target, []).append(tensor)
        self._aliases = self._find_aliases()
        self._check()

    @property
    def stored_itemsize(self) -> int:
        """Bytes per weight of the dtype that most of the files' bytes are in, whatever the configuration says."""
        sizes: dict[int, int] = {}
        for tensor in self.tensors:
            sizes[tensor.dtype.itemsize] = sizes.get(tensor.dtype.itemsize, 0) + tensor.num_bytes
        return max(sizes, key=lambda itemsize: sizes[itemsize])

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of what the files hold."""
        odd = [key for key in self._passed_over if not key.endswith("rotary_emb.inv_freq")]  # a table of old models
        if not odd:
            return ()
        named = ", ".join(one_line(key, 100) for key in odd[:3]) + (", ..." if len(odd) > 3 else "")
        return (f"the files hold {len(odd)} tensors that this model does not have, which are not used: {named}",)

    def stored(self, target: str) -> list[StoredTensor]:
        """What the files hold for a parameter: one tensor, or those that are fused into it."""
        return self._by_target[self._aliases.get(target, target)]

    def targets_below(self, name: str) -> list[str]:
        """The parameters that a name stands for: itself, or all below a module."""
        if name in self._by_target or name in self._aliases:
            return [name]
        return [target for target in (*self._by_target, *self._aliases) if target.startswith(name + ".")]

    def _read_headers(self) -> Iterator[StoredTensor]:
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        prefix = self._model.base_model_prefix
        seen: dict[str, Path] = {}
        for shard in self.shards:
            for entry in read_header(shard, self._listed[shard]):
                key = entry.key
                if key in seen:
                    raise ModelError(f"tensor {one_line(key)} is in {seen[key].name} and again in {shard.name}")
                seen[key] = shard
                target, pattern = rename_source_key(key, renamings, converters, prefix, self.expected)
                if target not in self.expected and key in self.expected:
                    target, pattern = key, None
                if target not in self.expected:
                    self._passed_over.append(target)  # files may hold more than the model, such as old rotary buffers
                    continue
                if entry.dtype not in STORED_DTYPES:
                    raise ModelError(
                        f"{shard.name}: {key} is stored as {entry.dtype}, which is not a weight to take gradients of; "
                        "give the checkpoint before it was quantized"
                    )
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
        made = {target: {target} for target in self._by_target}  # by the first of what a conversion makes, all of it
        for converter in self._conversions:
            if isinstance(converter, WeightConverter) and len(converter.target_patterns) > 1:
                first = converter.target_patterns[0]
                for target, others in made.items():
                    others |= {target.replace(first, other) for other in converter.target_patterns}
        produced = set(self._aliases).union(*made.values())
        self._require_all_blocks()
        for target, tensors in self._by_target.items():
            if len(tensors) > 1 and not any(tensor.converted for tensor in tensors):
                keys = " and as ".join(one_line(tensor.key) for tensor in tensors[:2])
                raise ModelError(f"{shown(self._folder)} holds {target} twice, as {keys}")
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        missing = sorted(parameters - produced)
        if missing:
            raise ModelError(
                f"{shown(self._folder)} lacks {len(missing)} tensors that config.json asks for: "
                + ", ".join(missing[:5])
                + (" ..." if len(missing) > 5 else "")
            )
        for tensor in self.tensors:
            expected = tuple(self.expected[tensor.target].shape)
            if not tensor.converted and tensor.shape != expected:
                raise ModelError(
                    f"{tensor.file.name}: {tensor.key} has shape {list(tensor.shape)}, config.json asks for "
                    f"{list(expected)}"
                )
        for target, others in made.items():
            tensors = self._by_target[target]
            if not all(tensor.converted for tensor in tensors):
                continue
            # fusing and splitting keep every value, so a number of experts that is another shows here
            held = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
            wanted = sum(self.expected[other].numel() for other in others if other in self.expected)
            if held != wanted:
                raise ModelError(
                    f"{shown(self._folder)} holds {held} values for {target}, config.json asks for {wanted}"
                )

    def _require_all_blocks(self) -> None:
        """Refuses files with more blocks than the model: they are another model than the configuration says.

        Blocks that the model itself passes over, such as those that predict further tokens, are no such case.
        """
        ignored = [re.compile(pattern) for pattern in self._model._keys_to_ignore_on_load_unexpected or ()]
        last = getattr(self._model.config, "num_hidden_layers", 0)
        further = last + (getattr(self._model.config, "num_nextn_predict_layers", None) or 0)
        self._passed_over = [key for key in self._passed_over if not any(each.search(key) for each in ignored)]
        for key in self._passed_over:
            numbered = re.fullmatch(r"(.+?\.)(\d{1,9})(\..+)", key)
            # the same tensor of the model's first and last block is there, and this is of none of its blocks
            if numbered and int(numbered[2]) >= further and f"{numbered[1]}{last - 1}{numbered[3]}" in self.expected:
                raise ModelError(
                    f"{shown(self._folder)} holds {one_line(key)}, but config.json asks for {last} blocks only"
                )
