"""The official `anthropic` client against the simulator."""

import hashlib
import time
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import httpx2
import pytest
from anthropic.types import MessageParam, ToolParam, ToolResultBlockParam

from support.simulator_fixtures import RunningSimulator, StartSimulator

MODEL = "claude-opus-5-5"
WRITE: ToolParam = {
    "name": "Write",
    "input_schema": {"type": "object", "properties": {"file_path": {"type": "string"}}},
}


def client_of(simulator: RunningSimulator, **options: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url=simulator.url, **{"api_key": "sk-official", "max_retries": 0, "timeout": 20.0, **options}
    )


def prompt(text: str) -> list[MessageParam]:
    return [{"role": "user", "content": text}]


async def say(client: anthropic.AsyncAnthropic, text: str, **more: Any) -> anthropic.types.Message:
    message = await client.messages.create(model=MODEL, max_tokens=1000, messages=prompt(text), **more)
    assert isinstance(message, anthropic.types.Message)
    return message


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


async def test_a_message_is_answered_deterministically(simulator: RunningSimulator) -> None:
    async with client_of(simulator) as client:
        message = await say(client, "hello", system="Be brief.", extra_body={"temperature": 0.5})
        again = await say(client, "hello", system="Be brief.", extra_body={"temperature": 0.5})
    assert text_of(message) == 'Turn 1. You said: "hello".'
    assert (message.stop_reason, message.model, message.role) == ("end_turn", MODEL, "assistant")
    assert message.usage.output_tokens == 7
    assert message.usage.input_tokens > 0
    assert (message.usage.cache_read_input_tokens, message.usage.cache_creation_input_tokens) == (0, 0)
    assert again == message, "the same request must get the same answer"
    assert message._request_id is not None
    assert message._request_id.startswith("req_")
    assert again._request_id != message._request_id


async def test_streamed_and_unstreamed_messages_are_equal(simulator: RunningSimulator) -> None:
    async with client_of(simulator) as client:
        whole = await say(client, "[[tokens 40]] hello")
        async with client.messages.stream(model=MODEL, max_tokens=1000, messages=prompt("[[tokens 40]] hello")) as s:
            pieces = [text async for text in s.text_stream]
            streamed = await s.get_final_message()
    assert len(pieces) == 10
    assert "".join(pieces) == text_of(whole) == text_of(streamed)
    assert streamed.usage.output_tokens == whole.usage.output_tokens == 40
    assert streamed.stop_reason == "end_turn"


async def test_streams_follow_the_requested_pace(simulator: RunningSimulator) -> None:
    async with client_of(simulator) as client:
        started = time.monotonic()
        first = None
        async with client.messages.stream(
            model=MODEL, max_tokens=1000, messages=prompt("[[ttft 0.3]] [[rate 50]] [[tokens 26]]")
        ) as stream:
            async for _ in stream.text_stream:
                first = first or time.monotonic() - started
        total = time.monotonic() - started
    assert first is not None
    assert first >= 0.3
    assert total >= 0.3 + 25 / 50


async def test_tools_are_called_in_order_and_their_results_quoted(simulator: RunningSimulator) -> None:
    script = '[[tool Write {"file_path": "a"}]] [[tool Write {"file_path": "b"}]]'
    messages = prompt(script)
    inputs = []
    async with client_of(simulator) as client:
        for _ in range(3):
            async with client.messages.stream(model=MODEL, max_tokens=1000, messages=messages, tools=[WRITE]) as s:
                message = await s.get_final_message()
            uses = [block for block in message.content if block.type == "tool_use"]
            if not uses:
                break
            assert message.stop_reason == "tool_use"
            inputs.append(uses[0].input)
            messages.append({"role": "assistant", "content": message.content})
            answer: ToolResultBlockParam = {
                "type": "tool_result",
                "tool_use_id": uses[0].id,
                "content": f"wrote {uses[0].input}",
            }
            messages.append({"role": "user", "content": [answer]})
    assert inputs == [{"file_path": "a"}, {"file_path": "b"}]
    assert "wrote {'file_path': 'a'}" in text_of(message)
    assert "wrote {'file_path': 'b'}" in text_of(message)
    assert len(simulator.requests()) == 3


