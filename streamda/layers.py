"""Which linear layers are adapted, in which block they lie, and which of them read the same input.

Names and shapes only; nothing here reads a weight. A module is called by its full name in the transformers model,
for example ``model.layers.0.self_attn.q_proj``.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from streamda.errors import ConfigError
from streamda.quoting import counted, quoted

ALL_LINEAR = "all-linear"
REGEX_SECONDS = 5
"""How long a regular expression may take for all names of a model; real ones take milliseconds."""


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One adapted linear layer."""

    name: str
    """Full module name."""
    d_in: int
    d_out: int
    transposed: bool = False
    """True for transformers' Conv1D, which stores its weight as [d_in, d_out]."""


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linear layers of one block that read the very same tensor and so share one input moment."""

    modules: tuple[str, ...]
    """Full module names in call order; the first one names the group."""
    d_in: int
    token_rows: int = 0
    """Tokens, at most, whose inputs and output gradients are kept as they are; 0 where their products are summed up."""
    min_tokens: int = 0
    """Tokens that its layers see in any case; 0 where nobody knows, as of routed ones and of statistics on disk."""
    moment_bytes: int = 4
    """Of each sum of its input moment: 8 where products are summed in float64."""

    @property
    def name(self) -> str:
        """Name of the group: that of its first module."""
        return self.modules[0]


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """The adapted layers of one decoder block; of these there are none where nothing in it is adapted."""

    index: int
    prefix: str
    """Full name of the block's module."""
    linears: tuple[LinearSpec, ...]
    groups: tuple[InputGroup, ...]
    unread: tuple[str, ...] = ()
    """Linear layers, adapted or not, that a replay need not compute: no gradient needs their results. Not known of
    statistics on disk."""

    def linear(self, name: str) -> LinearSpec:
        """The layer of that full name."""
        return next(spec for spec in self.linears if spec.name == name)

    def group_of(self, name: str) -> InputGroup:
        """The input group that a module belongs to."""
        return next(group for group in self.groups if name in group.modules)


@dataclass(frozen=True, slots=True)
class Targets:
    """What ``target_modules`` selects in a model."""

    linears: tuple[LinearSpec, ...]
    """Adapted layers in the model's order, all of them inside decoder blocks."""
    outside: tuple[str, ...]
    """Layers that ``all-linear`` also means but that lie outside the blocks; they get no adapter."""


def is_linear(module: nn.Module) -> bool:
    """Whether streamda can adapt this module: a linear layer, or GPT-2's Conv1D.

    A router that is a linear layer by its class but returns more than a product (PhiMoE, Llama 4) is none.
    """
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    return isinstance(module, nn.Linear) and _returns_product(module)


def _returns_product(module: nn.Linear) -> bool:
    """Whether a subclass of Linear maps [..., d_in] to [..., d_out] and nothing more, tried on meta."""
    stand_ins = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    row = torch.empty(1, 1, module.in_features, dtype=module.weight.dtype, device="meta")
    try:
        output = torch.func.functional_call(module, stand_ins, (row,))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, 1, module.out_features)


def linear_spec(name: str, module: nn.Module) -> LinearSpec:
    """Shapes of a linear layer, whichever way round it stores its weight."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if isinstance(module, Conv1D):
        return LinearSpec(name, d_in=weight.shape[0], d_out=weight.shape[1], transposed=True)
    return LinearSpec(name, d_in=weight.shape[1], d_out=weight.shape[0])


def parse_target_modules(text: str) -> str | list[str]:
    """PEFT's two meanings: a list of name endings, or one regular expression that must match the whole name.

    Text of nothing but names, dots, dashes, commas and spaces is a list.
    """
    if re.fullmatch(r"[\w.,\-\s]+", text):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(f"target_modules {quoted(text)} is no regular expression: {error}") from error
    return text


def find_targets(model: nn.Module, block_prefixes: Sequence[str], target_modules: str) -> Targets:
    """Resolves ``target_modules`` against a model skeleton, with PEFT's own matching.

    Args:
        model: the model, its weights on meta or not.
        block_prefixes: full names of the decoder blocks, in order.
        target_modules: ``all-linear``, comma-separated names, or a regular expression.

    Raises:
        ConfigError: nothing matches, or a named layer lies outside the decoder blocks.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if target_modules == ALL_LINEAR:
        # PEFT leaves the output layer out of all-linear
        chosen = [name for name, module in linears.items() if module is not head]
    else:
        wanted = parse_target_modules(target_modules)
        if isinstance(wanted, str):
            _require_quick(wanted, [name for name, _ in model.named_modules()])
        config = LoraConfig(target_modules=wanted)
        chosen = [name for name in linears if check_target_module_exists(config, name)]
        if not chosen:
            endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise ConfigError(
                f"target_modules {quoted(target_modules)} matches no linear layer; this model has {', '.join(endings)}"
                + _near(target_modules, endings)
            )
        for name in wanted if isinstance(wanted, list) else ():
            if not any(found == name or found.endswith(f".{name}") for found in chosen):
                near = _near(name, [other.rsplit(".", 1)[-1] for other in linears])
                raise ConfigError(f"target_modules names {quoted(name)}, which is no linear layer of this model{near}")
    inside = [name for name in chosen if any(name.startswith(prefix + ".") for prefix in block_prefixes)]
    outside = tuple(name for name in chosen if name not in set(inside))
    if outside and target_modules != ALL_LINEAR:
        raise ConfigError(
            f"target_modules selects {outside[0]}, which lies outside the decoder blocks; only layers inside them "
            "can be initialized"
        )
    if not inside:
        raise ConfigError("the decoder blocks of this model hold no linear layer to adapt")
    _require_peft_adapts(model, inside)
    return Targets(tuple(linear_spec(name, linears[name]) for name in inside), outside)


