"""Translation of SDK messages to events: messages recorded from the pinned CLI, and hostile ones."""

from typing import Any

import pytest
from claude_agent_sdk import (
    AssistantMessage,
    Message,
    ResultMessage,
    StreamEvent,
    SystemMessage,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserMessage,
)

from hypercore_agents.agent.claude import translate
from hypercore_agents.agent.claude.outcome import conclude, failure, stopped
from hypercore_agents.agent.claude.translate import TOOL_RESULT_LIMIT, Event, Translator
from hypercore_agents.api.errors import (
    AgentUnreachable,
    BudgetExceeded,
    Conflict,
    DeadlineExceeded,
    HypercoreError,
    ModelFailed,
    RateLimited,
    Unavailable,
)
from hypercore_agents.api.events import Delta, ToolResult, ToolUse, event_name


def event(kind: str, parent: str | None = None, **fields: Any) -> StreamEvent:
    return StreamEvent(uuid="u", session_id="s", event={"type": kind, **fields}, parent_tool_use_id=parent)


def delta(text: Any, parent: str | None = None) -> StreamEvent:
    return event("content_block_delta", parent, index=0, delta={"type": "text_delta", "text": text})


START = event("message_start", message={})
WHOLE = event("message_delta", delta={"stop_reason": "end_turn"})
STOP = event("message_stop")
CUT = [event("content_block_stop", index=0), STOP]


def assistant(*blocks: Any, model: str = "claude", **fields: Any) -> AssistantMessage:
    return AssistantMessage(content=list(blocks), model=model, **fields)


def result(**fields: Any) -> ResultMessage:
    defaults: dict[str, Any] = {
        "subtype": "success",
        "duration_ms": 1,
        "duration_api_ms": 1,
        "is_error": False,
        "num_turns": 1,
        "session_id": "s",
    }
    return ResultMessage(**{**defaults, **fields})


def translated(*messages: Message) -> tuple[Translator, list[Event]]:
    translator = Translator()
    return translator, [event for message in messages for event in translator.feed(message)]


def kinds(events: list[Event]) -> list[str]:
    return [event_name(each) for each in events]


def text_after_reset(events: list[Event]) -> str:
    """Return the text of a client that follows the documented rule for resets."""
    text = ""
    for each in events:
        if isinstance(each, Delta):
            text += each.text
        else:
            text = ""
    return text


def test_a_plain_answer_gives_deltas_and_content() -> None:
    translator, events = translated(START, delta("a"), delta("b"), assistant(TextBlock("ab")), WHOLE, STOP, result())
    assert [each.text for each in events if isinstance(each, Delta)] == ["a", "b"]
    assert translator.content == "ab"
    assert translator.result is not None


def test_a_cut_message_gives_a_reset() -> None:
    translator, events = translated(START, delta("a"), *CUT, START, delta("x"), delta("y"), WHOLE, STOP, result())
    assert kinds(events) == ["delta", "reset", "delta", "delta"]
    assert text_after_reset(events) == translator.content == "xy"


def test_complete_text_before_a_cut_is_repeated_after_the_reset() -> None:
    translator, events = translated(
        START, delta("one "), WHOLE, STOP, START, delta("tw"), *CUT, START, delta("two"), WHOLE, result()
    )
    assert [each.text for each in events if isinstance(each, Delta)] == ["one ", "tw", "one ", "two"]
    assert text_after_reset(events) == translator.content == "one two"


def test_a_message_cut_before_its_first_text_gives_no_reset() -> None:
    _, events = translated(START, STOP, START, delta("x"), WHOLE, result())
    assert events == [Delta(text="x")]


def test_only_tool_calls_of_complete_messages_give_events() -> None:
    call = assistant(ToolUseBlock(id="t1", name="Bash", input={"command": "ls"}))
    again = assistant(ToolUseBlock(id="t2", name="Bash", input={"command": "ls"}))
    answer = UserMessage(content=[ToolResultBlock(tool_use_id="t2", content="ok", is_error=None)])
    translator, events = translated(
        START, delta("I look"), call, *CUT, START, delta("Look"), again, WHOLE, STOP, answer, result()
    )
    assert [each.tool_use_id for each in events if isinstance(each, ToolUse)] == ["t2"]
    assert kinds(events) == ["delta", "reset", "delta", "tool_use", "tool_result"]
    assert translator.content == "Look", "without text after the tool, the last text before it is the answer"


def test_unstreamed_text_gives_a_delta() -> None:
    translator, events = translated(assistant(TextBlock("whole")), result())
    assert events == [Delta(text="whole")]
    assert translator.content == "whole"


def test_text_of_the_cli_is_not_part_of_the_answer() -> None:
    translator, events = translated(
        assistant(TextBlock("API Error: 529"), model="<synthetic>", error="server_error"),
        UserMessage(content=[TextBlock("[Request interrupted by user]")]),
        UserMessage(content="Output token limit hit."),
        result(is_error=True, api_error_status=529),
    )
    assert (translator.content, events) == ("", [])


def test_a_subagents_text_is_not_part_of_the_answer() -> None:
    translator, events = translated(
        START,
        delta("sub", parent="t1"),
        assistant(TextBlock("sub"), parent_tool_use_id="t1"),
        UserMessage(content=[ToolResultBlock(tool_use_id="x", content="y")], parent_tool_use_id="t1"),
        delta("main"),
        WHOLE,
        result(),
    )
    assert events == [Delta(text="main")]
    assert translator.content == "main"


