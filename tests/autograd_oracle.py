"""The statistics of a whole model, straight from their definitions: float64, one sample at a time, nothing streamed.

For each sample the loss is the mean cross-entropy over its label tokens. `gradient` is the mean over samples of
dloss/dW, taken by autograd from the weight itself; `input_moment` and `output_moment` are means over the tokens that
the mask selects of x x^T and of g * g, where x enters a layer and g = dloss/dy at its output y.

Never imported by the package, and shares nothing with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.oracles import dense_lora_da

IGNORED = -100


@dataclass(frozen=True)
class OracleStatistics:
    """One layer, in float64 and in PyTorch's orientation."""

    gradient: Tensor
    """[d_out, d_in]."""
    input_moment: Tensor
    """[d_in, d_in]."""
    output_moment: Tensor
    """[d_out]."""
    num_tokens: int
    """0 for a layer whose forward is never called; its tensors are zero then, as an adapter on it has no effect."""


def load_model(folder: Path) -> PreTrainedModel:
    """The whole model as transformers loads it, in float64."""
    # grouped products of experts exist for float32 and less; the plain loop over experts takes any dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def oracle_statistics(
    model: PreTrainedModel, samples: Sequence[tuple[Tensor, Tensor]], names: Iterable[str], token_mask: str
) -> tuple[dict[str, OracleStatistics], float]:
    """Statistics of the named layers, and the mean loss.

    Args:
        model: from `load_model`.
        samples: per sample its token ids [tokens] and labels [tokens], not shifted.
        names: full module names.
        token_mask: ``attention`` (every token) or ``labels`` (tokens whose successor is a label).
    """
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    gradient = {name: torch.zeros_like(module.weight) for name, module in modules.items()}
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    losses = []
    for ids, labels in samples:
        predicts = torch.tensor([*(labels[1:] != IGNORED).tolist(), False])
        chosen = predicts if token_mask == "labels" else torch.ones_like(predicts)
        calls: list[tuple[str, Tensor, Tensor]] = []

        def keep(name: str, calls: list[tuple[str, Tensor, Tensor]] = calls) -> Any:
            def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                output.retain_grad()
                calls.append((name, args[0].detach().clone(), output))
                return output.clone()  # a model that changes it in place would have the gradient of what it makes kept

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
        model.zero_grad()
        with _float64_constants():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1][predicts[:-1]], labels[1:][predicts[:-1]], reduction="mean")
        loss.backward()
        losses.append(loss.item())
        for handle in handles:
            handle.remove()
        for name, x, y in calls:
            x_rows, g_rows = x.reshape(-1, x.shape[-1]), y.grad.reshape(-1, y.shape[-1])
            if len(x_rows) == len(ids):
                x_rows, g_rows = x_rows[chosen], g_rows[chosen]
            else:  # a layer that sees some of the tokens only, in an order of its own
                assert token_mask == "attention"
            inputs[name].append(x_rows)
            outputs[name].append(g_rows)
        for name, module in modules.items():
            if module.weight.grad is not None:
                gradient[name] += module.weight.grad / len(samples)
    statistics = {}
    for name, module in modules.items():
        if not inputs[name]:
            d_out, d_in = gradient[name].T.shape if isinstance(module, Conv1D) else gradient[name].shape
            zeros = torch.zeros(d_out, d_in, dtype=torch.float64)
            statistics[name] = OracleStatistics(zeros, torch.zeros(d_in, d_in), torch.zeros(d_out), 0)
            continue
        x, g = torch.cat(inputs[name]), torch.cat(outputs[name])
        statistics[name] = OracleStatistics(
            gradient=gradient[name].T if isinstance(module, Conv1D) else gradient[name],
            input_moment=x.T @ x / len(x),
            output_moment=(g * g).sum(dim=0) / len(g),
            num_tokens=len(x),
        )
    return statistics, sum(losses) / len(losses)


def oracle_products(
    folder: Path,
    samples: Sequence[tuple[Tensor, Tensor]],
    names: Iterable[str],
    token_mask: str = "attention",
    **settings: Any,
) -> dict[str, Tensor]:
    """B A of the named modules, dense and in float64; `settings` as of `dense_lora_da`."""
    statistics, _ = oracle_statistics(load_model(folder), samples, names, token_mask)
    return {
        name: dense_lora_da(layer.gradient, layer.input_moment, layer.output_moment, **settings).product
        for name, layer in statistics.items()
    }


@contextmanager
def _float64_constants() -> Iterator[None]:
    """Lets constants that a model makes on the way be float64 too (XGLM's do not fit otherwise)."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
