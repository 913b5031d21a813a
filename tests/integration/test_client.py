"""Both clients against a scripted server on loopback."""

import asyncio
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import mypy.api
import pytest
import pytest_asyncio
from aiohttp import web

from hypercore_agents.api.agents import SpawnRequest
from hypercore_agents.api.chat import ChatRequest
from hypercore_agents.client import (
    AsyncClient,
    AsyncStream,
    ChatOptions,
    Client,
    ClientError,
    Retrying,
    ServerError,
    SpawnOptions,
    Stream,
    StreamLost,
    Unreachable,
)
from support.manager_server import aiohttp_served, frame
from support.scripted_server import RESULT, SESSION, STARTED, Answer, Server, fails, numbered, says, streams

QUICK = Retrying(first=0.001, longest=5.0, outage=0.05)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.serve)
    async with aiohttp_served(app) as server.url:
        yield server


async def both(server: Server, script: list[Answer], work: str) -> list[Any]:
    """Run the same call with both clients, each with the script; return results or exceptions."""
    found: list[Any] = []
    server.script = list(script)

    def synchronous() -> Any:
        client = Client(server.url, "secret-token", retrying=QUICK)
        if work == "stream":
            stream = client.stream("hello", user_id="ada")
            return [*stream.text()], stream.result
        return client.chat("hello", user_id="ada") if work == "chat" else client.agents("ada")

    try:
        found.append(await asyncio.to_thread(synchronous))
    except ClientError as error:
        found.append(error)
    server.script = list(script)
    async with AsyncClient(server.url, "secret-token", retrying=QUICK) as client:
        try:
            if work == "stream":
                stream = client.stream("hello", user_id="ada")
                found.append(([piece async for piece in stream.text()], await stream.result()))
            elif work == "chat":
                found.append(await client.chat("hello", user_id="ada"))
            else:
                found.append(await client.agents("ada"))
        except ClientError as error:
            found.append(error)
    return found


async def test_chats_send_the_token_and_reuse_one_key_over_retries(server: Server) -> None:
    busy = fails("at_capacity", 503, retryable=True, Retry_After="0")
    for result in await both(server, [busy, says(RESULT)], "chat"):
        assert result.usage.total_tokens == 3
        assert result.content == "one two"
    assert len(server.requests) == 4
    for path, headers, body in server.requests:
        assert path == "POST /v1/agent/chat"
        assert headers["Authorization"] == "Bearer secret-token"
        assert body == {"prompt": "hello", "user_id": "ada"}
    keys = [headers["Idempotency-Key"] for _, headers, _ in server.requests]
    assert keys[0] == keys[1] != keys[2] == keys[3]


async def test_errors_have_type_and_request_id_and_are_not_retried(
    server: Server,
) -> None:
    for error in await both(server, [fails("invalid_request", 400, retryable=False)], "chat"):
        assert isinstance(error, ServerError)
        assert (error.type, error.request_id, error.status) == ("invalid_request", "req-7", 400)
        assert error.details == {"field": "x"}
    assert len(server.requests) == 2


async def test_a_retry_after_beyond_the_limit_raises_immediately(server: Server) -> None:
    for error in await both(server, [fails("rate_limited", 429, retryable=True, Retry_After="3600")], "chat"):
        assert isinstance(error, ServerError)
        assert error.retry_after == 3600
    assert len(server.requests) == 2


async def test_retry_after_is_the_minimum_pause() -> None:
    error = ServerError("no", type="rate_limited", retryable=True, retry_after=4.0)
    assert QUICK.pause(error, 1, repeatable=False) == 4.0
    assert QUICK.pause(error, QUICK.attempts, repeatable=True) is None
    assert QUICK.pause(Unreachable("cut", sent=True), 1, repeatable=False) is None
    assert QUICK.pause(Unreachable("refused", sent=False), 1, repeatable=False) is not None


