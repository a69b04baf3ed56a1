"""Everything that is settled before a weight is read: the model's skeleton, its samples, its targets, and the plan."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from streamda.batches import MicroBatch, make_micro_batches
from streamda.blocks import DecoderStack
from streamda.calibration import CalibrationSet, load_calibration
from streamda.checkpoint import Checkpoint
from streamda.config import RunConfig
from streamda.costs import Workload
from streamda.errors import BudgetError, ConfigError, DataError
from streamda.files import shown
from streamda.heap import SMALL_BLOCK_BYTES, bound_allocator
from streamda.layers import BlockSpec, Targets, find_targets, require_rank
from streamda.limits import bounded_budget, memory_limit, memory_of_machine
from streamda.memory import MemoryBudget, parse_budget, parse_size
from streamda.model_source import ModelSource, find_model
from streamda.plan import Plan, make_plan, minimum_bytes
from streamda.products import product_library
from streamda.skeleton import build_skeleton, load_config, third_party
from streamda.token_counts import makes_sums, moment_bytes, rank_deficient
from streamda.workload import WorkloadModel, micro_batch_candidates

STATISTICS_VERSION = 6
"""Raised with every change that gives a block other statistics from the same model and samples."""
NUMERIC_LIBRARIES = ("torch", "transformers", "numpy", "zarr", "numcodecs")
"""Libraries whose version may decide the last bits of the statistics."""
NATIVE_BFLOAT16 = 8
"""Compute capability from which on a GPU of NVIDIA's multiplies bfloat16; others emulate it, or refuse."""
HOST_SHARE = 0.5
"""Share of free host memory for boundary states beside a GPU where --max-host-mem is not given."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is ready to be planned and started."""

    config: RunConfig
    source: ModelSource
    stack: DecoderStack
    checkpoint: Checkpoint | None
    """None where only a plan is wanted, for which no weights need be there."""
    tokenizer: PreTrainedTokenizerBase | None
    calibration: CalibrationSet
    targets: Targets
    budget: MemoryBudget
    workloads: WorkloadModel
    notices: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.stack.device

    @property
    def dtype(self) -> torch.dtype:
        """In what the model computes."""
        return self.stack.model.dtype

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [sample.num_tokens for sample in self.calibration.samples]

    @property
    def population_size(self) -> int:
        """Rows of the whole training set."""
        return self.config.solve.population_size or self.calibration.population_size

    @property
    def lowest_block(self) -> int:
        """The first block with an adapted layer; below it there is nothing to collect."""
        prefixes = self.stack.prefixes
        return next(
            index
            for index, prefix in enumerate(prefixes)
            if any(spec.name.startswith(prefix + ".") for spec in self.targets.linears)
        )

    def plan(
        self,
        *,
        solves: bool,
        keep_statistics: bool,
        micro_batch_tokens: int | None = None,
        disk_room: int | None = None,
    ) -> Plan:
        """Cuts the run to its budget.

        Args:
            solves: whether this run also solves.
            keep_statistics: whether the statistics of all blocks stay on disk.
            micro_batch_tokens: what an interrupted run had chosen; its bits depend on it.
            disk_room: what the file system has to give to the work directory; None if that is not known.
        """
        try:
            return make_plan(
                self.budget,
                self._candidates(micro_batch_tokens),
                self._workload_at(solves, keep_statistics),
                rank=self.config.solve.rank if solves else 0,
                keep_statistics=keep_statistics,
                # what a codec rounds is solved as it was rounded, under every budget
                spill_statistics=self.config.spill_statistics or self.config.collect.statistics_codec == "bitround",
                host_is_device=self.device.type == "cpu",
                disk_room=disk_room,
            )
        except BudgetError as error:
            asked = self.config.max_gpu_mem
            if asked is None or self.budget.device_bytes >= parse_size(asked):
                raise
            raise BudgetError(f"{error}; {asked} are asked for, but this machine has no more") from error

    def smallest_budget(self, *, solves: bool, keep_statistics: bool) -> int:
        """Bytes of the smallest budget that would do."""
        workload = self._workload_at(solves, keep_statistics)(self._candidates(None)[-1])
        host = self.budget.host_bytes if self.device.type == "cpu" else 0
        return minimum_bytes(workload, self.config.solve.rank if solves else 0, host)

    def num_rows(self, micro_batch_tokens: int) -> int:
        """Tokens computed, padding included."""
        return sum(batch.num_rows for batch in self.micro_batches(self.lengths, micro_batch_tokens))

    def micro_batches(self, lengths: Sequence[int], max_tokens: int) -> tuple[MicroBatch, ...]:
        """Samples of those lengths put together, as they pass through the blocks one after another."""
        batches = make_micro_batches(lengths, max_tokens, padded=self.stack.is_causal)
        if self.device.type == "cpu":
            return batches
        # a GPU's allocator serves a small one from what a large one has left, and not the other way round
        return tuple(sorted(batches, key=lambda batch: -batch.num_rows))

    def specs(self, micro_batch_tokens: int, *, keep_statistics: bool) -> list[BlockSpec]:
        """The adapted layers of all blocks, and whether rows stand for their statistics.

        That is decided by all samples, whatever is left out of them later: a run does not change from one to the other.
        """
        return [cost.spec for cost in self.workloads.at(micro_batch_tokens, self._row_tokens(keep_statistics)).blocks]

    def _row_tokens(self, keep_statistics: bool) -> int:
        """Tokens whose rows may stand for statistics: all that there are, or none."""
        return 0 if keep_statistics or makes_sums(self.config, self.dtype) else sum(self.lengths)

    def _workload_at(self, solves: bool, keep_statistics: bool) -> Callable[[int], Workload]:
        """Costs at a number of tokens per micro-batch."""
        rows = self._row_tokens(keep_statistics or not solves)
        return functools.partial(self.workloads.at, row_tokens=rows)

    def _candidates(self, chosen: int | None) -> tuple[int, ...]:
        if chosen is not None:
            return (chosen,)
        return micro_batch_candidates(self.config.collect.micro_batch_tokens, self.lengths, self.device)


