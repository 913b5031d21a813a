"""Rules for the bodies of model requests: what is rejected and what is rewritten."""

import json
from typing import Any

import pytest

from hypercore_agents.api.errors import Forbidden, HypercoreError, InvalidRequest
from hypercore_agents.gateway.request_rules import (
    CLI_BETAS,
    LONG_CONTEXT_BETA,
    Policy,
    SessionRules,
    apply_rules,
    cap_output,
    check_betas,
    model_allowed,
)

ANY = SessionRules()
STRICT = Policy()


def body(**more: Any) -> bytes:
    return json.dumps(
        {"model": "claude-opus-5-5", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}], **more}
    ).encode()


def content(*blocks: Any) -> bytes:
    return body(messages=[{"role": "user", "content": list(blocks)}])


def test_an_ordinary_request_passes_unchanged() -> None:
    given = body(
        stream=True,
        system=[{"type": "text", "text": "é"}],
        tools=[{"name": "Bash", "input_schema": {}}, {"type": "custom"}],
    )
    request = apply_rules(given, ANY, STRICT)
    assert (request.model, request.stream) == ("claude-opus-5-5", True)
    assert json.loads(request.encoded()) == json.loads(given)


def test_the_api_receives_the_checked_value_of_a_duplicate_key() -> None:
    raw = b'{"model":"claude-fable-5","model":"claude-haiku-4-5","max_tokens":1,"messages":[]}'
    request = apply_rules(raw, SessionRules(model="claude-haiku-4-5"), STRICT)
    assert request.encoded().count(b'"model"') == 1
    assert b"fable" not in request.encoded()


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff", b'"x"', b'{"a": NaN}', b"[" * 100_000, body().decode().encode("utf-16")]
)
def test_a_body_that_is_not_a_json_object_is_rejected(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        apply_rules(raw, ANY, STRICT)


def test_lone_surrogates_are_replaced_but_not_escapes() -> None:
    raw = body(system="x", messages=[{"role": "user", "content": "y"}])
    raw = raw.replace(b'"x"', b'"\\ud800 \\ud83d\\ude00"').replace(b'"y"', b'"\\\\ud800 \\\\u0000"')
    sent = json.loads(apply_rules(raw, ANY, STRICT).encoded())
    assert sent["system"] == "\ufffd \U0001f600"
    assert sent["messages"][0]["content"] == "\\ud800 \\u0000"


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"container": "c"}, "container"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"service_tier": "auto"}, "service_tier"),
        ({"speed": "fast"}, "speed"),
        ({"inference_geo": "x"}, "inference_geo"),
        ({"tools": [{"name": "a"}, {"type": "web_search_20250305", "name": "web_search"}]}, "tools.1.type"),
        ({"tools": [{"type": "code_execution_20250825"}]}, "tools.0.type"),
        ({"tools": [{"type": 5}]}, "tools.0.type"),
        ({"tools": [{"type": {"a": 1}}]}, "tools.0.type"),
        ({"tools": "Bash"}, "tools"),
        ({"tools": ["Bash"]}, "tools"),
        ({"messages": {}}, "messages"),
        ({"messages": ["x"]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"stream": 1}, "stream"),
        ({"model": 7}, "model"),
        ({"model": "a b"}, "model"),
        ({"model": "x" * 200}, "model"),
        ({"system": [{"type": "text", "text": "", "file_id": "f"}]}, "system"),
    ],
)
def test_a_rejection_names_its_field(more: dict[str, Any], field: str) -> None:
    with pytest.raises(HypercoreError) as caught:
        apply_rules(body(**more), ANY, STRICT)
    assert caught.value.status in (400, 403)
    assert (caught.value.details or {})["field"] == field


@pytest.mark.parametrize(
    "block",
    [
        {"type": "document", "source": {"type": "file", "file_id": "file_1"}},
        {"type": "container_upload", "file_id": "file_1"},
        {"type": "container_upload"},
        {"type": "image", "source": {"type": "url", "url": "https://evil.example/?data=secret"}},
        {"type": "image", "source": {"url": "https://evil.example/"}},
        {"type": "tool_result", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]},
        {"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": {"type": "url"}}]}},
    ],
)
def test_content_to_be_fetched_is_rejected_at_any_depth(block: dict[str, Any]) -> None:
    with pytest.raises(Forbidden):
        apply_rules(content({"type": "text", "text": "x"}, block), ANY, STRICT)


def test_a_tools_input_may_have_any_field() -> None:
    block = {"type": "tool_use", "id": "1", "name": "drive", "input": {"file_id": "mine", "source": {"type": "url"}}}
    assert apply_rules(content(block), ANY, STRICT)