async def test_html_error_pages_of_a_proxy_raise_server_errors(server: Server) -> None:
    async def page(_: web.Request) -> web.StreamResponse:
        return web.Response(status=502, text="<html>bad gateway</html>")

    for error in await both(server, [page] * QUICK.attempts, "list"):
        assert isinstance(error, ServerError)
        assert "bad gateway" in str(error)


async def test_interrupted_streams_resume_after_the_last_event(server: Server) -> None:
    first = streams(
        numbered(1, "session", STARTED), b": keepalive\n\n", numbered(2, "delta", {"text": "one"}),
        numbered(3, "delta", {"text": " lost"})[:25], cut=True,
    )  # fmt: skip
    rest = streams(
        numbered(3, "something_new", {"x": 1}), numbered(4, "delta", {"text": " two"}), numbered(5, "result", RESULT)
    )
    for text, result in await both(server, [first, rest], "stream"):
        assert text == ["one", " two"]
        assert result.status == "completed"
    resumed = server.requests[1]
    assert resumed[0] == f"GET /v1/agent/session/{SESSION}/events/stream"
    assert resumed[1]["Last-Event-ID"] == "1.2"


async def test_leaving_a_stream_interrupts_its_turn(server: Server) -> None:
    begun = streams(numbered(1, "session", STARTED), numbered(2, "delta", {"text": "one"}), numbered(3, "delta", {}))
    server.script = [begun, says({"session_id": SESSION, "interrupted": True})] * 2 + [begun]

    def synchronous() -> None:
        client = Client(server.url, retrying=QUICK)
        with client.stream("hello", user_id="ada") as stream:
            next(iter(stream))
        client.stream("hello", user_id="ada", session_id=SESSION).close()  # not started: nothing to interrupt

    await asyncio.to_thread(synchronous)
    async with AsyncClient(server.url, retrying=QUICK) as client:
        async with client.stream("hello", user_id="ada") as stream:
            await anext(aiter(stream))
        async with client.stream("hello", user_id="ada", on_disconnect="interrupt") as stream:
            await anext(aiter(stream))
    sent = [path for path, _, _ in server.requests]
    left = ["POST /v1/agent/chat", f"POST /v1/agent/session/{SESSION}/interrupt"]
    assert sent == [*left, *left, "POST /v1/agent/chat"]
    modes = [body["on_disconnect"] for path, _, body in server.requests if path.endswith("/chat")]
    assert modes == ["continue", "continue", "interrupt"]


async def test_text_repeated_after_a_reset_is_not_returned_twice(server: Server) -> None:
    first = streams(
        numbered(1, "session", STARTED), numbered(2, "delta", {"text": "one"}), numbered(3, "delta", {"text": " two"}),
        cut=True,
    )  # fmt: skip

    def again(**text: Any) -> Answer:
        return streams(
            frame("reset", {"reason": "repeated as a whole"}), numbered(4, "text", text),
            numbered(5, "delta", {"text": " four"}), numbered(6, "result", RESULT),
        )  # fmt: skip

    for text, _ in await both(server, [first, again(text="one two three")], "stream"):
        assert text == ["one", " two", " three", " four"]
    for found in await both(server, [first, again(text="another answer")], "stream"):
        assert isinstance(found, StreamLost)
        assert "a different text" in str(found)
    for found in await both(server, [first, again(text="one two three", truncated=True)], "stream"):
        assert isinstance(found, StreamLost)
        assert "only the beginning" in str(found)


async def test_withdrawn_text_without_a_replacement_is_an_error(server: Server) -> None:
    script = streams(
        numbered(1, "session", STARTED), numbered(2, "delta", {"text": "one"}), numbered(3, "reset", {"reason": "cut"}),
        numbered(4, "result", RESULT),
    )  # fmt: skip
    for found in await both(server, [script], "stream"):
        assert isinstance(found, StreamLost)


