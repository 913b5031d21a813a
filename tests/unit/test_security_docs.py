"""docs/SECURITY.md does not rot: every test that it names exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "SECURITY.md").read_text()))
    trees = (ast.walk(ast.parse(path.read_text())) for path in (ROOT / "tests").rglob("test_*.py"))
    existing = {
        node.name for tree in trees for node in tree if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(named) >= 15
    assert named - existing == set()
