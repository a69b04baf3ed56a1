"""The model card of an adapter: what it is, what it is not, and how to train from it.

Text only. Whoever finds the folder later has this file and nothing else, so it says what is known about training
from such a start and, as plainly, what is not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from streamda.config import SolveConfig
from streamda.files import shown

CARD_MARK = "\n- streamda\n"
"""The tag in the header by which a card is known to be ours."""
PAPER = "2510.24561"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NUM_LARGEST = 5


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What the configuration and the card of an adapter say, beside the modules themselves."""

    base_model: str
    """Hub id or path of the unchanged base model."""
    revision: str | None
    """Revision of the base model on the hub."""
    dataset: str
    """Calibration data as the user named it."""
    num_samples: int
    """Samples that entered the statistics."""
    is_shipped_data: bool
    """True where the calibration set is the one that ships with streamda."""
    solve: SolveConfig
    version: str
    """Of streamda."""
    step_zero_change: Mapping[str, float]
    """Module name -> Frobenius norm of s B A over that of the base weight."""

    @property
    def scaling(self) -> float:
        """The factor s in s B A."""
        return self.solve.lora_alpha / (math.sqrt(self.solve.rank) if self.solve.rslora else self.solve.rank)


def model_card(facts: AdapterFacts) -> str:
    """The text of ``README.md``: Markdown under the YAML header that the hub reads."""
    return "\n\n".join(
        [_header(facts), _what_it_is(facts), _step_zero(facts), _how_to_train(facts), _scale(facts), _settings(facts)]
    )


def _header(facts: AdapterFacts) -> str:
    # The hub refuses a card whose base_model is no repository id, so a local path stays out of the header.
    is_hub_id = _HUB_ID.fullmatch(facts.base_model) and not Path(facts.base_model).exists()
    lines = [
        *([f"base_model: {json.dumps(facts.base_model)}"] if is_hub_id else []),
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in ("lora", "peft", "lora-initialization", "streamda", f"arxiv:{PAPER}")),
    ]
    return "\n".join(["---", *lines, "---"])


def _what_it_is(facts: AdapterFacts) -> str:
    revision = f" (revision {_cell(facts.revision)})" if facts.revision else ""
    text = f"""# LoRA starting point for {_cell(facts.base_model)}

**This is a starting point for training, not a trained adapter.** It holds the `lora_A` and `lora_B` from which to
train {_cell(facts.base_model)}{revision}. They were computed by streamda {_cell(facts.version)}
with LoRA-DA ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})) from the gradients and Fisher
statistics of {facts.num_samples} samples of {_cell(facts.dataset)}.

The base weights are not changed: use it with the unmodified base model, quantized or not."""
    if facts.is_shipped_data:
        text += """

**The samples are the small general set that ships with streamda.** A task's own data is the point of the method:
for a real use run it again with `--dataset` and a few hundred samples of the task."""
    return text


def _step_zero(facts: AdapterFacts) -> str:
    text = """## The model's output changes at step 0

In standard LoRA B is zero, so training starts from the base model itself. Here B is not zero: with the adapter
loaded, and before any step, the model's output already differs from the base model's."""
    changes = facts.step_zero_change
    if not changes:
        return text
    low, middle, high = min(changes.values()), statistics.median(changes.values()), max(changes.values())
    largest = sorted(changes.items(), key=lambda item: (-item[1], item[0]))[:_NUM_LARGEST]
    rows = [
        ("minimum", low),
        ("median", middle),
        ("maximum", high),
        *((f"`{_cell(name)}`", value) for name, value in largest),
    ]
    table = "\n".join(f"| {name} | {value:.3g} |" for name, value in rows)
    return f"""{text} By how much, over {len(changes)} modules,
as the Frobenius norm of the added matrix s B A (s = {facts.scaling:.4g}) over that of the weight; below the line of
the maximum, the modules with the largest values:

| | norm of s B A / norm of W |
|---|---|
{table}"""


def _how_to_train(facts: AdapterFacts) -> str:
    revision = f", revision={json.dumps(facts.revision)}" if facts.revision else ""
    return f"""## How to train from it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({json.dumps(facts.base_model)}{revision}, dtype="auto")
model = PeftModel.from_pretrained(base, "path/to/this/folder", is_trainable=True)
```

Without `is_trainable=True` PEFT freezes the adapter. The rank, alpha and target modules are those of
`adapter_config.json`; another rank needs another start.

- transformers: `Trainer(model=model, ...)`.
- TRL: `SFTTrainer(model=model, ...)` with this PeftModel and **no** `peft_config`: a `peft_config` asks for a new
  adapter with the standard start.

PEFT does not fail when the names in an adapter and in a model do not match, it warns and keeps the standard start. To
see that this start was loaded, look that no `lora_B` of the model is all zero (a layer whose gradient was exactly
zero is the exception: it has the standard start)."""


def _scale(facts: AdapterFacts) -> str:
    solve = facts.solve
    if solve.balance:
        split = "Here the singular values of B A are split evenly between the two (`--balance`)"
    else:
        norm = solve.a_norm if solve.a_norm is not None else 1 / math.sqrt(solve.gamma)
        source = "`--a-norm`" if solve.a_norm is not None else "1 / sqrt(gamma), the published choice"
        split = f"Here the rows of `lora_A` have norm {norm:.4g} ({source})"
    return f"""## Learning rate, alpha and the norm of A

What is known. The method fixes the product B A; how its scale is split between A and B is free, and the optimizer
feels it. {split}; those of standard LoRA have norm 0.58. Adam moves every entry by about the learning rate per step,
so small rows of A are overwritten within a few steps, the computed subspace with them, while B learns slowly; rows of
norm 0.5 to 1 keep it. In one small run (SmolLM2-135M, GSM8K, learning rate 2e-4, one seed) rows of norm 1 were ahead
of standard LoRA and the published split was behind it. Alpha scales the change at step 0 and every later one.

What is not known. Which learning rate, alpha and norm are best for this model and task: one run with one seed is a
hint, not a result, and a learning rate that suits standard LoRA need not suit this start. Compare a few learning
rates, against standard LoRA at its own best one. `streamda solve --a-norm 1` makes another start from stored
statistics (`--keep-statistics`) without the model's weights."""


def _settings(facts: AdapterFacts) -> str:
    rows = [
        f"| `--{(entry.metadata['flag'] or entry.name).replace('_', '-')}` "
        f"| {_value(getattr(facts.solve, entry.name))} | {_cell(entry.metadata['help'])} |"
        for entry in dataclasses.fields(facts.solve)
    ]
    return (
        "\n".join(["## Settings", "", "| option of `streamda solve` | value | meaning |", "|---|---|---|", *rows])
        + "\n"
    )


def _value(value: float | bool | None) -> str:
    if value is None:
        return "default"
    return f"{value:.10g}" if not isinstance(value, bool) else "on" if value else "off"


def _cell(text: str) -> str:
    """Text that can break neither a table nor the page: names come from users and from the hub."""
    return shown(text).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