def test_unknown_block_types_are_left_to_the_api() -> None:
    assert apply_rules(content({"type": {"a": 1}, "source": {"type": ["file"]}}), ANY, STRICT)


def test_deep_nesting_is_rejected() -> None:
    block: dict[str, Any] = {"type": "text"}
    for _ in range(100):
        block = {"type": "tool_result", "content": [block]}
    with pytest.raises(InvalidRequest):
        apply_rules(content(block), ANY, STRICT)


def test_the_operator_can_allow_an_api_tool() -> None:
    policy = Policy(server_tools=frozenset(("web_search_20250305",)))
    assert apply_rules(body(tools=[{"type": "web_search_20250305"}]), ANY, policy)


@pytest.mark.parametrize(
    ("model", "wanted", "allowed"),
    [
        ("claude-opus-5-5", None, True),
        ("claude-opus-5-5", "claude-opus-5-5", True),
        ("claude-sonnet-4-5", "claude-sonnet-4-5[1m]", True),
        ("claude-sonnet-4-5-20250929", "claude-sonnet-4-5", True),
        ("claude-sonnet-4-5", "claude-sonnet-4-5-20250929", True),
        ("claude-sonnet-4-5", "claude-sonnet-4", False),
        ("claude-fable-5", "claude-haiku-4-5", False),
        ("claude-sonnet-5-5", "sonnet", True),
        ("claude-opus-5-5", "sonnet", False),
        ("claude-haiku-5-5", "claude-opus-5-5", True),
    ],
)
def test_models(model: str, wanted: str | None, allowed: bool) -> None:
    assert model_allowed(model, wanted, ("claude-haiku-",)) is allowed
    if not allowed:
        with pytest.raises(Forbidden, match="ALLOWED_MODELS"):
            apply_rules(body(model=model), SessionRules(model=wanted), Policy(models=("claude-haiku-",)))


def test_betas_of_the_cli_pass_and_other_errors_name_the_remedy() -> None:
    every = ",".join(sorted(CLI_BETAS))
    assert check_betas(every, ANY, STRICT) == every
    assert check_betas(None, ANY, STRICT) is None
    for beta in ("files-api-2025-04-14", "mcp-client-2025-04-04", "code-execution-2025-05-22", LONG_CONTEXT_BETA):
        with pytest.raises(Forbidden, match="ALLOWED_BETAS"):
            check_betas(f"{every}, {beta}", ANY, STRICT)
        assert check_betas(beta, ANY, Policy(betas=frozenset((beta,)))) == beta
    assert check_betas(LONG_CONTEXT_BETA, SessionRules(model="claude-sonnet-4-5[1m]"), STRICT) == LONG_CONTEXT_BETA


def test_a_fixed_temperature_removes_thinking() -> None:
    edits = [{"type": "clear_thinking_20251015"}, {"type": "clear_tool_uses_20250919"}]
    given = body(thinking={"type": "adaptive"}, temperature=1, top_p=0.9, context_management={"edits": edits})
    request = apply_rules(given, SessionRules(temperature=0.2), STRICT)
    assert request.body["temperature"] == 0.2
    assert "thinking" not in request.body
    assert "top_p" not in request.body
    assert request.body["context_management"] == {"edits": edits[1:]}
    given = body(context_management={"edits": edits[:1]})
    assert "context_management" not in apply_rules(given, SessionRules(temperature=0.0), STRICT).body


@pytest.mark.parametrize(
    ("thinking", "limit", "expected"),
    [
        (None, 50, None),
        ({"type": "adaptive"}, 50, {"type": "adaptive"}),
        ({"type": "enabled", "budget_tokens": 31999}, 5000, {"type": "enabled", "budget_tokens": 2500}),
        ({"type": "enabled", "budget_tokens": 31999}, 1025, {"type": "enabled", "budget_tokens": 1024}),
        ({"type": "enabled", "budget_tokens": 31999}, 1024, None),
        ({"type": "enabled", "budget_tokens": 2000}, 5000, {"type": "enabled", "budget_tokens": 2000}),
    ],
)
def test_a_cap_reduces_the_thinking_budget(thinking: Any, limit: int, expected: Any) -> None:
    more = {"thinking": thinking} if thinking else {}
    request = apply_rules(body(**more | {"max_tokens": 32000}), ANY, STRICT)
    cap_output(request, limit)
    assert request.body["max_tokens"] == limit
    assert request.body.get("thinking") == expected


def test_a_cap_never_raises_max_tokens() -> None:
    request = apply_rules(body(max_tokens=10), ANY, STRICT)
    cap_output(request, 1000)
    assert request.body["max_tokens"] == 10
