import json
from collections import Counter
from typing import Any

import pytest

from hypercore_agents.simulator import frames
from hypercore_agents.simulator.answers import Answer, Defaults, Text, ToolUse, answer, tokens_of
from hypercore_agents.simulator.conversation import read_conversation
from hypercore_agents.simulator.directives import Fault
from hypercore_agents.simulator.instances import instance
from hypercore_agents.simulator.request import read_messages

BASH = {"name": "Bash", "input_schema": {"type": "object"}}


class Attempts:
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, key: str) -> int:
        self.counts[key] += 1
        return self.counts[key]


def ask(
    *messages: Any, defaults: Defaults | None = None, attempts: Attempts | None = None, scope: str = "", **fields: Any
) -> Answer:
    """Return the answer to alternating user and assistant messages."""
    listed = [{"role": ("user", "assistant")[n % 2], "content": message} for n, message in enumerate(messages)]
    body = {"model": "claude-opus-5-5", "max_tokens": 10_000, "messages": listed} | fields
    request = read_messages(body)
    return answer(
        request,
        read_conversation(request),
        identity="0123456789abcdef" * 4,
        scope=scope,
        input_tokens=1,
        defaults=defaults or Defaults(),
        attempts=attempts or Attempts(),
    )


def text_of(given: Answer) -> str:
    return "".join(block.text for block in given.blocks if isinstance(block, Text))


def use(identity: str) -> list[dict[str, Any]]:
    return [{"type": "tool_use", "id": identity, "name": "Bash", "input": {}}]


def result(identity: str, content: str) -> list[dict[str, Any]]:
    return [{"type": "tool_result", "tool_use_id": identity, "content": content}]


def test_default_answers_quote_the_turn_number_and_prompt() -> None:
    assert text_of(ask("a", "b", "and now?")) == 'Turn 2. You said: "and now?".'
    assert text_of(ask("x" * 300)) == f'Turn 1. You said: "{"x" * 200}…".'


def test_say_and_recall_directives() -> None:
    assert text_of(ask("please [[say exactly this]]")) == "exactly this"
    assert text_of(ask("the word is heliotrope", "ok", "[[recall 1]]")) == 'Prompt 1 was: "the word is heliotrope".'
    assert text_of(ask("[[recall 3]]")) == "There is no prompt 3: the conversation has 1."
    assert text_of(ask("[[recall system]]", system="You are Bob.")) == 'The system prompt begins: "You are Bob.".'
    assert text_of(ask("[[recall system]]")) == "There is no system prompt."
    assert text_of(ask("[[recall tools]]", tools=[BASH])) == "The tools offered are: Bash."


def test_directives_of_earlier_prompts_are_ignored() -> None:
    assert text_of(ask("[[say old]] [[fault 529]]", "old", "new")) == 'Turn 2. You said: "new".'
    assert ask("[[say old]] [[fault 529]]", "old", "new").fault is None


def test_scripts_call_their_tools_in_order() -> None:
    script = '[[say A]] [[rate 7]] [[tool Bash {"command": "one"}]] [[say B]] [[tool Bash {"command": "two"}]] go'
    first = ask(script, tools=[BASH])
    assert first.blocks[0] == Text("A")
    assert isinstance(first.blocks[1], ToolUse)
    assert json.loads(first.blocks[1].input) == {"command": "one"}
    assert first.stop_reason == "tool_use"

    second = ask(script, use("t1"), result("t1", "1"), tools=[BASH])
    assert second.blocks[0] == Text("B")
    assert isinstance(second.blocks[1], ToolUse)
    assert json.loads(second.blocks[1].input) == {"command": "two"}
    assert second.rate == 7

    last = ask(script, use("t1"), result("t1", "one!"), use("t2"), result("t2", "two!"), tools=[BASH])
    assert last.stop_reason == "end_turn"
    assert text_of(last) == 'Turn 1. You said: "go". Bash answered: "one!". Bash answered: "two!".'


def test_unavailable_tools_are_reported_and_the_script_continues() -> None:
    script = "[[tool Nope]] [[tool Bash]]"
    first = ask(script, tools=[BASH])
    assert "Nope is not offered" in text_of(first)
    assert first.stop_reason == "tool_use"
    assert ask(script, use("t1"), result("t1", "x"), tools=[BASH]).stop_reason == "end_turn"
    assert "(offered: none)" in text_of(ask(script))


def test_forced_tools_are_called_with_input_valid_for_their_schema() -> None:
    tool = {"name": "add", "input_schema": {"properties": {"n": {"type": "integer", "minimum": 3}}}}
    forced = ask("x", tools=[BASH, tool], tool_choice={"type": "tool", "name": "add"})
    assert isinstance(forced.blocks[0], ToolUse)
    assert (forced.blocks[0].name, forced.blocks[0].input) == ("add", '{"n": 3}')


def test_lengths_in_tokens_are_exact() -> None:
    assert ask("[[tokens 100]]").output_tokens == 100
    assert len(text_of(ask("[[tokens 100]]"))) == 400
    assert ask("[[tokens 2]] a long prompt that is cut").output_tokens == 2
    assert ask("x", defaults=Defaults(tokens=55)).output_tokens == 55
    assert text_of(ask("[[say short]]", defaults=Defaults(tokens=55))) == "short"


