"""docs/CLAUDE_AGENT_SDK_INTEGRATION.md matches the code: it lists all options, and the tests it names exist."""

import ast
import dataclasses
import itertools
import re
from pathlib import Path

import pytest
from claude_agent_sdk import ClaudeAgentOptions

from hypercore_agents.api.options import SessionOptions

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "CLAUDE_AGENT_SDK_INTEGRATION.md").read_text()
SAME_AS = {"output_format": "output_schema"}


def names_in_table(first_heading: str) -> set[str]:
    """Return the names in the first column of the table whose first column has this heading."""
    lines = TEXT.partition(f"| {first_heading} |")[2].splitlines()[2:]
    rows = lines[: next(number for number, line in enumerate(lines) if not line.startswith("|"))]
    return {name for row in rows for name in re.findall(r"`([a-z_]+)`", row.split("|")[1])}


def functions_of(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {each.name for each in nodes if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_each_sdk_option_is_offered_or_listed_with_a_reason() -> None:
    sdk = {field.name for field in dataclasses.fields(ClaudeAgentOptions)}
    offered = {field for field in sdk if SAME_AS.get(field, field) in SessionOptions.model_fields}
    refused = names_in_table("field")
    assert offered | refused == sdk
    assert not offered & refused, "offered, but listed as not offered"


def test_each_session_option_is_in_the_table() -> None:
    assert names_in_table("option") == set(SessionOptions.model_fields)


@pytest.mark.parametrize(("heading", "fewest"), [("## Traps", 25), ("## Options over HTTP", 10)])
def test_each_row_names_an_existing_test(heading: str, fewest: int) -> None:
    lines = TEXT.partition(heading)[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))[2:]
    assert len(rows) >= fewest
    for row in rows:
        named = re.findall(r"`([a-z0-9_/]+\.py)::(\w+)`", row.split("|")[3])
        assert named, f"no test is named: {row}"
        for path, test in named:
            assert test.startswith("test_")
            assert test in functions_of(ROOT / "tests" / path), f"{path}::{test} does not exist"
