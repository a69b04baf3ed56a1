"""The real thing: SmolLM2-135M, samples of the shipped set, against dense float64 and against itself.

Sixteen samples have about as many tokens as the widest layer has inputs: the hardest conditioning that the defaults
are meant for.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import streamda
from tests.oracles import dense_lora_da
from tools import check_few_tokens

pytestmark = pytest.mark.slow
OPTIONS = {"num_samples": 16, "max_length": 160, "max_gpu_mem": "512MB"}
CHECKED_BLOCKS = (0, 15, 29)


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[streamda.InitReport, Path]:
    folder = tmp_path_factory.mktemp("smollm2")
    report = streamda.initialize(
        model=str(smollm2), output_dir=str(folder / "adapter"), keep_statistics=True, **OPTIONS
    )
    return report, folder


@pytest.fixture(scope="module")
def another(run: tuple[streamda.InitReport, Path], smollm2: Path) -> Path:
    """Of some blocks, for the suite's time, one sample at a time, and with boundary states on disk."""
    folder = run[1] / "other"
    blocks = "|".join(map(str, CHECKED_BLOCKS))
    streamda.initialize(
        model=str(smollm2),
        output_dir=str(folder),
        keep_statistics=True,
        micro_batch_tokens="1",
        max_host_mem="60MB",
        target_modules=rf"model\.layers\.({blocks})\..*",
        **OPTIONS | {"max_gpu_mem": "400MB"},
    )
    return folder


def products(folder: Path) -> dict[str, torch.Tensor]:
    """B A [d_out, d_in] of every module of an adapter, float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"].double()
        @ tensors[f"{name}.lora_A.weight"].double()
        for name in names
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_every_layer_is_solved_and_weights_are_read_twice(run: tuple[streamda.InitReport, Path]) -> None:
    report, _ = run
    assert len(report.modules) == 210
    assert {facts["status"] for facts in report.modules.values()} == {"ok"}
    assert report.bytes["weights_read"] <= 2.02 * report.bytes["checkpoint"]
    assert max(report.peaks.values()) <= 512_000_000


def test_products_equal_the_dense_float64_solution(run: tuple[streamda.InitReport, Path]) -> None:
    report, folder = run
    solved = products(folder / "adapter")
    with streamda.open_statistics(folder / "adapter.work") as statistics:
        chosen = [name for name in statistics if int(name.split(".")[2]) in CHECKED_BLOCKS]
        assert len(chosen) == 7 * len(CHECKED_BLOCKS)
        for name in chosen:
            layer = statistics[name]
            dense = dense_lora_da(
                layer.gradient,
                layer.input_moment,
                layer.output_moment,
                rank=8,
                population_size=report.data["population_size"],
            )
            assert relative_error(solved[name], dense.product) < 1e-3, name


def test_batching_and_the_place_of_boundary_states_do_not_matter(
    run: tuple[streamda.InitReport, Path], another: Path
) -> None:
    _, folder = run
    first, second = products(folder / "adapter"), products(another)
    assert len(second) == 7 * len(CHECKED_BLOCKS)
    errors = {name: relative_error(second[name], first[name]) for name in second}
    # sums of inputs in float32 would put one of these layers percents apart
    assert max(errors.values()) < 1e-3, sorted(errors.items(), key=lambda item: -item[1])[:6]
    with (
        streamda.open_statistics(folder / "adapter.work") as ours,
        streamda.open_statistics(folder / "other.work") as theirs,
    ):
        for name in theirs:
            left, right = ours[name], theirs[name]
            assert left.num_tokens == right.num_tokens
            assert relative_error(right.gradient, left.gradient) < 1e-4, name
            assert relative_error(right.input_moment, left.input_moment) < 1e-4, name
            assert relative_error(right.output_moment, left.output_moment) < 1e-4, name


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls a name that transformers is renaming
def test_logits_are_those_of_the_weights_changed_by_hand(run: tuple[streamda.InitReport, Path], smollm2: Path) -> None:
    _, folder = run
    ids = AutoTokenizer.from_pretrained(smollm2)("Rivers carry sand to the sea.", return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    unchanged = base(ids).logits
    scaling = 16 / 8**0.5
    with torch.no_grad():
        for name, product in products(folder / "adapter").items():
            base.get_submodule(name).weight += (scaling * product).float()
    expected = base(ids).logits
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), folder / "adapter", is_trainable=True
    ).eval()
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unchanged, expected, atol=1e-3)


def test_solve_serves_other_ranks_without_the_model(another: Path) -> None:
    folder = another.with_name("rank-2")
    report = streamda.solve(statistics=f"{another}.work", output_dir=str(folder), rank=2)
    smaller, larger = products(folder), products(another)
    assert smaller.keys() == larger.keys()
    assert {facts["status"] for facts in report.modules.values()} == {"ok"}
    for name, product in smaller.items():
        # the two best directions of eight: projecting the larger product onto them gives the smaller one
        _, _, rows = torch.linalg.svd(product, full_matrices=False)
        directions = rows[:2]
        assert relative_error(larger[name] @ directions.T @ directions, product) < 1e-3, name


def test_few_tokens_give_what_a_whole_model_in_float64_gives(smollm2: Path, tmp_path: Path) -> None:
    """Every layer, from the rows of tokens."""
    data = tmp_path / "two.jsonl"
    texts = [
        {
            "question": "Lena has 12 pens and gives 5 to Tom. How many are left?",
            "answer": "12 - 5 = 7. She has 7 pens.",
        },
        {"question": "A train of 8 cars has 40 seats in each. How many seats?", "answer": "8 * 40 = 320 seats."},
    ]
    data.write_text("".join(json.dumps(text) + "\n" for text in texts))
    errors = check_few_tokens.main([str(smollm2), str(data), "--num-samples", "2", "--ways", "rows"])
    assert len(errors["rows"]) == 210
    assert max(errors["rows"].values()) < 2e-3


def test_as_many_tokens_as_inputs_give_what_a_whole_model_in_float64_gives(smollm2: Path, tmp_path: Path) -> None:
    """Between 1025 and one and a half for each of the 1536 inputs of a down projection, along a basis of their rows."""
    things = ("pens", "apples", "tickets", "stamps", "chairs", "shells", "coins", "books", "cards", "eggs")
    names = ("Lena", "Omar", "Ines", "Paul", "Mira", "Juan", "Aiko", "Nils", "Zoe", "Carl")
    lines = []
    for number in range(20):
        thing, name, other = things[number % 10], names[number * 3 % 10], names[(number * 7 + 1) % 10]
        many, few = 40 + 17 * number % 90, 3 + number % 8
        question = f"{name} has {many} {thing} and gives {few} of them to {other} every day for {few - 1} days. "
        question += f"Then {other} finds {many // 3} more under the old table. How many {thing} does each of them have?"
        answer = (
            f"{name} gives away {few} * {few - 1} = {few * (few - 1)} {thing}, and keeps {many - few * (few - 1)}. "
        )
        answer += f"{other} has {few * (few - 1)} + {many // 3} = {few * (few - 1) + many // 3}."
        lines.append(json.dumps({"question": question, "answer": answer}) + "\n")
    data = tmp_path / "twenty.jsonl"
    data.write_text("".join(lines))
    chosen = ["--modules", "1.mlp.down_proj", "--ways", "rows"]
    errors = check_few_tokens.main([str(smollm2), str(data), "--num-samples", "20", *chosen])
    assert len(errors["rows"]) == 3
    assert max(errors["rows"].values()) < 2e-3