def prepare(config: RunConfig, *, weights: bool, solves: bool = True) -> Prepared:
    """Finds and checks everything that a run needs, without reading a weight.

    Args:
        config: the run.
        weights: whether the weights will be read, and so must be there (or downloaded).
        solves: whether the run solves, and so needs a rank that fits every layer.

    Raises:
        StreamdaError: of the kind that fits; always before any work.
    """
    if config.model is None:
        raise ConfigError("no model is given; use --model with a hub id or a local folder")
    device = choose_device(config.device)
    asked = choose_budget(config, device)
    bound_allocator(device, SMALL_BLOCK_BYTES)
    source = find_model(config.model, config.revision, weights=weights, code=config.trust_remote_code)
    model_config = load_config(source.folder, config.trust_remote_code)
    dtype = choose_dtype(config.collect.dtype, device)
    stored_bytes = _stored_dtype_bytes(model_config)  # building the skeleton writes the compute dtype over it
    skeleton = build_skeleton(model_config, dtype, config.trust_remote_code)
    # its files are held against it before anything of the size it names is made, or a sample is read
    cache = _page_cache_bytes(asked, device)
    checkpoint = Checkpoint(source.folder, skeleton, device, cache_bytes=cache) if weights else None
    stack = DecoderStack(skeleton, device)
    stack.fill_small_parameters()
    stack.find_output_form()
    targets = find_targets(stack.model, stack.prefixes, config.collect.target_modules)
    if solves:
        require_rank(targets.linears, config.solve.rank)
    tokenizer = load_tokenizer(source.folder, config.trust_remote_code)
    calibration = load_calibration(
        config.data,
        tokenizer,
        vocab_size=stack.vocab_size,
        max_positions=stack.max_positions,
        may_assume=not weights,
    )
    # what is here by now is not in the budget, but in the machine's memory
    budget, bounded = bounded_budget(asked, device, memory_limit())
    num_labels = sum(sample.num_label_tokens for sample in calibration.samples)
    lengths = [sample.num_tokens for sample in calibration.samples]
    if checkpoint is not None:  # a configuration may say another dtype than the files have
        stored_bytes = checkpoint.map.stored_itemsize
    sure = 0 if config.skip_bad_samples else num_labels
    width = moment_bytes(config, dtype, device)
    workloads = WorkloadModel(stack, targets, lengths, num_labels, stored_bytes, min_tokens=sure, moment_bytes=width)
    notices = [*bounded, *source.notices, *(checkpoint.map.notices if checkpoint is not None else ())]
    if calibration.is_shipped:
        notices.append(
            "no --dataset is given, so a small general set that ships with streamda stands in; samples of your own "
            "task are the point of a data-aware start"
        )
    notices.extend(calibration.notices)
    if targets.outside:
        notices.append(f"outside the decoder blocks, so left without an adapter: {', '.join(targets.outside[:5])}")
    num_tokens = num_labels if config.collect.token_mask == "labels" else sum(lengths)
    sums = config.keep_statistics or not solves or makes_sums(config, dtype)
    if short := rank_deficient(targets, num_tokens, sums, width):
        notices.append(short)
    return Prepared(
        config, source, stack, checkpoint, tokenizer, calibration, targets, budget, workloads, tuple(notices)
    )