@pytest.mark.parametrize("headers_came", [False, True])
async def test_leaving_a_turn_before_its_first_event_interrupts_it(server: Server, headers_came: bool) -> None:
    arrived, over = asyncio.Event(), asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        if headers_came:
            await response.prepare(request)
        arrived.set()
        await over.wait()
        return response

    server.script = [silent, says({"session_id": SESSION, "interrupted": True})]
    async with AsyncClient(server.url, retrying=QUICK) as client:
        reading = asyncio.create_task(client.stream("hello", user_id="ada", session_id=SESSION).result())
        await arrived.wait()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert [path for path, _, _ in server.requests][1:] == [f"POST /v1/agent/session/{SESSION}/interrupt"]
        over.set()


async def test_rejected_turns_do_not_interrupt_the_running_turn(server: Server) -> None:
    server.script = [fails("session_busy", 409, retryable=False)]
    async with AsyncClient(server.url, retrying=QUICK) as client:
        with pytest.raises(ServerError):
            async with client.stream("hello", user_id="ada", session_id=SESSION) as stream:
                await anext(aiter(stream))
    assert len(server.requests) == 1


async def test_break_without_a_with_block_interrupts_the_turn(server: Server) -> None:
    begun = streams(numbered(1, "session", STARTED), numbered(2, "delta", {"text": "one"}), numbered(3, "delta", {}))
    interrupted = asyncio.Event()

    async def interrupt(_: web.Request) -> web.StreamResponse:
        interrupted.set()
        return web.json_response({"session_id": SESSION, "interrupted": True})

    def synchronous() -> None:
        for _ in Client(server.url, retrying=QUICK).stream("hello", user_id="ada").text():
            break

    async def asynchronous(client: AsyncClient) -> None:
        async for _ in client.stream("hello", user_id="ada").text():
            break

    server.script = [begun, interrupt]
    await asyncio.to_thread(synchronous)
    assert interrupted.is_set()
    interrupted.clear()
    server.script = [begun, interrupt]
    async with AsyncClient(server.url, retrying=QUICK) as client:
        await asynchronous(client)
        await asyncio.wait_for(interrupted.wait(), 30)
    interrupted.clear()
    server.script = [begun, interrupt]
    async with AsyncClient(server.url, retrying=QUICK) as client:
        referenced = client.stream("hello", user_id="ada")  # still referenced: closing the client ends the stream
        async for _ in referenced:
            break
    assert interrupted.is_set()


async def test_failed_resumption_reports_the_last_event(server: Server) -> None:
    first = streams(numbered(1, "session", STARTED), numbered(2, "delta", {"text": "one"}), cut=True)
    for error in await both(server, [first, fails("not_found", 404, retryable=False)], "stream"):
        assert isinstance(error, StreamLost)
        assert (error.session_id, error.last_event_id) == (SESSION, "1.2")


async def test_error_events_end_a_stream_with_an_exception(server: Server) -> None:
    error = {"type": "model_error", "message": "no", "request_id": "req-9", "retryable": True}
    script = [streams(numbered(1, "session", STARTED), numbered(2, "error", {"error": error}))]
    for found in await both(server, script, "stream"):
        assert isinstance(found, ServerError)
        assert (found.type, found.request_id) == ("model_error", "req-9")
    assert len(server.requests) == 2


async def test_files_are_written_and_read_unchanged(server: Server) -> None:
    stored: list[bytes] = []

    async def put(request: web.Request) -> web.StreamResponse:
        assert request.content_type == "application/octet-stream"
        stored.append(await request.read())
        return web.json_response({"session_id": SESSION, "path": "a b/c.bin", "size": 2})

    async def get(request: web.Request) -> web.StreamResponse:
        assert request.raw_path.endswith(f"/v1/agent/session/{SESSION}/files/a%20b/c.bin")
        return web.Response(body=stored[-1], content_type="application/octet-stream")

    listed = says({"session_id": SESSION, "count": 0, "files": [], "truncated": False})
    server.script = [put, get, listed] * 2

    def synchronous() -> None:
        client = Client(server.url, retrying=QUICK)
        assert client.write_file(SESSION, "a b/c.bin", b"{}").size == 2
        assert client.read_file(SESSION, "a b/c.bin") == b"{}"
        assert client.files(SESSION).files == []

    await asyncio.to_thread(synchronous)
    async with AsyncClient(server.url, retrying=QUICK) as client:
        await client.write_file(SESSION, "a b/c.bin", b"{}")
        assert await client.read_file(SESSION, "a b/c.bin") == b"{}"
        assert (await client.files(SESSION)).count == 0


