"""The model without its weights: its configuration, looked at before it is believed, and what is built of it.

A configuration may come from anyone. No code that it names is run unless the user trusts it, and whatever it makes
transformers raise becomes one line.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from streamda import stopping
from streamda.errors import ModelError, StreamdaError
from streamda.files import shown
from streamda.quoting import one_line, quoted
from streamda.shards import first_line, read_json_object, require_within

LARGEST = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 26,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
}
"""The largest models have 126 blocks of width 16384 and a few hundred thousand tokens."""


def load_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """Reads the configuration of a model folder.

    Raises:
        ModelError: unreadable, of an unknown architecture, quantized, not a decoder, or in need of its own code.
    """
    path = folder / "config.json"
    require_within(folder, path)
    raw = read_json_object(path)
    if not trust_remote_code and (code := _own_code(raw)):
        raise ModelError(f"{shown(folder)} {code}; add --trust-remote-code if you trust it")
    with third_party(f"{shown(path)} cannot be used"):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _require_sane(config, path)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{shown(folder)} is a quantized checkpoint; gradients need the original weights")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{shown(folder)} is an encoder-decoder model; streamda reads decoder-only language models")
    return config


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with every weight on meta and every buffer real, in evaluation mode, nothing requiring gradients.

    Raises:
        ModelError: transformers has no causal language model for this configuration, or cannot build it.
    """
    with third_party("no causal language model can be built from the configuration"):
        with init_empty_weights(include_buffers=False):
            auto: Any = AutoModelForCausalLM
            model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.tie_weights()
    model.config.use_cache = False
    model.eval()
    model.requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    return model


def _own_code(raw: dict[str, Any]) -> str | None:
    """What a configuration would have executed beside transformers' own code, as a clause."""
    if "auto_map" in raw:
        return "brings its own Python code"
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        for value in (part.get(key) for part in parts):
            names = value.values() if isinstance(value, dict) else (value,)
            if any("/" in str(name) for name in names):  # a repository of compiled code
                return f"asks for code from the hub ({key} {quoted(value)})"
    return None


def _require_sane(config: PretrainedConfig, path: Path) -> None:
    """Refuses sizes that no model has: building only the skeleton of such a one takes hours, or all memory.

    Raises:
        ModelError: naming the field.
    """
    for name, largest in LARGEST.items():
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # the blocks have several, among which transformers does not choose
            continue
        if isinstance(value, int) and not 1 <= value <= largest:
            raise ModelError(f"{shown(path)} has {name} {quoted(value)}; models have from 1 to {largest}")


@contextmanager
def third_party(what: str, kind: type[StreamdaError] = ModelError) -> Iterator[None]:
    """Turns whatever a model's files make transformers raise into one line, and keeps its warnings to itself.

    Args:
        what: could not be done, for the message.
        kind: of error.

    Raises:
        StreamdaError: of that kind, if anything was raised that is no error of ours.
    """
    log: Any = transformers.utils.logging
    verbosity = log.get_verbosity()
    log.set_verbosity(log.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except StreamdaError:
        raise
    except Exception as error:  # each of hundreds of model classes checks its fields in its own way, or does not
        stopping.check()  # this may be what the library made of it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # a checked field's error says what is wrong in its second line
        nested = len(lines) > 1 and lines[0].endswith(":")
        reason = one_line(" ".join(lines[:2])) if nested else first_line(error)
        if isinstance(error, (LookupError, ArithmeticError, AssertionError, TypeError)):
            reason = f"{type(error).__name__}: {reason}"  # which says little without
        raise kind(f"{what}: {reason}") from error
    finally:
        log.set_verbosity(verbosity)
