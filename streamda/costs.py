"""What a model and its samples cost, as the planner takes it: plain integers, at the largest micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from streamda.layers import BlockSpec


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One block, at the largest micro-batch."""

    spec: BlockSpec
    weight_bytes: int
    """In the compute dtype."""
    weight_count: int
    saved_bytes: int
    """Kept by autograd between forward and backward."""
    largest_bytes: int
    """The largest single activation."""
    stored_weight_bytes: int
    """With matrices in the dtype of their files where that is narrower."""
    largest_module_bytes: int
    """Of the largest parameter in the compute dtype: what is cast at a time if weights stay in their stored dtype."""
    fused_count: int = 0
    """Weights that are there beside the block's while those that the files hold in pieces are put together."""
    unread_count: int = 0
    """Weights of layers whose results no gradient needs: a replay only multiplies gradients with them."""
    product_bytes: int = 0
    """Of a product that goes into a panel, beside its operands and the panel."""

    @property
    def shrinks(self) -> bool:
        """Whether the block takes less if its weights stay in their stored dtype."""
        return self.stored_weight_bytes + self.largest_module_bytes < self.weight_bytes

    def resident_bytes(self, keep_stored: bool) -> int:
        """Weights at rest."""
        return self.stored_weight_bytes if keep_stored else self.weight_bytes

    def loading_bytes(self, keep_stored: bool) -> int:
        """Weights while they are loaded."""
        resident = self.resident_bytes(keep_stored)
        return resident + resident * self.fused_count // max(1, self.weight_count)

    def used_bytes(self, keep_stored: bool) -> int:
        """Weights while the block runs."""
        return self.resident_bytes(keep_stored) + (self.largest_module_bytes if keep_stored else 0)


CPU_HOLE_BYTES = 48 << 20
"""`Workload.hole_bytes` of a CPU, where holes are given back between micro-batches; measured."""
HOLE_BYTES = 96 << 20
"""The same of a device where they are not; unmeasured."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The model and the samples at one choice of micro-batch size."""

    micro_batch_tokens: int
    largest_rows: int
    """Rows of the largest micro-batch."""
    num_rows: int
    """Rows of all micro-batches, padding included."""
    num_labels: int
    hidden_size: int
    vocab_size: int
    dtype_bytes: int
    small_bytes: int
    """What stays throughout: parameters outside blocks, embeddings and head, and what the device's libraries keep."""
    embedding_bytes: int
    head_bytes: int
    blocks: tuple[BlockCost, ...]
    checkpoint_bytes: int
    """Stored size of all weights."""
    stored_dtype_bytes: int = 2
    """Per weight, in the files."""
    outer_count: int = 0
    """Weights outside the blocks, as the way up reads them: a head that is tied is read once more."""
    num_micro_batches: int = 1
    stored_embedding_bytes: int | None = None
    """With weights in their stored dtype: looked up there; None where that is no smaller."""
    stored_head_bytes: int | None = None
    """With weights in their stored dtype, and what is cast of them at a time; None where that is no smaller."""
    hole_bytes: int = CPU_HOLE_BYTES
    """Most that holes take in the device's allocator: activations of many shapes leave some as large as themselves, up
    to about this much. Larger blocks are mapped one by one."""

    @property
    def shrinks(self) -> bool:
        """Whether anything takes less if weights stay in their stored dtype."""
        outer = self.stored_embedding_bytes is not None or self.stored_head_bytes is not None
        return outer or any(cost.shrinks for cost in self.blocks)

    def block_bytes(self, keep_stored: bool) -> int:
        """Weights of the largest block at rest."""
        return max(cost.resident_bytes(keep_stored) for cost in self.blocks)

    def outer_bytes(self, keep_stored: bool) -> tuple[int, int]:
        """Bytes of the embeddings and of the head while they are used."""
        if not keep_stored:
            return self.embedding_bytes, self.head_bytes
        return (
            self.embedding_bytes if self.stored_embedding_bytes is None else self.stored_embedding_bytes,
            self.head_bytes if self.stored_head_bytes is None else self.stored_head_bytes,
        )
