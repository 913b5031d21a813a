"""Values that the Claude CLI or the kernel would refuse, change or drop are a 400 with the field and the remedy."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from hypercore_agents.api.agents import SpawnRequest
from hypercore_agents.api.arguments import ARGUMENT_BYTES, RULES_BYTES, split_rules
from hypercore_agents.api.chat import ChatRequest
from hypercore_agents.api.errors import Conflict
from hypercore_agents.api.options import SessionOptions
from hypercore_agents.api.pool import PoolConfig
from hypercore_agents.api.schemas import check_schema

DOORS: tuple[tuple[type[BaseModel], dict[str, Any]], ...] = (
    (ChatRequest, {"prompt": "hello", "user_id": "ada"}),
    (SpawnRequest, {"user_id": "ada"}),
    (PoolConfig, {}),
)


def refusal(field: str, value: Any) -> str:
    """Return the error for a value; every model with the field must refuse it and name the field."""
    said = set()
    for model, more in DOORS:
        if field in ("tags", "prompt") and field not in model.model_fields:
            continue
        with pytest.raises(ValidationError) as caught:
            model.model_validate({**more, field: value})
        fault = caught.value.errors()[0]
        assert field in fault["loc"], fault
        said.add(fault["msg"])
    assert len(said) == 1
    return said.pop()


def accept(field: str, value: Any) -> None:
    for model, more in DOORS:
        if field in model.model_fields or model is PoolConfig:
            model.model_validate({**more, field: value})


def server(*args: str) -> dict[str, Any]:
    return {"command": "notes", "args": list(args)}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *(("mcp_servers", {name: server()}, "letters, digits, _ and -") for name in (
            "my server", "github.com", "a__b", "notes_", "_notes", "x" * 65, "notes\n", "", "naïve")),
        *(("mcp_servers", {name: server()}, "reserved") for name in ("ide", "workspace")),
        *(("model", name, "Claude CLI") for name in ("default", "inherit", "best", "opusplan", "default[1m]")),
        *(("model", name, "a-z, 0-9") for name in ("SONNET", "Claude-Sonnet-4-5", "sonnet\n", "sonnet[1m]x", "a b")),
        ("fallback_model", "default", "Claude CLI"),
        *(("tags", {key: "x"}, "letters, digits and ._/-") for key in ("a\n", "", "-a", "a b", "x" * 64)),
        ("tools", ["default"], "all of its tools"),
        *(("tools", [name], "letters, digits, _ and -") for name in ("Read\n", "Read,Bash", "--tools", "Bash(ls)")),
        *(("agents", {name: {"description": "d", "prompt": "p"}}, "a-z, 0-9 and -") for name in ("Rev", "a\n", "a_b")),
        ("agents", {"rev": {"description": "d", "prompt": "p", "model": "best"}}, "Claude CLI"),
        *(("skills", [name], "a-z, 0-9 and -") for name in ("a\n", "A", "../etc")),
        ("approval_tools", ["Bash\n"], "letters, digits"),
    ],
)  # fmt: skip
def test_invalid_names_list_allowed_characters(field: str, value: Any, allowed: str) -> None:
    assert allowed in refusal(field, value)


def test_names_that_the_cli_does_not_change_are_accepted() -> None:
    accept("mcp_servers", {name: server() for name in ("notes", "a-b_c", "X1", "x" * 64)})
    for model in ("claude-sonnet-4-5", "claude-sonnet-4-5-20250929", "sonnet", "sonnet[1m]", "us.anthropic.claude:0"):
        accept("model", model)
    accept("agents", {"rev": {"description": "d", "prompt": "p", "model": "inherit"}})


@pytest.mark.parametrize("field", ["allowed_tools", "disallowed_tools"])
@pytest.mark.parametrize(
    "rule",
    [
        "--dangerously-skip-permissions", "-p", "Bash(ls", "a,b", "Bash(a\nb)", " Bash", "", "my rule", "Bash ",
        "Bash(a),Write(b)", "Bash(echo (a) b)", "Bash(a) Bash(b)", "Bash\n",
    ],
)  # fmt: skip
def test_rules_that_the_cli_would_split_are_refused(rule: str, field: str) -> None:
    refusal(field, [rule])


def test_rules_that_the_cli_does_not_split_are_accepted() -> None:
    rules = ["Bash(git log:*)", "mcp__notes__*", "Edit(./src/**)", "Read", "Bash(echo (a))", "Bash(a, b c)"]
    accept("allowed_tools", rules)
    assert split_rules(",".join(rules)) == rules


def test_command_line_values_are_limited_in_bytes() -> None:
    accept("mcp_servers", {"notes": server("a" * 100_000)})
    for args in (
        ["a" * 200_000],
        ["a" * ARGUMENT_BYTES],
        ["\N{GRINNING FACE}" * 11_000],
        ["é" * 30_000],
        ["a" * 2100] * 63,
    ):
        assert f"at most {ARGUMENT_BYTES} bytes" in refusal("mcp_servers", {"notes": server(*args)})
    rules = [f"Bash({'é' * 240}{at})" for at in range(256)]
    assert f"at most {RULES_BYTES} bytes" in refusal("allowed_tools", rules)
    accept("disallowed_tools", rules[:200])


@pytest.mark.parametrize(
    "prompt",
    [
        "", " ", "\n\t ", "\N{NO-BREAK SPACE}", "\N{IDEOGRAPHIC SPACE}\u2028\ufeff", "\N{ZERO WIDTH SPACE}",
        " \N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}\N{WORD JOINER}\N{SOFT HYPHEN}\u202e\U000e0020",
    ],
)  # fmt: skip
def test_blank_prompts_are_refused(prompt: str) -> None:
    assert not prompt or "visible character" in refusal("prompt", prompt)
    refusal("prompt", prompt)


def test_prompts_with_a_visible_character_are_accepted() -> None:
    for prompt in ("\N{ZERO WIDTH SPACE}.", "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}"):
        assert ChatRequest(prompt=prompt, user_id="ada").prompt == prompt


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), float("-inf")])
def test_budgets_that_are_not_finite_are_refused(budget: float) -> None:
    assert "finite number" in refusal("max_budget_usd", budget)


def schema(part: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": part}, **more}


TAKEN_BY_THE_CLI: dict[str, dict[str, Any]] = {
    "draft-07": schema(True, **{"$schema": "http://json-schema.org/draft-07/schema#"}),
    "a reference": schema({"$ref": "#/definitions/x"}, definitions={"x": {"type": "string"}}),
    "a reference to $defs": schema({"$ref": "#/$defs/x"}, **{"$defs": {"x": {"type": "string"}}}),
    "a reference to itself": schema({"$ref": "#"}),
    "nullable": schema({"type": "string", "nullable": True}),
    "an unknown format": schema({"type": "string", "format": "zip"}),
    "an ECMAScript pattern": schema({"type": "string", "pattern": "(?<a>x)\\p{L}"}),
    "a list of items": schema({"type": "array", "items": [{"type": "string"}], "additionalItems": False}),
    "names that look like keywords": schema({"type": "string"}, required=["a", "b"], default={"strng": 1}),
}
REFUSED_BY_THE_CLI: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown type": (schema({"type": "strng"}), "properties.a.type"),
    "draft 2020-12": (schema(True, **{"$schema": "https://json-schema.org/draft/2020-12/schema"}), "draft-07"),
    "draft-07 by https": (schema(True, **{"$schema": "https://json-schema.org/draft-07/schema#"}), "$schema"),
    "a dialect that is no name": (schema(True, **{"$schema": ["a"]}), "$schema"),
    "a reference that is no number": (schema({"enum": [1]}, **{"$ref": "#/properties/a/enum/²"}), "$ref"),
    "an unknown keyword": (schema({"type": "string", "x-note": 1}), "properties.a.x-note"),
    "a keyword of 2020-12": (schema({"type": "array", "prefixItems": []}), "properties.a.prefixItems"),
    "a reference to nothing": (schema({"$ref": "#/definitions/x"}), "properties.a.$ref"),
    "a remote reference": (schema({"$ref": "http://example.com/x"}), "properties.a.$ref"),
    "an empty enum": (schema({"enum": []}), "properties.a.enum"),
    "an enum that repeats": (schema({"enum": [1, 1]}), "properties.a.enum"),
    "a definition that is wrong": (schema(True, definitions={"x": {"type": "strng"}}), "definitions.x.type"),
    "nullable without a type": (schema({"nullable": True}), "properties.a.nullable"),
}


@pytest.mark.parametrize("taken", TAKEN_BY_THE_CLI)
def test_output_schemas_that_the_cli_accepts_are_accepted(taken: str) -> None:
    check_schema(TAKEN_BY_THE_CLI[taken])


@pytest.mark.parametrize("refused", REFUSED_BY_THE_CLI)
def test_output_schemas_that_the_cli_refuses_are_refused_with_the_place(refused: str) -> None:
    value, place = REFUSED_BY_THE_CLI[refused]
    assert place in refusal("output_schema", value)


def test_too_deep_output_schemas_are_refused() -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(100_000):  # beyond any recursion limit that other tests may have raised
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(ValueError, match="nested too deeply"):
        check_schema(deep)


def test_stored_options_of_an_older_version_are_a_conflict() -> None:
    with pytest.raises(Conflict, match=r"mcp_servers\.my server.*start a new session"):
        SessionOptions.stored({"mcp_servers": {"my server": server()}})
    assert SessionOptions.stored({"model": "sonnet"}).model == "sonnet"