async def test_the_conversation_can_be_recalled(simulator: RunningSimulator) -> None:
    messages: list[MessageParam] = [
        {"role": "user", "content": "the word is heliotrope"},
        {"role": "assistant", "content": "noted"},
        {"role": "user", "content": "[[recall 1]] [[recall system]]"},
    ]
    async with client_of(simulator) as client:
        message = await client.messages.create(model=MODEL, max_tokens=500, system="You are Bob.", messages=messages)
    assert text_of(message) == 'Prompt 1 was: "the word is heliotrope".\nThe system prompt begins: "You are Bob.".'


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, anthropic.BadRequestError),
        (401, anthropic.AuthenticationError),
        (403, anthropic.PermissionDeniedError),
        (404, anthropic.NotFoundError),
        (413, anthropic.RequestTooLargeError),
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
        (529, anthropic.OverloadedError),
    ],
)
async def test_fault_directives_raise_the_matching_errors(
    simulator: RunningSimulator, status: int, error: type[anthropic.APIStatusError]
) -> None:
    async with client_of(simulator) as client:
        with pytest.raises(error) as caught:
            await say(client, f"[[fault {status} retry_after=7]]")
    assert caught.value.status_code == status
    assert caught.value.request_id is not None
    assert caught.value.response.headers.get("retry-after") == ("7" if status == 429 else None)


async def test_limited_faults_end_after_client_retries(simulator: RunningSimulator) -> None:
    async with client_of(simulator, max_retries=2) as client:
        message = await say(client, "[[fault 529 times=1]] [[fault 429 retry_after=0 times=1]] finally")
    assert text_of(message) == 'Turn 1. You said: "finally".'
    assert [each["answer"]["status"] for each in simulator.requests()] == [529, 429, 200]


async def test_refused_connections_raise_connection_errors(simulator: RunningSimulator) -> None:
    async with client_of(simulator) as client:
        with pytest.raises(anthropic.APIConnectionError):
            await say(client, "[[fault refuse]]")


@pytest.mark.parametrize("fault", ["cut after=5", "refuse after=5"])
async def test_cut_streams_end_early_with_an_error(simulator: RunningSimulator, fault: str) -> None:
    received = ""
    async with client_of(simulator) as client:
        with pytest.raises((httpx2.TransportError, anthropic.APIConnectionError)):  # noqa: PT012
            async with client.messages.stream(
                model=MODEL, max_tokens=1000, messages=prompt(f"[[fault {fault}]] [[rate 50]] [[tokens 50]]")
            ) as stream:
                async for text in stream.text_stream:
                    received += text
    assert 0 < len(received) <= 20


async def test_cut_unstreamed_answers_raise_an_error(simulator: RunningSimulator) -> None:
    async with client_of(simulator) as client:
        with pytest.raises(anthropic.APIConnectionError):
            await say(client, "[[fault cut]]")


async def test_an_error_event_in_the_middle_of_a_stream(simulator: RunningSimulator) -> None:
    async with client_of(simulator) as client:
        stream = client.messages.stream(model=MODEL, max_tokens=1000, messages=prompt("[[fault 529 after=2]] hello"))
        with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
            async with stream as events:
                await events.get_final_message()


async def test_hanging_requests_time_out_at_the_client(simulator: RunningSimulator) -> None:
    async with client_of(simulator, timeout=0.5) as client:
        with pytest.raises(anthropic.APITimeoutError):
            await say(client, "[[fault hang]]")


async def test_stop_reasons_and_max_tokens(simulator: RunningSimulator) -> None:
    async with client_of(simulator) as client:
        cut = await client.messages.create(model=MODEL, max_tokens=5, messages=prompt("[[tokens 50]]"))
        refused = await say(client, "[[stop refusal]]")
    assert (cut.stop_reason, cut.usage.output_tokens, len(text_of(cut))) == ("max_tokens", 5, 20)
    assert refused.stop_reason == "refusal"


