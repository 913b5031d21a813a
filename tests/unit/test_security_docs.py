"""docs/SECURITY.md and docs/MICROVM.md do not rot: every test that they name exists, every promise names one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "least"), [("SECURITY.md", 15), ("MICROVM.md", 60)])
def test_every_test_that_is_named_exists(name: str, least: int) -> None:
    text = (ROOT / "docs" / name).read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    trees = (ast.walk(ast.parse(path.read_text())) for path in _modules())
    existing = {
        node.name for tree in trees for node in tree if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(named) >= least
    assert named - existing == set()
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path


def test_every_promise_about_microvms_names_what_shows_it() -> None:
    lines = (ROOT / "docs" / "MICROVM.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and line != "| promise | shown by |"]
    assert len(rows) > 35
    assert [row for row in rows if "test" not in row.split(" | ")[1]] == []


def _modules() -> Iterator[Path]:
    yield from (ROOT / "tests").rglob("test_*.py")
    yield ROOT / "src/hypercore_agents/compute/testing/conformance.py"
