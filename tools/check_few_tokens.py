"""Holds adapters of few tokens against a whole model in float64: from the tokens' rows, and from the sums of products.

    python tools/make_smollm2.py .cache/smollm2-135m
    python -m tools.check_few_tokens .cache/smollm2-135m gsm8k_train.jsonl [--num-samples 2] [--max-length 1024]
                                      [--modules down_proj] [--ways rows sums]

Runs `streamda init` twice, with `--keep-statistics`, which makes sums, and without. The truth is the same model loaded
whole in float64: inputs and output gradients of every adapted layer, and a dense solution along the singular vectors of
these inputs, none of which is left out. (A dense inverse of the damped moment would lose more digits than are asked
for.) Prints relative Frobenius errors of B A and the statuses of the layers. Memory: the model in float64, and 8 bytes
for each input and output of each layer and token. `--modules` adapts those layers only whose names hold it.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import streamda
from streamda.config import RunConfig, SolveConfig
from streamda.report import table
from streamda.setup import prepare
from tests.autograd_oracle import load_model
from tests.golden_options import products, read_adapter

WAYS = {"rows": {}, "sums": {"keep_statistics": True}}
Rows = dict[str, tuple[Tensor, Tensor]]


def whole_rows(model: PreTrainedModel, samples: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]) -> Rows:
    """Inputs [tokens, d_in] and output gradients [tokens, d_out] of layers, in the model's dtype, sample after sample.

    Args:
        model: whole, in memory.
        samples: token ids and labels, not shifted.
        names: of the layers.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:

        def note(_module: object, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            inputs[name].append(args[0].detach()[0])
            output.register_hook(lambda g: outputs[name].append(g[0]))  # type: ignore[no-untyped-call]

        model.get_submodule(name).register_forward_hook(note)
    model.requires_grad_(False)
    embed = model.get_input_embeddings()
    for ids, labels in samples:
        embedded = embed(ids[None]).requires_grad_()
        logits = model(inputs_embeds=embedded).logits[0, :-1]
        chosen = labels[1:] != -100
        cross_entropy(logits[chosen], labels[1:][chosen]).backward()  # type: ignore[no-untyped-call]
    return {name: (torch.cat(inputs[name]), torch.cat(outputs[name])) for name in names}


def dense_product(x: Tensor, g: Tensor, num_samples: int, population_size: int, config: SolveConfig) -> Tensor:
    """``B A`` [d_out, d_in] of equations 19 and 21 of arXiv 2510.24561, normalized, from rows x and g."""
    left, singular, right = torch.linalg.svd(x, full_matrices=False)
    kept = singular > 1e-13 * singular[0]  # of float64, what is not rounding of float64
    left, singular, right = left[:, kept], singular[kept], right[kept]
    damped = singular.square() / len(x) + config.damping
    y = g.square().mean(dim=0) + config.damping
    displacement = g.T @ (left * singular) / num_samples / y[:, None] / damped
    variance = config.variance_weight * float((1 / y).sum()) / population_size
    omega = torch.diag(variance / damped) - config.bias_weight * displacement.T @ displacement
    vectors = torch.linalg.eigh(omega)[1][:, : config.rank]
    product: Tensor = -(displacement @ vectors) @ (vectors.T @ right)
    return product / torch.linalg.matrix_norm(displacement, 2) / config.gamma


def compare(
    model: Path, data: str, num_samples: int, max_length: int, rank: int, modules: str, ways: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Errors by way and layer whose name holds `modules`; prints their statuses."""
    options = {
        "model": str(model),
        "dataset": data,
        "num_samples": num_samples,
        "max_length": max_length,
        "rank": rank,
        "device": "cpu",
        "dtype": "float32",
        "max_gpu_mem": "1GB",
    }
    prepared = prepare(RunConfig.from_options(options), weights=False)
    names = [linear.name for linear in prepared.targets.linears if modules in linear.name]
    if modules:
        options["target_modules"] = "|".join(map(re.escape, names))
    samples = [
        (torch.as_tensor(sample.input_ids), torch.as_tensor(sample.labels)) for sample in prepared.calibration.samples
    ]
    rows = whole_rows(load_model(model), samples, names)
    config = SolveConfig(rank=rank)
    truth = {name: dense_product(*rows.pop(name), len(samples), prepared.population_size, config) for name in names}
    errors: dict[str, dict[str, float]] = {}
    for way in ways:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "adapter"
            report = streamda.initialize(**options, **WAYS[way], output_dir=str(output))
            found = products(read_adapter(output))
        statuses = dict(Counter(facts["status"] for facts in report.modules.values()))
        print(f"{way}: {statuses}, {sum(report.seconds.values()):.1f} s")
        errors[way] = {name: float((found[name] - truth[name]).norm() / truth[name].norm()) for name in names}
    print(f"{sum(prepared.lengths)} tokens, {len(names)} layers")
    return errors


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--num-samples", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--modules", default="", help="a part of the names of the layers that are adapted")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args(arguments)
    errors = compare(
        options.model,
        options.data,
        options.num_samples,
        options.max_length,
        options.rank,
        options.modules,
        options.ways,
    )
    lines = []
    for way, each in errors.items():
        ordered = sorted(each.values())
        above = sum(error > 1e-2 for error in ordered)
        lines.append([way, f"{ordered[len(ordered) // 2]:.1e}", f"{ordered[-1]:.1e}", str(above)])
    print("\n".join(table(["", "median error", "worst error", "layers above 1e-2"], lines)))
    return errors


if __name__ == "__main__":
    main()