async def test_a_closed_port_is_unreachable_and_nothing_was_sent() -> None:
    with pytest.raises(Unreachable) as caught:
        Client("http://127.0.0.1:9", retrying=QUICK).stats()
    assert not caught.value.sent
    async with AsyncClient("http://127.0.0.1:9", retrying=QUICK) as client:
        with pytest.raises(Unreachable) as caught:
            await client.stats()
    assert not caught.value.sent


def test_invalid_urls_are_rejected_with_an_explanation() -> None:
    with pytest.raises(ClientError, match="not the URL of a manager"):
        Client("localhost:8080")


def test_importing_the_client_imports_no_large_modules() -> None:
    heavy = ("aiohttp", "fastapi", "sqlalchemy", "claude_agent_sdk", "cryptography", "uvicorn", "rich")
    code = f"import sys, hypercore_agents.client; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "[]"


async def test_session_history_and_events_are_paged(server: Server) -> None:
    message = {"role": "user", "text": "hello"}
    view = {
        "session_id": SESSION, "user_id": "ada", "agent_id": None, "state": "parked", "turns": 1, "running": False,
        "created_at": "x", "last_used_at": "x", "usage": RESULT["usage"], "history": [message], "history_next": 7,
    }  # fmt: skip
    event = {"id": "1.2", "event": "text", "data": {"text": "hello"}, "at": "x"}
    log = {"session_id": SESSION, "count": 1, "events": [event], "next": "1.2", "cut": False}
    server.script = [says(view), says(view), says(log), says(log)] * 2
    client = Client(server.url)
    shown = [
        await asyncio.to_thread(client.session, SESSION),
        await asyncio.to_thread(client.session, SESSION, history=5, before=7),
    ]
    logs = [
        await asyncio.to_thread(client.events, SESSION),
        await asyncio.to_thread(client.events, SESSION, after="1.1", limit=1),
    ]
    async with AsyncClient(server.url) as other:
        shown += [await other.session(SESSION), await other.session(SESSION, history=5, before=7)]
        logs += [await other.events(SESSION), await other.events(SESSION, after="1.1", limit=1)]
    assert {(each.history[0].text, each.history_next, each.state) for each in shown} == {("hello", 7, "parked")}
    assert {(each.events[0].id, each.events[0].event, each.next) for each in logs} == {("1.2", "text", "1.2")}
    path = f"GET /v1/agent/session/{SESSION}"
    assert [sent for sent, _, _ in server.requests] == [
        f"{path}?history=20", f"{path}?history=5&before=7",
        f"{path}/events?limit=100", f"{path}/events?after=1.1&limit=1",
    ] * 2  # fmt: skip


