"""The API fails, dies or stalls, clients disconnect, the store fails: the responses and the charges."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pytest

from hypercore_agents.api.errors import Unavailable
from hypercore_agents.gateway import ledger_retry, model, model_responses
from hypercore_agents.gateway.metering import Tokens
from hypercore_agents.gateway.model_responses import ModelAnswer
from hypercore_agents.gateway.pricing import PriceList
from hypercore_agents.store import ledger
from hypercore_agents.store.database import Database, sqlite_url
from hypercore_agents.store.ledger import LedgerEntry
from support.gateway_server import MODEL, PLATFORM_KEY, Site, gateway_site
from support.relay_ends import Connection, scripted_upstream

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def frame(name: str, **data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


START = frame("message_start", message={
    "id": "m", "type": "message", "role": "assistant", "content": [], "model": MODEL, "stop_reason": None,
    "stop_sequence": None, "usage": {"input_tokens": 25, "output_tokens": 1, "cache_read_input_tokens": 100},
})  # fmt: skip
BLOCK = frame("content_block_start", index=0, content_block={"type": "text", "text": ""})
DELTA = frame("content_block_delta", index=0, delta={"type": "text_delta", "text": "x" * 40})
END = frame("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 12}) + frame("message_stop")

Script = Callable[[Connection], Awaitable[None]]


async def with_api(folder: Path, script: Script, test: Callable[[Site], Awaitable[None]], **values: Any) -> None:
    store = sqlite_url(folder / "s.db")
    async with scripted_upstream(script) as api, gateway_site(folder, store, api.url, **values) as site:
        await test(site)


async def charged(site: Site) -> LedgerEntry:
    """Wait for the one ledger entry."""
    async with asyncio.timeout(10):
        while not (entries := await site.entries()):
            await asyncio.sleep(0.01)
    (entry,) = entries
    return entry


async def read_stream(site: Site, token: str) -> tuple[str, bool]:
    """Return the bytes of a stream, and whether it is complete by HTTP's framing."""
    body = {"model": MODEL, "max_tokens": 100, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    text = b""
    async with site.http.post(f"{site.url}/v1/messages", json=body, headers={"x-api-key": token}) as answer:
        assert answer.status == 200
        try:
            async for piece in answer.content.iter_any():
                text += piece
        except aiohttp.ClientPayloadError:
            return text.decode(), False
    return text.decode(), True


async def test_a_stream_cut_by_the_api_is_cut_and_charged(tmp_path: Path) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(HEAD)
        await connection.chunk(START + BLOCK + DELTA * 3 + DELTA[:30])

    async def test(site: Site) -> None:
        text, whole = await read_stream(site, site.token(await site.session(model=MODEL)))
        assert text.encode() == START + BLOCK + DELTA * 3  # complete frames only
        assert not whole
        entry = await charged(site)
        assert (entry.outcome, entry.input_tokens, entry.cache_read_tokens) == ("cut", 25, 100)
        assert entry.output_tokens == 30  # 120 characters

    await with_api(tmp_path, script, test)


async def test_a_stream_that_ends_early_is_reported(tmp_path: Path) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(HEAD)
        await connection.chunk(START + BLOCK + DELTA)
        await connection.chunk(b"")

    async def test(site: Site) -> None:
        token = site.token(await site.session(model=MODEL))
        async with anthropic.AsyncAnthropic(base_url=site.url, api_key=token, max_retries=0) as client:
            with pytest.raises(Exception, match=r"(?i)connection|peer|incomplete"):
                async with client.messages.stream(
                    model=MODEL, max_tokens=90, messages=[{"role": "user", "content": "x"}]
                ) as stream:
                    await stream.get_final_message()
        assert (await charged(site)).output_tokens == 10

    await with_api(tmp_path, script, test)


async def test_a_disconnected_client_is_charged(tmp_path: Path) -> None:
    cancelled = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(HEAD)
        await connection.chunk(START + BLOCK + DELTA)
        await connection.closed_by_peer()
        cancelled.set()

    async def test(site: Site) -> None:
        token = site.token(await site.session(model=MODEL))
        body = {"model": MODEL, "max_tokens": 50, "stream": True, "messages": []}
        async with aiohttp.ClientSession() as http:
            answer = await http.post(f"{site.url}/v1/messages", json=body, headers={"x-api-key": token})
            await answer.content.readuntil(b"content_block_delta")
            answer.close()
        async with asyncio.timeout(5):
            await cancelled.wait()
        entry = await charged(site)
        assert (entry.outcome, entry.input_tokens, entry.output_tokens) == ("cut", 25, 10)

    await with_api(tmp_path, script, test)


THINKING = frame("content_block_start", index=0, content_block={"type": "thinking", "thinking": "", "signature": ""})
SIGNATURE = frame("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "c2ln"})
CHINESE = "\u4f60\u597d" * 500


@pytest.mark.parametrize(
    ("frames", "least", "most"),
    [
        (THINKING + SIGNATURE, 100, 100),
        (THINKING, 100, 100),
        (BLOCK + f'event: content_block_delta\ndata: {{"delta":{{"text":"{CHINESE}"}}}}\n\n'.encode(), 100, 100),
        (BLOCK + f'event: content_block_delta\ndata: {{"delta":{{"text":"{CHINESE[:60]}"}}}}\n\n'.encode(), 60, 100),
        (b"event: ping\ndata: " + b"x" * 5_000_000 + b"\n\n", 1, 100),
        (BLOCK + DELTA + THINKING + SIGNATURE + END[: END.index(b"event: message_stop")], 12, 12),
    ],
    ids=["a signature", "thinking begun", "much Chinese", "some Chinese", "a junk line", "a cut after the usage"],
)
async def test_a_cut_stream_is_charged_for_its_possible_output(
    tmp_path: Path, frames: bytes, least: int, most: int
) -> None:
    """At least the output seen so far, at most max_tokens (100), and the API's number if it arrived."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(HEAD)
        await connection.chunk(START + frames)

    async def test(site: Site) -> None:
        await read_stream(site, site.token(await site.session(model=MODEL)))
        entry = await charged(site)
        assert (entry.outcome, entry.input_tokens) == ("cut", 25)
        assert least <= entry.output_tokens <= most

    await with_api(tmp_path, script, test)


async def test_a_thinking_stream_is_read_on_without_its_client(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(HEAD)
        await connection.chunk(START + THINKING + SIGNATURE)
        await left.wait()
        await connection.chunk(END)
        await connection.chunk(b"")

    async def test(site: Site) -> None:
        token = site.token(await site.session(model=MODEL))
        body = {"model": MODEL, "max_tokens": 5000, "stream": True, "messages": []}
        async with aiohttp.ClientSession() as http:
            answer = await http.post(f"{site.url}/v1/messages", json=body, headers={"x-api-key": token})
            await answer.content.readuntil(b"signature_delta")
            answer.close()
        left.set()
        assert (await charged(site)).output_tokens == 12

    await with_api(tmp_path, script, test)


async def test_an_endless_thinking_stream_costs_max_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "DRAIN_SECONDS", 0.2)

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(HEAD)
        await connection.chunk(START + THINKING + SIGNATURE)
        await connection.closed_by_peer()

    async def test(site: Site) -> None:
        token = site.token(await site.session(model=MODEL))
        body = {"model": MODEL, "max_tokens": 5000, "stream": True, "messages": []}
        async with aiohttp.ClientSession() as http:
            answer = await http.post(f"{site.url}/v1/messages", json=body, headers={"x-api-key": token})
            await answer.content.readuntil(b"signature_delta")
            answer.close()
        assert (await charged(site)).output_tokens == 5000

    await with_api(tmp_path, script, test)


async def test_searches_count_against_the_budget(tmp_path: Path) -> None:
    usage = {"input_tokens": 10, "output_tokens": 5, "server_tool_use": {"web_search_requests": 3}}
    body = json.dumps({"type": "message", "usage": usage}).encode()
    search = {"type": "web_search_20250305", "name": "web_search"}

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    async def test(site: Site) -> None:
        token = site.token(await site.session(model=MODEL, max_budget_usd=11))
        status, answer, _ = await site.ask(token=token, tools=[search])
        assert (status, answer["error"]["details"]["field"]) == (400, "tools.0.max_uses")
        assert (await site.ask(token=token, tools=[{**search, "max_uses": 2000}]))[0] == 403
        assert (await site.ask(token=token, tools=[{**search, "max_uses": 3}]))[0] == 200
        entry = await charged(site)
        assert entry.cost_micro_usd == 10 * 2 + 5 * 10 + 3 * 10_000

    await with_api(tmp_path, script, test, allowed_server_tools=("web_search_20250305",))


async def test_searches_of_a_cut_stream_are_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "DRAIN_SECONDS", 0.2)
    use = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(HEAD)
        await connection.chunk(START + frame("content_block_start", index=0, content_block=use))
        await connection.chunk(frame("content_block_start", index=1, content_block={**use, "id": "srvtoolu_2"}))
        await connection.closed_by_peer()

    async def test(site: Site) -> None:
        token = site.token(await site.session(model=MODEL))
        search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
        body = {"model": MODEL, "max_tokens": 100, "stream": True, "messages": [], "tools": [search]}
        async with aiohttp.ClientSession() as http:
            answer = await http.post(f"{site.url}/v1/messages", json=body, headers={"x-api-key": token})
            await answer.content.readuntil(b"srvtoolu_2")
            answer.close()
        entry = await charged(site)
        tokens = Tokens(entry.input_tokens, entry.output_tokens, entry.cache_read_tokens)
        assert entry.cost_micro_usd == PriceList().cost_micro_usd(MODEL, tokens) + 2 * 10_000

    await with_api(tmp_path, script, test, allowed_server_tools=("web_search_20250305",))


async def test_impossible_token_numbers_are_not_accepted(tmp_path: Path) -> None:
    usage = {"input_tokens": 2**31 - 1, "output_tokens": 2**31 - 1, "cache_read_input_tokens": 2**40}
    body = json.dumps({"type": "message", "usage": usage}).encode()

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    async def test(site: Site) -> None:
        await site.ask(token=site.token(await site.session(model=MODEL)))
        entry = await charged(site)
        assert max(entry.input_tokens, entry.output_tokens, entry.cache_read_tokens) == 10_000_000

    await with_api(tmp_path, script, test)


async def test_an_early_disconnect_is_charged_for_its_input(tmp_path: Path) -> None:
    arrived = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.request()
        arrived.set()
        await connection.closed_by_peer()

    async def test(site: Site) -> None:
        token = site.token(await site.session(model=MODEL))
        asking = asyncio.create_task(
            site.ask(token=token, stream=True, messages=[{"role": "user", "content": "y" * 4000}])
        )
        async with asyncio.timeout(5):
            await arrived.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        entry = await charged(site)
        assert (entry.outcome, entry.output_tokens) == ("cut", 0)
        assert 1000 <= entry.input_tokens <= 1100

    await with_api(tmp_path, script, test)


async def test_an_unstreamed_request_is_charged_in_full(tmp_path: Path) -> None:
    arrived, left = asyncio.Event(), asyncio.Event()
    body = json.dumps({"type": "message", "usage": {"input_tokens": 11, "output_tokens": 22}}).encode()

    async def script(connection: Connection) -> None:
        await connection.request()
        arrived.set()
        await left.wait()
        await connection.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    async def test(site: Site) -> None:
        token = site.token(await site.session(model=MODEL))
        asking = asyncio.create_task(site.ask(token=token))
        async with asyncio.timeout(5):
            await arrived.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        left.set()
        entry = await charged(site)
        assert (entry.outcome, entry.input_tokens, entry.output_tokens) == ("complete", 11, 22)

    await with_api(tmp_path, script, test)


async def test_an_unreachable_api_costs_nothing(tmp_path: Path) -> None:
    async with gateway_site(tmp_path, sqlite_url(tmp_path / "s.db"), "http://127.0.0.1:9") as site:
        status, body, headers = await site.ask(token=site.token(await site.session()), stream=True)
        assert (status, body["error"]["type"], headers["x-should-retry"]) == (503, "unavailable", "true")
        assert "the Claude API could not be reached" in body["error"]["message"]
        assert await site.entries() == []
        assert 'upstream_requests_total{status="unreachable"} 1.0' in await site.metrics()


async def test_an_error_only_stream_is_free(tmp_path: Path) -> None:
    overloaded = frame("error", error={"type": "overloaded_error", "message": "Overloaded"})

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(HEAD)
        await connection.chunk(overloaded)
        await connection.chunk(b"")

    async def test(site: Site) -> None:
        text, whole = await read_stream(site, site.token(await site.session(model=MODEL)))
        assert (text.encode(), whole) == (overloaded, True)
        assert await site.entries() == []

    await with_api(tmp_path, script, test)


async def test_an_unrecorded_answer_has_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(HEAD)
        await connection.chunk(START + BLOCK + DELTA)
        await connection.chunk(END)
        await connection.chunk(b"")

    async def broken(*_: Any) -> None:
        raise Unavailable("the store does not answer")

    async def test(site: Site) -> None:
        with monkeypatch.context() as patch:
            for module in (model_responses, ledger_retry):
                patch.setattr(module, "add_entry", broken)
            token = site.token(await site.session(model=MODEL))
            text, whole = await read_stream(site, token)
            assert "message_stop" not in text
            assert not whole
            assert "hypercore_gateway_ledger_failures_total 1.0" in await site.metrics()
            status, answer, _ = await site.ask(token=token)
            assert (status, answer["error"]["type"]) == (503, "unavailable"), "no request is sent to the API meanwhile"
        assert (await charged(site)).output_tokens == 12, "written once the store is back"

    await with_api(tmp_path, script, test)


async def test_a_failed_ledger_write_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tries = ledger.add_entry, 0

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(HEAD)
        await connection.chunk(START + BLOCK + DELTA + END)
        await connection.chunk(b"")

    async def flaky(connection: Any, entry: LedgerEntry) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise Unavailable("the store does not answer")
        await real(connection, entry)

    async def test(site: Site) -> None:
        monkeypatch.setattr(model_responses, "add_entry", flaky)
        text, whole = await read_stream(site, site.token(await site.session(model=MODEL)))
        assert text.endswith(END.decode())
        assert whole
        assert (await charged(site)).output_tokens == 12

    await with_api(tmp_path, script, test)


async def test_an_echoed_key_is_not_passed_on(tmp_path: Path) -> None:
    async def script(connection: Connection) -> None:
        _, headers, _ = await connection.request()
        body = json.dumps(
            {"type": "error", "error": {"type": "invalid_request_error", "message": f"you sent {headers['x-api-key']}"}}
        )
        await connection.write(
            f"HTTP/1.1 400 Bad\r\nContent-Type: application/json\r\nX-Echo: {headers['x-api-key']}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        )

    async def test(site: Site) -> None:
        status, body, headers = await site.ask(token=site.token(await site.session()))
        assert status == 400
        assert body["error"]["message"] == "you sent [masked]"
        assert PLATFORM_KEY not in repr(headers)

    await with_api(tmp_path, script, test)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops",
    ],
)
async def test_foreign_answers_get_the_error_shape(tmp_path: Path, answer: bytes) -> None:
    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(answer)

    async def test(site: Site) -> None:
        status, body, _ = await site.ask(token=site.token(await site.session()))
        assert status in (500, 502)
        assert (body["type"], body["error"]["type"]) == ("error", "model_error")

    await with_api(tmp_path, script, test)


async def test_a_body_over_the_limit_is_413_before_it_is_read(tmp_path: Path) -> None:
    async def silent(_: Connection) -> None:
        raise AssertionError("nothing may reach the API")

    async def test(site: Site) -> None:
        token = site.token(await site.session())
        reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rsplit(":", 1)[1]))
        writer.write(
            f"POST /v1/messages HTTP/1.1\r\nHost: g\r\nx-api-key: {token}\r\nContent-Length: 33554433\r\n\r\n".encode()
        )
        async with asyncio.timeout(5):
            assert b" 413 " in await reader.readline()
        writer.close()

    await with_api(tmp_path, silent, test)


async def test_a_request_with_two_lengths_is_rejected(tmp_path: Path) -> None:
    async def silent(_: Connection) -> None:
        raise AssertionError("nothing may reach the API")

    async def test(site: Site) -> None:
        token = site.token(await site.session())
        for head in ("Content-Length: 2\r\nTransfer-Encoding: chunked", "Content-Length: 2\r\nContent-Length: 3"):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rsplit(":", 1)[1]))
            request = f"POST /v1/messages HTTP/1.1\\r\\nHost: g\\r\\nx-api-key: {token}\\r\\n{head}\\r\\n\\r\\n"
            writer.write(f"{request}2\\r\\n{{}}\\r\\n0\\r\\n\\r\\n".encode())
            async with asyncio.timeout(5):
                assert b" 400 " in await reader.readline()
            writer.close()

    await with_api(tmp_path, silent, test)


@pytest.mark.parametrize("lost", [1, 2, 3])
async def test_an_unacknowledged_charge_is_written_once(
    tmp_path: Path, store_url: str, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"type": "message", "usage": {"input_tokens": 11, "output_tokens": 22}}).encode()
    losses = iter(range(lost))
    real = Database.write_one

    @contextlib.asynccontextmanager
    async def write_one(self: Database) -> AsyncIterator[Any]:
        async with real(self) as connection:
            yield connection
        if next(losses, None) is not None:
            raise Unavailable("the connection broke before COMMIT was acknowledged")

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    async with scripted_upstream(script) as api, gateway_site(tmp_path, store_url, api.url) as site:
        token = site.token(await site.session(model=MODEL, max_budget_usd=1))
        monkeypatch.setattr(Database, "write_one", write_one)
        with contextlib.suppress(aiohttp.ClientError):  # after three failures the answer ends with an error
            await site.ask(token=token)
        with contextlib.suppress(aiohttp.ClientError):  # the next request writes the waiting entries
            await site.ask(token=token)
        entries = await site.entries()
        assert len({entry.charge_id for entry in entries}) == len(entries) == 2


async def test_a_metrics_failure_does_not_stop_a_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ModelAnswer, entry: LedgerEntry, tokens: Any) -> None:
        raise RuntimeError("planted")

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.write(HEAD)
        await connection.chunk(START + BLOCK + DELTA + END)
        await connection.chunk(b"")

    async def test(site: Site) -> None:
        monkeypatch.setattr(ModelAnswer, "_count", fail)
        token = site.token(await site.session(model=MODEL, max_budget_usd=1))
        await read_stream(site, token)
        assert (await charged(site)).output_tokens == 12
        budgets = vars(vars(site.app)["_model"])["_app"]._budgets
        async with asyncio.timeout(10):
            while budgets.reserved() or vars(budgets)["_accounts"]:
                await asyncio.sleep(0.01)

    await with_api(tmp_path, script, test)
