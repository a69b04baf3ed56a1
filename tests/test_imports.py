"""Imports point one way, and third parties have homes. Read from the source; nothing is imported.

A module may import from layers below its own, and within its layer only where `WITHIN` says so. Imports for type
checking count like all others, those of the standard library do not.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "streamda"
MAX_LINES = 350

LAYERS = (
    {
        "errors", "quoting", "requirements", "files", "sealed_json", "units", "folder_lock", "filesystem", "run_parts",
        "rundir", "config", "commands", "timeline", "stopping", "huge_pages", "openmp",
        "read_ahead", "processor", "file_reader",
    },
    # pure: tensors and integers
    {
        "layers", "heap", "memory", "batches", "panels", "costs", "disk_plan", "flops", "plan", "bounds", "precision",
        "products", "factors", "cholesky", "block_statistics", "eigen", "low_rank", "token_span", "gram_schmidt",
        "token_basis", "solve_bytes", "solve_plan", "token_counts", "stored_weights", "workers", "methods",
        "spare_memory", "kept_memory",
    },
    # edges: files, data sets, the hub
    {
        "model_source", "model_copy", "shards", "shard_values", "skeleton", "weight_map", "checkpoint", "prefetch",
        "bad_rows", "json_rows", "rows", "samples", "row_formats", "calibration", "config_file", "disk_space",
        "limits", "boundary", "statistics_codecs", "store", "collected", "scratch", "solutions", "adapter",
        "adapter_check", "output", "model_card", "report", "plan_table", "rates", "gantt", "trace",
    },
    {
        "block_calls", "blocks", "unread", "probe", "workload", "hooks", "loss", "nonfinite", "passes", "sweep",
        "progress", "stopwatch",
    },
    {"places", "setup", "session", "solve_reading", "solve_stage", "collect_stage"},
    {"pipeline"},
    {"api", "inspection", "repair", "verification"},
    {"cli", "cli_options", "__init__"},
    {"__main__"},
)  # fmt: skip

WITHIN = {
    # each step on the one before it
    "files": {"errors", "quoting"},
    "sealed_json": {"errors", "files"},
    "units": {"errors", "files", "sealed_json"},
    "folder_lock": {"errors", "files"},
    "filesystem": {"errors", "files"},
    "run_parts": {"errors", "files", "quoting"},
    "rundir": {"errors", "files", "filesystem", "folder_lock", "run_parts", "sealed_json", "units"},
    "config": {"errors", "quoting"},
    "commands": {"config"},
    "requirements": {"errors"},
    "stopping": {"errors"},
    "panels": {"layers"},
    "memory": {"heap"},
    "spare_memory": {"heap"},
    "disk_plan": {"layers", "panels"},
    "factors": {"products"},
    "low_rank": {"products"},
    "token_span": {"factors", "products"},
    "gram_schmidt": {"cholesky", "products", "token_span"},
    "token_basis": {"block_statistics", "cholesky", "gram_schmidt", "panels", "products", "token_span"},
    "stored_weights": {"products"},
    "block_statistics": {"factors", "layers", "panels"},
    "solve_bytes": {"cholesky", "eigen", "low_rank", "panels", "token_span"},
    "solve_plan": {"gram_schmidt", "layers", "memory", "panels", "solve_bytes"},
    "token_counts": {"layers", "panels", "solve_bytes", "solve_plan"},
    "costs": {"layers"},
    "flops": {"costs", "eigen", "layers", "low_rank", "panels", "products", "solve_bytes", "solve_plan"},
    "kept_memory": {"costs", "heap"},
    "plan": {"costs", "disk_plan", "flops", "kept_memory", "layers", "memory", "panels", "solve_plan"},
    "eigen": {"cholesky", "factors"},
    "methods": {"cholesky", "eigen", "factors", "low_rank", "products", "solve_bytes", "token_basis", "token_span"},
    # the families of a noun
    "json_rows": {"bad_rows"},
    "rows": {"bad_rows", "json_rows"},
    "samples": {"bad_rows"},
    "row_formats": {"bad_rows", "json_rows", "rows", "samples"},
    "calibration": {"bad_rows", "json_rows", "row_formats", "rows", "samples"},
    "checkpoint": {"shard_values", "shards", "weight_map"},
    "shard_values": {"shards"},
    "weight_map": {"shards"},
    "skeleton": {"shards"},
    "prefetch": {"checkpoint"},
    "boundary": {"disk_space"},
    "store": {"statistics_codecs"},
    "collected": {"store"},
    "adapter": {"adapter_check", "output", "model_card", "report", "trace"},
    "adapter_check": {"output"},
    "plan_table": {"report"},
    "trace": {"gantt"},
    # the two passes, from the bottom up
    "blocks": {"block_calls"},
    "unread": {"block_calls"},
    "probe": {"block_calls", "unread"},
    "workload": {"block_calls", "blocks", "probe"},
    "loss": {"blocks"},
    "nonfinite": {"block_calls", "blocks"},
    "sweep": {"blocks", "hooks", "loss", "nonfinite", "passes", "progress", "unread"},
    "progress": {"stopwatch"},
    "session": {"setup"},
    "solve_stage": {"solve_reading"},
    "collect_stage": {"session", "setup", "solve_stage"},
    "api": {"pipeline", "repair", "verification"},
    "verification": {"inspection"},
    "cli": {"__init__", "cli_options"},
}

HOMES = {
    "accelerate": {"checkpoint", "skeleton"},
    "datasets": {"rows"},
    "google_crc32c": {"boundary", "files", "sealed_json", "shard_values"},
    "huggingface_hub": {"model_source", "rows"},
    "jinja2": {"samples"},
    "numpy": {"store"},
    "peft": {"adapter", "adapter_check", "layers"},
    "safetensors": {"adapter", "adapter_check", "shards", "solutions"},
    "tqdm": {"progress"},
    "transformers": {
        "adapter",
        "adapter_check",
        "blocks",
        "calibration",
        "checkpoint",
        "layers",
        "samples",
        "setup",
        "skeleton",
        "weight_map",
    },
    "typer": {"cli", "cli_options"},
    "yaml": {"config_file"},
    "zarr": {"statistics_codecs", "store"},  # and numcodecs, through it
}
"""Where each dependency is imported, no more and no less; torch is at home everywhere."""


def module_name(path: Path) -> str:
    """The first part below the package: a folder is one noun."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.Module) -> set[tuple[str, ...]]:
    """All modules that a file imports, split at the dots; of ``from streamda import x`` also x."""
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            parts = tuple((node.module or "").split("."))
            found |= {(*parts, alias.name) for alias in node.names} if parts == ("streamda",) else {parts}
    return found