def _near(target: str, endings: Iterable[str]) -> str:
    """The names most like the last one in a target, as a clause; empty if there are none."""
    words = re.findall(r"[\w-]+", target)
    near = difflib.get_close_matches(words[-1].lower(), dict.fromkeys(endings), n=3) if words else []
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _require_quick(pattern: str, names: Sequence[str]) -> None:
    """Refuses a regular expression that would be tried for ages: nested repetitions double the time with each letter.

    Python's matching cannot be given a time limit, so a process of its own tries it first.
    """
    if not sys.executable:  # embedded in another program
        return
    attempt = "import json, re, sys; p, names = json.load(sys.stdin); [re.fullmatch(p, name) for name in names]"
    try:
        # what goes wrong in there will go wrong here, and with a better message
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", attempt],
            input=json.dumps([pattern, names]).encode(),
            timeout=REGEX_SECONDS,
            capture_output=True,
        )
    except OSError:  # no process to be had
        return
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"target_modules {quoted(pattern)} takes more than {REGEX_SECONDS} s to be matched with this model's "
            "names; write it without a repetition inside a repetition"
        ) from error


def _require_peft_adapts(model: nn.Module, names: Sequence[str]) -> None:
    """Asks PEFT for an adapter on one layer of each kind, for what it refuses it would refuse at the end of a run only.

    A kind is a name without its numbers: a shared expert's ``gate_proj`` is another one than that of a dense block.

    Some of Mamba's layers it does not adapt. Of mixtures of experts that transformers fused, it takes names that once
    were an expert's (``gate_proj``) for the fused weights, wherever a layer of that name lies.

    Raises:
        ConfigError: with PEFT's reason, or the layers that it does not adapt.
    """
    kinds = {tuple(part for part in name.split(".") if not part.isdecimal()): name for name in names}
    conv1d = any(isinstance(model.get_submodule(name), Conv1D) for name in kinds.values())
    config = LoraConfig(r=1, target_modules="|".join(map(re.escape, kinds.values())), fan_in_fan_out=conv1d)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where Linear and Conv1D are mixed PEFT corrects the flag per module
            adapted = inject_adapter_in_model(config, copy.deepcopy(model), low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"PEFT refuses to adapt these layers: {error}") from error
    reached = {name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    lost = dict.fromkeys(kind[-1] for kind, name in kinds.items() if name not in reached)
    if lost:
        rest = ",".join(dict.fromkeys(kind[-1] for kind in kinds if kind[-1] not in lost))
        raise ConfigError(
            f"PEFT takes {', '.join(lost)} of this model for the weights of its experts and does not adapt the layers "
            f"of that name; use --target-modules {rest or 'with other names'}"
        )


def require_rank(linears: Sequence[LinearSpec], rank: int, *, may_leave_out: bool = True) -> None:
    """Refuses a rank above the smaller side of any adapted layer.

    Args:
        linears: the layers.
        rank: of the adapter.
        may_leave_out: whether other layers can still be chosen.

    Raises:
        ConfigError: naming the narrowest such module and its shape.
    """
    narrow = [spec for spec in linears if rank > min(spec.d_in, spec.d_out)]
    if narrow:
        spec = min(narrow, key=lambda linear: min(linear.d_in, linear.d_out))
        raise ConfigError(
            f"rank {rank} is above the smaller side of {counted(len(narrow), 'layer')}, narrowest {spec.name} "
            f"[{spec.d_out}, {spec.d_in}]; use --rank {min(spec.d_in, spec.d_out)} or less"
            + (", or leave them out of --target-modules" if may_leave_out and len(narrow) < len(linears) else "")
        )
