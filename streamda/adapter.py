"""The adapter folder that PEFT reads, read back before it takes its place.

Its configuration comes from `peft.LoraConfig` and its tensors have PEFT's names, so it is a plain LoRA adapter of the
unmodified base model. A layer's weight is W [d_out, d_in]; the adapter adds s B A with A [r, d_in] and B [d_out, r].
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from streamda import files
from streamda.adapter_check import CONFIG_FILE, TENSOR_NAME, WEIGHTS_FILE, check_adapter
from streamda.errors import ConfigError, NumericalError
from streamda.layers import LinearSpec, is_linear, linear_spec
from streamda.model_card import CARD_MARK, AdapterFacts, model_card
from streamda.output import OutputFolder, resolved
from streamda.quoting import named
from streamda.report import REPORT_FILE
from streamda.trace import PROFILE_FILES
from streamda.units import FileRecord

__all__ = [
    "OWN_FILES",
    "AdapterFacts",
    "has_mark",
    "peft_config",
    "relative_change",
    "require_writable_output",
    "write_adapter",
]

CARD_FILE = "README.md"
OWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, REPORT_FILE)
"""All that an adapter folder may hold for ``overwrite`` to replace it, but for the files of a profile."""

_MARK = "streamda"  # in the weights' metadata: tells our start from an adapter trained and saved under the same names


def relative_change(lora_a: Tensor, lora_b: Tensor, scaling: float, weight_norm: float) -> float:
    """How much of the weight the adapter adds before training: the Frobenius norm of s B A over that of W.

    B A is never formed: its squared norm is the sum of (B^T B) * (A A^T), two r x r matrices.

    Args:
        lora_a: [r, d_in].
        lora_b: [d_out, r].
        scaling: s.
        weight_norm: Frobenius norm of the base weight.

    Returns:
        The ratio; infinity where a zero weight is changed.
    """
    a_rd = lora_a.double()
    b_or = lora_b.double()
    squared = ((b_or.T @ b_or) * (a_rd @ a_rd.T)).sum().item()
    change = abs(scaling) * math.sqrt(max(squared, 0.0))  # rounding can leave a zero sum just below zero
    if weight_norm == 0:
        return math.inf if change else 0.0
    return change / weight_norm


def peft_config(facts: AdapterFacts, names: Sequence[str], skeleton: PreTrainedModel) -> LoraConfig:
    """The configuration under which PEFT adapts exactly the named modules of the unmodified base model.

    ``target_modules`` are the modules' last name parts (``q_proj``), else the last two (``attn.c_proj``), else the full
    names: the shortest that select these modules and no other, by PEFT's own matching over all modules of the model.

    Args:
        facts: base model and settings.
        names: full names of the adapted modules.
        skeleton: the base model, weights on meta or not; unchanged on return.

    Raises:
        ConfigError: PEFT cannot be told to adapt just these modules.
    """
    linears = _linears(names, skeleton)
    alpha = facts.solve.lora_alpha
    config = LoraConfig(
        r=facts.solve.rank,
        lora_alpha=cast("int", int(alpha) if alpha.is_integer() else alpha),  # its type hint is too narrow
        use_rslora=facts.solve.rslora,
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=facts.base_model,
        revision=facts.revision,
        # where Linear and Conv1D are mixed PEFT corrects the flag per module, with a warning
        fan_in_fan_out=any(spec.transposed for spec in linears),
        inference_mode=False,  # as in an adapter saved while it trains; from_pretrained sets its own
    )
    wanted = set(names)
    everything = [name for name, _ in skeleton.named_modules() if name]
    for num_parts in (1, 2, 0):  # 0: the whole name
        config.target_modules = sorted({".".join(name.split(".")[-num_parts:]) for name in names})
        if {name for name in everything if check_target_module_exists(config, name)} == wanted:
            return config
    raise ConfigError(
        f"PEFT cannot adapt {named(names)} alone: another module's name ends in the same way; change --target-modules"
    )


def require_writable_output(folder: Path, overwrite: bool) -> None:
    """Refuses an output folder that `write_adapter` could not write, before any work starts; makes its parents.

    What a crash left beside it is cleared away first: a displaced adapter is put back.

    Raises:
        ConfigError: it holds anything and ``overwrite`` is off, or anything that is not an adapter made by streamda.
        StorageError: it, or a file beside it, cannot be written.
    """
    output = _output(folder, overwrite)
    output.prepare()
    output.probe()


def write_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    facts: AdapterFacts,
    skeleton: PreTrainedModel,
    *,
    overwrite: bool = False,
    report: Callable[[Mapping[str, FileRecord]], str] | None = None,
) -> None:
    """Writes an adapter folder that holds either what it held before or the whole, checked adapter.

    Args:
        folder: where; a symbolic link is followed once and stays.
        factors: module name -> (``lora_A`` [r, d_in], ``lora_B`` [d_out, r]). One module is fetched at a time, so a
            mapping that reads them from disk never holds them all.
        facts: what the configuration and the card say.
        skeleton: the base model, weights on meta or not; unchanged on return.
        overwrite: replace a folder that holds nothing but an adapter made by streamda.
        report: makes the report, given what the adapter's configuration and weights came to.

    Raises:
        ConfigError: the folder is not ours to write, see `require_writable_output`.
        NumericalError: a factor holds NaN or Inf.
        StorageError: no space, or the place cannot be written.
        ValueError: factors that do not fit the model and the rank: the caller's mistake.
    """
    config = peft_config(facts, list(factors), skeleton)
    settings = files.json_text(config.to_dict())  # type: ignore[no-untyped-call]  # PEFT has no types for it
    card = model_card(facts).encode(errors="backslashreplace")
    linears = _linears(list(factors), skeleton)
    output = _output(folder, overwrite)
    output.prepare()
    with output.building() as part:
        _write_file(part / CARD_FILE, card)
        written = {
            CONFIG_FILE: _write_file(part / CONFIG_FILE, settings),
            WEIGHTS_FILE: _write_weights(part / WEIGHTS_FILE, factors, facts, linears),
        }
        check_adapter(part, skeleton)
        if report is not None:
            _write_file(part / REPORT_FILE, report(written).encode())


def _output(folder: Path, overwrite: bool) -> OutputFolder:
    return OutputFolder(resolved(folder), overwrite, _is_own, (*OWN_FILES, *PROFILE_FILES))


def _is_own(file: Path) -> bool:
    """False for weights and cards without our mark.

    PEFT saves a trained adapter under the very same names, and every other folder has a README.md.
    """
    if file.name == CARD_FILE:
        return CARD_MARK.encode() in files.read_bytes(file)
    return file.name != WEIGHTS_FILE or has_mark(file) is True


def has_mark(file: Path) -> bool | None:
    """Whether weights are of an adapter as streamda wrote it; None where they are missing or damaged."""
    try:
        with safe_open(file, framework="pt", backend="pread") as weights:
            return _MARK in (weights.metadata() or {})
    except (SafetensorError, FileNotFoundError):
        return None


def _linears(names: Sequence[str], skeleton: PreTrainedModel) -> list[LinearSpec]:
    modules = dict(skeleton.named_modules())
    unknown = [name for name in names if name not in modules or not is_linear(modules[name])]
    if unknown or not names:
        raise ValueError(f"not linear layers of this model: {named(unknown)}" if unknown else "no module is adapted")
    return [linear_spec(name, modules[name]) for name in names]


def _write_file(path: Path, data: bytes) -> FileRecord:
    with files.FileWriter(path) as file:
        file.write(data)
    return FileRecord(file.size, file.crc32c)


def _write_weights(
    path: Path, factors: Mapping[str, tuple[Tensor, Tensor]], facts: AdapterFacts, linears: Sequence[LinearSpec]
) -> FileRecord:
    """Writes the safetensors format itself, tensor by tensor.

    The library's writer wants all tensors at once, leaves mode 0600 whatever the umask, does not fsync, and reports a
    full disk as an error of its own. The format: header length (8 bytes), JSON header, the tensors without a gap.
    """
    rank = facts.solve.rank
    header: dict[str, object] = {"__metadata__": {"format": "pt", _MARK: facts.version}}
    start = 0
    for spec in linears:
        for letter, shape in (("A", (rank, spec.d_in)), ("B", (spec.d_out, rank))):
            end = start + 4 * math.prod(shape)  # float32
            header[TENSOR_NAME.format(spec.name, letter)] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": (start, end),
            }
            start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, as the library has it
    with files.FileWriter(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in linears:
            lora_a, lora_b = factors[spec.name]
            for tensor, wanted in ((lora_a, (rank, spec.d_in)), (lora_b, (spec.d_out, rank))):
                if tuple(tensor.shape) != wanted:
                    raise ValueError(f"a factor of {spec.name} is {list(tensor.shape)}, not {list(wanted)}")
                stored = tensor.detach().to("cpu", torch.float32).contiguous()
                if not bool(stored.isfinite().all()):
                    raise NumericalError(f"the adapter of {spec.name} is not finite in float32; nothing was written")
                file.write(stored.numpy().data)
    return FileRecord(file.size, file.crc32c)
