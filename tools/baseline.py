"""LoRA-DA the plain way: the whole model in memory, every matrix formed. What streamda is measured against.

    python -m tools.baseline MODEL DATA [--num-samples 16] [--layers-per-pass 8|all] [--passes whole|short]
                                        [--max-length 1024] [--rank 8] [--output FILE.safetensors] [--json FILE]
    python -m tools.baseline .cache/smollm2-135m gsm8k_train.jsonl --num-samples 16

1. The model is loaded in float32.
2. Gradient pass: forward and backward over all samples; the gradient of every linear layer stays in memory.
3. Fisher passes, one for every group of decoder blocks: forward and backward over all samples again, collecting the
   input moment x x^T and the output moment g * g of the group's layers. They are `whole`, as is the gradient pass: the
   model stays as it was loaded, so that each goes back through all blocks and makes the gradient of every parameter,
   which is dropped where it is not wanted. `short` ones take none below the group, nor for any weight, and the gradient
   pass takes those of the linear layers alone.
4. After each pass the group's layers are solved one by one, dense and in float32: the inverse of the damped input
   moment, the displacement and the guidance matrix are formed, and torch.lobpcg makes ten iterations on the latter.

Samples are computed one at a time, so there is no padding. More blocks per pass mean fewer passes and more memory.
Prints seconds by phase and the peak of anonymous memory above what it was after the imports. CPU only.
"""

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from streamda.blocks import max_positions
from streamda.calibration import Sample, load_calibration
from streamda.config import DataConfig
from streamda.memory import PeakMeter, format_size
from streamda.setup import load_tokenizer

RANK, BETA, GAMMA, DAMPING = 8, 0.03, 1024.0, 1e-6
"""The published defaults."""
LOBPCG_ITERATIONS = 10
BLOCK = re.compile(r".*?\.\d+(?=\.)")
"""The decoder block in the name of a layer inside one."""


@dataclass
class Moments:
    """Sums over tokens for one linear layer, float32."""

    input_moment: torch.Tensor
    """[d_in, d_in] of x x^T."""
    output_moment: torch.Tensor
    """[d_out] of g * g."""
    num_tokens: int = 0

    def divided(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Means over tokens, in place of the sums."""
        return self.input_moment.div_(self.num_tokens), self.output_moment.div_(self.num_tokens)


@dataclass
class Phases:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Adds the time of its block to a phase."""
        started = time.monotonic()
        yield
        self.seconds[name] += time.monotonic() - started


def sample_loss(model: nn.Module, sample: Sample) -> torch.Tensor:
    """Mean cross-entropy over a sample's label tokens."""
    return model(input_ids=sample.input_ids[None], labels=sample.labels[None], use_cache=False).loss


def find_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the decoder blocks, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and BLOCK.match(name)
    }


def gradients(model: nn.Module, samples: Sequence[Sample], linears: dict[str, nn.Linear]) -> dict[str, torch.Tensor]:
    """Mean over samples of dloss/dW [d_out, d_in] for every layer, in one pass. Their weights require it."""
    for sample in samples:
        (sample_loss(model, sample) / len(samples)).backward()
    found = {}
    for name, linear in linears.items():
        assert linear.weight.grad is not None
        found[name] = linear.weight.grad
    model.zero_grad()  # the others; these are held on to
    return found


