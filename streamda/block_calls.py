"""How a model calls its decoder blocks: what each receives beside hidden states, by the shape of a micro-batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from streamda.errors import ModelError
from streamda.products import in_model

CACHED_BYTES = 8 << 20
"""Of block arguments that are kept, by batch shape: rotations of 200 tokens take 0.1 to 0.2 MB. To make them again
costs a stand-in forward pass, some milliseconds for each micro-batch and each block."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How the model calls one block: everything but the hidden states, detached."""

    args: tuple[Any, ...]
    """Positional arguments after the hidden states."""
    kwargs: dict[str, Any]
    hidden_is_positional: bool

    def run(
        self, block: nn.Module, hidden: torch.Tensor, watch: AbstractContextManager[object] | None = None
    ) -> torch.Tensor:
        """Hidden states [batch, tokens, hidden] in and out, in tensors or tuples; `watch` is entered around it."""
        with in_model(hidden.device), watch or nullcontext():
            if self.hidden_is_positional:
                output = block(hidden, *self.args, **self.kwargs)
            else:
                output = block(*self.args, hidden_states=hidden, **self.kwargs)
        result = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(result, torch.Tensor) or result.shape != hidden.shape:
            raise ModelError(f"a {type(block).__name__} does not map hidden states to hidden states of the same shape")
        return result

    def tensors(self) -> list[torch.Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> BlockCall:
        """The same call with its tensors elsewhere, those of floating point in another dtype."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype)

        return BlockCall(tree_map(move, self.args), tree_map(move, self.kwargs), self.hidden_is_positional)


class KeptCalls:
    """The calls of a few shapes of micro-batches, so that they need not be made again for each block."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[tuple[BlockCall, ...], int]] = {}  # with their bytes

    def of(self, shape: tuple[int, int]) -> tuple[BlockCall, ...] | None:
        """Those of all blocks for a [batch, tokens]; None where they are not kept."""
        return self._kept[shape][0] if shape in self._kept else None

    def keep(self, shape: tuple[int, int], calls: tuple[BlockCall, ...]) -> None:
        """Keeps calls, in the place of others where there is no room for all of them."""
        tensors = (tensor for call in calls for tensor in call.tensors())
        storages = {storage.data_ptr(): storage for storage in map(torch.Tensor.untyped_storage, tensors)}
        size = sum(storage.nbytes() for storage in storages.values())  # blocks share most of them
        # each pass goes round all shapes: of too many, the one that was kept last is needed last
        while self._kept and size + sum(each for _, each in self._kept.values()) > CACHED_BYTES:
            self._kept.popitem()
        self._kept[shape] = calls, size
