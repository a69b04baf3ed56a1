"""The table of faults names tests that exist, one row for each fault and none without a proof or a reason."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
    for line in (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ \|", line)
]


@functools.cache
def functions_of(file: str) -> set[str]:
    """Names of the tests in a file, those of classes with the class before them."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def test_every_fault_has_a_row_and_none_has_two() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, 78))


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_tests_that_a_row_names_exist(row: list[str]) -> None:
    _, fault, behaviour, proof = row
    assert fault
    assert behaviour
    named = re.findall(r"`([^`]+)`", proof)
    files = [name for name in named if name.endswith(".py")]
    assert files or "not handled" in behaviour
    current = ""
    for name in named:
        if name.endswith(".py"):
            current = name
        else:
            assert name in functions_of(current), f"{current} has no {name}"
