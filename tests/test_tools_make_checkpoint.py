"""The synthetic checkpoints that scale is measured on: they load, repeat, and have the shapes they claim."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models import make_config
from tools import make_checkpoint
from tools.make_checkpoint import CONFIGS, build_config, list_tensors


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    make_config("llama").save_pretrained(folder)
    return folder / "config.json"


def make(source: object, output: Path, *options: str) -> Path:
    make_checkpoint.main([str(source), str(output), "--shard-size", "10kB", *options])
    return output


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_transformers_loads_every_tensor(config_file: Path, tmp_path: Path) -> None:
    folder = make(config_file, tmp_path / "model")
    model, facts = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not facts["missing_keys"]
    assert not facts["unexpected_keys"]
    written = contents(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert set(written) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, written[name]), name
        assert tensor.dtype == torch.bfloat16
    loss = model(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss
    assert bool(torch.isfinite(loss))


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gpt2", "qwen3_moe"])
def test_other_families_load_too(family: str, tmp_path: Path) -> None:
    make_config(family).save_pretrained(tmp_path / "source")
    folder = make(tmp_path / "source", tmp_path / "model")
    _, facts = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not facts["missing_keys"]
    assert not facts["unexpected_keys"]


def test_the_same_seed_gives_the_same_bytes(config_file: Path, tmp_path: Path) -> None:
    folders = [make(config_file, tmp_path / name, "--seed", seed) for name, seed in zip("abc", "001", strict=True)]
    first, second, other = (
        {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".safetensors"}
        for folder in folders
    )
    assert first == second
    assert all(first[name] != other[name] for name in first)


def test_fewer_layers_are_the_first_ones(config_file: Path, tmp_path: Path) -> None:
    whole = contents(make(config_file, tmp_path / "whole"))
    first = contents(make(config_file, tmp_path / "first", "--layers", "1"))
    assert set(first) == {name for name in whole if ".layers.1." not in name}
    assert set(first) < set(whole)
    for name, tensor in first.items():
        assert torch.equal(tensor, whole[name]), name
    assert json.loads((tmp_path / "first" / "config.json").read_text())["num_hidden_layers"] == 1


def test_chunks_are_joined_without_a_seam(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "CHUNK_ELEMENTS", 100)
    weights = contents(make(config_file, tmp_path / "model"))
    matrix = weights["model.layers.0.mlp.up_proj.weight"].float()
    assert matrix.std() * matrix.shape[1] ** 0.5 == pytest.approx(1, rel=0.1)
    assert int(torch.linalg.matrix_rank(matrix)) == min(matrix.shape)
    assert weights["model.norm.weight"].float().mean() == pytest.approx(1, abs=0.05)


def test_the_same_call_again_keeps_what_is_there_and_another_one_is_refused(config_file: Path, tmp_path: Path) -> None:
    folder = make(config_file, tmp_path / "model")
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    make(config_file, folder)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    with pytest.raises(SystemExit, match="exists and holds something else"):
        make(config_file, folder, "--seed", "7")


def test_a_full_disk_is_seen_before_the_first_byte(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = make_checkpoint.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(make_checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SystemExit, match=r"needs .* of disk, and 1.00 kB are free"):
        make(config_file, tmp_path / "model")
    assert not list(tmp_path.glob("model*"))


def test_samples_have_a_prompt_without_loss(config_file: Path, tmp_path: Path) -> None:
    folder = make(config_file, tmp_path / "model", "--samples", "3", "--tokens", "12")
    rows = [json.loads(line) for line in (folder / "calibration.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert len(row["input_ids"]) == 12
        assert row["labels"] == [-100] * 3 + row["input_ids"][3:]
    assert rows[0] != rows[1]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.738),
        ("llama-2-13b", 13.016),
        ("llama-2-70b", 68.977),
        ("llama-3-8b", 8.030),
        ("llama-3-70b", 70.554),
        ("qwen-32b", 32.764),
        ("qwen-3-32b", 32.762),
    ],
)
def test_known_models_have_their_published_number_of_parameters(name: str, billions: float) -> None:
    config = build_config(CONFIGS[name])
    count = sum(spec.num_elements for spec in list_tensors(config, config.num_hidden_layers))
    assert count / 1e9 == pytest.approx(billions, abs=6e-4)