def edges() -> set[tuple[str, str]]:
    """Which module imports which, within the package."""
    names = {module_name(path) for path in sources()}
    return {
        (module_name(path), parts[1] if len(parts) > 1 and parts[1] in names else "__init__")
        for path, tree in sources().items()
        for parts in imported(tree)
        if parts[0] == "streamda"
    }


def test_every_module_has_its_layer() -> None:
    placed = [name for layer in LAYERS for name in layer]
    assert len(placed) == len(set(placed))
    assert {module_name(path) for path in sources()} == set(placed)


def test_imports_point_one_way() -> None:
    layer_of = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    found = {(source, target) for source, target in edges() if source != target}
    assert len(found) > 60
    wrong = {
        f"{source} imports {target}"
        for source, target in found
        if layer_of[target] > layer_of[source]
        or (layer_of[target] == layer_of[source] and target not in WITHIN.get(source, set()))
    }
    assert not wrong


def test_edges_do_not_know_each_other() -> None:
    """Only the families of a noun, and what is kept in units."""
    found = {(source, target) for source, target in edges() if {source, target} <= LAYERS[2] and source != target}
    assert found <= {(source, target) for source, targets in WITHIN.items() for target in targets}
    assert ("calibration", "samples") in found


def test_the_pure_modules_do_not_know_what_time_it_is() -> None:
    """Spans are recorded by those who call them."""
    clocks = {"time", "datetime"}
    knowing = {source for source, target in edges() if target == "timeline"}
    reading = {module_name(path) for path, tree in sources().items() for parts in imported(tree) if parts[0] in clocks}
    assert not (knowing | reading) & LAYERS[1]
    assert "timeline" in reading
    assert {"sweep", "solve_stage", "pipeline"} <= knowing


def test_third_parties_have_homes() -> None:
    places: dict[str, set[str]] = {}
    for path, tree in sources().items():
        for parts in imported(tree):
            if parts[0] not in sys.stdlib_module_names | {"streamda", "torch"}:
                places.setdefault(parts[0], set()).add(module_name(path))
    assert places == HOMES


def test_cuda_is_spoken_to_in_one_place() -> None:
    """`memory` measures and limits; `setup` asks which there is, and what it can do."""
    found: set[tuple[str, str]] = set()
    for path, tree in sources().items():
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
                    found.add((module_name(path), function.name))
    assert {module for module, _ in found} == {"memory", "setup"}
    in_setup = {function for module, function in found if module == "setup"}
    assert in_setup == {"choose_device", "device_name", "_multiplies_bfloat16"}
    text = {module_name(path) for path in sources() if "torch.cuda" in path.read_text(encoding="utf-8")}
    assert text == {"memory", "setup"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_is_one_noun_of_readable_size(path: Path) -> None:
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    assert ast.get_docstring(sources()[path])


def test_the_root_holds_no_logic() -> None:
    tree = sources()[PACKAGE / "__init__.py"]
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}
    assert ast.ImportFrom in kinds
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert calls == [
        "stopping.guard_start()",
        "huge_pages.request()",
        "openmp.spin_briefly()",
    ]  # what must be before torch is imported


def test_the_package_never_reads_the_oracles_nor_they_the_package() -> None:
    assert not [path for path, tree in sources().items() for parts in imported(tree) if parts[0] == "tests"]
    for name in ("oracles.py", "autograd_oracle.py"):
        tree = ast.parse((Path(__file__).parent / name).read_text(encoding="utf-8"))
        assert not [parts for parts in imported(tree) if parts[0] == "streamda"], name


def test_contributing_names_every_module_once() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ")]
    rows = rows[2:]  # without heading and rule
    named = [sorted(name.rstrip("/") for name in re.findall(r"`([a-z_]+/?)`", row)) for row in rows]
    stages, surface = LAYERS[4] | LAYERS[5], LAYERS[6] | LAYERS[7] - {"__init__"}
    assert named == [sorted(layer) for layer in (*LAYERS[:4], stages, surface)]
