"""Times the solver: streamda's against the dense float32 path of tools/baseline.py, and the Cholesky against GEMM.

    python -m tools.bench_solver [--sizes 4096x4096 11008x4096] [--cholesky 4096 8192] [--oracle auto|always|never]
                                 [--repeats 1] [--threads N] [--json FILE]

Sizes are d_in x d_out. The statistics are synthetic and seeded: input moments of twice d_in tokens whose covariance has
eigenvalues 1/i, gradients of rank 64 with a power-law spectrum plus noise that lies as the inputs do, log-normal output
moments around the damping.

Both paths solve the same layer from the same float32 statistics; streamda's time is split into the Cholesky, which the
layers of an input group share, and the eigenvectors. Errors are relative Frobenius norms of B A against the float64
oracle of the tests, which inverts and diagonalizes everything: minutes at 4096, hours beyond, so `auto` is up to 4096.
Without the oracle only the distance of the two from each other is shown; it does not say which one is wrong.

Rates count n^3 / 3 operations for a Cholesky and 2 n^3 for the product of two float64 matrices of the same size.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamda import cholesky
from streamda.config import SolveConfig
from streamda.methods import LayerSolution, prepare_input_factor, solve_layer
from streamda.panels import PANEL_ROWS
from streamda.report import table
from tests.oracles import dense_lora_da
from tools.baseline import solve_dense

RANK, POPULATION, SEED = 8, 7473, 0
ORACLE_SIZE = 4096
GRADIENT_RANK, REFLECTIONS = 64, 8


@dataclass
class SyntheticLayer:
    """Statistics of one layer, float32."""

    gradient: torch.Tensor
    """[d_out, d_in]"""
    input_moment: torch.Tensor
    """[d_in, d_in], both triangles."""
    output_moment: torch.Tensor
    """[d_out]"""


def make_layer(d_in: int, d_out: int, seed: int = SEED) -> SyntheticLayer:
    """Statistics with the spectra that the module's docstring names."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d_in + 1).float().rsqrt()
    # Householder reflections turn the coordinate axes away from the eigenvectors without an orthogonal matrix
    mirrors = torch.nn.functional.normalize(torch.randn(REFLECTIONS, d_in, generator=generator), dim=1)

    def rows(count: int) -> torch.Tensor:
        """Rows [count, d_in] distributed as the inputs."""
        block = torch.randn(count, d_in, generator=generator).mul_(scales)
        for mirror in mirrors:
            block.addr_(block @ mirror, mirror, alpha=-2)
        return block

    moment = torch.zeros(d_in, d_in)
    directions = rows(GRADIENT_RANK)
    for _ in range(2 * d_in // 256):
        tokens = rows(256)
        moment.addmm_(tokens.T, tokens)
    moment /= max(256 * (2 * d_in // 256), 1)
    decay = torch.arange(1, GRADIENT_RANK + 1).float() ** -0.7
    gradient = (torch.randn(d_out, GRADIENT_RANK, generator=generator) * decay) @ directions
    gradient = 1e-4 * gradient.add_(rows(d_out), alpha=0.05)
    output_moment = 1e-6 * torch.randn(d_out, generator=generator).exp()
    return SyntheticLayer(gradient, (moment + moment.T) / 2, output_moment)


def bounds(size: int) -> list[tuple[int, int]]:
    """First and last row of every band."""
    return [(start, min(start + PANEL_ROWS, size)) for start in range(0, size, PANEL_ROWS)]


class BandsOf:
    """A matrix in memory as streamda reads a stored moment: bands [rows, stop] of its lower triangle."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix
        self._bounds = bounds(matrix.shape[0])

    def __len__(self) -> int:
        return len(self._bounds)

    def diagonal(self) -> torch.Tensor:
        """[n] float64."""
        return self._matrix.diagonal().double()

    def band(self, index: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Band `index`, a copy."""
        start, stop = self._bounds[index]
        return torch.empty(stop - start, stop, dtype=dtype).copy_(self._matrix[start:stop, :stop])


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Least seconds of a few runs, and what the last one gave."""
    best, result = float("inf"), None
    for _ in range(repeats):
        del result  # not two of them at a time
        started = time.monotonic()
        result = work()
        best = min(best, time.monotonic() - started)
    return best, result


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def time_streamda(layer: SyntheticLayer, repeats: int) -> tuple[float, float, LayerSolution]:
    """Seconds of the Cholesky and of the rest, and the solution."""
    config, moment = SolveConfig(rank=RANK), BandsOf(layer.input_moment)
    factor_seconds, factor = timed(lambda: prepare_input_factor(moment, config.damping, ("layer",)), repeats)

    def solve() -> LayerSolution:
        gradient = [layer.gradient[start:stop].double() for start, stop in bounds(layer.gradient.shape[0])]
        return solve_layer(
            "layer", factor, gradient, layer.output_moment, config, population_size=POPULATION, seed=SEED
        )

    return factor_seconds, *timed(solve, repeats)


def bench_layer(d_in: int, d_out: int, *, oracle: bool, repeats: int) -> dict[str, Any]:
    """Times both paths on one layer, and measures how far their products are off."""
    layer = make_layer(d_in, d_out)
    factor_seconds, layer_seconds, solution = time_streamda(layer, repeats)
    dense_seconds, dense = timed(
        # a copy, because the damping is added in place; it is a thousandth of the time
        lambda: solve_dense(
            layer.gradient, layer.input_moment.clone(), layer.output_moment, rank=RANK, population_size=POPULATION
        ),
        repeats,
    )
    ours, theirs = solution.lora_b.double() @ solution.lora_a.double(), dense[1].double() @ dense[0].double()
    facts = {
        "d_in": d_in,
        "d_out": d_out,
        "factor_seconds": factor_seconds,
        "layer_seconds": layer_seconds,
        "streamda_seconds": factor_seconds + layer_seconds,
        "dense_seconds": dense_seconds,
        "ratio": dense_seconds / (factor_seconds + layer_seconds),
        "status": solution.status.value,
        "steps": solution.stats.steps,
        "distance": relative_error(theirs, ours),
    }
    if oracle:
        exact = dense_lora_da(
            layer.gradient, layer.input_moment, layer.output_moment, rank=RANK, population_size=POPULATION
        ).product
        facts |= {"streamda_error": relative_error(ours, exact), "dense_error": relative_error(theirs, exact)}
    return facts


def bench_cholesky(size: int, repeats: int) -> dict[str, Any]:
    """Rates in GFLOP/s of streamda's and LAPACK's float64 Cholesky and of a float64 product, all of one size."""
    matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    matrix = matrix + matrix.T
    matrix.diagonal().add_(2 * size)  # dominant, so positive definite
    parts = BandsOf(matrix)
    gemm, _ = timed(lambda: matrix @ matrix, repeats)
    bands: dict[int, torch.Tensor] = {}
    ours, _ = timed(lambda: cholesky.factorize(parts.band, len(parts), bands), repeats)
    bands.clear()
    lapack, _ = timed(lambda: torch.linalg.cholesky(matrix), repeats)
    rates = {"gemm": 2e-9 * size**3 / gemm, "streamda": size**3 / 3e9 / ours, "lapack": size**3 / 3e9 / lapack}
    return {"size": size, "gflops": rates, "seconds": {"gemm": gemm, "streamda": ours, "lapack": lapack}}


def describe(layers: Sequence[dict[str, Any]], factorizations: Sequence[dict[str, Any]]) -> str:
    """Two tables."""

    def error(facts: dict[str, Any], key: str) -> str:
        return f"{facts[key]:.1e}" if key in facts else ""

    solver = [
        [
            f"{each['d_in']}x{each['d_out']}",
            f"{each['factor_seconds']:.2f} + {each['layer_seconds']:.2f}",
            f"{each['dense_seconds']:.2f}",
            f"{each['ratio']:.2f}",
            error(each, "streamda_error"),
            error(each, "dense_error"),
            error(each, "distance"),
            f"{each['status']}, {each['steps']} steps",
        ]
        for each in layers
    ]
    header = ["d_in x d_out", "streamda, s", "dense, s", "ratio", "error", "dense error", "apart", "status"]
    rates = [
        [
            str(each["size"]),
            *(f"{each['gflops'][name]:.1f}" for name in ("gemm", "streamda", "lapack")),
            *(f"{each['gflops'][name] / each['gflops']['gemm']:.2f}" for name in ("streamda", "lapack")),
        ]
        for each in factorizations
    ]
    names = ["n", "GEMM, GFLOP/s", "streamda", "LAPACK", "streamda / GEMM", "LAPACK / GEMM"]
    parts = [table(header, solver)] * bool(solver) + [table(names, rates)] * bool(rates)
    return "\n\n".join("\n".join(lines) for lines in parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["4096x4096", "11008x4096"], metavar="D_INxD_OUT")
    parser.add_argument("--cholesky", nargs="*", type=int, default=[4096, 8192], metavar="N")
    parser.add_argument("--oracle", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    warm = torch.rand(512, 512, dtype=torch.float64)
    torch.linalg.cholesky(warm @ warm.T + 512 * torch.eye(512, dtype=torch.float64))  # starts threads, loads LAPACK
    factorizations = [bench_cholesky(size, options.repeats) for size in options.cholesky]
    layers = []
    for size in options.sizes:
        d_in, d_out = map(int, size.split("x"))
        oracle = options.oracle == "always" or (options.oracle == "auto" and d_in <= ORACLE_SIZE)
        layers.append(bench_layer(d_in, d_out, oracle=oracle, repeats=options.repeats))
    print(describe(layers, factorizations))
    if options.json:
        facts = {"threads": torch.get_num_threads(), "layers": layers, "cholesky": factorizations}
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
