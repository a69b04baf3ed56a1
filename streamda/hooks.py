"""Routes what flows through a block's linear layers into the panels of a replay. No mathematics here, no files.

A forward hook sees the input x, and hangs another hook on the output tensor, which sees its gradient g. (A full
backward hook of the module would wrap inputs and outputs in autograd nodes of its own and keep them alive.) Weights
never require gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from streamda.batches import Batch
from streamda.block_statistics import PanelMaker, zero_panel
from streamda.errors import ModelError, NumericalError
from streamda.factors import add_gradient_, add_input_moment_, add_output_moment_, fits_float32
from streamda.layers import BlockSpec, InputGroup
from streamda.panels import OF_INPUTS, Panel


class PanelCollector:
    """Accumulates the panels of one replay while micro-batches pass through the block."""

    def __init__(
        self,
        block: nn.Module,
        spec: BlockSpec,
        panels: Sequence[Panel],
        device: torch.device,
        new_panel: PanelMaker = zero_panel,
    ) -> None:
        self._block = block
        self._spec = spec
        self._handles: list[RemovableHandle] = []
        self._batch: Batch | None = None
        self._group_inputs: dict[str, list[tuple[torch.Tensor, slice | None]]] = {}
        self._crowded: str | None = None  # a group that saw more tokens than it has rows
        self.totals = {panel: new_panel(panel, device) for panel in panels}
        self.num_tokens = {linear.name: 0 for linear in spec.linears}
        """Rows that entered the second moments of each layer."""
        self._of_inputs = {group.name: self._panels_of(group.name, *OF_INPUTS) for group in spec.groups}
        self._of_outputs = {
            linear.name: (
                self._panels_of(linear.name, "gradient"),
                self._panels_of(linear.name, "output_moment", "output_rows"),
            )
            for linear in spec.linears
        }

    def __enter__(self) -> PanelCollector:
        modules = dict(self._block.named_modules())
        for linear in self._spec.linears:
            module = modules[linear.name.removeprefix(self._spec.prefix + ".")]
            self._handles.append(module.register_forward_hook(self._forward_hook(linear.name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        # the last graph's hooks lead to this object, and these inputs lead back into the graph: a ring through C++ that
        # Python's collector cannot see and that would keep a micro-batch of activations alive per block
        self._group_inputs = {}
        # not at once: a sample that became NaN or Inf is looked at by passing it again, and is an error of its own
        if error is None and self._crowded is not None:
            raise ModelError(
                f"{self._crowded} sees more tokens than the samples have, though it did not when planned; use "
                "--keep-statistics"
            )

    def begin(self, batch: Batch) -> None:
        """Announces the micro-batch that will pass next."""
        self._batch = batch
        self.end()

    def end(self) -> None:
        """Lets go of the micro-batch that has passed."""
        self._group_inputs = {}

    def bad_layers(self) -> dict[str, str]:
        """Layers with NaN or Inf in a statistic of theirs, and which; all that share a bad input moment."""
        bad: dict[str, str] = {}
        for panel, total in self.totals.items():
            # above the diagonal an input moment's panel holds partial blocks, finite like the rest
            if not fits_float32(total):
                shared = panel.statistic in OF_INPUTS
                names = self._spec.group_of(panel.module).modules if shared else (panel.module,)
                what = {"input_rows": "input", "output_rows": "output gradient"}.get(panel.statistic, panel.statistic)
                bad |= dict.fromkeys(names, f"its {what} holds NaN or Inf")
        return bad

    def require_finite(self) -> None:
        """Checks all panels.

        Raises:
            NumericalError: naming the first statistic with NaN or Inf in it.
        """
        for name, reason in self.bad_layers().items():
            raise NumericalError(
                f"{name}: {reason}; look for a damaged sample or weight, or use --dtype float32 or --skip-bad-layers"
            )

    def _panels_of(self, module: str, *statistics: str) -> list[Panel]:
        return [panel for panel in self.totals if panel.module == module and panel.statistic in statistics]

    def _forward_hook(self, name: str) -> Any:
        group = self._spec.group_of(name)
        gradients, outputs = self._of_outputs[name]

        def hook(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            batch = self._batch
            assert batch is not None
            x = args[0].detach()
            rows = self._moment_rows(name, x.numel() // x.shape[-1])
            count = x.numel() // x.shape[-1] if rows is None else rows.numel()
            self.num_tokens[name] += count
            seen = self._group_inputs.setdefault(group.name, [])
            if name == group.name:
                place = self._place(group, count)
                self._add_input(name, x, rows, place)
                seen.append((args[0], place))
            else:
                places = [known for tensor, known in seen if tensor is args[0]]
                if not places:
                    raise ModelError(f"{name} does not read the input of {group.name}, though it did when planned")
                place = places[-1]
            if (gradients or outputs) and output.requires_grad:
                output.register_hook(  # type: ignore[no-untyped-call]  # torch has no types for it
                    lambda g: self._add_output(gradients, outputs, x, g, rows, place, batch.leaves_out_padding)
                )

        return hook

    def _moment_rows(self, name: str, num_rows: int) -> torch.Tensor | None:
        """Rows of a layer's input that enter the moments; None for all."""
        batch = self._batch
        assert batch is not None
        if num_rows == batch.num_rows:
            return batch.moment_rows
        # a layer that sees routed tokens; which of them are padding or labels cannot be told
        if batch.moment_rows is not None:
            raise ModelError(
                f"{name} sees {num_rows} of {batch.num_rows} tokens, so its tokens cannot be masked; use "
                "--micro-batch-tokens 1 and --token-mask attention, or leave it out of --target-modules"
            )
        return None

    def _place(self, group: InputGroup, count: int) -> slice | None:
        """Where the last counted tokens of a group's input lie among its rows; None where there are no more of them."""
        stop = self.num_tokens[group.name]
        if 0 < group.token_rows < stop:
            self._crowded = group.name
            return None
        return slice(stop - count, stop)

    def _add_input(self, name: str, x: torch.Tensor, rows: torch.Tensor | None, place: slice | None) -> None:
        panels = self._of_inputs[name]
        if panels:
            flat = x.reshape(-1, x.shape[-1])  # [tokens, d_in]
            flat = flat if rows is None else flat[rows]
            for panel in panels:
                if panel.statistic == "input_rows":
                    self._keep_rows(panel, flat, place)
                else:
                    add_input_moment_(self.totals[panel], flat, panel.start)

    def _add_output(
        self,
        gradients: list[Panel],
        outputs: list[Panel],
        x: torch.Tensor,
        g: torch.Tensor,
        rows: torch.Tensor | None,
        place: slice | None,
        skipped_are_zero: bool,
    ) -> None:
        flat_x = x.reshape(-1, x.shape[-1])  # [tokens, d_in]
        flat_g = g.detach().reshape(-1, g.shape[-1])  # [tokens, d_out]
        for panel in gradients:
            add_gradient_(self.totals[panel], flat_x, flat_g[:, panel.start : panel.stop])
        for panel in outputs:
            if panel.statistic == "output_moment":
                add_output_moment_(self.totals[panel], flat_g if skipped_are_zero or rows is None else flat_g[rows])
            else:
                self._keep_rows(panel, flat_g if rows is None else flat_g[rows], place)

    def _keep_rows(self, panel: Panel, rows: torch.Tensor, place: slice | None) -> None:
        """Copies what a panel holds of the rows at a place among its group's."""
        if place is None:
            return
        start, stop = max(place.start, panel.start), min(place.stop, panel.stop)
        if start < stop:
            self.totals[panel][start - panel.start : stop - panel.start] = rows[
                start - place.start : stop - place.start
            ]