async def test_logs_are_read_and_followed_until_the_agent_ends(server: Server) -> None:
    agent = {
        "agent_id": "agent-1", "url": "http://x", "metrics_url": "http://x", "status": "running", "user_id": "ada",
        "kind": "dedicated", "cores": 1, "memory": 512, "max_concurrent": 1, "timeout": 5, "tags": {}, "sessions": 0,
        "created_at": "x", "backend": "process", "isolation": "process", "tools": True,
    }  # fmt: skip

    def printed(text: str) -> Answer:
        async def answer(_: web.Request) -> web.StreamResponse:
            return web.Response(text=text)

        return answer

    cut = fails("unavailable", 503, retryable=True, Retry_After="0")
    script = [
        printed("one\ntwo\n"), printed("one\ntwo\nthree"), says(agent), cut, printed("one\ntwo\nthree\nfour"),
        printed("one\ntwo\nthree\nfour"), says({**agent, "status": "failed"}), printed("end"),
    ]  # fmt: skip
    server.script = [*script, *script]
    with Client(server.url, retrying=QUICK) as client:
        lines = await asyncio.to_thread(lambda: [*client.follow_logs("agent-1", tail=1, every=0.001)])
        assert await asyncio.to_thread(client.logs, "agent-1", limit=3) == "end"
    async with AsyncClient(server.url, retrying=QUICK) as other:
        again = [line async for line in other.follow_logs("agent-1", tail=1, every=0.001)]
        assert await other.logs("agent-1", limit=3) == "end"
    assert lines == again == ["two", "three", "four"]
    assert server.script == []


@pytest.mark.parametrize(("asynchronous", "synchronous"), [(AsyncClient, Client), (AsyncStream, Stream)])
def test_both_clients_have_the_same_methods_and_parameters(asynchronous: type, synchronous: type) -> None:
    def shape(client: type) -> dict[str, list[tuple[str, Any, Any]]]:
        public = {name: value for name, value in vars(client).items() if not name.startswith("_")}
        return {
            name: [
                (each.name, each.kind, each.default) for each in inspect.signature(value).parameters.values()
            ] if callable(value) else [("self", inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty)]
            for name, value in public.items()
        }  # fmt: skip

    assert shape(asynchronous) == shape(synchronous)
    assert "chat" in shape(synchronous) or "text" in shape(synchronous)


async def test_answers_of_another_program_raise_a_clear_error(server: Server) -> None:
    for error in await both(server, [says({"hello": "world"})], "list"):
        assert isinstance(error, Unreachable)
        assert "it is not this platform (/v1/agents/list: user_id: Field required)" in str(error)
        assert "hello" not in str(error)


async def test_malformed_events_end_a_stream_with_a_clear_error(server: Server) -> None:
    wrong = streams(numbered(1, "session", STARTED), numbered(2, "delta", {"texts": 1}))
    for error in await both(server, [wrong], "stream"):
        assert isinstance(error, StreamLost)
        assert (error.session_id, error.last_event_id) == (SESSION, "1.2")
        assert "delta has an unknown format" in str(error)


def test_option_types_name_every_field_of_the_api() -> None:
    separate_parameters = {"prompt", "user_id", "session_id", "stream"}
    assert set(ChatOptions.__annotations__) == set(ChatRequest.model_fields) - separate_parameters
    assert set(SpawnOptions.__annotations__) == set(SpawnRequest.model_fields) - separate_parameters


def test_programs_that_use_the_client_pass_mypy_strict(tmp_path: Path) -> None:
    """The package is typed (`py.typed`), and its results are never Any."""
    program = tmp_path / "program.py"
    program.write_text(
        """from hypercore_agents.client import AsyncClient, Client

with Client() as client:
    reveal_type(client.chat("hi", user_id="ada", when_busy="queue", max_turns=3).usage.cost_usd)
    reveal_type([piece for piece in client.stream("hi", user_id="ada").text()])
    client.chat("hi", user_id="ada", max_turn=3)


async def main() -> None:
    async with AsyncClient() as other:
        reveal_type([line async for line in other.follow_logs("agent-1")])
"""
    )
    report, errors, status = mypy.api.run([str(program)])  # strict, as configured for the project
    assert errors == ""
    found = [line.partition(": ")[2].partition("  [")[0] for line in report.splitlines() if "program.py:" in line]
    found = [line for line in found if "defined in" not in line]
    assert found == [
        'note: Revealed type is "float"',
        'note: Revealed type is "list[str]"',
        'error: Unexpected keyword argument "max_turn" for "chat" of "Client"; did you mean "max_turns"?',
        'note: Revealed type is "list[str]"',
    ]
    assert status == 1