def fisher_moments(
    model: nn.Module, samples: Sequence[Sample], linears: dict[str, nn.Linear], lowest: nn.Module | None = None
) -> dict[str, Moments]:
    """Input and output moments of a group of layers, in one pass.

    Args:
        model: without any parameter that requires a gradient where `lowest` is given.
        samples: to pass through it.
        linears: the group.
        lowest: the group's first decoder block, where the graph is to begin; None where weights that require a gradient
            begin it.
    """
    moments = {
        name: Moments(torch.zeros(linear.in_features, linear.in_features), torch.zeros(linear.out_features))
        for name, linear in linears.items()
    }

    def begin_graph(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0].detach().requires_grad_(True), *arguments[1:])

    def collect(name: str, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        layer = moments[name]
        x = arguments[0].detach().flatten(0, -2)  # [tokens, d_in]
        layer.input_moment.addmm_(x.T, x)
        layer.num_tokens += x.shape[0]

        def collect_gradient(g: torch.Tensor) -> None:
            layer.output_moment.add_(g.flatten(0, -2).square().sum(0))

        output.register_hook(collect_gradient)

    handles = [lowest.register_forward_pre_hook(begin_graph)] if lowest else []
    for name, linear in linears.items():
        handles.append(linear.register_forward_hook(lambda _, x, y, name=name: collect(name, x, y)))
    for sample in samples:
        sample_loss(model, sample).backward()
        model.zero_grad()
    for handle in handles:
        handle.remove()
    return moments


def solve_dense(
    gradient: torch.Tensor,
    input_moment: torch.Tensor,
    output_moment: torch.Tensor,
    *,
    rank: int = RANK,
    population_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, d_in] and B [d_out, rank], with the inverse, the displacement and the guidance matrix formed.

    Everything is float32. The largest singular value comes from a randomized decomposition; a full one would take
    longer than all the rest.

    Args:
        gradient: [d_out, d_in].
        input_moment: [d_in, d_in]; the damping is added in place.
        output_moment: [d_out].
        rank: of the adapter.
        population_size: rows of the whole training set.
    """
    input_moment.diagonal().add_(DAMPING)
    z_inverse = torch.linalg.inv(input_moment)
    y = output_moment + DAMPING
    displacement = -(z_inverse @ gradient.T) / y  # [d_in, d_out]
    sigma = float(torch.svd_lowrank(displacement, q=rank, niter=4)[1][0])
    displacement /= sigma
    variance = BETA * float((1 / y).sum()) / (population_size * sigma**2)
    omega = z_inverse.mul_(variance).addmm_(displacement, displacement.T, alpha=-1)  # the inverse is not needed again
    omega = (omega + omega.T) / 2
    omega /= omega.diagonal().abs().mean()  # the solver judges convergence by absolute numbers
    if 3 * rank > omega.shape[0]:  # too small for LOBPCG
        vectors = torch.linalg.eigh(omega)[1][:, :rank]
    else:
        start = torch.randn(omega.shape[0], rank, generator=torch.Generator().manual_seed(0))
        vectors = torch.lobpcg(-omega, k=rank, X=start, niter=LOBPCG_ITERATIONS, largest=True)[1]
    return (vectors.T / GAMMA**0.5).contiguous(), (displacement.T @ vectors / GAMMA**0.5).contiguous()


@dataclass
class Result:
    """Adapters and what they cost."""

    adapters: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """A [rank, d_in] and B [d_out, rank] by layer."""
    seconds: dict[str, float]
    total_seconds: float
    peak_bytes: int
    """Of anonymous memory, above what it was before the model was loaded."""


def run(
    folder: Path,
    data: DataConfig,
    layers_per_pass: int | None,
    rank: int = RANK,
    threads: int | None = None,
    *,
    short: bool = False,
) -> Result:
    """The whole procedure.

    Args:
        folder: the model.
        data: the samples.
        layers_per_pass: decoder blocks per Fisher pass; None for all of them in one.
        rank: of the adapters.
        threads: of torch; None for its default.
        short: whether no gradient is taken that is not wanted: Fisher passes end at their group.
    """
    if threads:
        torch.set_num_threads(threads)
    phases, started = Phases(), time.monotonic()
    with PeakMeter(torch.device("cpu")) as meter:
        with phases.time("load"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            calibration = load_calibration(
                data,
                load_tokenizer(folder, False),
                vocab_size=model.config.vocab_size,
                max_positions=max_positions(model.config),
            )
        samples, linears = calibration.samples, find_linears(model)
        if short:
            model.requires_grad_(False)
            for linear in linears.values():
                linear.weight.requires_grad_(True)
        with phases.time("gradient"):
            gradient = gradients(model, samples, linears)
        if short:
            model.requires_grad_(False)
        blocks = list(dict.fromkeys(found[0] for found in map(BLOCK.match, linears) if found))
        adapters = {}
        step = layers_per_pass or len(blocks)
        for first in range(0, len(blocks), step):
            prefixes = tuple(block + "." for block in blocks[first : first + step])
            group = {name: linear for name, linear in linears.items() if name.startswith(prefixes)}
            with phases.time("fisher"):
                lowest = model.get_submodule(blocks[first]) if short else None
                moments = fisher_moments(model, samples, group, lowest)
            with phases.time("solve"):
                for name in group:
                    adapters[name] = solve_dense(
                        gradient.pop(name),
                        *moments.pop(name).divided(),
                        rank=rank,
                        population_size=calibration.population_size,
                    )
        total, peak = time.monotonic() - started, meter.take_peak()
    return Result(adapters, dict(phases.seconds), total, peak)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--layers-per-pass", default="8", metavar="8|all")
    parser.add_argument("--passes", choices=("whole", "short"), default="whole")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="safetensors file for the adapters, by layer name")
    parser.add_argument("--json", type=Path, help="the figures for programs")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    data = DataConfig(dataset=options.data, num_samples=options.num_samples, max_length=options.max_length)
    layers_per_pass = None if options.layers_per_pass == "all" else int(options.layers_per_pass)
    short = options.passes == "short"
    result = run(options.model, data, layers_per_pass, options.rank, options.threads, short=short)
    for phase, seconds in result.seconds.items():
        print(f"{phase:<10} {seconds:8.1f} s")
    print(f"{'total':<10} {result.total_seconds:8.1f} s")
    print(f"{'peak':<10} {format_size(result.peak_bytes):>10} above the imports")
    if options.output:
        tensors = {}
        for name, (lora_a, lora_b) in result.adapters.items():
            tensors |= {f"{name}.lora_A.weight": lora_a, f"{name}.lora_B.weight": lora_b}
        save_file(tensors, options.output)
    if options.json:
        facts = {"seconds": result.seconds, "total_seconds": result.total_seconds, "peak_bytes": result.peak_bytes}
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
