"""A weight that stays in the narrower dtype of its file and is cast for each product, one tensor at a time.

To the model it looks like a weight in the compute dtype: it says so when asked, and every operation on it gets a cast
copy that is gone when the operation ends. Autograd would keep that copy alive until the backward pass; it is given a
note instead of which stored values to cast again. Casting to a wider dtype is exact, so nothing changes in a result
(but by rounding where a head is so large that it is multiplied by bands).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from streamda.products import linear

VIEWS = {"T", "mT", "__getitem__", "data", "detach", "narrow", "reshape", "select", "squeeze", "t", "transpose"}
VIEWS |= {"chunk", "split", "unbind", "unsqueeze", "view"}
"""What selects from a weight without reading it: of experts in one tensor only those that are used are cast."""
QUESTIONS = {"dim", "get_device", "is_contiguous", "nelement", "numel", "requires_grad_", "size", "storage_offset"}
QUESTIONS |= {"__len__", "data_ptr", "element_size", "is_floating_point", "stride", "untyped_storage"}
"""Methods that do not look at the values."""
LARGE_BYTES, BAND_BYTES = 1 << 30, 256 << 20
"""A weight above the first size once cast (the head of a large vocabulary; no layer of a 70B model) is cast and
multiplied by bands of output features of the second."""


class StoredWeight(torch.Tensor):
    """A weight in its stored dtype that takes part in operations as if it were in the compute dtype."""

    compute_dtype: torch.dtype

    @staticmethod
    def keep(stored: torch.Tensor, compute_dtype: torch.dtype) -> StoredWeight:
        """Wraps a tensor of any shape; its memory is shared.

        Args:
            stored: in a dtype whose every value the compute dtype holds.
            compute_dtype: what operations see.
        """
        weight = torch.Tensor._make_subclass(StoredWeight, stored, False)
        weight.compute_dtype = compute_dtype
        weight._is_param = True  # modules ask for nn.Parameter, and this is how it tells
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answers questions and makes views without a cast, and casts for everything else."""
        kwargs = kwargs or {}
        name = func.__name__
        is_getter = name == "__get__"
        if is_getter:
            name = func.__self__.__name__  # type: ignore[attr-defined]  # a property's getter has both
        self = args[0] if args and isinstance(args[0], StoredWeight) else None
        if func is F.linear and len(args) > 1 and _is_large(args[1]):
            return _linear_by_bands(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.embedding and isinstance(
                args[1], StoredWeight
            ):  # rows are looked up as they are stored; weights need no gradient
                weight = args[1]
                return func(args[0], _plain(weight), *args[2:], **kwargs).to(weight.compute_dtype)
            if self is not None:
                if is_getter and name == "dtype":
                    return self.compute_dtype
                if name in VIEWS:
                    view = func(_plain(self), *args[1:], **kwargs)
                    if _keeps_layout(view):
                        return tree_map(lambda leaf: StoredWeight.keep(leaf, self.compute_dtype), view)
                elif is_getter or name in QUESTIONS or name == "__set__":
                    return func(*args, **kwargs)
                elif name.endswith("_") and not name.endswith("__"):
                    raise TypeError(f"{name} would change a copy of a weight that is kept in its stored dtype")
            return _on_casts(func, args, kwargs)


@dataclass(frozen=True, slots=True)
class _Recast:
    """What autograd keeps of a cast weight: where its values come from, and which view of them was saved."""

    stored: torch.Tensor
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _on_casts(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by storage: the stored tensor and its cast copy
    originals: dict[int, StoredWeight] = {}

    def cast(leaf: Any) -> Any:
        if not isinstance(leaf, StoredWeight):
            return leaf
        stored = _plain(leaf)
        copy = stored.to(leaf.compute_dtype)
        casts[copy.untyped_storage()._cdata] = (stored, copy)
        originals[id(copy)] = leaf
        return copy

    def pack(saved: torch.Tensor) -> torch.Tensor | _Recast:
        found = casts.get(saved.untyped_storage()._cdata)
        if found is None:
            return saved
        return _Recast(found[0], found[1].dtype, saved.shape, saved.stride(), int(saved.storage_offset()))

    args, kwargs = tree_map(cast, (args, kwargs))
    func = linear if func is F.linear else func
    if torch.is_grad_enabled():
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
                result = func(*args, **kwargs)
        finally:
            casts.clear()  # the graph holds the hooks, and through them this
    else:
        result = func(*args, **kwargs)
    return originals.get(id(result), result)  # `.float()` and its like return what they are given


def _is_large(weight: Any) -> bool:
    return isinstance(weight, StoredWeight) and weight.numel() * weight.compute_dtype.itemsize > LARGE_BYTES


def _linear_by_bands(x: torch.Tensor, weight: StoredWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = max(1, BAND_BYTES // (weight.shape[1] * weight.compute_dtype.itemsize))
    bands = [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]
    return torch.cat([F.linear(x, weight[band], None if bias is None else bias[band]) for band in bands], dim=-1)


def _unpack(packed: torch.Tensor | _Recast) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    return packed.stored.to(packed.dtype).as_strided(packed.size, packed.stride, packed.offset)


def _plain(weight: StoredWeight) -> torch.Tensor:
    return weight.as_subclass(torch.Tensor)


def _keeps_layout(view: Any) -> bool:
    """Whether a cast copy would have the strides that the same view of a cast copy has: only then are bits the same."""
    leaves = view if isinstance(view, (tuple, list)) else (view,)
    return all(leaf.is_contiguous() or (leaf.ndim > 1 and leaf.mT.is_contiguous()) for leaf in leaves)
