"""A decoder as prologue, blocks and epilogue, with the model's own forward driving all three.

The blocks' `forward` is replaced for a moment by stand-ins that note the arguments they are called with and pass
hidden states through. The model's forward then *is* the prologue, and, with the last stand-in handing out a tensor of
our choice, the epilogue. No knowledge of any model family is needed.

What makes a model streamable, checked here: every block receives one differentiable tensor, the hidden states
[batch, tokens, hidden], just as the block before it returned them; everything else it receives was made before the
first block, from shapes and not from token ids; nothing is led past the blocks to the head. Samples are padded on the
right and no mask is passed: in a causal decoder no real token sees what lies to its right, so padding changes nothing
but its own rows. (Of another one samples are not padded.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from streamda.block_calls import BlockCall, KeptCalls
from streamda.errors import ModelError
from streamda.layers import is_linear
from streamda.products import in_model

_EXTRA = object()
"""Stands for what a block returns behind the hidden states; it must not reach another block."""
MAX_EXTRAS = 3
_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What the loop of a model raises that expects another form than it is given."""


class _ReachedEnd(Exception):
    """Raised by a stand-in to leave the model's forward."""


class DecoderStack:
    """A causal language model skeleton, cut at its decoder blocks."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        """Finds the blocks, embeddings and head of a skeleton.

        Args:
            model: its weights may be on meta; its buffers are moved to the device.
            device: where the model will compute.

        Raises:
            ModelError: no block list, or no head.
        """
        self.model = model
        self.device = device
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self.prefix, self.blocks = find_block_list(model)
        self.prefixes = tuple(f"{self.prefix}.{index}" for index in range(len(self.blocks)))
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers has no types for it
        if head is None:
            raise ModelError(f"{type(model).__name__} has no output embeddings; it is no causal language model")
        self.head: nn.Module = head
        inside = {id(module) for module in self.blocks.modules()}
        outside = [(name, module) for name, module in model.named_modules() if id(module) not in inside]
        self.embeddings: dict[str, nn.Module] = {name: part for name, part in outside if isinstance(part, nn.Embedding)}
        owners = {id(module) for module in self.embeddings.values()} | {id(self.head)}
        self.small_names = tuple(
            f"{name}.{leaf}" if name else leaf
            for name, module in outside
            if id(module) not in owners
            for leaf, _ in module.named_parameters(recurse=False)
        )
        """Parameters outside blocks, embeddings and head (norms, projections): resident for the whole run."""
        self.head_name = next(name for name, module in outside if module is self.head)
        self._calls = KeptCalls()
        self._num_extras: int | None = None

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return int(weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """As the function of that name."""
        return max_positions(self.model.config)

    @property
    def is_causal(self) -> bool:
        """Whether no token sees what lies to its right, so that padding there changes none."""
        if getattr(self.model.config, "is_causal", None) is False:  # transformers' masks go by it
            return False
        return not any(getattr(module, "is_causal", None) is False for module in self.blocks.modules())

    def fill_small_parameters(self) -> None:
        """Puts zeros in the place of the small parameters, for a model that is planned and not run."""
        for name in self.small_names:
            parameter = self.model.get_parameter(name)
            zeros = torch.zeros(parameter.shape, dtype=parameter.dtype, device=self.device)
            owner = self.model.get_submodule(name.rpartition(".")[0])
            owner._parameters[name.rpartition(".")[2]] = nn.Parameter(zeros, requires_grad=False)

    def find_output_form(self) -> None:
        """Finds by trying whether the model's loop expects a tensor or a tuple from its blocks.

        Needs the small parameters.

        Raises:
            ModelError: it works with neither.
        """
        reasons: dict[int | None, str] = {}
        for self._num_extras in (None, *range(MAX_EXTRAS + 1)):
            try:
                self.forget_calls()
                calls = self.calls(1, 3)
            except _FAILURES as error:
                reasons[self._num_extras] = str(error).splitlines()[0] if str(error) else type(error).__name__
            else:  # a mask may hold infinity; rope settings that make no sense give NaN
                if any(bool(tensor.isnan().any()) for call in calls for tensor in call.tensors()):
                    raise ModelError(f"{type(self.model).__name__} gives its blocks NaN; look at rope in config.json")
        # a model that takes short tuples may still hand on the rest of a longer one, so all forms were tried
        works = [form for form in (None, *range(MAX_EXTRAS + 1)) if form not in reasons]
        if not works:
            raise ModelError(
                f"{type(self.model).__name__} cannot be streamed: its blocks exchange more than hidden states "
                f"({'; '.join(dict.fromkeys(reasons.values()))})"
            )
        self._num_extras = works[0]
        self.forget_calls()

    def calls(self, batch: int, tokens: int) -> tuple[BlockCall, ...]:
        """How each block is called for a batch of that shape, without any weight of the prologue.

        Raises:
            ModelError: a block receives, beside hidden states, a tensor computed from embeddings, or a cache to fill.
        """
        key = (batch, tokens)
        if (kept := self._calls.of(key)) is not None:
            return kept
        ids = torch.zeros(batch, tokens, dtype=torch.long, device=self.device)
        with self._zero_embeddings(), torch.enable_grad():
            recorded, _ = self._record(ids)
        calls = tuple(_checked(call, self.model) for call in recorded)
        self._calls.keep(key, calls)
        return calls

    def forget_calls(self) -> None:
        """Lets go of the arguments that are kept."""
        self._calls = KeptCalls()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The prologue: hidden states [batch, tokens, hidden] that enter block 0. Embeddings must be loaded.

        Raises:
            ModelError: the blocks' other arguments depend on the token ids.
        """
        expected = self.calls(*input_ids.shape)
        with torch.no_grad():
            recorded, hidden = self._record(input_ids)
        for call, other in zip(recorded, expected, strict=True):
            ours, theirs = call.tensors(), other.tensors()
            if len(ours) != len(theirs) or not all(map(torch.equal, ours, theirs)):
                raise ModelError(f"{type(self.model).__name__} cannot be streamed: its blocks also read the token ids")
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The epilogue: final norm and head, for hidden states [positions, hidden]; the head must be loaded.

        Everything behind the last block acts on one position at a time, so positions of many samples pass as one
        sequence, and only those whose logits are needed pass at all.

        Returns:
            [positions, vocabulary].
        """
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        form = self._wrap

        def last(*_args: Any, **_kwargs: Any) -> Any:
            return form(hidden[None])

        def others(*args: Any, **kwargs: Any) -> Any:
            return form(args[0] if args else kwargs["hidden_states"])

        stand_ins = self._replaced([others] * (len(self.blocks) - 1) + [last])
        with self._zero_embeddings(), stand_ins, in_model(hidden.device):
            logits = self.model(input_ids=ids, use_cache=False).logits
        if logits.shape[:2] != (1, hidden.shape[0]):
            raise ModelError(f"{type(self.model).__name__} returns logits of shape {list(logits.shape)}")
        assert isinstance(logits, torch.Tensor)
        return logits[0]

    def _wrap(self, hidden: torch.Tensor) -> torch.Tensor | tuple[object, ...]:
        return hidden if self._num_extras is None else (hidden, *([_EXTRA] * self._num_extras))

    def _record(self, input_ids: torch.Tensor) -> tuple[list[BlockCall], torch.Tensor]:
        """Runs the prologue and notes every block's call; stops at the head. Returns block 0's hidden states too."""
        shape = (*input_ids.shape, self.hidden_size)
        recorded: list[BlockCall] = []
        passed: list[torch.Tensor] = []  # what enters each block

        def note(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index != len(recorded):
                raise ValueError(f"block {index} is called in the place of block {len(recorded)}")
            if tuple(hidden.shape) != shape:
                raise ValueError(f"block {index} receives hidden states of shape {list(hidden.shape)}")
            if passed and hidden is not passed[-1]:
                raise ValueError(f"block {index} receives something else than block {index - 1} returns")
            recorded.append(BlockCall(tuple(args[1:]), dict(kwargs), bool(args)))
            # behind the last block nothing hangs on the embeddings any more, unless it was led past the blocks
            passed.append(hidden if index < len(self.blocks) - 1 else hidden.detach())
            return self._wrap(passed[-1])

        def stop(hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
            if hidden.ndim != 3 or tuple(hidden.shape[:2]) != shape[:2]:
                raise ValueError(f"the head receives hidden states of shape {list(hidden.shape)}")
            if hidden.requires_grad:
                raise ValueError("the head also reads what is led past the blocks")
            raise _ReachedEnd

        self.head.forward = stop
        try:
            with self._replaced([partial(note, index) for index in range(len(self.blocks))]):
                self.model(input_ids=input_ids, use_cache=False)
        except _ReachedEnd:
            pass
        else:
            raise ValueError("the head is not called")
        finally:
            del self.head.forward
        if len(recorded) != len(self.blocks):
            raise ValueError(f"{len(recorded)} of {len(self.blocks)} blocks are called")
        return recorded, passed[0]

    @contextmanager
    def _replaced(self, stand_ins: list[Callable[..., Any]]) -> Iterator[None]:
        for block, stand_in in zip(self.blocks, stand_ins, strict=True):
            block.forward = stand_in
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    @contextmanager
    def _zero_embeddings(self) -> Iterator[None]:
        """Lets every embedding return zeros that require gradients.

        Its weights are not needed, what is computed from it can be recognized, and its values never reach what is read.
        """
        for module in self.embeddings.values():
            module.forward = _zeros_like_embedding(module, self.device)
        try:
            yield
        finally:
            for module in self.embeddings.values():
                del module.forward


def max_positions(config: PretrainedConfig) -> int | None:
    """Positions that a model knows; rotary models silently accept more, learned positions do not."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def find_block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its full name.

    Raises:
        ModelError: there is none, or more than one.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = set(model._no_split_modules or ())
    found = [(name, m) for name, m in lists if len(m) and all(type(block).__name__ in blocks for block in m)]
    if not found:
        # some models declare nothing; their blocks are the outermost list of equal modules that hold linear layers
        alike = [
            (name, m)
            for name, m in lists
            if len({type(block) for block in m}) == 1 and any(is_linear(part) for part in m[0].modules())
        ]
        found = [(name, m) for name, m in alike if not any(name.startswith(other + ".") for other, _ in alike)]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ModelError(f"{type(model).__name__} should have one list of decoder blocks; found {names}")
    return found[0]


def _zeros_like_embedding(module: nn.Module, device: torch.device) -> Callable[..., torch.Tensor]:
    assert isinstance(module, nn.Embedding)

    def forward(ids: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        shape = (*ids.shape, module.embedding_dim)  # the ids may have been sent after the weight, to meta
        zeros = torch.zeros(shape, dtype=module.weight.dtype, device=device, requires_grad=True)
        return zeros.clone()  # no leaf, so that a model may scale its embeddings in place

    return forward


def _checked(call: BlockCall, model: nn.Module) -> BlockCall:
    given = (*call.args, *call.kwargs.values())
    for leaf in tree_leaves(given, is_leaf=lambda value: isinstance(value, dict) and not value):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            what = "a second tensor that depends on the embeddings"
        elif isinstance(leaf, Cache) or (isinstance(leaf, dict) and not leaf):
            what = "a container that one block fills and another reads"
        elif leaf is _EXTRA:
            what = "more than hidden states"
        else:
            continue
        raise ModelError(f"{type(model).__name__} cannot be streamed: its blocks exchange {what}")
    return call