def test_max_tokens_truncates_text_and_tool_input() -> None:
    cut = ask("[[tokens 100]]", max_tokens=7)
    assert (cut.stop_reason, cut.output_tokens, len(text_of(cut))) == ("max_tokens", 7, 28)
    exact = ask("[[tokens 100]]", max_tokens=100)
    assert (exact.stop_reason, exact.output_tokens) == ("end_turn", 100)
    tool = ask('[[say four]] [[tool Bash {"command": "a long command"}]]', tools=[BASH], max_tokens=3)
    assert (tool.stop_reason, tool.output_tokens) == ("max_tokens", 3)
    assert tool.blocks[1] == ToolUse("toolu_89abcdef0123456789abcdef"[:30], "Bash", '{"comman')
    assert json.loads(frames.message(tool))["content"][1]["input"] == {}


def test_stop_sequences_and_reasons() -> None:
    stopped = ask("[[say one STOP two END]]", stop_sequences=["END", "STOP"])
    assert (text_of(stopped), stopped.stop_reason, stopped.stop_sequence) == ("one ", "stop_sequence", "STOP")
    assert ask("[[stop refusal]]").stop_reason == "refusal"


def test_pace_and_cache() -> None:
    paced = ask("[[ttft 0.5]] [[rate 20]] [[cache read=9 write=4]]", defaults=Defaults(ttft=9, rate=9))
    assert (paced.ttft, paced.rate) == (0.5, 20)
    assert frames.usage(paced, 3) == {
        "input_tokens": 1,
        "cache_creation_input_tokens": 4,
        "cache_read_input_tokens": 9,
        "output_tokens": 3,
    }


def test_limited_faults_are_used_up_in_order() -> None:
    attempts = Attempts()
    prompt = "[[fault 529 times=2]] [[fault cut after=3 times=1]]"
    faults = [ask(prompt, attempts=attempts).fault for _ in range(4)]
    assert [each.kind if each else None for each in faults] == ["529", "529", "cut", None]


def test_limited_faults_are_counted_per_session_and_per_message() -> None:
    attempts = Attempts()
    prompt = "[[fault 529 times=1]]"
    assert ask(prompt, attempts=attempts, scope="a").fault
    assert not ask(prompt, attempts=attempts, scope="a").fault
    assert ask(prompt, attempts=attempts, scope="b").fault
    assert ask("x", "y", prompt, attempts=attempts, scope="a").fault


def test_a_fault_after_a_tool_applies_to_the_next_message() -> None:
    script = "[[tool Bash]] [[fault 500]]"
    assert ask(script, tools=[BASH]).fault is None
    assert ask(script, use("t1"), result("t1", "x"), tools=[BASH]).fault == Fault("500")


def test_the_fault_flag_applies_to_prompts_without_a_fault_directive() -> None:
    defaults = Defaults(fault=Fault("500", times=1))
    attempts = Attempts()
    assert ask("[[fault 529]]", defaults=defaults, attempts=attempts).fault == Fault("529")
    assert ask("a", defaults=defaults, attempts=attempts).fault == Fault("500", times=1)
    assert ask("b", defaults=defaults, attempts=attempts).fault is None


def test_a_structured_answer_is_an_instance_of_the_schema() -> None:
    schema = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    given = ask("name this", output_config={"format": {"type": "json_schema", "schema": schema}})
    assert json.loads(text_of(given)) == {"title": "name this"}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"const": 4}, 4),
        ({"enum": ["b", "a"]}, "b"),
        ({"type": ["string", "null"]}, "t"),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [False, False]),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "number", "minimum": 1.5}}}, 1.5),
        ({"properties": {"a": {"type": "string"}, "b": {"type": "null"}}, "required": ["a"]}, {"a": "t"}),
    ],
)
def test_schema_instances(schema: dict[str, Any], value: Any) -> None:
    assert instance(schema, "t") == value


def test_self_referencing_schemas_terminate() -> None:
    assert instance({"$ref": "#"}, "t") is None


def events(given: Answer, most: int | None = None) -> list[dict[str, Any]]:
    raw = b"".join(delta.data for delta in frames.deltas(given, most)).decode()
    found = []
    for frame in raw.strip().split("\n\n") if raw else []:
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_events_follow_the_api_order_and_contain_the_answer() -> None:
    given = ask('[[say ünï😀 "quoted"]] [[tool Bash {"command": "é"}]]', tools=[BASH])
    listed = events(given)
    kinds = [each["type"] for each in listed]
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    text = "".join(e["delta"]["text"] for e in listed if e.get("delta", {}).get("type") == "text_delta")
    deltas = [e["delta"] for e in listed if e.get("delta", {}).get("type") == "input_json_delta"]
    tool_input = "".join(delta["partial_json"] for delta in deltas)
    assert text == 'ünï😀 "quoted"'
    assert json.loads(tool_input) == {"command": "é"}
    assert listed[-2]["delta"]["stop_reason"] == "tool_use"
    assert listed[-2]["usage"]["output_tokens"] == tokens_of(text) + tokens_of(tool_input)


def test_deltas_count_every_token_once_and_follow_the_rate() -> None:
    slow = ask("[[rate 10]] [[tokens 30]]")
    assert [delta.tokens for delta in frames.deltas(slow)] == [1] * 30
    fast = ask("[[rate 1000]] [[tokens 30]]")
    assert [delta.tokens for delta in frames.deltas(fast)] == [20, 10]


@pytest.mark.parametrize("most", [0, 1, 3, 4, 29, 30, 31])
def test_interrupted_streams_contain_the_given_tokens_and_no_end(most: int) -> None:
    given = ask("[[tokens 30]]")
    assert sum(delta.tokens for delta in frames.deltas(given, most)) == min(most, 30)
    kinds = [each["type"] for each in events(given, most)]
    assert "message_delta" not in kinds
    assert "message_stop" not in kinds