@pytest.mark.parametrize("text", [None, 3, {"a": 1}, ""])
def test_a_forged_delta_is_dropped(text: Any) -> None:
    assert translated(START, delta(text), WHOLE)[1] == []


def test_sizes_of_events_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate, "CONTENT_LIMIT", 10)
    huge = "x" * (TOOL_RESULT_LIMIT + 1)
    translator, events = translated(
        START,
        assistant(ToolUseBlock(id="i" * 999, name="n" * 999, input={"x": "y" * 2_000_000})),
        WHOLE,
        UserMessage(
            content=[ToolResultBlock(tool_use_id="t", content=[{"type": "text", "text": huge}, {"type": "image"}])]
        ),
        START,
        delta("0123456789abc"),
        delta("more"),
        WHOLE,
        result(),
    )
    call, answer, words = events
    assert isinstance(call, ToolUse)
    assert (len(call.tool_use_id), len(call.name)) == (256, 256)
    assert list(call.input) == ["omitted"]
    assert isinstance(answer, ToolResult)
    assert len(answer.content) == TOOL_RESULT_LIMIT
    assert words == Delta(text="0123456789")
    assert translator.overflowed


def test_retries_and_offered_tools_are_recorded() -> None:
    translator, _ = translated(
        SystemMessage(subtype="init", data={"tools": ["Bash", 3]}),
        SystemMessage(subtype="api_retry", data={"retry_delay_ms": 1500}),
        SystemMessage(subtype="api_retry", data={"retry_delay_ms": "soon"}),
    )
    assert translator.offered == frozenset({"Bash"})
    assert (translator.retries, translator.retry_after) == (2, 1.5)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"stop_reason": "end_turn"}, "completed"),
        ({"stop_reason": "max_tokens"}, "max_tokens"),
        ({"subtype": "error_max_turns", "is_error": True}, "max_turns"),
        ({"subtype": "error_max_budget_usd", "is_error": True}, "budget_exceeded"),
        ({"stop_reason": "refusal", "is_error": True, "result": "API Error: can't help"}, "refused"),
        ({"subtype": "error_during_execution", "is_error": True, "terminal_reason": "aborted_tools"}, "interrupted"),
    ],
)
def test_results_become_statuses(fields: dict[str, Any], status: str) -> None:
    assert conclude(Translator(), result(**fields)) == status


@pytest.mark.parametrize(
    ("api_status", "cause", "kind", "retryable"),
    [
        (400, "API Error: 400 prompt is too long", ModelFailed, False),
        (401, "Failed to authenticate. API Error: 401 invalid x-api-key", ModelFailed, False),
        (403, "Failed to authenticate. API Error: 403 the budget is spent", BudgetExceeded, False),
        (403, "Failed to authenticate. API Error: 403 not yours", ModelFailed, False),
        (404, "no such model", ModelFailed, False),
        (429, "API Error: Request rejected (429)", RateLimited, True),
        (500, "oops", ModelFailed, True),
        (529, "API Error: 529 check your inference gateway (10.0.0.1:8090)", ModelFailed, True),
        (None, "Connection lost", ModelFailed, True),
    ],
)
def test_failed_results_become_domain_errors(
    api_status: int | None, cause: str, kind: type[HypercoreError], retryable: bool
) -> None:
    translator = Translator(retry_after=2.5)
    with pytest.raises(kind) as raised:
        conclude(translator, result(is_error=True, api_error_status=api_status, result=cause))
    assert raised.value.retryable is retryable
    assert raised.value.details is not None
    assert raised.value.details["api_status"] == api_status
    assert "10.0.0.1" not in raised.value.message
    assert "API Error" not in raised.value.message
    if kind is RateLimited:
        assert raised.value.retry_after == 2.5


def test_a_key_in_an_error_is_masked() -> None:
    assert "sk-ant-canary12345" not in failure(400, "API Error: 400 bad key sk-ant-canary12345").message


def test_an_execution_error_of_the_cli_is_agent_unreachable() -> None:
    with pytest.raises(AgentUnreachable):
        conclude(Translator(), result(subtype="error_during_execution", is_error=True))


def test_the_stop_reason_determines_how_a_turn_ends() -> None:
    assert stopped("user", 1) == stopped("disconnect", 1) == "interrupted"
    for reason, kind in (("deadline", DeadlineExceeded), ("draining", Unavailable), ("deleted", Conflict)):
        with pytest.raises(kind):
            stopped(reason, 1)  # type: ignore[arg-type]


def test_the_old_name_of_the_agent_tool_is_translated() -> None:
    translator = Translator()
    list(translator.feed(SystemMessage(subtype="init", data={"tools": ["Task", "Bash"]})))
    assert translator.offered == frozenset({"Agent", "Bash"})
    assert not translator.acted


def test_a_tool_call_counts_as_acted_before_its_message_is_complete() -> None:
    translator = Translator()
    list(translator.feed(START))
    assert not translator.acted
    list(translator.feed(assistant(ToolUseBlock("t1", "Bash", {"command": "true"}))))
    assert translator.acted, "the CLI runs it even without a `message_delta`"


def test_the_gateways_503_is_a_lost_connection() -> None:
    cause = "API Error: 503 the Claude API closed the connection without a response. This is a server-side issue."
    with pytest.raises(ModelFailed, match=r"closed the connection without a response.*try again") as raised:
        conclude(Translator(), result(is_error=True, api_error_status=503, result=cause))
    assert raised.value.retryable
    assert raised.value.details == {"api_status": None, "cause": "connection"}
    assert "503" not in raised.value.message
