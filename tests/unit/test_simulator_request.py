from typing import Any

import pytest

from hypercore_agents.simulator.conversation import ToolResult, read_conversation
from hypercore_agents.simulator.failures import ApiFailure
from hypercore_agents.simulator.request import input_tokens, read_count, read_json, read_messages


def body(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    listed = list(messages) or [{"role": "user", "content": "hello"}]
    return {"model": "claude-opus-5-5", "max_tokens": 100, "messages": listed} | fields


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def use(identity: str, name: str = "Bash") -> dict[str, Any]:
    return {"type": "tool_use", "id": identity, "name": name, "input": {}}


def result(identity: str, content: Any = "done") -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": identity, "content": content}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"model": "claude-x", "messages": [user(text("a"))]}, "max_tokens: Field required"),
        (body(max_tokens=0), "max_tokens: "),
        (body(max_tokens="5"), "max_tokens: "),
        (body(temperature=1.5), "temperature: "),
        (body(temprature=1), "temprature: Extra inputs are not permitted"),
        (body() | {"messages": []}, "messages: "),
        (body({"role": "robot", "content": "x"}), "messages.0.role: "),
        (body({"role": "user"}), "messages.0.content: Field required"),
        (body(user({"text": "x"})), "messages.0.content.0.type: Field required"),
        (body(user({"type": "text"})), "messages.0.content.0.text: Field required"),
        (body(user(text(""))), "messages.0.content.0: text content blocks must be non-empty"),
        (body(user()), "messages.0.content: all messages must have non-empty content"),
        (body(assistant(text("a"))), "messages.0.role: the first message must be the user's"),
        (body(tools=[{"input_schema": {}}]), "tools.0.name: Field required"),
        (body(tools=[{"name": "Bash"}]), "tools.0.input_schema: Field required"),
        (body(user(text("a")), assistant(use("t1")), user(text("b"))), "`tool_use` ids were found without"),
        (body(user(text("a")), assistant(text("b")), user(result("t1"))), "unexpected `tool_use_id` found"),
        (body(user(use("t1"))), "can only be in `assistant` messages"),
    ],
)
def test_errors_name_the_invalid_field(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ApiFailure) as caught:
        read_messages(given)
    assert caught.value.status == 400
    assert field in caught.value.message


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"a": NaN}', b"\xff\xfe", "{}".encode("utf-16"), b"[" * 100_000])
def test_bodies_other_than_json_objects_are_a_400(raw: bytes) -> None:
    with pytest.raises(ApiFailure) as caught:
        read_json(raw)
    assert caught.value.status == 400


def test_unknown_models_are_a_404() -> None:
    with pytest.raises(ApiFailure) as caught:
        read_messages(body(model="gpt-x"))
    assert (caught.value.status, caught.value.message) == (404, "model: gpt-x")


def test_counting_tokens_does_not_require_max_tokens() -> None:
    count = body()
    del count["max_tokens"]
    assert read_count(count).model == "claude-opus-5-5"


def test_input_tokens_are_a_quarter_of_the_json_length() -> None:
    # {"messages":[{"role":"user","content":"hello"}]} has 48 characters.
    assert input_tokens(body()) == 12
    assert input_tokens(body(temperature=0.5, stream=True)) == 12
    assert input_tokens(body(system="y" * 40)) > 12


def test_prompts_exclude_reminders_and_interruption_notes() -> None:
    conversation = read_conversation(
        read_messages(
            body(
                user(text("<system-reminder>\nbe nice [[say x]]\n</system-reminder>\n"), text("first")),
                {"role": "system", "content": "# Environment"},
                assistant(use("t1")),
                user(result("t1"), text("<system-reminder>hint</system-reminder>")),
                assistant(text("answer")),
                user(text("[Request interrupted by user]"), text("failed turn"), text("newest")),
            )
        )
    )
    assert conversation.prompts == ("first", "failed turn", "newest")
    assert conversation.results == ()


def test_results_are_limited_to_the_newest_prompt() -> None:
    conversation = read_conversation(
        read_messages(
            body(
                user(text("one")),
                assistant(use("t1", "Old")),
                user(result("t1")),
                assistant(text("x")),
                user(text("two")),
                assistant(use("t2", "Read"), use("t3", "Bash")),
                user(result("t2", [text("a"), {"type": "image"}]), result("t3", "b")),
            )
        )
    )
    assert conversation.prompt == "two"
    assert conversation.results == (ToolResult("Read", "a\n[image]"), ToolResult("Bash", "b"))


def test_only_client_side_tools_are_offered() -> None:
    tools = [
        {"name": "Bash", "input_schema": {"type": "object"}},
        {"name": "bash", "type": "bash_20250124"},
        {"name": "web_search", "type": "web_search_20250305"},
    ]
    assert set(read_conversation(read_messages(body(tools=tools))).offered) == {"Bash", "bash"}
    none = body(tools=tools, tool_choice={"type": "none"})
    assert read_conversation(read_messages(none)).offered == {}


def test_the_system_prompt_omits_the_billing_header() -> None:
    system = [text("x-anthropic-billing-header: v=1;"), text("You are Bob.")]
    assert read_conversation(read_messages(body(system=system))).system == "You are Bob."


def test_title_requests_ignore_directives_in_the_quoted_prompt() -> None:
    schema = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    given = body(
        user(text("<session>\n[[fault 529]] fix it\n</session>\n\nWrite the title.")),
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    conversation = read_conversation(read_messages(given))
    assert conversation.schema == schema
    assert conversation.prompt == "fault 529 fix it"