async def test_counted_tokens_equal_the_usage_of_a_message(simulator: RunningSimulator) -> None:
    async with client_of(simulator) as client:
        counted = await client.messages.count_tokens(model=MODEL, messages=prompt("hello"), tools=[WRITE])
        message = await say(client, "hello", tools=[WRITE])
    assert counted.input_tokens == message.usage.input_tokens


async def test_models_are_listed_and_retrieved(simulator: RunningSimulator) -> None:
    async with client_of(simulator) as client:
        listed = [model.id async for model in client.models.list()]
        assert MODEL in listed
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(anthropic.NotFoundError):
            await client.models.retrieve("claude-unknown")


async def test_invalid_bodies_are_rejected_with_the_field(simulator: RunningSimulator) -> None:
    async with client_of(simulator) as client:
        with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.0: text content blocks"):
            await say(client, "")
        with pytest.raises(anthropic.BadRequestError, match=r"directive \[\[fault\]\]"):
            await say(client, "[[fault often]]")


async def test_credentials_are_required_and_checked(
    simulator: RunningSimulator, start_simulator: StartSimulator, tmp_path: Path
) -> None:
    async with client_of(simulator, api_key=None, auth_token="a-bearer-token") as client:
        assert text_of(await say(client, "[[say hi]]")) == "hi"
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{simulator.url}/v1/messages", json={}, headers={"x-api-key": " "}) as answer,
    ):
        assert answer.status == 401
        assert (await answer.json())["error"]["type"] == "authentication_error"

    keys = tmp_path / "keys"
    keys.write_text("sk-one\nsk-two\n")
    strict = start_simulator(api_keys_file=keys)
    async with client_of(strict, api_key="sk-two") as client:
        assert text_of(await say(client, "[[say hi]]")) == "hi"
    async with client_of(strict, api_key="sk-three") as client:
        with pytest.raises(anthropic.AuthenticationError, match="invalid x-api-key"):
            await say(client, "[[say hi]]")


async def test_requests_are_recorded_without_credentials(simulator: RunningSimulator) -> None:
    async with client_of(simulator, api_key="sk-secret-one") as client:
        for session in ("a", "b", "a"):
            headers = {"x-claude-code-session-id": session, "x-api-key": "sk-secret-two"}
            await say(client, "hi", extra_body={"temperature": 0.25}, extra_headers=headers)
        with pytest.raises(anthropic.BadRequestError):
            await say(client, "")
    everything = simulator.requests()
    assert [each["session_id"] for each in everything] == ["a", "b", "a", None]
    assert everything[-1]["answer"]["status"] == 400
    assert len(simulator.requests("a")) == 2
    assert simulator.requests(limit=1) == everything[-1:]
    first = everything[0]
    assert first["body"]["temperature"] == 0.25
    assert first["body"]["messages"] == prompt("hi")
    assert first["answer"]["output_tokens"] == 6
    assert first["headers"]["authorization"] == f"Bearer sha256:{hashlib.sha256(b'sk-secret-one').hexdigest()}"
    assert first["headers"]["x-api-key"] == f"sha256:{hashlib.sha256(b'sk-secret-two').hexdigest()}"
    assert "sk-secret" not in str(everything)
    simulator.clear()
    assert simulator.requests() == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/", 200),
        ("GET", "/", 200),
        ("HEAD", "/api/hello", 200),
        ("GET", "/health", 200),
        ("GET", "/nothing", 404),
        ("POST", "/health", 405),
        ("GET", "/v1/messages", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/simulator/requests?limit=0", 400),
        ("GET", "/simulator/requests?session=1", 400),
    ],
)
async def test_status_of_other_routes(simulator: RunningSimulator, method: str, path: str, status: int) -> None:
    async with (
        aiohttp.ClientSession() as http,
        http.request(method, simulator.url + path, headers={"x-api-key": "k"}) as answer,
    ):
        assert answer.status == status
        if status >= 400 and method != "HEAD":
            assert (await answer.json())["type"] == "error"
