"""Configuration: one frozen dataclass per stage, legal by construction.

Each field carries its help text in its metadata, so the command line, the documentation and the Python API read
one and the same sentence. Field names are unique across the dataclasses; `RunConfig.from_options` therefore takes
one flat mapping, which is also the form of a ``--config FILE.yaml``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from streamda.errors import ConfigError
from streamda.quoting import quoted

TokenMask = Literal["attention", "labels"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
StatisticsCodec = Literal["none", "zstd", "blosc", "bitround"]

PRESETS: dict[str, dict[str, Any]] = {
    # the settings of the published experiments; the defaults of every field below
    "released": {},
    # Theorem 4.2 of arXiv 2510.24561 as it stands
    "theorem": {"normalize": False, "variance_weight": 1.0, "gamma": 1.0},
    # the ablations of the paper: "w/o var", "w/o bias", "w/o var & Fisher"
    "without-variance": {"variance_weight": 0.0},
    "without-bias": {"bias_weight": 0.0},
    "without-fisher": {"variance_weight": 0.0, "use_fisher": False},
}
"""What each ``--preset`` sets; an option given beside it wins."""


def option(default: Any, text: str, flag: str | None = None) -> Any:
    """A dataclass field with its help text and, where it is not the name itself, its flag on the command line."""
    return field(default=default, metadata={"help": text, "flag": flag})


def _require(legal: bool, name: str, value: object, allowed: str) -> None:
    if not legal:
        raise ConfigError(f"{name} is {quoted(value)}; allowed is {allowed}")


def _require_finite(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(math.isfinite(value), name, value, "a finite number")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which samples the statistics are taken from, and how rows become tokens."""

    dataset: str | None = option(
        None,
        "Hub id or local .jsonl, .json, .csv or .parquet file (JSON rows of up to 8 MiB). Default: a small general set "
        "that ships with streamda.",
    )
    dataset_config: str | None = option(None, "Name of the dataset's configuration on the hub.")
    split: str = option("train", "Split of the dataset.")
    num_samples: int = option(
        256, "Samples used, at most 4096; of more rows a seeded random choice is taken, in file order."
    )
    max_length: int = option(1024, "Tokens per sample; longer samples are cut, and counted.")
    skip_bad_lines: int = option(
        0, "Malformed lines, and rows without their columns, that are skipped and counted; one more ends the run."
    )
    prompt_column: str | None = option(None, "Column with the prompt (no loss).")
    completion_column: str | None = option(None, "Column with the completion (loss).")
    text_column: str | None = option(None, "Column with plain text (loss on all of it).")
    template: str | None = option(None, "Prompt built from columns, for example 'Q: {question}\\nA: '.")
    seed: int = option(0, "Seed of the choice of samples and of the eigensolver's start.")

    def __post_init__(self) -> None:
        _require(1 <= self.num_samples <= 4096, "num_samples", self.num_samples, "1 to 4096")
        _require(2 <= self.max_length <= 10**9, "max_length", self.max_length, "2 (one token predicts the next) to 1e9")
        _require(0 <= self.skip_bad_lines <= 10**9, "skip_bad_lines", self.skip_bad_lines, "0 to 1e9")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        if self.text_column is not None and (self.prompt_column or self.completion_column or self.template):
            raise ConfigError("text_column excludes prompt_column, completion_column and template")


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig:
    """What changes the statistics, beside the model and the data."""

    target_modules: str = option(
        "all-linear", "all-linear, comma-separated module names, or one regular expression (as in PEFT)."
    )
    token_mask: TokenMask = option(
        "attention", "Tokens that enter the second moments: every real token, or those that predict a label."
    )
    dtype: ComputeDtype = option("auto", "Compute dtype. auto: bfloat16 on a GPU that multiplies it, else float32.")
    micro_batch_tokens: str = option(
        "auto", "Tokens per micro-batch, or auto. Changes speed and rounding, not meaning."
    )
    statistics_codec: StatisticsCodec = option(
        "none", "Compression of stored statistics (bitround drops mantissa bits and so changes them)."
    )

    def __post_init__(self) -> None:
        _require(bool(self.target_modules.strip()), "target_modules", self.target_modules, "a name, a list or a regex")
        _require(self.token_mask in ("attention", "labels"), "token_mask", self.token_mask, "attention or labels")
        _require(self.dtype in ("auto", "float32", "bfloat16"), "dtype", self.dtype, "auto, float32 or bfloat16")
        codecs = ("none", "zstd", "blosc", "bitround")
        _require(self.statistics_codec in codecs, "statistics_codec", self.statistics_codec, ", ".join(codecs))
        legal = self.micro_batch_tokens == "auto" or (
            re.fullmatch(r"[0-9]{1,18}", self.micro_batch_tokens) is not None and int(self.micro_batch_tokens) > 0
        )
        _require(legal, "micro_batch_tokens", self.micro_batch_tokens, "auto or a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveConfig:
    """What turns statistics into an adapter (arXiv 2510.24561, Theorem 4.2 and section 5)."""

    rank: int = option(8, "Rank r of the adapter.")
    lora_alpha: float = option(16.0, "LoRA's alpha.")
    rslora: bool = option(True, "Scale by alpha / sqrt(r) instead of alpha / r.")
    population_size: int | None = option(None, "Rows of the whole training set. Default: rows of the dataset.")
    variance_weight: float = option(0.03, "Weight beta of the variance term.")
    bias_weight: float = option(1.0, "Weight alpha of the bias term.")
    gamma: float = option(1024.0, "B A is divided by gamma.")
    a_norm: float | None = option(None, "Norm of the rows of A; B takes the rest. Default: 1 / sqrt(gamma).")
    damping: float = option(1e-6, "lambda, added to the diagonal of both Fisher factors.")
    output_damping_ratio: float | None = option(
        None, "Damp the output factor by this share of its median instead of by lambda."
    )
    normalize: bool = option(True, "Divide the displacement by its largest singular value.")
    balance: bool = option(False, "Split the singular values of B A evenly between A and B.")
    use_fisher: bool = option(
        True, "Precondition the gradient with the Fisher factors; without, B A is its top subspace.", "fisher"
    )

    def __post_init__(self) -> None:
        _require_finite(
            self, "lora_alpha", "variance_weight", "bias_weight", "gamma", "a_norm", "damping", "output_damping_ratio"
        )
        _require(1 <= self.rank <= 10**9, "rank", self.rank, "1 or more, up to the smaller side of a layer")
        for name in ("lora_alpha", "gamma", "a_norm", "damping", "output_damping_ratio"):
            value = getattr(self, name)
            _require(value is None or 1e-30 <= value <= 1e12, name, value, "above 0 (1e-30 to 1e12)")
        _require(0 <= self.variance_weight <= 1e12, "variance_weight", self.variance_weight, "0 to 1e12")
        _require(0 <= self.bias_weight <= 1e12, "bias_weight", self.bias_weight, "0 to 1e12")
        size = self.population_size
        _require(size is None or 1 <= size <= 10**15, "population_size", size, "1 to 1e15")
        if self.variance_weight == 0 and self.bias_weight == 0:
            raise ConfigError("variance_weight and bias_weight are both 0: nothing is left to solve")
        if self.balance and self.a_norm is not None:
            raise ConfigError("balance and a_norm both fix the split between A and B; give one of them")
        if not self.use_fisher and self.variance_weight != 0:
            raise ConfigError("without the Fisher factors there is no variance term: add --variance-weight 0")

    @property
    def scaling(self) -> float:
        """LoRA's factor s in front of B A: alpha / r, or alpha / sqrt(r) with rank-stabilized scaling."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run: the stages, where it reads and writes, and what it may use."""

    model: str | None = option(None, "Hub id or local folder of the base model. Required.")
    revision: str | None = option(None, "Branch, tag or commit of the model on the hub.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")
    output_dir: str | None = option(None, "Where the adapter goes. Default: MODEL-lora-da in the current folder.")
    work_dir: str | None = option(None, "Where the run keeps its state. Default: OUTPUT_DIR.work.")
    statistics: str | None = option(None, "Folder of collected statistics.")
    max_gpu_mem: str | None = option(
        None, "Memory budget of the device, for example 24GB or 22GiB. Required, but for `solve`."
    )
    max_host_mem: str | None = option(
        None,
        "Host memory for boundary states beside a GPU, and for buffers that they pass through while it computes. "
        "Without a GPU it is a part of --max-gpu-mem.",
    )
    max_disk: str | None = option(None, "Disk that the work directory may take.")
    keep_statistics: bool = option(False, "Keep the statistics of all blocks, for `solve`.")
    spill_statistics: bool = option(
        False,
        "Write the statistics of each block to disk before it is solved, even where memory would hold them: a run that "
        "is stopped then repeats less. The bits are the same.",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    rates: str | None = option(
        None,
        "Rates of the machine for time estimates, such as flops=150e9,flops64=70e9,read=1e9,write=4e8 (FLOP/s in the "
        "compute dtype and in float64, bytes/s). What is left out is measured.",
    )
    skip_bad_samples: bool = option(
        False, "Leave out samples that become NaN or Inf, wherever they do, and say so; otherwise they are an error."
    )
    skip_bad_layers: bool = option(
        False, "Leave layers without adapter that are NaN or Inf or cannot be solved, and say so, instead of an error."
    )
    profile: bool = option(False, "Write a trace of the run and a drawing of it beside the report.")
    allow_environment_change: bool = option(
        False,
        "Continue a run that was begun with other library versions, threads or kind of device; bits may then differ.",
    )
    unsafe_filesystem: bool = option(
        False, "Run on a file system that cannot lock, rename folders or sync; a crash may then lose what is done."
    )
    overwrite: bool = option(False, "Replace an adapter that streamda wrote, or statistics, and restart its run.")
    resume: bool = option(True, "Continue an interrupted run of the same settings.")
    data: DataConfig = field(default_factory=DataConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    solve: SolveConfig = field(default_factory=SolveConfig)

    def __post_init__(self) -> None:
        legal = re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", self.device) is not None
        _require(legal, "device", self.device, "auto, cpu, cuda or cuda:N")
        for name in ("model", "output_dir", "work_dir", "statistics"):
            path = getattr(self, name)
            _require(path is None or bool(path.strip()), name, path, "a name; without the option there is a default")
            # safetensors opens no other files, and would say so after hours
            _require(path is None or _is_utf8(path), name, path, "a path in UTF-8")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> RunConfig:
        """Builds the nested configuration from a flat mapping of option names; ``preset`` may be among them.

        Raises:
            ConfigError: an unknown name (with the nearest known one), a wrong type, or a value out of range.
        """
        given = dict(options)
        preset = given.pop("preset", None)
        if preset is not None:
            if not isinstance(preset, str) or preset not in PRESETS:
                raise ConfigError(f"preset is {quoted(preset)}; allowed is {', '.join(PRESETS)}")
            given = PRESETS[preset] | given
        stages: dict[str, dict[str, Any]] = {"data": {}, "collect": {}, "solve": {}, "": {}}
        known = {entry.name: (stage, entry) for stage, entry in option_fields()}
        for name, value in given.items():
            if name not in known:
                raise ConfigError(unknown_option(name))
            stage, entry = known[name]
            stages[stage][name] = _coerce(entry, value)
        return cls(
            data=DataConfig(**stages["data"]),
            collect=CollectConfig(**stages["collect"]),
            solve=SolveConfig(**stages["solve"]),
            **stages[""],
        )

    def to_dict(self) -> dict[str, Any]:
        """The nested configuration as plain JSON values."""
        return dataclasses.asdict(self)

    def given(self) -> dict[str, Any]:
        """The options that are not at their defaults, flat: `from_options` makes this configuration of them."""
        stages = {"": self, "data": self.data, "collect": self.collect, "solve": self.solve}
        values = ((entry, getattr(stages[stage], entry.name)) for stage, entry in option_fields())
        return {entry.name: value for entry, value in values if value != entry.default}


def flag(entry: dataclasses.Field[Any]) -> str:
    """The name of an option on the command line."""
    return "--" + (entry.metadata["flag"] or entry.name).replace("_", "-")


def unknown_option(name: str) -> str:
    """That there is no such option, with the nearest one, for a message."""
    near = difflib.get_close_matches(name, [entry.name for _, entry in option_fields()], n=1)
    return f"unknown option {quoted(name)}" + (f"; did you mean {near[0]!r}?" if near else "")


def option_fields() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """All options in the order in which help shows them, each with the name of its stage ("" for the run itself)."""
    for entry in dataclasses.fields(RunConfig):
        if entry.metadata:
            yield "", entry
    for stage, kind in (("data", DataConfig), ("collect", CollectConfig), ("solve", SolveConfig)):
        for entry in dataclasses.fields(kind):
            yield stage, entry


def _coerce(entry: dataclasses.Field[Any], value: Any) -> Any:
    """Accepts what YAML, Python and the command line naturally give for a field; refuses everything else by name."""
    kinds = str(entry.type)
    if value is None and "None" in kinds:
        return None
    if "bool" in kinds:
        legal = isinstance(value, bool)
    elif "int" in kinds:
        legal = isinstance(value, int) and not isinstance(value, bool)
    elif "float" in kinds:
        if isinstance(value, str):  # YAML 1.1 reads 1e-6 as text
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, int) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # an integer beyond any float stays one, and is refused
                value = float(value)
        legal = isinstance(value, float)
    else:
        if isinstance(value, (Path, int)) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, (list, tuple)) and entry.name == "target_modules":
            value = ",".join(map(str, value))
        legal = isinstance(value, str)
    if not legal:
        raise ConfigError(f"{entry.name} is {quoted(value)}; expected {kinds.removesuffix(' | None')}")
    if isinstance(value, str):
        _require(_is_file_text(value), entry.name, value, "text without zero bytes and halves of surrogate pairs")
    return value


def _is_utf8(path: str) -> bool:
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeError:
        return False
    return True


def _is_file_text(value: str) -> bool:
    """Whether the system can be given this text as, or in, the name of a file; most text options end up in one."""
    try:
        return b"\0" not in os.fsencode(value)  # bytes of a command line that are not UTF-8 pass as they came
    except UnicodeEncodeError:
        return False