def choose_device(name: str) -> torch.device:
    """The device to compute on.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    device = torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch sees no CUDA device here; use --device cpu")
    torch.cuda.init()  # type: ignore[no-untyped-call]  # the memory functions need it, and a device with its number
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here")
    return torch.device("cuda", index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype: bfloat16 on a GPU that multiplies it; float32 elsewhere, as on a CPU, where few do."""
    if name == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # PyTorch's own question is answered with yes where it is emulated; AMD's GPUs have it
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= NATIVE_BFLOAT16


def choose_budget(config: RunConfig, device: torch.device) -> MemoryBudget:
    """The budget that the options name.

    Without an accelerator boundary states go to disk unless --max-host-mem says otherwise: the system's page cache
    keeps them in memory as far as there is any, and gives it back when asked.

    Raises:
        ConfigError: no device budget, or an option that is no size.
    """
    if config.max_gpu_mem is None:
        raise ConfigError("no memory budget is given; use for example --max-gpu-mem 24GB")
    host = 0
    if config.max_host_mem is not None:
        host = parse_budget(config.max_host_mem, "--max-host-mem")
    elif device.type == "cuda":
        host = int(HOST_SHARE * min(_free_host_bytes(), memory_limit() or sys.maxsize))
    disk = None if config.max_disk is None else parse_budget(config.max_disk, "--max-disk")
    return MemoryBudget(parse_budget(config.max_gpu_mem, "--max-gpu-mem"), host, disk)


def load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model folder; None if it has none, which tokenized data do not need."""
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")) and not (folder / "vocab.json").is_file():
        return None
    with third_party(f"the tokenizer in {shown(folder)} cannot be loaded", DataError):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("streamda", *NUMERIC_LIBRARIES, "accelerate", "safetensors", "peft", "datasets")
    return {name: importlib.metadata.version(name) for name in names}


def device_name(device: torch.device) -> str:
    """What decides last bits of its products; of a CPU the libraries and threads do, which are told beside it."""
    return device.type if device.type == "cpu" else f"{device.type}, {torch.cuda.get_device_name(device)}"


def fingerprint_parts(prepared: Prepared, model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What decides the statistics, by name; a run is continued only with equal parts.

    ``numerics`` decides their last bits only, and may be let pass.

    Args:
        prepared: the run.
        model: `Checkpoint.fingerprint`.
    """
    collect = prepared.config.collect
    return {
        "model": model,
        "data": {"tokens": prepared.calibration.digest(), "num_samples": len(prepared.calibration.samples)},
        "method": {
            "version": STATISTICS_VERSION,
            "modules": [spec.name for spec in prepared.targets.linears],
            "token_mask": collect.token_mask,
            "dtype": str(prepared.dtype).removeprefix("torch."),
            "statistics_codec": collect.statistics_codec,
        },
        "numerics": {
            **{name: found for name, found in versions().items() if name in NUMERIC_LIBRARIES},
            "device": device_name(prepared.device),
            "threads": torch.get_num_threads(),
            "products": product_library(prepared.device),
        },
    }


def _stored_dtype_bytes(config: PretrainedConfig) -> int:
    stored = getattr(config, "dtype", None)
    return stored.itemsize if isinstance(stored, torch.dtype) else 4


def _page_cache_bytes(budget: MemoryBudget, device: torch.device) -> int:
    """What the system can hold of files at most beside the run; unlimited where its memory is unknown."""
    known = [size for size in (memory_of_machine("MemAvailable"), memory_limit()) if size is not None]
    if not known:
        return sys.maxsize
    # without an accelerator the host's part is one of the device's
    return max(0, min(known) - (budget.device_bytes if device.type == "cpu" else budget.host_bytes))


def _free_host_bytes() -> int:
    available = memory_of_machine("MemAvailable")
    if available is None:
        raise BudgetError("the free host memory is unknown here; give --max-host-mem")
    return available
