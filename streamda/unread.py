"""Linear layers whose results no gradient needs, as they are only added up into what their block returns.

    hidden = residual + down_proj(...)

The backward pass of a sum looks at none of its terms, and nobody looks at what a replay returns: the forward pass had
it. So in a replay such a layer only passes its gradient down: of a Llama block's products with weights a ninth to a
seventh are not done.

Which layers they are is found by looking on while a block runs on fake tensors (`streamda.probe`), and looked at again
in every replay: a result that is read after all is an error and no wrong number.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch._C import _len_torch_function_stack  # nothing public says whether a mode is entered within another one
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from streamda.block_calls import BlockCall
from streamda.errors import ModelError
from streamda.products import linear

SUMS = {"add", "dropout", "mul", "reshape", "view"}
"""What may become of such a result: none of these keeps it for its gradient, nor looks at it for anything but the next
sum. Dropout does nothing in a model that is not trained, and factors must be constants."""
QUESTIONS = {"dim", "is_floating_point", "numel", "register_hook", "size"}
PROPERTIES = {"device", "dtype", "grad_fn", "is_leaf", "ndim", "requires_grad", "shape"}
"""What may be asked of it, by methods and by properties."""


class ResultWatch(TorchFunctionMode):
    """While it is entered, follows the results of linear layers through whatever is done with them."""

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        """Changes nothing yet.

        Args:
            linears: the layers, by any names.
        """
        super().__init__()
        self._linears = linears
        # of a sum, by its identity: the layers; weak, or it would keep activations alive
        self._terms: dict[int, tuple[weakref.ref[torch.Tensor], frozenset[str]]] = {}
        self._with_gradients = True
        self._called: set[str] = set()
        self._read: set[str] = set()
        self._entered = ExitStack()
        self._depth, self._is_watching = 0, False

    def __enter__(self) -> ResultWatch:
        for name, module in self._linears.items():
            hook = module.register_forward_hook(partial(self._note, name), prepend=True)
            self._entered.callback(hook.remove)
        self._with_gradients = torch.is_grad_enabled()
        self._depth = _len_torch_function_stack()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    def unread(self, output: torch.Tensor) -> frozenset[str]:
        """Layers that were called once, and whose results were only added up to `output`."""
        return self._terms_of(output) - self._read

    def _terms_of(self, tensor: torch.Tensor) -> frozenset[str]:
        found = self._terms.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else frozenset()

    def _note(self, name: str, _module: nn.Module, _args: Any, result: torch.Tensor) -> None:
        # within another mode this one is not entered, as the other's end would be taken for its own, and the layer is
        # said to be read
        is_outermost = _len_torch_function_stack() == self._depth + self._is_watching
        if not self._is_watching and is_outermost:
            # only now, as each function passes here from now on, and most of a block comes before
            super().__enter__()  # type: ignore[no-untyped-call]  # torch has no types for it
            self._entered.callback(super().__exit__, None, None, None)
            self._is_watching = True
        if name in self._called or not is_outermost:
            self._read.add(name)
        self._called.add(name)
        self._terms[id(result)] = weakref.ref(result), frozenset((name,))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        names = frozenset[str]().union(*map(self._terms_of, operands))
        if names and not _is_question(func):
            if self._is_sum(func, operands, kwargs):
                self._terms[id(result)] = weakref.ref(result), names
            else:
                self._read |= names
        return result

    def _is_sum(self, func: Callable[..., Any], operands: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> bool:
        # inside of a function that brings its own backward pass nobody can tell what is kept for that
        if torch.is_grad_enabled() != self._with_gradients:
            return False
        name = getattr(func, "__name__", "")
        if name == "mul":
            return sum(each.requires_grad or bool(self._terms_of(each)) for each in operands) == 1
        if name == "dropout":
            return kwargs.get("training") is False
        return name in SUMS


class Replayed:
    """A block as a replay runs it, without the products that no gradient needs; a context manager."""

    def __init__(self, block: nn.Module, prefix: str, unread: Iterable[str]) -> None:
        """Changes nothing yet.

        Args:
            block: its weights may be loaded later.
            prefix: its full name.
            unread: full names of the linear layers.
        """
        self._block = block
        self._linears = {name: block.get_submodule(name.removeprefix(f"{prefix}.")) for name in unread}

    def __enter__(self) -> Replayed:
        for module in self._linears.values():
            module.forward = partial(_NoResult.apply, module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self._linears.values():
            del module.forward

    def run(self, call: BlockCall, hidden: torch.Tensor) -> torch.Tensor:
        """As `BlockCall.run`; of what it returns only the gradient is right.

        Raises:
            ModelError: a result is read after all.
        """
        if not self._linears:
            return call.run(self._block, hidden)
        watch = ResultWatch(self._linears)
        output = call.run(self._block, hidden, watch)
        for name in self._linears.keys() - watch.unread(output):
            raise ModelError(
                f"the result of {name} is not only added up to what its block returns, though it was when planned; "
                "blocks of one class and shape must do the same, so please report this model"
            )
        return output


class _NoResult(torch.autograd.Function):
    """A linear layer of which only the input's gradient is asked for, and not even the result."""

    @staticmethod
    def forward(ctx: Any, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        ctx.module = module
        return x.new_zeros(()).expand(*x.shape[:-1], module.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, linear(gradients[0], ctx.module.weight.T)


def plain_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Layers that compute what `torch.nn.Linear` does, by their names within a block."""
    return {name: module for name, module in block.named_modules() if type(module).forward is nn.Linear.forward}


def _is_question(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in QUESTIONS or (name == "__get__" and func.__self__.__name__ in PROPERTIES)  # type: ignore[attr-defined]
