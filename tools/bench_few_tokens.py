"""What solving on the span of few tokens gains, in time and in truth, over the way that many tokens take.

    python -m tools.bench_few_tokens [--layers 2048x1024x64 2048x1024x256 2048x1024x1000 5120x5120x512 13824x5120x512]
                                     [--oracle-size 2048] [--skip-long-way] [--threads N] [--json FILE]

Layers are d_in x d_out x tokens: random tokens whose channels and lengths differ in size, seeded. Their statistics are
summed in float32, as a run sums and stores them; both ways solve from these. The truth is the dense float64 solution of
the same tokens' statistics summed in float64 (up to `--oracle-size` inputs), and errors are relative Frobenius norms of
B A against it. The last column is what an exact solver makes of the float32 sums: the dense float64 solution of those.

Times are of the factor, which the layers of an input group share, and of one layer; statistics are in memory.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from streamda.config import SolveConfig
from streamda.methods import LayerSolution, prepare_input_factor, solve_layer
from streamda.report import table
from tests.oracles import dense_lora_da
from tools.bench_solver import POPULATION, RANK, SEED, BandsOf, bounds, relative_error

Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Gradient [d_out, d_in], input moment [d_in, d_in], output moment [d_out]."""


def make_tokens(d_in: int, d_out: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [tokens, d_in] and output gradients [tokens, d_out], float32."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(tokens, d_in) * normal(d_in).mul(0.3).exp() * normal(tokens, 1).mul(0.5).exp()
    g = normal(tokens, d_out) * normal(d_out).mul(0.5).exp() * normal(tokens, 1).mul(0.7).exp() * 1e-4
    return x, g


def sums_of(x: torch.Tensor, g: torch.Tensor) -> Statistics:
    """Mean statistics in the precision of the tokens."""
    return g.T @ x / len(x), x.T @ x / len(x), (g * g).mean(dim=0)


def time_way(statistics: Statistics, num_tokens: int | None) -> tuple[float, float, LayerSolution]:
    """Seconds of the factor and of the layer, and the solution; tokens are None for the long way."""
    gradient, moment, output_moment = statistics
    config = SolveConfig(rank=RANK)
    started = time.monotonic()
    factor = prepare_input_factor(BandsOf(moment), config.damping, ("layer",), num_tokens=num_tokens)
    factored = time.monotonic()
    bands = [gradient[start:stop] for start, stop in bounds(gradient.shape[0])]
    solution = solve_layer("layer", factor, bands, output_moment, config, population_size=POPULATION, seed=SEED)
    return factored - started, time.monotonic() - factored, solution


def bench(d_in: int, d_out: int, tokens: int, *, oracle: bool, long_way: bool) -> dict[str, Any]:
    """One layer both ways."""
    x, g = make_tokens(d_in, d_out, tokens)
    stored = sums_of(x, g)
    facts: dict[str, Any] = {"d_in": d_in, "d_out": d_out, "tokens": tokens}
    ways: dict[str, int | None] = {"span": tokens} | ({"long": None} if long_way else {})
    products = {}
    for way, count in ways.items():
        factor, layer, solution = time_way(stored, count)
        assert solution.stats is not None
        products[way] = solution.lora_b.double() @ solution.lora_a.double()
        facts[way] = {
            "factor_seconds": factor,
            "layer_seconds": layer,
            "status": solution.status.value,
            "steps": solution.stats.steps,
        }
    if oracle:
        options = {"rank": RANK, "population_size": POPULATION}
        truth = dense_lora_da(*sums_of(x.double(), g.double()), **options).product
        for way, product in products.items():
            facts[way]["error"] = relative_error(product, truth)
        facts["dense_error"] = relative_error(dense_lora_da(*stored, **options).product, truth)
    return facts


def describe(facts: dict[str, Any]) -> list[str]:
    """A row of the table."""

    def way(name: str) -> list[str]:
        if name not in facts:
            return ["", "", ""]
        found = facts[name]
        return [
            f"{found['factor_seconds']:.2f} + {found['layer_seconds']:.2f}",
            f"{found['status']}, {found['steps']}",
            f"{found['error']:.1e}" if "error" in found else "",
        ]

    dense = f"{facts['dense_error']:.1e}" if "dense_error" in facts else ""
    return [f"{facts['d_in']}x{facts['d_out']}", str(facts["tokens"]), *way("span"), *way("long"), dense]


HEADER = ["layer", "tokens", "span s", "status, steps", "error", "long way s", "status, steps", "error", "dense error"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["2048x1024x64", "2048x1024x256", "2048x1024x1000", "5120x5120x512", "13824x5120x512"]
    parser.add_argument("--layers", nargs="+", default=default, metavar="D_INxD_OUTxTOKENS")
    parser.add_argument("--oracle-size", type=int, default=2048)
    parser.add_argument("--skip-long-way", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    found = []
    for layer in chosen.layers:
        d_in, d_out, tokens = map(int, layer.split("x"))
        oracle = d_in <= chosen.oracle_size
        found.append(bench(d_in, d_out, tokens, oracle=oracle, long_way=not chosen.skip_long_way))
        print("  ".join(describe(found[-1])), flush=True)
    print("\n".join(table(HEADER, [describe(each) for each in found])))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
