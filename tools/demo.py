"""From a checkpoint to the first training steps, on a real model: what `make demo` runs.

    python tools/demo.py MODEL_DIR [OUTPUT_DIR]

1. `streamda init` with the calibration set that ships with streamda, under a 512 MB budget.
2. `streamda solve` from the same statistics with the other split of the scale (`--a-norm 1`); the model is not read.
3. PEFT loads the adapters on the unmodified base model: loss on the calibration samples, base and base + adapter.
4. A few Adam steps from standard LoRA and from both starts: same samples, same order, same learning rate.

Step 4 is an illustration with one seed and few steps, not a benchmark. Times are of this machine.
"""

import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamda.calibration import Sample, load_calibration
from streamda.config import DataConfig

NUM_SAMPLES, MAX_LENGTH = 40, 160
EVALUATED, STEPS, BATCH, LEARNING_RATE = 16, 6, 4, 2e-4


def run(*arguments: str) -> None:
    """Runs a command as a user would, and shows it."""
    print(f"\n$ {' '.join(arguments)}", flush=True)
    subprocess.run([str(Path(sys.executable).with_name(arguments[0])), *arguments[1:]], check=True)


def load_base(folder: Path) -> torch.nn.Module:
    """The unmodified base model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sample_loss(model: torch.nn.Module, sample: Sample) -> torch.Tensor:
    """Mean cross-entropy over a sample's label tokens."""
    return model(input_ids=sample.input_ids[None], labels=sample.labels[None]).loss


@torch.no_grad()
def mean_loss(model: torch.nn.Module, samples: Sequence[Sample]) -> float:
    """Mean over samples of their losses."""
    model.eval()
    return sum(float(sample_loss(model, sample)) for sample in samples) / len(samples)


def train(model: torch.nn.Module, samples: Sequence[Sample], steps: int) -> None:
    """Adam steps on the adapter, `BATCH` samples each, in the order given."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for step in range(steps):
        for offset in range(BATCH):
            sample = samples[(step * BATCH + offset) % len(samples)]
            (sample_loss(model, sample) / BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(model_dir: Path, output: Path) -> None:
    """Runs the four parts and prints two tables."""
    started = time.monotonic()
    published, unit_rows = output / "adapter", output / "adapter-a-norm-1"
    run(
        *("streamda", "init", "--model", str(model_dir), "--max-gpu-mem", "512MB", "--output-dir", str(published)),
        *("--num-samples", str(NUM_SAMPLES), "--max-length", str(MAX_LENGTH), "--keep-statistics", "--overwrite"),
    )
    run(
        *("streamda", "solve", "--statistics", f"{published}.work", "--output-dir", str(unit_rows), "--a-norm", "1"),
        "--overwrite",
    )

    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT calls a name that transformers is renaming
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    data = DataConfig(num_samples=NUM_SAMPLES, max_length=MAX_LENGTH)
    base = load_base(model_dir)
    samples = load_calibration(data, tokenizer, vocab_size=base.config.vocab_size, max_positions=None).samples
    evaluated = samples[:EVALUATED]
    print(f"\nloss on {EVALUATED} of the {len(samples)} calibration samples")
    print(f"  base model                   {mean_loss(base, evaluated):.4f}")

    standard = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = []
    for name, folder in (("standard LoRA", None), ("LoRA-DA", published), ("LoRA-DA, --a-norm 1", unit_rows)):
        torch.manual_seed(0)
        base = load_base(model_dir)
        if folder is None:
            model = get_peft_model(base, standard)
        else:
            model = PeftModel.from_pretrained(base, folder, is_trainable=True)
        before = mean_loss(model, evaluated)
        if folder is not None:
            print(f"  base + {name:<21} {before:.4f}")
        train(model, samples, STEPS)
        rows.append((name, before, mean_loss(model, evaluated)))
    print(f"\nloss before and after {STEPS} Adam steps of {BATCH} samples at learning rate {LEARNING_RATE}")
    for name, before, after in rows:
        print(f"  {name:<24} {before:.4f} -> {after:.4f}")
    print(f"\nadapters in {output}; {time.monotonic() - started:.0f} seconds in all")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "demo-output"))
