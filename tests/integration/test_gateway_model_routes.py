"""The model routes over real HTTP, with a real store (SQLite and PostgreSQL) and the simulator as the Claude API."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pytest
import pytest_asyncio
from yarl import URL

from hypercore_agents.api.agents import AgentState
from hypercore_agents.security.sealing import KeyRing
from hypercore_agents.store.agents import change_agent
from hypercore_agents.store.database import sqlite_url
from hypercore_agents.store.keys import put_key
from hypercore_agents.store.ledger import session_usage
from support.folders_in_use import content_of, files_below
from support.gateway_server import DEDICATED, MODEL, PLATFORM_KEY, POOL, Site, gateway_site
from support.simulator_fixtures import RunningSimulator


@pytest_asyncio.fixture
async def site(tmp_path: Path, simulator: RunningSimulator) -> AsyncIterator[Site]:
    async with gateway_site(tmp_path, sqlite_url(tmp_path / "store.db"), simulator.url) as site:
        yield site


def key_hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def everything(simulator: RunningSimulator) -> list[dict[str, Any]]:
    """Return the recorded requests, including token counts."""
    found: list[dict[str, Any]] = simulator._call("GET", "/simulator/requests")["requests"]
    return found


def used_key(simulator: RunningSimulator) -> str:
    """Return the recorded form of the credential of the last request."""
    return json.dumps(simulator.requests()[-1])


async def test_a_stream_is_in_the_ledger_before_its_end(
    tmp_path: Path, store_url: str, simulator: RunningSimulator
) -> None:
    async with gateway_site(tmp_path, store_url, simulator.url) as site:
        session_id = await site.session(model=MODEL)
        turn = await site.turn(session_id)
        async with anthropic.AsyncAnthropic(base_url=site.url, api_key=site.token(session_id), max_retries=0) as client:
            pieces = []
            async with client.messages.stream(
                model=MODEL, max_tokens=200, messages=[{"role": "user", "content": "[[say one two three four]]"}]
            ) as stream:
                async for event in stream:
                    if event.type == "text":
                        pieces.append(event.text)
                    if event.type == "message_stop":
                        async with site.database.read() as connection:
                            at_the_end = await session_usage(connection, session_id, turn)
                final = await stream.get_final_message()
        assert "".join(pieces) == "one two three four"
        assert at_the_end.input_tokens == final.usage.input_tokens > 0
        assert at_the_end.output_tokens == final.usage.output_tokens > 0
        (entry,) = await site.entries()
        assert (entry.user_id, entry.agent_id, entry.session_id, entry.turn) == ("ada", POOL, session_id, turn)
        assert (entry.model, entry.outcome) == (MODEL, "complete")
        assert entry.cost_micro_usd == 2 * entry.input_tokens + 10 * entry.output_tokens


async def test_the_official_client_without_streaming(site: Site) -> None:
    session_id = await site.session(model=MODEL)
    token = site.token(session_id)
    async with anthropic.AsyncAnthropic(base_url=site.url, auth_token=token, api_key=None, max_retries=0) as client:
        message = await client.messages.create(
            model=MODEL, max_tokens=50, messages=[{"role": "user", "content": "[[say hello]]"}]
        )
        counted = await client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "hello"}])
        assert counted.input_tokens > 0
    assert message.content[0].type == "text"
    status, models, _ = await site.ask("/v1/models?limit=5", token=token, method="GET")
    assert status == 200
    assert models["data"]
    (entry,) = await site.entries()
    assert (entry.input_tokens, entry.output_tokens) == (message.usage.input_tokens, message.usage.output_tokens)


async def test_the_api_receives_the_key_and_listed_headers(site: Site, simulator: RunningSimulator) -> None:
    session_id = await site.session()
    token = site.token(session_id)
    headers = {
        "cookie": "a=b", "x-forwarded-for": "1.2.3.4", "x-hypercore-user": "eve", "authorization": f"Bearer {token}",
        "x-claude-code-session-id": session_id, "accept-encoding": "gzip", "anthropic-version": "2023-06-01",
    }  # fmt: skip
    status, _, answered = await site.ask("/v1/messages?beta=true", token=token, headers=headers)
    assert status == 200
    record = simulator.requests(session_id)[-1]
    sent = {name.lower(): value for name, value in record["headers"].items()}
    assert not {"cookie", "x-forwarded-for", "x-hypercore-user", "authorization", "x-request-id"} & set(sent)
    assert sent["accept-encoding"] == "identity"
    text = json.dumps(record)
    assert key_hash(PLATFORM_KEY) in text
    assert token not in text
    assert key_hash(token) not in text
    assert answered["x-request-id"].startswith("req_")


async def test_the_key_is_the_agents_then_the_users_then_the_platforms(site: Site, simulator: RunningSimulator) -> None:
    await site.key("user:bob", "sk-user-bob-key")
    await site.key("user:eve", "sk-user-eve-key")
    await site.key(f"agent:{DEDICATED}", "sk-agent-key-of-eve")
    of_ada, of_bob = await site.session(user_id="ada"), await site.session(user_id="bob")
    of_eve_in_pool, of_eve = await site.session(user_id="eve"), await site.session(DEDICATED, user_id="eve")
    for session_id, key in (
        (of_ada, PLATFORM_KEY),
        (of_bob, "sk-user-bob-key"),
        (of_eve_in_pool, "sk-user-eve-key"),
        (of_eve, "sk-agent-key-of-eve"),
    ):
        simulator.clear()
        assert (await site.ask(token=site.token(session_id)))[0] == 200
        assert key_hash(key) in used_key(simulator)
    await site.key("platform", "sk-stored-platform-key")
    simulator.clear()
    assert (await site.ask(token=site.token(of_ada)))[0] == 200
    assert key_hash("sk-stored-platform-key") in used_key(simulator)


async def test_a_missing_key_error_names_the_remedy(tmp_path: Path, simulator: RunningSimulator) -> None:
    async with gateway_site(tmp_path, sqlite_url(tmp_path / "a.db"), simulator.url, allow_platform_key=False) as site:
        status, body, headers = await site.ask(token=site.token(await site.session()))
        assert status == 403
        assert "keys add" in body["error"]["message"]
        assert headers["x-should-retry"] == "false"
    async with gateway_site(tmp_path, sqlite_url(tmp_path / "b.db"), simulator.url, anthropic_api_key=None) as site:
        status, body, _ = await site.ask(token=site.token(await site.session()))
        assert status == 403
        assert "ANTHROPIC_API_KEY" in body["error"]["message"]
    assert simulator.requests() == []


async def test_a_key_sealed_for_another_owner_does_not_open(site: Site, simulator: RunningSimulator) -> None:
    session_id = await site.session(user_id="mallory")
    sealed_for_bob = site.sealer.seal("sk-user-bob-key", "user:bob")
    async with site.database.write() as connection:
        await put_key(connection, "user:mallory", sealed_for_bob, now=time.time())
    status, body, _ = await site.ask(token=site.token(session_id))
    assert (status, body["error"]["type"]) == (500, "internal")
    assert body["error"]["retryable"] is False
    assert simulator.requests() == []


async def test_wrong_tokens_are_401_in_the_apis_shape(site: Site, simulator: RunningSimulator) -> None:
    session_id = await site.session()
    good = site.token(session_id)
    expired = site.tokens._signers()[0].session_token(POOL, session_id, 1, now=time.time() - 100, lifetime=10)[0]
    for token in (site.agent_token(), expired, good[:-2] + "AA", "", "sk-ant-something", PLATFORM_KEY):
        status, body, _ = await site.ask(token=token)
        assert status == 401, token
        assert body["type"] == "error"
        assert body["error"]["type"] == "unauthenticated"
        assert token == "" or token not in json.dumps(body)
    assert simulator.requests() == []


async def test_a_token_is_valid_only_for_its_placement(site: Site) -> None:
    moved, ended, foreign = await site.session(), await site.session(), await site.session()
    await site.end(ended)
    for token in (
        site.token(moved, generation=2),
        site.token(ended),
        site.tokens.for_session(DEDICATED, foreign, 1)[0],
    ):
        status, body, headers = await site.ask(token=token)
        assert (status, body["error"]["type"], headers["x-should-retry"]) == (403, "forbidden", "false")
    async with site.database.write() as connection:
        assert await change_agent(connection, POOL, 0, now=time.time(), state=AgentState.DRAINING)
    assert (await site.ask(token=site.token(foreign)))[0] == 200
    async with site.database.write() as connection:
        assert await change_agent(connection, POOL, 1, now=time.time(), state=AgentState.FAILED)
    assert (await site.ask(token=site.token(foreign)))[0] == 403


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/complete", 404),
        ("POST", "/v1/messages/batches", 404),
        ("GET", "/v1/files", 404),
        ("GET", "/v1/models/claude-opus-5-5", 404),
        ("GET", "/v1/organizations/me", 404),
        ("POST", "//v1/messages", 404),
        ("POST", "/v1//messages", 404),
        ("POST", "/v1/messages/", 404),
        ("POST", "/v1/%6dessages", 404),
        ("POST", "/v1/messages%2Fbatches", 404),
        ("POST", "/v1/./messages", 404),
        ("POST", "/v1/x/../messages", 404),
        ("POST", "/v1/messages;x=1", 404),
        ("POST", "/V1/messages", 404),
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/%69nternal/agent-token", 404),
        ("GET", "/v1/messages", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/messages?beta=true&x=1", 400),
    ],
)
async def test_other_routes_are_not_found(
    site: Site, simulator: RunningSimulator, method: str, path: str, status: int
) -> None:
    token = site.token(await site.session())
    async with site.http.request(
        method, URL(site.url + path, encoded=True), headers={"x-api-key": token}, json={} if method == "POST" else None
    ) as answer:
        assert answer.status == status
        body = await answer.json()
    assert body["error"]["request_id"].startswith("req_")
    assert simulator._call("GET", "/simulator/requests")["requests"] == []


@pytest.mark.parametrize(
    ("more", "headers"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, {}),
        ({"container": "c_1"}, {}),
        ({"mcp_servers": [{"url": "https://x"}]}, {}),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "document", "source": {"type": "file", "file_id": "f"}}]}
                ]
            },
            {},
        ),
        ({"model": "claude-opus-5-5"}, {}),
        ({}, {"anthropic-beta": "files-api-2025-04-14"}),
    ],
)
async def test_rejected_requests_do_not_reach_the_api(
    site: Site, simulator: RunningSimulator, more: dict[str, Any], headers: dict[str, str]
) -> None:
    token = site.token(await site.session(model=MODEL))
    status, body, answered = await site.ask(token=token, headers=headers, **more)
    assert (status, answered["x-should-retry"]) == (403, "false")
    assert body["error"]["details"]["field"]
    assert simulator.requests() == []
    assert 'hypercore_gateway_refusals_total{reason="policy"} 1.0' in await site.metrics()


async def test_a_turn_is_limited_to_its_max_tokens(site: Site, simulator: RunningSimulator) -> None:
    session_id = await site.session()
    await site.turn(session_id, max_tokens=8)
    token = site.token(session_id)
    long = [{"role": "user", "content": "[[tokens 5]] [[say a b c d e]]"}]
    status, body, _ = await site.ask(token=token, max_tokens=32000, messages=long)
    assert status == 200
    assert simulator.requests()[-1]["body"]["max_tokens"] == 8
    used = body["usage"]["output_tokens"]
    for _ in range(8):
        status, body, headers = await site.ask(token=token, max_tokens=32000, messages=long)
        if status != 200:
            break
        assert simulator.requests()[-1]["body"]["max_tokens"] == 8 - used
        used += body["usage"]["output_tokens"]
    assert used == 8
    assert (status, body["error"]["type"], headers["x-should-retry"]) == (403, "budget_exceeded", "false")
    await site.turn(session_id, max_tokens=8)
    assert (await site.ask(token=token, messages=long))[0] == 200


async def test_a_session_is_limited_to_its_budget(site: Site, simulator: RunningSimulator) -> None:
    session_id = await site.session(max_budget_usd=0.0009)
    await site.turn(session_id)
    token = site.token(session_id)
    status, _, _ = await site.ask(token=token, max_tokens=32000)
    assert status == 200
    counting, sent = everything(simulator)
    assert counting["path"] == "/v1/messages/count_tokens"
    assert key_hash(PLATFORM_KEY) in json.dumps(counting)
    given = counting["answer"]["input_tokens"] + 16  # the margin of a count
    assert sent["body"]["max_tokens"] == int((900 - given * 2.5) / 10), "2.5 and 10 micro-dollars a token"
    async with asyncio.timeout(20):
        while status == 200:
            status, body, _ = await site.ask(token=token, max_tokens=32000)
    assert (status, body["error"]["type"]) == (403, "budget_exceeded")
    assert "max_budget_usd" in body["error"]["message"]
    assert 750 <= sum(entry.cost_micro_usd for entry in await site.entries()) <= 900


async def test_a_budget_is_checked_for_the_input_before_sending(site: Site, simulator: RunningSimulator) -> None:
    """20,000 tokens at 2 micro-dollars are more than the session has."""
    session_id = await site.session(max_budget_usd=0.03)
    await site.turn(session_id)
    token, large = site.token(session_id), [{"role": "user", "content": "word " * 16_000}]
    status, body, headers = await site.ask(token=token, messages=large)
    assert (status, body["error"]["type"], headers["x-should-retry"]) == (403, "budget_exceeded", "false")
    assert body["error"]["details"]["left_usd"] == 0.03
    assert await site.entries() == []
    assert [each["path"] for each in everything(simulator)] == ["/v1/messages/count_tokens"]
    assert (await site.ask(token=token))[0] == 200, "a smaller request is sent"


async def test_a_large_remaining_budget_needs_no_token_count(site: Site, simulator: RunningSimulator) -> None:
    session_id = await site.session(max_budget_usd=5)
    await site.turn(session_id)
    large = [{"role": "user", "content": "word " * 16_000}]
    assert (await site.ask(token=site.token(session_id), messages=large, max_tokens=32_000))[0] == 200
    assert [each["path"] for each in everything(simulator)] == ["/v1/messages"]
    assert simulator.requests()[-1]["body"]["max_tokens"] == 32_000


async def test_a_turns_temperature_overrides_the_request(site: Site, simulator: RunningSimulator) -> None:
    session_id = await site.session()
    await site.turn(session_id, temperature=0.25)
    status, _, _ = await site.ask(token=site.token(session_id), temperature=1, thinking={"type": "adaptive"})
    assert status == 200
    sent = simulator.requests()[-1]["body"]
    assert sent["temperature"] == 0.25
    assert "thinking" not in sent


async def test_concurrent_requests_of_a_session_are_limited(tmp_path: Path, simulator: RunningSimulator) -> None:
    async with gateway_site(
        tmp_path, sqlite_url(tmp_path / "s.db"), simulator.url, model_requests_per_session=2
    ) as site:
        token = site.token(await site.session())
        slow = [{"role": "user", "content": "[[ttft 30]] [[say late]]"}]
        running = [asyncio.create_task(site.ask(token=token, messages=slow, stream=True)) for _ in range(2)]
        async with asyncio.timeout(10):
            while len(simulator.requests()) < 2:
                await asyncio.sleep(0.01)
        status, body, headers = await site.ask(token=token)
        assert (status, body["error"]["type"], headers["retry-after"]) == (429, "rate_limited", "1")
        other = site.token(await site.session())
        assert (await site.ask(token=other))[0] == 200
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@pytest.mark.parametrize(("fault", "status"), [(429, 429), (500, 500), (529, 529), (401, 403), (400, 400)])
async def test_api_errors_are_passed_on_without_charge(site: Site, fault: int, status: int) -> None:
    token = site.token(await site.session())
    messages = [{"role": "user", "content": f"[[fault {fault}]]"}]
    answered, body, headers = await site.ask(token=token, messages=messages)
    assert answered == status
    assert body["type"] == "error"
    assert PLATFORM_KEY not in json.dumps(body)
    assert headers["x-should-retry"] == ("true" if fault == 429 or fault >= 500 else "false")
    if fault == 429:
        assert "retry-after" in headers
    if fault == 401:
        assert body["error"]["type"] == "model_error"
        assert "key of the platform" in body["error"]["message"]
    assert await site.entries() == []


async def test_tokens_survive_a_key_ring_rotation(site: Site) -> None:
    await site.key("user:ada", "sk-ada-before-rotation")
    session_id = await site.session()
    token = site.token(session_id)
    ring = KeyRing.load(site.settings.key_path).rotated()
    ring.save(site.settings.key_path)
    assert (await site.ask(token=token))[0] == 200
    fresh = site.token(session_id)
    assert fresh != token
    assert (await site.ask(token=fresh))[0] == 200
    ring.keeping().save(site.settings.key_path)
    await site.key("user:ada", "sk-ada-after-rotation")
    assert (await site.ask(token=fresh))[0] == 200
    assert (await site.ask(token=token))[0] == 401


async def test_the_key_appears_nowhere(
    tmp_path: Path, simulator: RunningSimulator, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    canary = "sk-ant-canary-user-77aa10"
    async with gateway_site(tmp_path, sqlite_url(tmp_path / "store.db"), simulator.url) as site:
        await site.key("user:ada", canary)
        token = site.token(await site.session())
        seen = []
        for prompt in ("[[say hello]]", "[[fault 401]]", "[[fault 500]]", "[[fault cut]]"):
            messages = [{"role": "user", "content": prompt}]
            for stream in (False, True):
                try:
                    seen.append(repr(await site.ask(token=token, messages=messages, stream=stream)))
                except aiohttp.ClientError as error:
                    seen.append(repr(error))
        seen.append(repr(await site.ask(token=token, container="x")))
        seen.append(await site.metrics())
        async with site.http.get(f"{site.operator_url}/health") as answer:
            seen.append(await answer.text())
    captured = capfd.readouterr()
    everything = "".join([*seen, captured.out, captured.err, caplog.text, repr(site)])
    for path in files_below(tmp_path):
        everything += content_of(path).decode("latin-1")
    for secret in (canary, PLATFORM_KEY):
        assert secret not in everything
    assert token not in captured.out + captured.err + caplog.text


async def test_health_and_readiness(site: Site) -> None:
    async with site.http.get(f"{site.operator_url}/health") as answer:
        assert answer.status == 200
        body = await answer.json()
        assert all(latency > 0 for latency in body.pop("latency_ms").values())
        assert body == {
            "status": "ok",
            "errors": {},
            "dependencies": {"store": "ok", "key_ring": "ok", "blobs": "ok", "claude_api": "ok"},
        }
    async with site.http.get(f"{site.url}/ready") as answer:
        assert answer.status == 200
    assert "hypercore_gateway_upstream_requests_total" in await site.metrics()
