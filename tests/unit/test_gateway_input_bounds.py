"""The bound on a request's input tokens is never below the API's count, for any body."""

import json
from typing import Any

import pytest

from hypercore_agents.gateway.input_bounds import max_input_tokens
from hypercore_agents.gateway.request_rules import Policy, SessionRules, apply_rules
from hypercore_agents.simulator.request import input_tokens

LARGEST_IMAGE = 4784
WINDOW = 1_000_000


def bound(*blocks: Any, **more: Any) -> int:
    content = list(blocks) or "hi"
    body = {"model": "claude-sonnet-5", "max_tokens": 1, "messages": [{"role": "user", "content": content}], **more}
    raw = json.dumps(body).encode()
    found = max_input_tokens(apply_rules(raw, SessionRules(), Policy(server_tools=frozenset(("web_search_20250305",)))))
    if "image" not in str(content):  # the simulator counts the bytes of an image as text
        assert found >= input_tokens(body)
    return found


def image(data: str = "iVBO") -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def test_text_is_bounded_by_its_bytes() -> None:
    text = "日本語 é a " * 1000
    assert bound({"type": "text", "text": text}) >= len(text.encode())
    assert bound(system=text) >= len(text.encode())
    assert bound({"type": "text", "text": "x" * 100_000}) < 110_000, "the bound is tight"


def test_an_image_counts_by_its_area_not_its_bytes() -> None:
    assert bound(image()) - bound({"type": "text", "text": ""}) >= LARGEST_IMAGE
    assert bound(image("A" * 3_000_000)) < 20_000
    nested = {"type": "tool_result", "tool_use_id": "t", "content": [image(), image()]}
    assert bound(nested) >= 2 * LARGEST_IMAGE


@pytest.mark.parametrize(
    "block",
    [
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}},
        {"type": "document", "citations": {"enabled": True}, "source": {"type": "text", "data": "a. b. c."}},
        {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "document", "source": {"type": "base64"}}]},
        {"type": "search_result", "content": [{"type": "text", "text": "a"}]},
        {"type": "hologram"},
        {"type": ["text"]},
        {},
    ],
)
def test_unknown_blocks_count_as_a_whole_context_window(block: dict[str, Any]) -> None:
    assert bound(block) >= WINDOW


def test_tools_count_with_the_text_around_them() -> None:
    tools = [{"name": f"t{number}", "input_schema": {}} for number in range(10)]
    assert bound(tools=tools) - bound() >= 10 * 200
    assert bound(tools=[{"type": "web_search_20250305", "name": "web_search"}]) >= WINDOW
